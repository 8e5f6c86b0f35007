"""``python -m benchmarks gpu``: everything that needs a GPU, in one command: proven first, then raced.

Each step has a share of the time; what it did not reach says so in the record. On a CPU the same steps run at toy sizes
under Triton's interpreter, so that the command cannot rot where there is no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import accuracy, machine, race, record, report, targets
from benchmarks.rows import Check, Record, Row, Spec

SUITE = ("test_accuracy", "test_finite", "test_triton", "test_gpu", "test_plan", "test_surface", "test_compile")
# They need no GPU, and what they measure a busy machine would spoil.
NO_GPU = (
    "--deselect=tests/test_triton.py::test_every_kernel_compiles_for_every_chip",
    "--deselect=tests/test_surface.py::test_import_is_light",
)
# Small on purpose: a sanitizer slows every kernel by one or two orders of magnitude.
SANITIZED = ("-k", "matches_float64 and triton or lost_rows or odds_ratio")
WORKERS = 8
FAILED = re.compile(r"\b(FAILED|ERROR)\b tests/|^=+ (Error|Invalid)|^E  ")
STEPS = ("suite", "accuracy", "race", "memcheck", "racecheck")


@dataclass(frozen=True)
class Step:
    """``seconds`` is what it may take."""

    name: str
    what: str
    seconds: float
    run: Callable[[Record, float], None]


def steps(device: torch.device, seconds: float, keep: Callable[[Record], None], logs: Path) -> list[Step]:
    """The order is that of what would be missed most. What a check prints goes to a file in ``logs``."""
    toy = device.type == "cpu"
    tests = [f"tests/{name}.py" for name in SUITE]
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    suite = (
        [*pytest, "tests/test_triton.py", "-k", "two_runs"] if toy else [*pytest, "-n", str(WORKERS), *NO_GPU, *tests]
    )
    sanitized = [*pytest, "tests/test_accuracy.py", "tests/test_triton.py", *SANITIZED]
    tool = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )

    def checked(name: str, command: Sequence[str]) -> Callable[[Record, float], None]:
        return lambda found, limit: _replace(found, _check(name, command, limit, logs / f"{name}.log"))

    def sanitizer(kind: str) -> Callable[[Record, float], None]:
        if tool is None or toy:
            reason = "compute-sanitizer is not on the PATH" if tool is None else "it watches a GPU, and there is none"
            return lambda found, limit: _replace(found, Check(kind, "not available", 0.0, reason))
        return checked(kind, [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "5", *sanitized])

    def regimes(found: Record, limit: float) -> None:
        found.accuracy = accuracy.run(device.type, 32, 256, 8000) if toy else accuracy.run(device.type)

    def raced(specs: Sequence[Spec]) -> Callable[[Record, float], None]:
        def run(found: Record, limit: float) -> None:
            before = list(found.rows)

            def so_far(rows: list[Row]) -> None:
                found.rows = record.merged(before, rows)
                keep(found)

            race.run(specs, so_far, limit)

        return run

    sections = _toy() if toy else record.gpu_race()
    return [
        Step("suite", " ".join(suite[1:]), 0.32 * seconds, checked("suite", suite)),
        Step("accuracy", "errors against float64 in five regimes", 0.03 * seconds, regimes),
        *(
            Step(f"race: {name}", f"{len(specs)} measurements", share * seconds, raced(specs))
            for (name, specs), share in zip(sections.items(), (0.13, 0.19, 0.09), strict=True)
        ),
        Step("memcheck", "compute-sanitizer, small cases", 0.12 * seconds, sanitizer("memcheck")),
        Step("racecheck", "compute-sanitizer, small cases", 0.12 * seconds, sanitizer("racecheck")),
    ]


def _toy() -> dict[str, list[Spec]]:
    def specs(*providers: str) -> list[Spec]:
        return [
            Spec("tiny-cpu", "tiny-cpu", "trained-like", "trainable", "float32", "full", name, repeats=2)
            for name in providers
        ]

    return {"ours": specs("ours_triton", "floor"), "others": specs("naive"), "compiled": []}


def run(device: torch.device, seconds: float, path: Path, only: Sequence[str], console: Console) -> int:
    """Run the steps, write the record after each, end with what misses its target. 0 if all that ran holds."""
    found = Record.load(path) if path.exists() else Record()
    found.machine, found.date, found.commit = machine.device_name(device), machine.today(), machine.commit()

    def keep(current: Record) -> None:
        current.save(path)

    logs = machine.ROOT / "build" if path.parent == record.RESULTS else path.parent
    logs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    chosen = [step for step in steps(device, seconds, keep, logs) if not only or step.name.split(":")[0] in only]
    for index, step in enumerate(chosen):
        console.print(f"[bold]{step.name}[/bold]: {step.what}", highlight=False)
        # What a step leaves, and what steps that were not asked for would have taken, goes to those still to come.
        left = seconds - (time.perf_counter() - start)
        step.run(found, left * step.seconds / sum(later.seconds for later in chosen[index:]))
        keep(found)
    summary(device, found, console)
    console.print(f"{time.perf_counter() - start:.0f} s; written to {path}, logs to {logs}", highlight=False)
    bad = any(check.status == "failed" for check in found.checks)
    return 1 if bad or any(row.status in ("failed", "wrong") for row in found.rows) else 0


def summary(device: torch.device, found: Record, console: Console) -> None:
    """The race's tables, the checks, and what misses its target."""
    report.print_rows(found.rows, console)
    report.print_accuracy(found.accuracy, console)
    for check in found.checks:
        console.print(f"{check.name}: {check.status} after {check.seconds:.0f} s: {check.detail}", highlight=False)
    if device.type == "cpu":
        console.print("toy sizes on a CPU: no target applies")
        return
    verdicts = targets.verdicts("gpu", found)
    table = Table("misses its target", "bound", "measured", title_justify="left")
    for verdict in verdicts:
        if verdict.holds is False:
            table.add_row(*verdict[:3])
    console.print(table)
    unknown = sum(verdict.holds is None for verdict in verdicts)
    held = sum(verdict.holds is True for verdict in verdicts)
    console.print(f"{held} targets held, {len(verdicts) - held - unknown} missed, {unknown} not measured")


def plan(device: torch.device, seconds: float, console: Console) -> None:
    """What would run, and for how long at most."""
    table = Table("step", "what", "seconds at most")
    for step in steps(device, seconds, lambda _: None, Path()):
        table.add_row(step.name, step.what, f"{step.seconds:.0f}")
    console.print(table)
    sections = _toy() if device.type == "cpu" else record.gpu_race()
    for name, specs in sections.items():
        for spec in specs:
            console.print(f"{name}: {' '.join(spec.group)} {spec.provider}", highlight=False, soft_wrap=True)


def _replace(found: Record, check: Check) -> None:
    found.checks = [*(other for other in found.checks if other.name != check.name), check]


def _check(name: str, command: Sequence[str], limit: float, log: Path) -> Check:
    # torch's allocator hands out parts of large blocks, whose bounds a sanitizer cannot see.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
    start = time.perf_counter()
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env={**os.environ, **race.QUIET, **extra, "COLUMNS": "300"}, stdout=sink,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would disturb what is timed next
            process.wait()
            code = None
    text = log.read_text(errors="replace")
    failed = sorted({line.strip() for line in text.splitlines() if FAILED.search(line)})
    detail = _end(text) + "".join(f"\n{line[:300]}" for line in failed[:20])
    seconds = time.perf_counter() - start
    if code is None:
        return Check(name, "not reached", seconds, f"longer than {limit:.0f} s; so far: {detail}")
    if code and "Device not supported" in text:
        return Check(name, "not available", seconds, "compute-sanitizer does not support this device here")
    return Check(name, "failed" if code else "ok", seconds, detail)


def _end(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:]
