"""Peak memory of a call: CUDA's own counter, or the process's resident size."""

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from orpo_kernels.backends.torch_backend import release

MIB = 1 << 20


class Peak(NamedTuple):
    beyond_mib: float  # above what was held before the call
    absolute_mib: float | None  # CPU: maximum resident size of the process


def peak_of(call: Callable[[], object], device: torch.device) -> Peak:
    """Run ``call`` and say how far memory rose."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return Peak((torch.cuda.max_memory_allocated(device) - before) / MIB, None)
    # What this package and the C library keep goes back, so that a call cannot hide its use in what another left.
    release()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    try:
        # Creating inputs and checking them costs more memory than most calls, so the kernel's mark has to start anew.
        Path("/proc/self/clear_refs").write_text("5")
        anew = _status("VmHWM") <= _status("VmRSS") * 1.05
    except OSError:
        anew = False
    if not anew:
        return _sampled_peak(call)
    resident = _status("VmRSS")
    call()
    return Peak(_status("VmHWM") - resident, _status("VmHWM"))


def _status(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return float(found[1]) / 1024


def _sampled_peak(call: Callable[[], object]) -> Peak:
    """Where the mark cannot be reset: the largest of many looks, which can miss a peak shorter than a millisecond."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch)
        try:
            call()
        finally:
            done.set()
    highest = max(highest, process.memory_info().rss)
    return Peak((highest - before) / MIB, highest / MIB)
