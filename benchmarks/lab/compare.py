"""Two checkouts in one run: the loss and its backward of this working tree against those of another commit.

Two records of different hours compare the hours as well. So each round runs both packages on the same numbers, a
process each, in the order A B B A: whatever slows the machine for a while meets both, and none is always the first.
This module is imported with either package, so it takes no more of one than ``orpo_loss``.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import orpo_kernels
from benchmarks.harness import isolate, machine
from benchmarks.harness.measure import UnsupportedError, in_turn, measured, summary
from benchmarks.harness.record import Keep, Row
from benchmarks.problems.cases import BATCHES, BETA
from benchmarks.problems.inputs import problem_of

SIDES = ("before", "after")
REPEATS, SECONDS = {"cpu": 5, "cuda": 30}, 20.0  # timed calls of a process at most, and when no more is begun


@contextmanager
def checkout(commit: str) -> Iterator[tuple[Path, str]]:
    """A temporary git worktree of ``commit``, and its short hash; UnsupportedError where git has none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "checkout"
        try:
            known = machine.git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")
            machine.git("worktree", "add", "--detach", str(path), known)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise UnsupportedError(f"--against {commit}: git cannot check it out: {said.strip()}") from error
        try:
            yield path, known
        finally:
            machine.git("worktree", "remove", "--force", str(path))


def run(wanted: Sequence[Row], commit: str, device: str, rounds: int, keep: Keep = lambda _: None) -> list[Row]:
    """Both sides of each row. ``floor_ms`` of either is the median of what was before, so ``ratio`` is after / before.
    ``figures`` holds the median milliseconds and the ratio of each round."""
    rows: list[Row] = []
    with checkout(commit) as (path, known), tqdm(total=2 * rounds * len(wanted), unit="process") as bar:
        places = {"before": (path, known), "after": (machine.ROOT, machine.commit())}
        for row in wanted:
            answers: dict[str, list[Row]] = {side: [] for side in SIDES}
            for turn in range(rounds):
                for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                    package, label = places[side]
                    bar.set_description(f"{row.case} {row.batch} {side}")
                    asked = [row.with_(provider=side, task="compare")]
                    options, environment = {"device": device, "until": float("inf")}, {"ORPO_CHECKOUT": str(package)}
                    (answer,) = isolate.process("benchmarks.lab.compare", asked, options, environment=environment)
                    answers[side].append(answer.with_(commit=label))
                    bar.update()
            rows += _both(answers)
            keep(rows)
    return rows


def _both(answers: dict[str, list[Row]]) -> list[Row]:
    """The rounds of each side as one row; what went wrong in one of them instead, where something did."""
    wrong = [next((row for row in answers[side] if row.status != "ok"), None) for side in SIDES]
    if any(wrong):
        return [row or answers[side][0] for side, row in zip(SIDES, wrong, strict=True)]
    rounds = {side: [row.median_ms or 0.0 for row in answers[side]] for side in SIDES}
    ratios = [after / before for before, after in zip(*rounds.values(), strict=True)]
    timings = {side: summary(own, rounds["before"]) for side, own in rounds.items()}
    figures = {side: {"rounds_ms": own, "ratios": ratios} for side, own in rounds.items()}
    return [answers[side][0].with_(figures=figures[side], **timings[side]) for side in SIDES]


def measure(rows: Sequence[Row], *, device: str, until: float) -> Iterator[Row]:
    """Medians of this process's own package, the first call of each row left out."""
    where, place = Path(orpo_kernels.__file__).resolve(), torch.device(device)
    if not where.is_relative_to(os.environ["ORPO_CHECKOUT"]):
        raise RuntimeError(f"orpo_kernels came from {where}, not from {os.environ['ORPO_CHECKOUT']}")
    for row in rows:
        yield measured(row.with_(**machine.about(place)), _measure, place)


def _measure(row: Row, device: torch.device) -> Row:
    problem = problem_of(row, device)
    inputs = problem.hidden, problem.weight, problem.labels
    options: dict[str, Any] = {"nll_labels": problem.nll_labels, "beta": BETA, "softcap": problem.softcap}
    losses: list[float] = []

    def call() -> None:
        problem.clear_gradients()
        loss = orpo_kernels.orpo_loss(*inputs, **options).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())

    (times,) = in_turn([call], device, repeats=REPEATS[device.type], seconds=SECONDS, warm_up=1)
    return row.with_(status="ok", targets=BATCHES[row.batch].targets, loss=losses[-1], **summary(times, times))


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """A line for each problem: medians over rounds, their ratio, and the lowest and highest ratio of a round."""
    lines = []
    for both in zip(rows[::2], rows[1::2], strict=True):
        before, after = both
        ratios = after.figures.get("ratios", ())
        line = {name: getattr(before, name) for name in ("case", "batch", "dtype", "head")}
        line |= {f"{row.provider} {row.commit}, ms": row.median_ms for row in both}
        line["ratio"] = after.ratio if ratios else None
        line["of a round"] = f"{min(ratios):.3f}-{max(ratios):.3f}" if ratios else "-"
        line["loss gap"] = abs(after.loss / before.loss - 1) if before.loss and after.loss else None
        line[""] = next((f"{row.provider}: {row.status}: {row.reason}" for row in both if row.status != "ok"), "")
        lines.append(line)
    return pd.DataFrame(lines)
