"""Tiny models here too: one thread each."""

from tests.integrations.conftest import _one_thread

__all__ = ["_one_thread"]
