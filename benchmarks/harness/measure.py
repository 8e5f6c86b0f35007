"""Measurements in a process of their own: ``python -m benchmarks.measure SPECS FILE DEADLINE``.

SPECS is a JSON list; FILE gets a line of JSON for each row as soon as it is known. After DEADLINE (seconds since the
epoch) no further measurement starts.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import machine
from benchmarks.accuracy import relative_error
from benchmarks.cases import BATCHES, BETA, CASES, STATES
from benchmarks.floor import build_floor
from benchmarks.inputs import Problem, make_problem, make_sample
from benchmarks.memory import MIB, peak_of
from benchmarks.providers import NAIVE, PROVIDERS, Provider, UnsupportedError
from benchmarks.rows import Row, Spec, row_of
from orpo_kernels import reference

MIN_REPEATS = 3  # the one whose memory is watched among them
WRONG_FACTOR = 20  # times the naive implementation's own error
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Errors(NamedTuple):
    """Relative errors against float64."""

    loss: float
    hidden: float | None
    weight: float | None


def measure(spec: Spec) -> Row:
    """Check, then measure. Whatever goes wrong becomes the row's status, with its message."""
    row = row_of(spec, "ok").with_(**_circumstances(spec))
    try:
        return _measure(spec, row)
    except UnsupportedError as reason:
        return row.with_(status="unsupported", reason=str(reason))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            return row.with_(status="out of memory", reason=first_line(error))
        return _failed(row, error)
    except Exception as error:  # a row that failed is a result; the race goes on
        return _failed(row, error)


def _measure(spec: Spec, row: Row) -> Row:
    device = torch.device(spec.device)
    case, batch, states = CASES[spec.case], BATCHES[spec.batch], STATES[spec.states]
    provider = PROVIDERS.get(spec.provider)
    if provider is not None:
        row = check(provider, row, make_sample(case, states, spec.dtype, spec.head, device))
        if row.status != "ok":
            return row
        torch.compiler.reset()  # or the sample's shapes would turn what is timed into a dynamic-shape kernel
    problem = make_problem(case, batch, states, spec.dtype, spec.head, device)
    row = row.with_(scores=batch.scores, positions=problem.labels.numel())
    if provider is None:
        return _summary(row, *_race_floor(spec, problem))
    step = provider.build(problem)
    losses: list[float] = []

    def call() -> None:
        if spec.phase == "forward":
            with torch.no_grad():
                losses.append(step().item())
        else:
            problem.clear_gradients()
            loss = step()
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())

    for _ in range(3 if device.type == "cuda" else 1):
        call()
    problem.clear_gradients()
    first: list[float] = []
    peak = peak_of(lambda: first.append(_seconds(call, device)), device)
    returned = sum(grad.numel() * grad.element_size() for grad in problem.gradients().values()) / MIB
    problem.clear_gradients()
    times, floors = _alternate(call, build_floor(problem, spec.phase), spec, device)
    row = _summary(row, first + times, floors)
    return row.with_(loss=losses[-1], peak_mib=max(peak.beyond_mib - returned, 0.0), peak_rss_mib=peak.absolute_mib)


def check(provider: Provider, row: Row, sample: Problem) -> Row:
    """Errors of the provider and of the naive implementation on the sample; "wrong" beyond 20 times the latter."""
    problem = sample.double()
    loss = reference.orpo_loss(
        problem.hidden, problem.weight, problem.labels,
        nll_labels=problem.nll_labels, beta=BETA, softcap=problem.softcap,
    )["loss"]  # fmt: skip
    loss.backward()  # type: ignore[no-untyped-call]
    naive = _errors(NAIVE, sample, loss.item(), problem)
    mine = naive if provider is NAIVE else _errors(provider, sample, loss.item(), problem)
    row = row.with_(
        err_loss=mine.loss, err_hidden=mine.hidden, err_weight=mine.weight,
        naive_err_loss=naive.loss, naive_err_hidden=naive.hidden, naive_err_weight=naive.weight,
    )  # fmt: skip
    for name in ("hidden", "weight"):
        error, yardstick = getattr(mine, name), getattr(naive, name)
        if yardstick is not None and not (error is not None and error <= WRONG_FACTOR * yardstick):
            reason = f"gradient of {name} has error {error}, the naive implementation's is {yardstick:.1e}"
            return row.with_(status="wrong", reason=reason)
    return row


def _errors(provider: Provider, sample: Problem, true_loss: float, truth: Problem) -> Errors:
    sample.clear_gradients()
    loss = provider.build(sample)()
    loss.backward()  # type: ignore[no-untyped-call]
    found, true = sample.gradients(), truth.gradients()

    def error(name: str) -> float | None:
        if name not in found or name not in true:
            return None
        return relative_error(found[name], true[name])

    result = Errors(abs(loss.item() - true_loss) / abs(true_loss), error("hidden"), error("weight"))
    sample.clear_gradients()
    return result


def _race_floor(spec: Spec, problem: Problem) -> tuple[list[float], list[float]]:
    """The floor as an entry of its own: its calls are its own yardstick."""
    step, device = build_floor(problem, spec.phase), torch.device(spec.device)
    step()
    times, _ = _alternate(step, None, spec, device)
    return times, times


def _alternate(
    call: Callable[[], None], floor: Callable[[], None] | None, spec: Spec, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of both, in turn, so that whatever slows the machine slows both."""
    if floor is not None:
        floor()
    times: list[float] = []
    floors: list[float] = []
    start = time.perf_counter()
    while len(times) < MIN_REPEATS - 1 or (len(times) < spec.repeats and time.perf_counter() - start < spec.seconds):
        times.append(_seconds(call, device))
        if floor is not None:
            floors.append(_seconds(floor, device))
    return times, floors


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _summary(row: Row, times: list[float], floors: list[float]) -> Row:
    quintiles = statistics.quantiles(times, n=5, method="inclusive")
    median, floor = statistics.median(times), statistics.median(floors)
    return row.with_(
        median_ms=1e3 * median, p20_ms=1e3 * quintiles[0], p80_ms=1e3 * quintiles[3],
        floor_ms=1e3 * floor, ratio=median / floor, repeats=len(times),
    )  # fmt: skip


def _circumstances(spec: Spec) -> dict[str, str]:
    provider = PROVIDERS.get(spec.provider)
    return {
        "device": machine.device_name(torch.device(spec.device)),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "provider_version": provider.version() if provider else torch.__version__,
        "commit": machine.commit(),
        "date": machine.today(),
    }


def _failed(row: Row, error: Exception) -> Row:
    traceback.print_exception(error)
    return row.with_(status="failed", reason=f"{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def be_first_to_die() -> None:
    """If the machine runs out of memory, the kernel shall end this process, whose row then says so, and no other."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return  # no such file outside Linux, where the kernel's own choice has to do


def main(specs: str, answer: str, deadline: str) -> None:
    with Path(answer).open("a") as file:
        for entry in json.loads(specs):
            if time.time() > float(deadline):
                return
            row = measure(Spec(**entry))
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            if row.status == "failed":
                return  # an error on a GPU poisons the process; who asked goes on in another
            gc.collect()
            torch.compiler.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    be_first_to_die()
    main(*sys.argv[1:])
