"""Where one call of the loss spends its time: kernels by step, each step against its own floor.

A step's floor is the larger of its bytes at the bandwidth of a copy and its products' FLOP at the rate of a large
product, both measured in the same run: what the step would take if it were limited by nothing else. What a step takes
beyond it is its loss, and the largest loss is where work pays.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from benchmarks import machine
from benchmarks.cases import BATCHES, BETA, CASES, STATES, HeadName
from benchmarks.inputs import Problem, make_problem
from orpo_kernels import explain, orpo_loss
from orpo_kernels.plan import Plan

WARM_UP, REPEATS = 3, 5
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
DEFAULTS = {"cuda": ("llama3-8b", "ultrafeedback"), "cpu": ("small-v32k-cpu", "ragged-small-cpu")}
SUM_TOKENS = 256  # tokens of the widest shipped tile, whose sums the settle kernel reads one by one

# A kernel, or on a CPU an operator, belongs to the first step whose pattern its name holds. Products are cuBLAS's
# (nvjet, cutlass, xmma and gemm names, and what adds their splits), rocBLAS's (Cijk) or ATen's own.
STEPS: dict[str, str] = {
    "score": r"score_(tma_)?kernel|exp_pass_kernel|aten::exp",
    "rescue and settle": r"rescue_kernel|settle_kernel",
    "label and finish": r"label_kernel|label_entry_kernel|finish_kernel",
    "odds ratio": r"odds_ratio_kernel",
    "rows": r"\brows_kernel|index_?add|indexFunc|aten::index_put|_index_put",
    "scale": r"scale_kernel",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitK|Cijk|aten::(add|b|baddb)?mm|aten::(add)?mv|aten::dot",
    "reductions": r"reduce_kernel|aten::(sum|mean|min|max|amax|amin)\b",
    "everything else": r"",
}


class Cost(NamedTuple):
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Size:
    """What the costs below depend on."""

    n: int  # scores
    features: int
    vocab: int
    positions: int
    pairs: int
    plan: str
    mm: int
    capped: bool
    own: bool  # the score GEMM is a kernel of the backend, not one of the library's products
    logit_bytes: int  # of what the library's form of it leaves for the exponential


ENTRY = 2  # bytes of bfloat16: hidden, weight, their gradients and E


def costs(size: Size) -> dict[str, Cost]:
    """Bytes that must move and FLOP that must be done, by step; a step's tensors cross memory once each.

    From docs/kernels.md: one mm is 2 N V H; the plans' numbers of mm are in its table of plans, and ``recompute``
    computes E twice. Where E comes from and goes to is what the docstring of ``triton_backend.py`` lists.
    """
    n, H, V, trains = size.n, size.features, size.vocab, size.plan in ("stash", "recompute")
    mm, exps, hidden, weight = 2.0 * n * V * H, ENTRY * n * V, ENTRY * n * H, ENTRY * V * H
    passes = 2 if size.plan == "recompute" else 1
    product = Cost(passes * (hidden + weight + exps), passes * mm)  # read hidden and weight, write E
    exp_pass = Cost(passes * (size.logit_bytes * n * V + exps))
    library = 0 if size.own else passes
    products = (  # hidden's: E and weight to float32 rows; the head's: E and scaled rows to its gradient
        library * (hidden + weight + size.logit_bytes * n * V)
        + (exps + weight + 4 * n * H)
        + (exps + hidden + weight if trains else 0)
    )
    rows = 4 * n * H + hidden  # the float32 product to the gradient's rows
    rows += 2 * hidden if trains else 0  # rows times their coefficients, for the head's product
    rows += 3 * hidden if size.plan != "stash" else 0  # the label's row of the head; the coefficients come afterwards
    return {
        "score": product if size.own else exp_pass,
        "rescue and settle": Cost(4 * n * -(-V // SUM_TOKENS)),
        "label and finish": Cost(2 * hidden + 9 * 4 * n),  # a row of hidden and of the head each, vectors of [n]
        "odds ratio": Cost(4 * 4 * n + 6 * 4 * size.pairs),  # logps and two weights to coefficients, and the table
        "rows": Cost(rows),
        "scale": Cost(0.0),  # an upstream gradient of 1 touches nothing
        "products": Cost(products, mm * (size.mm - (passes if size.own else 0))),
        "reductions": Cost(0.0 if size.capped else weight),  # the head's mean row, for the mean logits
        # Labels are read, hidden's scored rows gathered, its gradient zeroed.
        "everything else": Cost(2 * 8 * size.positions + 2 * hidden + ENTRY * size.positions * H),
    }


@dataclass(frozen=True)
class StepRow:
    step: str
    launches: int
    ms: float
    floor_ms: float
    gap_ms: float  # ms - floor_ms, what could be won
    share: float  # of the whole call's total_ms
    bytes: float
    flops: float


@dataclass(frozen=True)
class Profile:
    """One call, forward and backward, and the machine's ceilings in the same run."""

    case: str
    batch: str
    head: HeadName
    plan: str
    wall_ms: float  # median of calls without a profiler
    total_ms: float  # under it, from the first kernel's start to the last one's end; on a CPU the whole call
    busy_ms: float
    idle_ms: float  # total_ms - busy_ms: between kernels, on a CPU outside operators
    copy_gb_s: float  # read and written bytes
    matmul_tflop_s: float
    steps: tuple[StepRow, ...]  # the largest gap first
    device: str
    torch: str
    triton: str
    commit: str
    date: str


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    duration: float


def run(case: str, batch: str, head: HeadName, device: torch.device) -> Profile:
    problem = make_problem(CASES[case], BATCHES[batch], STATES["trained-like"], "bfloat16", head, device)
    options: dict[str, Any] = {"nll_labels": problem.nll_labels, "beta": BETA, "softcap": problem.softcap}
    plan = explain(problem.hidden, problem.weight, problem.labels, **options)

    def call() -> None:
        problem.clear_gradients()
        orpo_loss(problem.hidden, problem.weight, problem.labels, **options).loss.backward()  # type: ignore[no-untyped-call]

    wall = _median_ms(call, device)
    with _profiler(device):  # the first one starts the profiler itself
        call()
    with _profiler(device) as seen:
        total = _ms(call, device)
    kernels = kernels_of(seen.events(), device)
    if not kernels:
        raise RuntimeError(f"the profiler saw no kernel on {device}: is another profiler attached to it?")
    if device.type == "cuda":
        total = (max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)) / 1e3
    busy = busy_us(kernels) / 1e3 if device.type == "cuda" else sum(k.duration for k in kernels) / 1e3
    problem.clear_gradients()
    copy, matmul = ceilings(device)
    rows = steps_of(kernels, size_of(problem, plan, len(BATCHES[batch].pairs), kernels), total, copy, matmul)
    return Profile(
        case, batch, head, str(plan), wall, total, busy, total - busy, copy / 1e9, matmul / 1e12, tuple(rows),
        machine.device_name(device), torch.__version__, machine.version("triton"), machine.commit(), machine.today(),
    )  # fmt: skip


def size_of(problem: Problem, plan: Plan, pairs: int, kernels: Sequence[Kernel]) -> Size:
    own = any(re.search(r"score_(tma_)?kernel", kernel.name) for kernel in kernels)
    vocab, features = problem.weight.shape
    logit_bytes = 4 if plan.backend == "triton" else ENTRY
    capped = problem.softcap is not None
    return Size(plan.scores, features, vocab, plan.positions, pairs, plan.name, plan.mm, capped, own, logit_bytes)


def steps_of(kernels: Sequence[Kernel], size: Size, total_ms: float, copy: float, matmul: float) -> list[StepRow]:
    """Kernels by step, the largest gap first. A step that ran nothing has no row."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        step = next(step for step, pattern in STEPS.items() if re.search(pattern, kernel.name))
        found.setdefault(step, []).append(kernel)
    rows = []
    for step, own in found.items():
        cost = costs(size)[step]
        ms = sum(kernel.duration for kernel in own) / 1e3
        floor = 1e3 * max(cost.bytes / copy, cost.flops / matmul)
        rows.append(StepRow(step, len(own), ms, floor, ms - floor, ms / total_ms, *cost))
    return sorted(rows, key=lambda row: -row.gap_ms)


def kernels_of(events: Sequence[torch.autograd.profiler_util.FunctionEvent], device: torch.device) -> list[Kernel]:
    """What ran on the device; on a CPU operators by the time they spent themselves, so that none counts twice."""
    return [
        Kernel(
            event.name, event.time_range.start,
            event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total,
        )
        for event in events
        if event.device_type.name == device.type.upper() and not event.is_user_annotation
    ]  # fmt: skip


def busy_us(kernels: Sequence[Kernel]) -> float:
    """Time in which at least one kernel ran: the end of one may overlap the start of the next."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        end = kernel.start + kernel.duration
        busy += max(end - max(kernel.start, until), 0.0)
        until = max(until, end)
    return busy


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy, each read and written, and FLOP a second of a large bfloat16 product."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / (_median_ms(lambda: target.copy_(source), device) / 1e3)
    size = MATMUL_SIZE[device.type]
    # Random entries: a product of zeros draws less power, and so runs at a higher clock than any real one.
    a = torch.randn((size, size), device=device).bfloat16()
    out = torch.empty_like(a)
    return copy, 2 * size**3 / (_median_ms(lambda: torch.mm(a, a, out=out), device) / 1e3)


def _profiler(device: torch.device) -> torch.profiler.profile:
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    return torch.profiler.profile(activities=[kind])


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    return statistics.median([_ms(call, device) for _ in range(WARM_UP + REPEATS)][WARM_UP:])


def _ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def print_profile(found: Profile, console: Console) -> None:
    console.print(f"{found.case}, {found.batch}, head {found.head}; {found.device}", highlight=False)
    console.print(f"{found.plan}", highlight=False)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for name in ("launches", "ms", "floor", "gap", "share", "GB", "TFLOP"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.steps:
        table.add_row(
            row.step, str(row.launches), *(f"{ms:.3f}" for ms in (row.ms, row.floor_ms, row.gap_ms)),
            f"{row.share:.1%}", f"{row.bytes / 1e9:.2f}", f"{row.flops / 1e12:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{found.wall_ms:.2f} ms a call; profiled {found.total_ms:.2f} ms, of it {found.idle_ms:.2f} idle; ceilings "
        f"{found.copy_gb_s:.0f} GB/s, {found.matmul_tflop_s:.1f} TFLOP/s",
        highlight=False,
    )


def save(path: Path, found: Profile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found), indent=1) + "\n")
