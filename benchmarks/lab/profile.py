"""Where one call of the loss spends its time: kernels by step, and the whole call over the floor.

torch's profiler serves both devices; Proton, which Triton ships, records the kernels of a GPU only.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.profiler import ProfilerActivity

from benchmarks.harness import machine
from benchmarks.harness.measure import in_turn, summary, timed
from benchmarks.harness.record import Row
from benchmarks.problems.cases import BETA
from benchmarks.problems.floor import build_floor
from benchmarks.problems.inputs import problem_of
from benchmarks.report.tables import text
from orpo_kernels import explain, orpo_loss

WARM_UP, REPEATS = 3, 5
DEFAULTS = {"cuda": ("llama3-8b", "ultrafeedback"), "cpu": ("small-v32k-cpu", "ragged-small-cpu")}

# A kernel, or on a CPU an operator, belongs to the first step whose pattern its name holds. Products are cuBLAS's
# (nvjet, cutlass, xmma and gemm names, and what adds their splits), rocBLAS's (Cijk) or ATen's own.
STEPS: dict[str, str] = {
    "exp gemm": r"exp_gemm_(tma_)?kernel|exp_pass_kernel|aten::exp",
    "sums and overflow": r"recompute_overflowed_kernel|rescale_kernel|reduce_tiles_kernel",
    "label and logps": r"label_kernel|label_entry_kernel|finalize_kernel",
    "odds ratio": r"odds_ratio_kernel",
    "rows": r"\brows_kernel|index_?add|indexFunc|aten::index_put|_index_put",
    "scale": r"scale_kernel",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitK|Cijk|aten::(add|b|baddb)?mm|aten::(add)?mv|aten::dot",
    "reductions": r"reduce_kernel|aten::(sum|mean|min|max|amax|amin)\b",
    "everything else": r"",
}


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    duration: float


def run(case: str, batch: str, head: str, device: torch.device) -> list[Row]:
    """The whole call over its floor, timed without a profiler, then its steps under one, the longest first."""
    row = Row(case, batch, "trained-like", head, "bfloat16", "full", "whole call", "ok", task="profile")
    problem = problem_of(row, device)
    inputs = problem.hidden, problem.weight, problem.labels
    options: dict[str, Any] = {"nll_labels": problem.nll_labels, "beta": BETA, "softcap": problem.softcap}
    plan = explain(*inputs, **options)

    def call() -> None:
        problem.clear_gradients()
        orpo_loss(*inputs, **options).loss.backward()  # type: ignore[no-untyped-call]

    row = row.with_(**machine.about(device), targets=plan.targets, positions=plan.positions)
    cut, floor = build_floor(problem, "full")
    times, floors = in_turn([call, floor], device, repeats=REPEATS, warm_up=WARM_UP)
    total, kernels = profiled(call, device)
    busy = busy_ms(kernels) if device.type == "cuda" else sum(kernel.duration for kernel in kernels) / 1e3
    # Idle: between kernels, on a CPU outside operators.
    figures = {"plan": str(plan), "total_ms": total, "busy_ms": busy, "idle_ms": total - busy}
    return [row.with_(cut=cut, figures=figures, **summary(times, floors)), *steps_of(kernels, row, total)]


def profiled(call: Callable[[], object], device: torch.device) -> tuple[float, list[Kernel]]:
    """Milliseconds of a call under the profiler, and what ran: on a GPU kernels, from the first one's start to the last
    one's end; on a CPU operators by the time they spent themselves, so that none counts twice."""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities):  # the first one starts the profiler itself
        call()
    with torch.profiler.profile(activities=activities) as seen:
        total = timed(call, device)()
    kernels = []
    for event in seen.events() or []:
        if event.device_type.name == device.type.upper() and not event.is_user_annotation:
            taken = event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
            kernels.append(Kernel(event.name, event.time_range.start, taken))
    if not kernels:
        raise RuntimeError(f"the profiler saw no kernel on {device}: is another profiler attached to it?")
    if device.type == "cuda":
        total = (max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)) / 1e3
    return total, kernels


def steps_of(kernels: Sequence[Kernel], row: Row, total_ms: float) -> list[Row]:
    """A row for each step that ran anything, the longest first."""
    found: dict[str, list[float]] = {}
    for kernel in kernels:
        step = next(step for step, pattern in STEPS.items() if re.search(pattern, kernel.name))
        found.setdefault(step, []).append(kernel.duration / 1e3)
    return [
        row.with_(provider=step, median_ms=sum(own), figures={"launches": len(own), "share": sum(own) / total_ms})
        for step, own in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]


def busy_ms(kernels: Sequence[Kernel]) -> float:
    """Time in which at least one kernel ran: the end of one may overlap the start of the next."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        end = kernel.start + kernel.duration
        busy += max(end - max(kernel.start, until), 0.0)
        until = max(until, end)
    return busy / 1e3


def print_rows(call: Row, steps: Sequence[Row]) -> None:
    """The whole call in words, and its steps."""
    total, idle = call.figures["total_ms"], call.figures["idle_ms"]
    print(f"{call.case}, {call.batch}, head {call.head}; {call.device}\n{call.figures['plan']}")
    print(f"{call.median_ms:.2f} ms a call, {call.ratio:.2f} of its products alone ({call.cut}); ", end="")
    print(f"profiled {total:.2f} ms, of it {idle:.2f} idle")
    print(text(pd.DataFrame([{"step": row.provider, "ms": row.median_ms, **row.figures} for row in steps])))
