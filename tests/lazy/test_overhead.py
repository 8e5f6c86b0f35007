"""What a step with lazy logits costs where its products cost nothing: counted in calls, which no machine's load moves.

How long they take is in docs/performance.md, as the rows of the smallest head in the race of losses that read logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.problems.cases import BATCHES, CASES, STATES
from benchmarks.problems.chains import CHAINS
from benchmarks.problems.inputs import make_problem
from benchmarks.problems.providers import PROVIDERS
from orpo_kernels.integrations import fuse

# Calls of functions, Python's, its built-in ones and torch's, that a step may make more than with plain logits, the
# fused passes themselves among them. A thousand are about a millisecond; a change that needs more of them says why.
MOST = {"sft": 950, "dpo": 1100, "grpo": 1900, "kto": 1100, "factory-orpo": 1130}


def calls(step: Callable[[], object]) -> int:
    """Calls of functions while ``step`` runs, on this thread."""
    count = 0

    def each(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(each)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("task", CHAINS)
def test_calls_of_a_step(task: str) -> None:
    problem = make_problem(
        CASES["tiny-cpu"], BATCHES["tiny-cpu"], STATES["trained-like"], "float32", "trainable", torch.device("cpu")
    )
    counted = {}
    for name in ("naive", "lazy"):
        forward = PROVIDERS[name].build(problem, task)

        def step(forward: Callable[[], torch.Tensor] = forward) -> None:
            problem.clear_gradients()
            forward().backward()

        step()  # learns which statistics are wanted
        step()
        counted[name] = calls(step)
    assert counted["lazy"] - counted["naive"] <= MOST[task], counted


def test_calls_of_a_view() -> None:
    head = nn.Linear(4, 8, bias=False)
    logits = fuse(nn.Sequential(head), head=head)(torch.randn(2, 3, 4))
    logits[:, :-1]
    assert calls(lambda: logits[:, :-1]) <= 120
