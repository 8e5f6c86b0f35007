"""Timing calls in turn, and turning whatever goes wrong into a row. Every measurement here goes through these."""

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

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
    """Milliseconds of each call, one round of all after the other, so that whatever slows the machine slows all:
    ``repeats`` rounds, fewer after ``seconds``, but ``least`` in any case, and ``warm_up`` before them. Without
    ``wait`` a GPU times itself and is kept busy throughout, so that starting a kernel costs nothing."""
    for _ in range(warm_up):
        for call in calls:
            call()
    rounds: list[list[Callable[[], float]]] = []
    start = time.perf_counter()
    while len(rounds) < least or (len(rounds) < repeats and time.perf_counter() - start < seconds):
        rounds.append([timed(call, device, wait=wait) for call in calls])
    synchronize(device)
    return [[milliseconds() for milliseconds in own] for own in zip(*rounds, strict=True)]


def flops(call: Callable[[], object]) -> int:
    """The operations of a call's products; torch's own count leaves out those that add in place."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # of shapes
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        call()
    return int(counter.get_total_flops())


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
    low, median, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
    floor = np.quantile(floors, 0.5).item()
    spread = {"p20_ms": low, "p80_ms": high, "repeats": len(times)}
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
    said = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def one_line(error: Exception) -> str:
    """A message in 300 characters: compilers say what at the end of where."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 270 else f"{text[:110]} ... {text[-155:]}"
