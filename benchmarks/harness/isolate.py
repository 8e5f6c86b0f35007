"""Measurements in processes of their own: whatever ends one leaves rows that say so, and the rest goes on.

``measure(rows, until=..., **options)`` of a module runs in such a process: an iterator of answers, a later one to a row
replacing an earlier. Each is a line of a file as soon as it is known, so that what was measured outlives the process.
After ``until`` (seconds since the epoch) ``measure`` starts nothing more.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness.machine import ROOT
from benchmarks.harness.record import Keep, Row, Status

Options = Mapping[str, Any]
TIMEOUT_S = 1200  # of one measurement
PATIENCE = 60  # seconds beyond a deadline, for the measurement that runs then
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
# With several GPUs in sight, Transformers would spread a batch over them by nn.DataParallel.
ONE_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}


def run(
    module: str,
    wanted: Sequence[Row],
    options: Options,
    *,
    together: Callable[[Row], Hashable] = attrgetter("key"),
    seconds: float = float("inf"),
    fair: bool = False,
    keep: Keep = lambda _: None,
) -> list[Row]:
    """An answer to each row. Neighbours for which ``together`` gives the same share a process; usually none does, so
    that no cache, no compiled kernel and no memory of another is in what is measured. After ``seconds`` nothing more is
    started, and what was not reached says so; ``fair`` gives every process an equal share of what those before it have
    left, and ends it then."""
    rows: list[Row] = []
    deadline = time.time() + seconds
    with tqdm(total=len(wanted), unit="row") as bar:
        while left := wanted[len(rows) :]:
            first, group = left[0], list(next(groupby(left, together))[1])
            bar.set_description(" ".join(filter(None, (first.case, first.batch, first.setting, first.provider))))
            now = time.time()
            until = now + (deadline - now) * len(group) / len(left) if fair else deadline
            if now >= until:
                found = [row.with_(reason=f"the budget of {seconds:.0f} s was used up") for row in group]
            else:
                found = process(module, group, {**options, "until": until}, 0 if fair else PATIENCE)
            rows += found
            keep(rows)
            for row in found:
                if row.status in ("failed", "wrong"):
                    bar.write(f"{row.provider}: {row.status}: {row.reason}")
            bar.update(len(found))
    return rows


def process(
    module: str, group: Sequence[Row], options: Options, patience: float = PATIENCE, environment: Options | None = None
) -> list[Row]:
    """Answers to at least the first of ``group``, from one process: up to the row that ended it."""
    limit = min(TIMEOUT_S * len(group), options["until"] + patience - time.time())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        request = json.dumps({"rows": [asdict(row) for row in group], "options": options})
        command = [sys.executable, "-m", "benchmarks.harness.isolate", module, request, str(file)]
        code, text = execute(command, Path(folder, "log.txt"), limit, {**ONE_GPU, **(environment or {})})
        lines = file.read_text().splitlines() if file.exists() else []
    answered: dict[tuple[str, ...], Row] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that its process did not live to finish
            row = Row(**json.loads(line))
            answered[row.key] = row
    status: Status = "failed"
    cause = f"exit code {code}: {(text.strip().splitlines() or ['no output'])[-1][:300]}"
    if code is None:
        cause = f"took longer than {limit:.0f} s"
    elif code == -signal.SIGKILL:
        status, cause = "out of memory", "the kernel ended the process"
    if time.time() > options["until"] and code in (0, None):
        status, cause = "not reached", "the time for it was used up"
    found: list[Row] = []
    for row in group:
        known = answered.get(row.key)
        if known is None and found and code == 0 and found[-1].status == "failed":
            break  # it ended itself after a failure; who is left gets another process
        if known is None:
            return [*found, row.with_(status=status, reason=cause)]
        if known.status == "not reached" and code not in (0, None):
            known = known.with_(reason=f"ended early: {cause}")
        found.append(known)
    return found


def everywhere(start: Callable[[Any], Any], wanted: Sequence[Any]) -> list[Any]:
    """``start`` of each, in a process for each core, for what it leaves in a compiler's cache; and what it returned.

    ``start`` raises nothing. One that ends its process ends this early: whoever needs the others compiles them then."""
    found: list[Any] = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            found.extend(tqdm(pool.map(start, wanted), total=len(wanted), desc="compile"))
        except BrokenProcessPool:
            print("one ended the process that compiled it; the others compile as they come", file=sys.stderr)
    return found


def execute(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code, None after ``limit`` seconds, and all that was printed. Its children, which would disturb, end too."""
    variables = {**os.environ, **QUIET, **environment}
    code: int | None = None
    with log.open("w") as sink:
        child = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return code, log.read_text(errors="replace")


def main(module: str, request: str, file: str) -> None:
    # If the machine runs out of memory, the kernel shall end this process, whose row then says so, and no other. There
    # is no such file outside Linux, where the kernel's own choice has to do.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    asked = json.loads(request)
    rows = [Row(**row) for row in asked["rows"]]
    with Path(file).open("a") as sink:
        for row in importlib.import_module(module).measure(rows, **asked["options"]):
            sink.write(json.dumps(asdict(row)) + "\n")
            sink.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
