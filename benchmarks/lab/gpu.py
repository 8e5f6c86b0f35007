"""``python -m benchmarks gpu``: everything that needs a GPU, in one command: proven first, then raced.

Each step has a share of the time; what it did not reach says so in the record. With ``--device cpu`` the same steps run
at toy sizes under Triton's interpreter, so that the command cannot rot where there is no GPU.
"""

import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from benchmarks import accuracy, race
from benchmarks.harness import machine
from benchmarks.harness.isolate import execute
from benchmarks.harness.record import Check, Record, Row, merged
from benchmarks.problems.sections import gpu_race, rows
from benchmarks.report import promises, tables

SUITE = (
    *(f"tests/core/test_{name}.py" for name in ("accuracy", "finite", "plan", "surface", "compile", "objectives")),
    *(f"tests/backends/test_{name}.py" for name in ("triton", "gpu")),
)
# They need no GPU, and what they measure a busy machine would spoil.
NO_GPU = (
    "--deselect=tests/backends/test_triton.py::test_every_kernel_compiles_for_every_chip",
    "--deselect=tests/core/test_surface.py::test_import_is_light",
)
# Small on purpose: a sanitizer slows every kernel by one or two orders of magnitude.
SMALL = "matches_float64 and triton or overflowed_rows or odds_ratio"
SANITIZED = ("tests/core/test_accuracy.py", "tests/backends/test_triton.py", "-k", SMALL)
TOY = ("tests/backends/test_triton.py", "-k", "two_runs and float32")
FAILED = re.compile(r"\b(FAILED|ERROR)\b tests/|^=+ (Error|Invalid)|^E  ")
STEPS = ("suite", "accuracy", "race", "memcheck", "racecheck")


class Step(NamedTuple):
    name: str
    what: str
    seconds: float  # what it may take
    run: Callable[[Record, float], None]  # writes into a record within as many seconds


def steps(device: str, seconds: float, keep: Callable[[Record], None], logs: Path) -> list[Step]:
    """The order is that of what would be missed most. What a check prints goes to a file in ``logs``."""
    toy = device == "cpu"
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    suite = [*pytest, *(TOY if toy else ("-n", "8", *NO_GPU, *SUITE))]
    known = [str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    tool = shutil.which("compute-sanitizer") or next(iter(known), None)

    missing = "it watches a GPU, and there is none" if toy else ""
    if tool is None:
        missing = "compute-sanitizer is not on the PATH"

    def checked(name: str, command: Sequence[str], missing: str, found: Record, limit: float) -> None:
        absent = Check(name, "not available", 0.0, missing)
        check = absent if missing else _check(name, command, limit, logs / f"{name}.log")
        found.checks = [*(other for other in found.checks if other.name != name), check]

    def sanitizer(kind: str) -> Step:
        command = [tool or "", "--tool", kind, "--error-exitcode", "9", "--print-limit", "5", *pytest, *SANITIZED]
        return Step(kind, "compute-sanitizer, small cases", 0.12 * seconds, partial(checked, kind, command, missing))

    def regimes(found: Record, limit: float) -> None:
        found.accuracy = accuracy.run(device, *((32, 256, 8000) if toy else ()))

    def raced(wanted: Sequence[Row], found: Record, limit: float) -> None:
        before = list(found.rows)

        def so_far(measured: list[Row]) -> None:
            found.rows = merged(before, measured)
            keep(found)

        effort = {"repeats": 3, "seconds": 15.0} if toy else race.EFFORT[device]
        race.run(wanted, device, keep=so_far, budget=limit, **effort)

    shares = zip(sections(device).items(), (0.24, 0.11, 0.06), strict=True)
    return [
        Step("suite", " ".join(suite[1:]), 0.32 * seconds, partial(checked, "suite", suite, "")),
        Step("accuracy", "errors against float64 in five regimes", 0.03 * seconds, regimes),
        *(Step(f"race: {k}", f"{len(few)} measurements", n * seconds, partial(raced, few)) for (k, few), n in shares),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]


def sections(device: str) -> dict[str, list[Row]]:
    if device == "cuda":
        return gpu_race()
    toy = {"ours": ("ours_triton", "floor"), "others": ("naive",), "compiled": ()}
    tiny = ["tiny-cpu"], ["tiny-cpu"], ["trainable"], ["float32"]
    return {name: rows(*tiny, providers) for name, providers in toy.items()}


def run(device: torch.device, seconds: float, path: Path, only: Sequence[str]) -> int:
    """Run the steps, write the record after each, end with what breaks its promise. 0 if all that ran holds."""
    found = race.opened(path, device)
    logs = machine.ROOT / "build" if path.parent == race.RESULTS else path.parent
    logs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    planned = steps(device.type, seconds, lambda current: current.save(path), logs)
    chosen = [step for step in planned if not only or step.name.split(":")[0] in only]
    for index, step in enumerate(chosen):
        print(f"{step.name}: {step.what}", flush=True)
        # What a step leaves, and what steps that were not asked for would have taken, goes to those still to come.
        left = seconds - (time.perf_counter() - start)
        step.run(found, left * step.seconds / sum(later.seconds for later in chosen[index:]))
        found.save(path)
    tables.print_rows(found.rows)
    tables.print_accuracy(found.accuracy)
    for check in found.checks:
        print(f"{check.name}: {check.status} after {check.seconds:.0f} s: {check.detail}")
    if device.type == "cpu":
        print("toy sizes on a CPU: no target applies")
    else:
        verdicts = pd.DataFrame(promises.verdicts("gpu", found))
        missed = verdicts[verdicts.holds == False]  # noqa: E712  None is neither
        print(f"\nmisses its target\n{tables.text(missed.drop(columns='holds'))}")
        unknown, held = verdicts.holds.isna().sum(), (verdicts.holds == True).sum()  # noqa: E712
        print(f"{held} targets held, {len(missed)} missed, {unknown} not measured")
    print(f"{time.perf_counter() - start:.0f} s; written to {path}, logs to {logs}")
    ends = {check.status for check in found.checks} | {row.status for row in found.rows}
    return int(bool(ends & {"failed", "wrong"}))


def print_plan(device: str, seconds: float) -> None:
    """What would run, and for how long at most."""
    planned = steps(device, seconds, lambda _: None, Path())
    table = [{"step": step.name, "seconds at most": f"{step.seconds:.0f}", "what": step.what} for step in planned]
    print(tables.text(pd.DataFrame(table)))
    for name, wanted in sections(device).items():
        for row in wanted:
            print(f"{name}: {' '.join(filter(None, row.key))}")


def _check(name: str, command: Sequence[str], limit: float, log: Path) -> Check:
    # torch's allocator hands out parts of large blocks, whose bounds a sanitizer cannot see.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
    start = time.perf_counter()
    code, text = execute(command, log, limit, {**extra, "COLUMNS": "300"})
    seconds = time.perf_counter() - start
    lines = [line for line in text.strip().splitlines() if line.strip()]
    failed = sorted({line.strip() for line in lines if FAILED.search(line)})
    detail = "\n".join([" | ".join(lines[-3:])[-600:], *(line[:300] for line in failed[:20])])
    if code is None:
        return Check(name, "not reached", seconds, f"longer than {limit:.0f} s; so far: {detail}")
    if code and "Device not supported" in text:
        return Check(name, "not available", seconds, "compute-sanitizer does not support this device here")
    return Check(name, "failed" if code else "ok", seconds, detail)
