"""Timing calls in turn, and turning whatever goes wrong into a row. Every measurement here goes through these."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness.machine import synchronize
from benchmarks.harness.record import Row

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class UnsupportedError(Exception):
    """This cannot be measured here; the message is the reason."""


def in_turn(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    seconds: float = float("inf"),
    least: int = 1,
    warm_up: int = 0,
    wait: bool = True,
) -> list[list[float]]:
    """Milliseconds of each call, one round of all after the other, so that whatever slows the machine slows all.

    ``repeats`` rounds, fewer after ``seconds``, but ``least`` in any case; ``warm_up`` more before them. Without
    ``wait`` a GPU times itself and is kept busy throughout, so that starting a kernel costs nothing.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    taken: list[list[Callable[[], float]]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(taken[0]) < least or (len(taken[0]) < repeats and time.perf_counter() - start < seconds):
        for call, own in zip(calls, taken, strict=True):
            own.append(timed(call, device, wait=wait))
    synchronize(device)
    return [[milliseconds() for milliseconds in own] for own in taken]


def timed(call: Callable[[], object], device: torch.device, *, wait: bool = True) -> Callable[[], float]:
    """Make the call; what is returned gives its milliseconds."""
    if device.type == "cuda" and not wait:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        return lambda: float(before.elapsed_time(after))
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    taken = 1e3 * (time.perf_counter() - start)
    return lambda: taken


def summary(times: Sequence[float], floors: Sequence[float]) -> dict[str, Any]:
    """The timing fields of a row. The ratio is of two medians, both of calls timed in turn."""
    quintiles = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    median, floor = statistics.median(times), statistics.median(floors)
    spread = {"p20_ms": quintiles[0], "p80_ms": quintiles[3], "repeats": len(times)}
    return {"median_ms": median, **spread, "floor_ms": floor, "ratio": median / floor}


def measured(row: Row, measure: Callable[..., Row], *arguments: Any) -> Row:
    """``measure(row, *arguments)``, or the row with the reason why there is no such answer."""
    try:
        return measure(row, *arguments)
    except Exception as error:  # a row that failed is a result, and the next one is measured all the same
        return failure(row, error)


def failure(row: Row, error: Exception) -> Row:
    """The row that an error leaves."""
    if isinstance(error, UnsupportedError):
        return row.with_(status="unsupported", reason=str(error))
    if out_of_memory(error):
        return row.with_(status="out of memory", reason=one_line(error))
    traceback.print_exception(error)
    return row.with_(status="failed", reason=f"{type(error).__name__}: {one_line(error)}")


def out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (RuntimeError, MemoryError))
    return isinstance(error, MemoryError) or (known and any(sign in str(error).lower() for sign in OUT_OF_MEMORY))


def one_line(error: Exception) -> str:
    """A message in 300 characters: compilers say what at the end of where."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 270 else f"{text[:110]} ... {text[-155:]}"
