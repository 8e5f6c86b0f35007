"""Results of workers that train as several ranks: one start of the processes serves a whole run of the tests."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

ROOT = Path(__file__).parents[1]
Results = list[dict[str, Any]]  # of each rank, as its worker wrote it, most by layout and mode


def results_of(worker: str, world: int, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What ``python -m worker RANK WORLD FOLDER`` writes into ``FOLDER/rank{RANK}.json``, of every rank.

    Starting the ranks is what takes the time, so the workers of pytest-xdist share one run.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{worker}-{world}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            _run(worker, world, folder)
    files = [folder / f"rank{rank}.json" for rank in range(world)]
    if not all(file.exists() for file in files):
        pytest.fail("\n".join(log.read_text() for log in sorted(folder.glob("*.log"))))
    return [json.loads(file.read_text()) for file in files]


def join() -> tuple[int, int, Path]:
    """In a worker: be one of the ranks. Its rank, how many there are, and the folder for its results."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # accelerate asks for them
    # If one rank fails where another does not, the other waits no longer than this.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    return rank, world, folder


def leave(results: dict[str, Any], rank: int, folder: Path) -> None:
    """In a worker: write what ``results_of`` reads."""
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _run(worker: str, world: int, folder: Path) -> None:
    ranks = []
    for rank in range(world):
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, "-m", worker, str(rank), str(world), str(folder)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in ranks:
            process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.kill()
            process.wait()


def errors(results: Results, layout: str, mode: str) -> list[dict[str, float]]:
    """Of every rank."""
    found = [of_rank[layout][mode] for of_rank in results]
    for rank, entry in enumerate(found):
        assert "traceback" not in entry, f"rank {rank}, {mode}:\n{entry['traceback']}"
    return [entry["errors"] for entry in found]
