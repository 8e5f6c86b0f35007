"""Uninitialised memory is NaN in every test, so that an entry nobody wrote fails loudly."""

import os
from collections.abc import Iterator

import pytest
import torch

from orpo_kernels.backends.torch_backend import release

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    release()  # memory kept from another test is not poisoned
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
