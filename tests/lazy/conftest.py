"""Tiny models: several threads in each of several workers cost more than they give."""

from tests.integrations.conftest import _one_thread  # noqa: F401
