"""Every test starts as a new process does; uninitialised memory is NaN, so that an entry nobody wrote fails loudly."""

import os
from collections.abc import Iterator

import pytest
import torch

from orpo_kernels import engine
from orpo_kernels.backends.torch_backend import release

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic under it, and torch insists


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    release()  # memory kept from another test is not poisoned
    # On a GPU the reference itself uses operations that torch calls nondeterministic; ours are compared bit for bit.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    engine._expected.clear()  # what another test's backward was given
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()  # one worker cannot free what another keeps; without a GPU this does nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.works import cells_of  # after the environment is set, as it brings the kernels

    for item in items:
        item.user_properties += [("works", cell) for cell in cells_of(item)]
