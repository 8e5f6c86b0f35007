"""pytest-benchmark over the same providers at small sizes: ``pytest benchmarks/``.

All share one process and nothing alternates with the floor, so its figures are comparable within a run and no further.
"""

from typing import Any

import pytest
import torch

from benchmarks.harness.machine import synchronize
from benchmarks.harness.measure import UnsupportedError
from benchmarks.problems.cases import CASES, HEADS, STATES, Batch, Pair
from benchmarks.problems.floor import build_floor
from benchmarks.problems.inputs import make_problem
from benchmarks.problems.providers import FLOOR, NAMES, PROVIDERS

BATCH = Batch("pytest", (Pair(24, 60, 50), Pair(40, 45, 70)), 112)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("provider", NAMES)
def test_full(benchmark: Any, provider: str, dtype: str, head: str) -> None:
    """Forward and backward."""
    benchmark.group = f"{dtype} {head}"
    problem = make_problem(CASES["small-v32k-cpu"], BATCH, STATES["trained-like"], dtype, head, DEVICE)
    step: Any = None
    try:
        step = build_floor(problem, "full")[1] if provider == FLOOR else PROVIDERS[provider].build(problem, "loss")
    except UnsupportedError as reason:
        pytest.skip(str(reason))

    def call() -> None:
        problem.clear_gradients()
        loss = step()
        if provider != FLOOR:
            loss.backward()
        synchronize(DEVICE)

    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
