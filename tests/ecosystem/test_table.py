"""What docs/stacks.md says of real stacks is what was recorded, and how two runs are compared. No stack is needed."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_kernels.integrations import TESTED
from tests.ecosystem import suites
from tests.ecosystem.compare import compare
from tests.ecosystem.stacks import MATRIX, STACKS
from tests.ecosystem.table import load, matrix, render


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


def test_the_range_that_doctor_names_is_the_matrix() -> None:
    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")[:2]))

    record = load()
    for library, span in TESTED.items():
        versions = sorted(number(record[name]["versions"][library]) for name in MATRIX)
        assert [f"{major}.{minor}" for major, minor in (versions[0], versions[-1])] == [*span]


@pytest.mark.parametrize("name", MATRIX)
def test_every_version_is_patched_and_its_weights_agree(name: str) -> None:
    runs = load()[name]["runs"]
    for objective in ("orpo", "cpo", "simpo"):
        assert runs[objective]["fused_by_trainer"], objective
        assert runs[f"{objective}, fuse(model)"]["calls"] > 0, objective
    ran = [run for run in runs.values() if "skipped" not in run]
    assert len(ran) >= 9
    assert all("weights" in run["differences"] for run in ran)


def test_a_cell_of_the_matrix_is_the_worst_difference() -> None:
    def run(calls: int, **differences: float) -> dict[str, Any]:
        return {
            "differences": differences,
            "calls": calls,
            "fused_by_trainer": False,
            "refusals": [],
            "disagrees": None,
        }

    runs = {
        "cpo": run(1, loss=1e-7, weights=2e-6),
        "simpo": run(1, loss=3e-6),
        "sft": run(0, loss=0.0),
        "dpo": {**run(1, loss=1.0), "disagrees": "figures differ: loss by 1.0e+00"},
        "grpo": {"skipped": "ImportError: this trl has no GRPOTrainer", "disagrees": None},
    }
    versions = {"trl": "0.12.2", "transformers": "4.46.3", "torch": "2.9.1+cu128"}
    row = matrix({next(iter(MATRIX)): {"versions": versions, "runs": runs}}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["0.12.2", "4.46.3", "2.9.1", "not run", "3e-06"]
    assert cells[5:9] == ["head not called", "**figures differ: loss by 1.0e+00**", "not run", "no trainer"]


def test_what_passes_trls_suites_stock_passes_fused() -> None:
    record = load(suites.RECORD)
    assert record
    assert set(record) <= set(suites.TAGS)
    for name, found in record.items():
        assert set(found["suites"]) <= set(suites.SUITES)
        for suite, run in found["suites"].items():
            assert run["passed_stock"], (name, suite)
            assert not run["failed_fused"], (name, suite)
            assert not run.get("patched", {}).get("failed"), (name, suite)


def outcomes(lazy: int = 0, patched: int = 0, **of: str) -> dict[str, Any]:
    more = {"lazy": lazy, "patched": patched, "full": ["eq (loss.py:3)"] if lazy else [], "refusals": []}
    tests = {
        f"tests/t.py::T::{name}": {"outcome": outcome, "reason": "\nwhy\nmore", **more} for name, outcome in of.items()
    }
    return {"tests": tests, "slow": 2, "unreached": 1}


def test_suites_are_compared_by_what_passes_stock() -> None:
    stock = outcomes(a="passed", b="passed", c="failed", d="skipped", e="passed")
    fused = outcomes(lazy=1, a="passed", b="failed", c="passed", d="skipped")
    patched = outcomes(patched=1, a="passed", b="passed", e="failed")
    assert suites.judge(stock, fused, patched) == {
        "collected": 6,
        "passed_stock": 3,
        "passed_fused": 1,
        "failed_fused": {"b": "why", "e": "it was not run"},
        "lazy": 2,
        "full": ["eq (loss.py:3)"],
        "refusals": [],
        "failed_stock": {"c": "why"},
        "skipped": {"why": 1},
        "slow": 2,
        "unreached": 1,
        "patched": {"passed": 2, "failed": {"e": "why"}, "fused_by_trainer": 3},
    }


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


@pytest.mark.parametrize(
    ("said", "called", "fused"), [({}, 0, True), ({}, 3, False), ({"fused_by_trainer": True}, 3, True)]
)
def test_a_head_that_was_called_and_not_fused_is_one(said: dict[str, Any], called: int, fused: bool) -> None:
    found = compare({**history(1.0), "head_calls": called}, {**history(1.0), **said})
    assert found["disagrees"] == (None if fused else "the head was called, and nothing was fused")


def test_products_are_the_trained_models() -> None:
    policy = {"products": 6.0, "calls": 2, "refusal": None, "materialised": []}
    reference = {"products": 2.0, "calls": 2, "refusal": "no", "materialised": [{"operation": "eq"}]}
    found = compare(history(1.0), {**history(1.0), "models": [reference, policy]})
    assert (found["products_per_call"], found["refusals"]) == (3.0, ["no"])
    assert found["materialised"] == [{"operation": "eq"}]
