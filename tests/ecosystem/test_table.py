"""What docs/stacks.md says of real stacks is what was recorded, and how two runs are compared. No stack is needed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ecosystem.compare import compare
from tests.ecosystem.stacks import STACKS
from tests.ecosystem.table import load, render


def test_the_document_says_what_the_record_says() -> None:
    assert not render(write=False), "write it anew: python -m tests.ecosystem render"


def test_the_record_holds_every_stack_and_no_disagreement() -> None:
    record = load()
    assert list(record) == list(STACKS)
    for name, found in record.items():
        assert found["runs"] or found["reason"], name
        for objective, run in found["runs"].items():
            assert run["disagrees"] is None, (name, objective)
            assert not run.get("refusals"), (name, objective)


def history(*losses: float, **others: float) -> dict[str, Any]:
    return {"history": [{"loss": loss, "train_runtime": loss, **others} for loss in losses], "models": []}


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        (history(1.0, 2.0, grad_norm=3.0), None),
        (history(1.0, 2.00001, grad_norm=3.0), None),
        (history(1.0, 2.1, grad_norm=3.0), "figures differ: loss by 5.0e-02"),
        (history(1.0, 2.0, grad_norm=3.3), "figures differ: gradient by 1.0e-01"),
        (history(1.0, float("nan"), grad_norm=3.0), "figures differ: loss by inf"),
        (history(1.0, grad_norm=3.0), "not the same figures were logged"),
        (history(1.0, 2.0), "not the same figures were logged"),
        ({"error": "ValueError: no"}, "ValueError: no"),
    ],
)
def test_runs_are_compared_by_their_losses(ours: dict[str, Any], sentence: str | None) -> None:
    found = compare(history(1.0, 2.0, grad_norm=3.0), ours)
    assert found["disagrees"] == sentence


def test_what_does_not_run_stock_is_no_disagreement() -> None:
    assert compare({"error": "ValueError: no"}, history(1.0)) == {"skipped": "ValueError: no", "disagrees": None}


def test_products_are_the_trained_models() -> None:
    policy = {"products": 6.0, "calls": 2, "refusal": None, "materialised": []}
    reference = {"products": 2.0, "calls": 2, "refusal": "no", "materialised": [{"operation": "eq"}]}
    found = compare(history(1.0), {**history(1.0), "models": [reference, policy]})
    assert (found["products_per_call"], found["refusals"]) == (3.0, ["no"])
    assert found["materialised"] == [{"operation": "eq"}]
