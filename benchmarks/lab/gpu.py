"""``python -m benchmarks gpu``: everything that needs a GPU, in one command: proven first, then raced.

Each step has a share of the time; what it did not reach says so in the record. However it ends, there is the record,
and a page that says what its figures mean. With ``--device cpu`` the same steps run at toy sizes under Triton's
interpreter, so that the command cannot rot where there is no GPU.
"""

import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from benchmarks import accuracy, race
from benchmarks.harness import machine
from benchmarks.harness.isolate import execute
from benchmarks.harness.measure import one_line
from benchmarks.harness.record import Check, Record, Row, merged
from benchmarks.lab import proof
from benchmarks.problems.sections import gpu_race, rows
from benchmarks.report import page, tables

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
STEPS = ("warm", "proof", "tiles", "profile", "suite", "accuracy", "race", "memcheck", "racecheck")
ADVICE = ("warm", "tiles", "profile", "memcheck", "racecheck")  # what of them fails is said, and fails nothing
PROFILED = (("llama3-8b", "ultrafeedback"), ("qwen2.5-0.5b", "ultrafeedback"))


class Step(NamedTuple):
    name: str
    what: str
    seconds: float  # what it may take
    run: Callable[[Record, float], None]  # writes into a record within as many seconds

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


def file_name(name: str) -> str:
    return name.replace(": ", "-")


def steps(device: str, seconds: float, keep: Callable[[Record], None], logs: Path) -> list[Step]:
    """The order is that of what would be missed most. What a check prints goes to a file in ``logs``."""
    toy = device == "cpu"
    ours = [sys.executable, "-m", "benchmarks"]
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    suite = [*pytest, *(TOY if toy else ("-n", "8", *NO_GPU, *SUITE))]
    known = [str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    tool = shutil.which("compute-sanitizer") or next(iter(known), None)

    missing = "it watches a GPU, and there is none" if toy else ""
    if tool is None:
        missing = "compute-sanitizer is not on the PATH"

    def checked(name: str, command: Sequence[str], missing: str, found: Record, limit: float) -> None:
        absent = Check(name, "not available", 0.0, missing)
        put(found, absent if missing else _check(name, command, limit, logs / f"{file_name(name)}.log"))

    def reported(name: str, command: Sequence[str], found: Record, limit: float) -> None:
        """A command that writes rows of its own."""
        file = logs / f"{file_name(name)}.json"
        file.unlink(missing_ok=True)
        checked(name, [*command, "--device", device, "--json", str(file)], "", found, limit)
        if file.exists():
            found.rows = merged(found.rows, Record.load(file).rows)

    def proven(found: Record, limit: float) -> None:
        start = time.perf_counter()
        rows = proof.run(torch.device(device), limit)
        found.rows = merged((row for row in found.rows if row.task != proof.TASK), rows)
        status, said = proof.verdict(rows)
        put(found, Check("proof", status, time.perf_counter() - start, said))

    def profiled(case: str, batch: str) -> Step:
        name, command = f"profile: {case}", [*ours, "profile", "--case", case, "--batch", batch]
        what = f"where a call's time goes on {batch}"
        return Step(name, what, 0.05 * seconds / len(profiles), partial(reported, name, command))

    def sanitizer(kind: str, share: float) -> Step:
        command = [tool or "", "--tool", kind, "--error-exitcode", "9", "--print-limit", "5", *pytest, *SANITIZED]
        return Step(kind, "compute-sanitizer, small cases", share * seconds, partial(checked, kind, command, missing))

    def regimes(found: Record, limit: float) -> None:
        found.accuracy = accuracy.run(device, *((32, 256, 8000) if toy else ()))

    def raced(wanted: Sequence[Row], found: Record, limit: float) -> None:
        before = list(found.rows)

        def so_far(measured: list[Row]) -> None:
            found.rows = merged(before, measured)
            keep(found)

        effort = {"repeats": 3, "seconds": 15.0} if toy else race.EFFORT[device]
        race.run(wanted, device, keep=so_far, budget=limit, **effort)

    shares = zip(sections(device).items(), (0.22, 0.09, 0.03), strict=True)
    kinds = f"{len(proof.kinds('interpreter' if toy else 'sm_90'))} kinds of call"
    warm = [sys.executable, "-m", proof.MODULE, device], "the interpreter compiles nothing" if toy else ""
    tiles = [*ours, "tune", "--shipped", "--seconds", f"{0.05 * seconds:.0f}"]
    profiles = (("tiny-cpu", "tiny-cpu"),) if toy else PROFILED
    return [
        Step("warm", f"{kinds}, compiled on all cores", 0.09 * seconds, partial(checked, "warm", *warm)),
        Step("proof", f"{kinds} against float64, and what cures one that fails", 0.09 * seconds, proven),
        Step("tiles", "the shipped tiles of E's GEMM", 0.05 * seconds, partial(reported, "tiles", tiles)),
        *(profiled(*names) for names in profiles),
        Step("suite", " ".join(suite[1:]), 0.25 * seconds, partial(checked, "suite", suite, "")),
        Step("accuracy", "errors against float64 in five regimes", 0.02 * seconds, regimes),
        *(Step(f"race: {k}", f"{len(few)} measurements", n * seconds, partial(raced, few)) for (k, few), n in shares),
        sanitizer("memcheck", 0.07),
        sanitizer("racecheck", 0.04),
    ]


def sections(device: str) -> dict[str, list[Row]]:
    if device == "cuda":
        return gpu_race()
    toy = {"ours": ("ours_triton", "floor"), "others": ("naive",), "compiled": ()}
    tiny = ["tiny-cpu"], ["tiny-cpu"], ["trainable"], ["float32"]
    return {name: rows(*tiny, providers) for name, providers in toy.items()}


def run(device: torch.device, seconds: float, path: Path, only: Sequence[str]) -> int:
    """Run the steps, write the record after each, end with the page. 0 if all that ran holds, but for advice."""
    found = race.opened(path, device)
    before = list(found.rows)
    logs = machine.ROOT / "build" if path.parent == race.RESULTS else path.parent
    logs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    planned = steps(device.type, seconds, lambda current: current.save(path), logs)
    chosen = [step for step in planned if not only or step.kind in only]
    useless = ""

    def save(ended: str) -> str:
        found.save(path)
        text = page.written(found, device, ended)
        (logs / "gpu.md").write_text(text)
        return text

    for index, step in enumerate(chosen):
        save(f"in the step {step.name}")  # which is then the last that anybody knows of
        print(f"{step.name}: {step.what}", flush=True)
        # What a step leaves, and what steps that were not asked for would have taken, goes to those still to come.
        left = seconds - (time.perf_counter() - start)
        if useless:
            put(found, Check(step.name, "not reached", 0.0, useless))
        else:
            attempt(step, found, left * step.seconds / sum(later.seconds for later in chosen[index:]))
        if step.kind == "proof" and not any(map(proof.holds, rows_of(found, proof.TASK))):
            useless = "no kind of call holds, so nothing else would mean anything"
    tables.print_rows(rows_of(found, "loss"))
    tables.print_accuracy(found.accuracy)
    print(f"\n{save('')}\n{time.perf_counter() - start:.0f} s; record: {path}; page and logs: {logs}")
    names = {step.name for step in chosen if step.kind not in ADVICE}
    failed = [check for check in found.checks if check.name in names and check.status == "failed"]
    return int(bool(failed) or any(map(proof.fails, (row for row in rows_of(found, "loss") if row not in before))))


def attempt(step: Step, found: Record, limit: float) -> None:
    """One that breaks is a check that failed: the others may still tell why."""
    try:
        step.run(found, limit)
    except Exception as error:
        traceback.print_exception(error)
        put(found, Check(step.name, "failed", 0.0, f"{type(error).__name__}: {one_line(error)}"))


def put(found: Record, check: Check) -> None:
    """In place of an earlier one of its name."""
    found.checks = [*(other for other in found.checks if other.name != check.name), check]


def rows_of(found: Record, task: str) -> list[Row]:
    return [row for row in found.rows if row.task == task]


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
