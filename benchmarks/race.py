"""Runs measurements in processes of their own and keeps every answer, also those that are no figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product, takewhile
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import DTypeName, HeadName, Phase
from benchmarks.machine import ROOT
from benchmarks.rows import Row, Spec, Status, row_of

TIMEOUT_S = 1200  # of one measurement
PATIENCE_S = 60  # beyond a deadline, for the measurement that runs then
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}


def specs(
    cases: Iterable[str],
    batches: Iterable[str],
    states: Iterable[str],
    heads: Iterable[HeadName],
    dtypes: Iterable[DTypeName],
    phases: Iterable[Phase],
    providers: Iterable[str],
    *,
    device: str,
    repeats: int = Spec.repeats,
    seconds: float = Spec.seconds,
) -> list[Spec]:
    """Every combination; a group's providers run one after the other, and so see the same state of the machine."""
    return [
        Spec(*combination, device=device, repeats=repeats, seconds=seconds)
        for combination in product(cases, batches, states, heads, dtypes, phases, providers)
    ]


def run(
    wanted: Sequence[Spec], keep: Callable[[list[Row]], None] = lambda _: None, budget: float | None = None
) -> list[Row]:
    """One row for each spec. ``keep`` sees the rows so far after each process, so that an interrupted race is not lost.

    After ``budget`` seconds nothing more is started; what was not reached says so.
    """
    rows: list[Row] = []
    deadline = time.time() + budget if budget is not None else float("inf")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(wanted))
        left = list(wanted)
        while left:
            together = _one_process(left)
            spec = left[0]
            progress.update(task, description=f"{spec.case} {spec.batch} {spec.dtype} {spec.head} {spec.provider}")
            if time.time() > deadline:
                reason = f"the budget of {budget:.0f} s was used up"
                found = [row_of(spec, "not reached", reason) for spec in together]
            else:
                found = run_process(together, deadline)
            rows += found
            left = left[len(found) :]
            keep(rows)
            for row in found:
                if row.status in ("failed", "wrong"):
                    progress.console.print(f"[red]{row.provider}: {row.status}[/red]: {row.reason}", highlight=False)
            progress.advance(task, len(found))
    return rows


def _one_process(left: Sequence[Spec]) -> list[Spec]:
    """What may share a process with the first of ``left``.

    On a CPU nothing: no cache, no compiled kernel and no memory of another provider may be in it, as the memory
    measured is the process's. On a GPU, whose allocator counts calls apart, starting anew would take longer than
    measuring.
    """
    if left[0].device == "cpu":
        return [left[0]]
    return list(takewhile(lambda spec: spec.case == left[0].case, left))


def run_process(specs: Sequence[Spec], deadline: float = float("inf")) -> list[Row]:
    """Rows of at least the first of ``specs``: up to one that failed, or that the deadline came before."""
    timeout = TIMEOUT_S * len(specs)
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "rows.jsonl"), Path(folder, "log.txt")
        asked = json.dumps([asdict(spec) for spec in specs])
        command = [sys.executable, "-m", "benchmarks.measure", asked, str(answer), str(deadline)]
        status: Status = "failed"
        try:
            with log.open("w") as sink:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **QUIET},
                    stdout=sink,
                    stderr=sink,
                    timeout=min(timeout, deadline + PATIENCE_S - time.time()),
                    check=False,
                )
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            reason = f"exit code {done.returncode}: {last[:300]}"
            if done.returncode == -signal.SIGKILL:
                status, reason = "out of memory", "the kernel ended the process"
        except subprocess.TimeoutExpired as expired:
            reason = f"took longer than {expired.timeout:.0f} s"
        lines = answer.read_text().splitlines() if answer.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    if rows and (rows[-1].status == "failed" or len(rows) == len(specs)):
        return rows
    if time.time() > deadline and not reason.startswith("took"):
        return [*rows, row_of(specs[len(rows)], "not reached", "the budget was used up")]
    return [*rows, row_of(specs[len(rows)], status, reason)]
