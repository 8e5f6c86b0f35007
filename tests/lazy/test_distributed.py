"""Two ranks on gloo: the gradients of a fused model are those of one process, however the model is spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR
from tests.lazy.distributed_worker import LATE, LAYOUTS, STEPS

pytestmark = [
    pytest.mark.slow,  # two processes
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo"),
]

ROOT = Path(__file__).parents[2]
Results = list[dict[str, dict[str, Any]]]  # of each rank, by layout and mode


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Both ranks' results. Starting them is what takes the time, so the workers of pytest-xdist share one run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lazy-distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run(folder)
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    if not all(file.exists() for file in files):
        pytest.fail("\n".join(log.read_text() for log in sorted(folder.glob("*.log"))))
    return [json.loads(file.read_text()) for file in files]


def run(folder: Path) -> None:
    ranks = []
    for rank in range(2):
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "tests.lazy.distributed_worker", str(rank), str(folder)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in ranks:
            process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.kill()
            process.wait()


def errors(results: Results, layout: str, mode: str) -> list[dict[str, float]]:
    found = [of_rank[layout][mode] for of_rank in results]
    for rank, entry in enumerate(found):
        assert "traceback" not in entry, f"rank {rank}, {mode}:\n{entry['traceback']}"
    return [entry["errors"] for entry in found]


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.exact])
@pytest.mark.parametrize("mode", ["stock", "fused", "unknown"])
def test_gradients_are_those_of_one_process(layout: str, mode: str, results: Results) -> None:
    """Of every parameter in two steps of SGD, and the loss in evaluation after them. Stock torch shows that the
    comparison itself is right."""
    for of_rank in errors(results, layout, mode):
        assert len(of_rank) > 20 * STEPS
        assert {name: error for name, error in of_rank.items() if not error < 1e-10} == {}


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if not layout.exact])
def test_bfloat16_costs_what_it_costs_stock(layout: str, results: Results) -> None:
    for stock, fused in zip(errors(results, layout, "stock"), errors(results, layout, "fused"), strict=True):
        allowed = {name: max(FACTOR * error, GRAD_FLOOR[torch.bfloat16]) for name, error in stock.items()}
        assert {name: error for name, error in fused.items() if not error <= allowed[name]} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_needed_by_the_unknown_operation_alone(layout: str, results: Results) -> None:
    for of_rank in results:
        calls = STEPS * (2 if LAYOUTS[layout].accumulates else 1) + 1
        for mode, wanted in (("fused", {}), ("unknown", {"sort": calls})):
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
