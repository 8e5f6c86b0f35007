"""What CONTRIBUTING says of a new competitor, done from outside and counted."""

from __future__ import annotations

import math

import pytest
from torch.utils.checkpoint import checkpoint

from benchmarks import race
from benchmarks.harness.record import Row
from benchmarks.problems.inputs import Problem
from benchmarks.problems.providers import PROVIDERS, Provider, Step
from benchmarks.report import tables
from orpo_kernels import reference
from tests.core.test_doors import lines_of, lines_promised


def _checkpointed(problem: Problem) -> Step:
    """The naive way, its logits computed again in backward."""
    inputs = problem.hidden, problem.weight, problem.targets
    options = {"softcap": problem.softcap, "use_reentrant": False}
    return lambda: checkpoint(reference.linear_logprobs, *inputs, **options)


@pytest.mark.parametrize("task", ["loss", "logprobs"])
def test_a_competitor_from_outside(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines_of(_checkpointed) + 1 <= lines_promised("competitor")  # and its line in the table
    monkeypatch.setitem(PROVIDERS, "checkpointed", Provider("checkpointed", "torch", _checkpointed))
    asked = Row("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "float32", "full", "checkpointed", task=task)
    (row,) = race.measure([asked], device="cpu", repeats=3, seconds=0.0, until=math.inf)
    assert (row.status, row.reason, row.repeats) == ("ok", "", 3)
    assert row.err_weight == row.naive_err_weight  # its arithmetic is the naive implementation's
    tables.print_rows([row])
    assert "checkpointed" in capsys.readouterr().out
