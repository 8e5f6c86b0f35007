"""Two ranks on gloo: the gradients of a fused model are those of one process, however the model is spread."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR
from tests.lazy.distributed_worker import GONE, LATE, LAYOUTS, LAZY, STEPS, WRAPPED_FIRST, row_of
from tests.ranks import Results, errors, results_of

pytestmark = [
    pytest.mark.slow,  # two processes
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.lazy.distributed_worker", 2, tmp_path_factory)


def marked(*modes: str, exact: bool = True) -> list[Any]:
    """Layouts and modes, those of the package as cells of the table."""
    return [
        pytest.param(name, mode, marks=[] if mode == "stock" else pytest.mark.works(row_of(name), by="lazy logits"))
        for name in LAZY
        for mode in modes
        if LAYOUTS[name].exact == exact
    ]


@pytest.mark.parametrize(("layout", "mode"), marked("stock", "fused", "unknown"))
def test_gradients_are_those_of_one_process(layout: str, mode: str, results: Results) -> None:
    """Of every parameter in two steps of SGD, and the loss in evaluation after them. Stock torch shows that the
    comparison itself is right."""
    for of_rank in errors(results, layout, mode):
        assert len(of_rank) > 20 * STEPS
        assert {name: error for name, error in of_rank.items() if not error < 1e-10} == {}


@pytest.mark.parametrize("layout", WRAPPED_FIRST)
@pytest.mark.works("a model that is wrapped before it is fused", by="lazy logits")
def test_a_model_may_be_wrapped_before_it_is_fused(layout: str, results: Results) -> None:
    """As the launcher does, which fuses a model when it is first called."""
    for of_rank in errors(results, layout, "wrapped first"):
        assert {name: error for name, error in of_rank.items() if not error < 1e-10} == {}


@pytest.mark.works(row_of(GONE), by="lazy logits", outcome="refused")
def test_a_weight_that_cannot_be_gathered_again_is_an_error(results: Results) -> None:
    """And a model that was wrapped first keeps its own logits."""
    for of_rank in results:
        said = of_rank[GONE]["fused"]["traceback"]
        assert "logits are asked for something after their head's weight was sharded" in said
        assert of_rank[GONE]["wrapped first"]["calls"] == 0
    for found in errors(results, GONE, "wrapped first"):
        assert {name: error for name, error in found.items() if not error < 1e-10} == {}


@pytest.mark.parametrize(("layout", "mode"), marked("fused", exact=False))
def test_bfloat16_costs_what_it_costs_stock(layout: str, mode: str, results: Results) -> None:
    for stock, fused in zip(errors(results, layout, "stock"), errors(results, layout, mode), strict=True):
        allowed = {name: max(FACTOR * error, GRAD_FLOOR[torch.bfloat16]) for name, error in stock.items()}
        assert {name: error for name, error in fused.items() if not error <= allowed[name]} == {}


@pytest.mark.parametrize("layout", LAZY)
def test_logits_are_needed_by_the_unknown_operation_alone(layout: str, results: Results) -> None:
    for of_rank in results:
        calls = STEPS * (2 if LAYOUTS[layout].accumulates else 1) + 1
        for mode, wanted in (("fused", {}), ("wrapped first", {}), ("unknown", {"sort": calls})):
            if mode in of_rank[layout]:
                entry, found = of_rank[layout][mode], Counter[str]()
                for operation, _, count in entry["materialised"]:
                    found[operation.split(" > ")[-1]] += count
                assert entry["calls"] == calls
                assert found == wanted


def test_logits_are_gathered_as_ever(results: Results) -> None:
    """By torch and by accelerate: real numbers leave the rank, and nothing is pickled that should not be."""
    for of_rank in errors(results, "collectives", "fused"):
        assert {name: error for name, error in of_rank.items() if not error <= VALUE_FLOOR[torch.float32]} == {}


@pytest.mark.parametrize("layout", LATE)
def test_logits_are_not_computed_with_weights_of_after_the_step(layout: str, results: Results) -> None:
    for of_rank in results:
        assert "their head's weight has changed since the forward" in of_rank[f"{layout}, late"]["fused"]["refused"]
