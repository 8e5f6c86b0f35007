"""Several processes on gloo: the gradients of a patched trainer and of a loss of one's own, however a model is spread.

What the workers record are errors against one process in float64 that saw the batches of all ranks.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import FACTOR, GRAD_FLOOR
from tests.integrations import deepspeed_worker, devices_worker
from tests.integrations.devices_worker import ON_FOUR, OUTSIDE, OWN, PATCHED
from tests.integrations.test_launcher import FUSED, LAUNCH, assert_same
from tests.lazy.distributed_worker import LAYOUTS, LAYOUTS_OF_TWO, STEPS, row_of
from tests.ranks import ROOT, Results, errors, results_of

pytestmark = [
    pytest.mark.slow,  # several processes
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo"),
]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
GATHERED = "FSDP2, a loss after the forward of the gathered weight"
SHARDED = "a sharded weight outside its module's forward"


def column(mode: str) -> str:
    return "ORPO patch" if mode in PATCHED else "lazy logits" if mode == "lazy" else "own loop"


def cell(row: str, mode: str) -> list[pytest.MarkDecorator]:
    return [] if mode == "stock" else [pytest.mark.works(GATHERED if mode == OWN[2] else row, by=column(mode))]


def cases(world: int, exact: bool = True) -> list[Any]:
    return [
        pytest.param(name, mode, marks=cell(row_of(name), mode))
        for name in (ON_FOUR if world == 4 else LAYOUTS_OF_TWO)
        for mode in devices_worker.modes_of(name, world)
        if LAYOUTS[name].exact == exact and mode != "outside"
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.integrations.devices_worker", 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.integrations.devices_worker", 4, tmp_path_factory)


def assert_exact(results: Results, layout: str, mode: str) -> None:
    """Every gradient of two steps of SGD, the first of which asks the model, and the loss in evaluation after them."""
    for of_rank in errors(results, layout, mode):
        assert len(of_rank) > 20 * STEPS
        assert {name: error for name, error in of_rank.items() if not error < 1e-10} == {}


@pytest.mark.parametrize(("layout", "mode"), cases(2))
def test_two_processes_find_the_gradients_of_one(layout: str, mode: str, two: Results) -> None:
    assert_exact(two, layout, mode)


@pytest.mark.parametrize(("layout", "mode"), cases(4))
def test_four_processes_find_the_gradients_of_one(layout: str, mode: str, four: Results) -> None:
    assert_exact(four, layout, mode)


@pytest.mark.parametrize(("layout", "mode"), [case for case in cases(2, exact=False) if "stock" not in case.values])
def test_bfloat16_costs_what_it_costs_stock(layout: str, mode: str, two: Results) -> None:
    for stock, ours in zip(errors(two, layout, "stock"), errors(two, layout, mode), strict=True):
        allowed = {name: max(FACTOR * error, GRAD_FLOOR[torch.bfloat16]) for name, error in stock.items()}
        assert {name: error for name, error in ours.items() if not error <= allowed[name]} == {}


@pytest.mark.parametrize("layout", [name for name, there in OUTSIDE.items() if not there])
@pytest.mark.works(SHARDED, by="own loop", outcome="refused")
def test_a_sharded_weight_is_an_error_outside_its_forward(layout: str, two: Results) -> None:
    for of_rank in two:
        said = of_rank[layout]["outside"]["traceback"]
        assert "ValueError: weight " in said
        assert "compute the loss in the forward of the module that owns the weight" in said


@pytest.mark.parametrize("layout", [name for name, there in OUTSIDE.items() if there])
def test_a_weight_that_is_still_there_has_the_right_gradient(layout: str, two: Results) -> None:
    assert_exact(two, layout, "outside")


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.integrations.deepspeed_worker", 2, tmp_path_factory)


ZERO_ROWS = {"zero 1": "DeepSpeed ZeRO-1", "zero 2": "DeepSpeed ZeRO-2", "zero 3": "DeepSpeed ZeRO-3"}


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "mode"),
    [
        pytest.param(stage, mode, marks=cell(ZERO_ROWS[stage[:6]], mode))
        for stage in deepspeed_worker.RUNS
        for mode in deepspeed_worker.modes_of(stage)
        if mode != "outside" or stage in ("zero 1", "zero 2")
    ],
)
def test_deepspeed_finds_the_gradients_of_one_process(stage: str, mode: str, zero: Results) -> None:
    """Of two micro-batches a step, whose gradients it divides itself; in float32, as DeepSpeed trains."""
    for stock, ours in zip(errors(zero, stage, "stock"), errors(zero, stage, mode), strict=True):
        allowed = {name: max(FACTOR * error, GRAD_FLOOR[torch.float32]) for name, error in stock.items()}
        assert max(stock.values()) < 1e-4
        assert {name: error for name, error in ours.items() if not error <= allowed[name]} == {}


@needs_deepspeed
@pytest.mark.works("DeepSpeed ZeRO-3, " + SHARDED, by="own loop", outcome="refused")
def test_a_partitioned_weight_is_an_error_outside_its_forward(zero: Results) -> None:
    for of_rank in zero:
        said = of_rank["zero 3"]["outside"]["traceback"]
        assert "ValueError: weight is empty (shape [0]): DeepSpeed ZeRO-3" in said


HERE = Path(__file__).parent
CONFIGURATIONS = {
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "deepspeed_zero1": "DeepSpeed ZeRO-1",
    "deepspeed_zero2": "DeepSpeed ZeRO-2",
    "deepspeed_zero3": "DeepSpeed ZeRO-3",
}


def launched(configuration: str, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """With a committed configuration. Its bfloat16 would hide in rounding what a wrong reduction does to a loss."""
    file = ROOT / "examples" / "accelerate" / f"{configuration}.yaml"
    options = [f"--config_file={file}", "--mixed_precision=no", "--main_process_port=0"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *map(str, command)],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stock script logs on two processes without this package."""
    folder = tmp_path_factory.mktemp("stock")
    done = launched("ddp", folder, HERE / "stock_script.py", "stock.json")
    assert done.returncode == 0, done.stderr
    return folder / "stock.json"


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.works(f"accelerate launch, {row}", by="ORPO patch"),
                *([needs_deepspeed] if "deepspeed" in name else []),
            ],
        )
        for name, row in CONFIGURATIONS.items()
    ],
)
def test_a_stock_script_under_accelerate_launch(configuration: str, stock: Path, tmp_path: Path) -> None:
    done = launched(configuration, tmp_path, *LAUNCH, HERE / "on_cpus.py", "ours.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(FUSED) == 1
    assert_same(stock, tmp_path / "ours.json", processes=2)
    assert done.stdout.count(f"ran under {CONFIGURATIONS[configuration]}\n") == 2
