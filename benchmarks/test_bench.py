"""pytest-benchmark over the same providers at small sizes: ``pytest benchmarks/``.

For a quick look while changing a kernel. The race measures each provider in a process of its own and alternates with
the floor; here all share one process, so its figures are comparable within a run and no further.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.machine import synchronize
from benchmarks.harness.measure import UnsupportedError
from benchmarks.problems.cases import CASES, STATES, Batch, Pair
from benchmarks.problems.floor import build_floor
from benchmarks.problems.inputs import Problem, make_problem
from benchmarks.problems.providers import FLOOR, NAMES, PROVIDERS

BATCH = Batch("pytest", (Pair(24, 60, 50), Pair(40, 45, 70)), 112)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = ("bfloat16", "float32")
HEADS = ("trainable", "frozen")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", NAMES)
def test_full(benchmark: Any, provider: str, dtype: str, head: str) -> None:
    """Forward and backward."""
    benchmark.group = f"{dtype} {head}"
    problem = make_problem(CASES["small-v32k-cpu"], BATCH, STATES["trained-like"], dtype, head, DEVICE)
    benchmark.pedantic(_step(provider, problem), rounds=3, warmup_rounds=1)


def _step(provider: str, problem: Problem) -> Any:
    if provider == FLOOR:
        return build_floor(problem, "full")[1]
    try:
        step = PROVIDERS[provider].build(problem, "loss")
    except UnsupportedError as reason:
        pytest.skip(str(reason))

    def call() -> None:
        problem.clear_gradients()
        step().backward()  # type: ignore[no-untyped-call]
        synchronize(DEVICE)

    return call
