"""Runs measurements, each in its own process, and keeps every answer, also those that are no figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import DTypeName, HeadName, Phase
from benchmarks.machine import ROOT
from benchmarks.rows import Row, Spec, row_of

TIMEOUT_S = 1200
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


def run(wanted: Sequence[Spec], keep: Callable[[list[Row]], None] = lambda _: None) -> list[Row]:
    """One row for each spec. ``keep`` sees the rows so far after each, so that an interrupted race is not lost."""
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(wanted))
        for spec in wanted:
            progress.update(task, description=f"{spec.case} {spec.batch} {spec.dtype} {spec.head} {spec.provider}")
            row = run_one(spec)
            rows.append(row)
            keep(rows)
            if row.status in ("failed", "wrong"):
                progress.console.print(f"[red]{row.provider}: {row.status}[/red]: {row.reason}", highlight=False)
            progress.advance(task)
    return rows


def run_one(spec: Spec, timeout: float = TIMEOUT_S) -> Row:
    """Measure in a process of its own: no cache, no compiled kernel and no memory of another provider is in it."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "row.json"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(spec)), str(answer)]
        try:
            with log.open("w") as sink:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **QUIET},
                    stdout=sink,
                    stderr=sink,
                    timeout=timeout,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            return row_of(spec, "failed", f"took longer than {timeout:.0f} s")
        if answer.exists():
            return Row(**json.loads(answer.read_text()))
        if done.returncode == -signal.SIGKILL:
            return row_of(spec, "out of memory", "the kernel ended the process")
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return row_of(spec, "failed", f"exit code {done.returncode}: {last[:300]}")
