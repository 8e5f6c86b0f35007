"""Tiles of the score GEMM, raced against the library's plain product on the heads that the benchmark knows.

A shipped tile serves every batch, so a candidate is judged by its worst ratio over heads and numbers of rows, each
ratio taken against a product timed in turn with it. What does not compile, does not fit or is wrong is a row as well.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import CASES, STATES, Case
from benchmarks.compile import TARGETS
from benchmarks.inputs import WEIGHT_STD, make_hidden
from orpo_kernels import reference
from orpo_kernels.backends.triton_backend import TritonBackend, _new_exps
from orpo_kernels.backends.triton_configs import PASS, Config, Tile, arch_of, config
from orpo_kernels.scores import Head

Form = Literal["tma", "pointer", "library"]
TuneStatus = Literal["ok", "wrong", "out of resources", "out of memory", "failed", "not reached"]

SECONDS = 480.0
REPEATS, WARM_UP = 7, 2
BEST = 5  # rows shown of each case and number of rows
SAMPLE_ROWS = 32  # rows compared with float32, over the whole vocabulary
SAMPLE_TOKENS = 16384  # tokens of a float32 copy of the head on the way there
SUM_ERROR = 1e-3  # relative, of float32 sums of positive terms: far above any order of adding, far below a missing tile
CAPPED_PARTS = 2  # a softcap needs twice the registers an entry, so its runs of columns start half as wide

TINY = {case.name: case for case in (Case("tiny", 48, 200), Case("tiny-capped", 48, 200, softcap=30.0))}
HEADS = ("llama3-8b", "qwen2.5-7b", "gemma2-2b", "qwen2.5-0.5b")
ROWS = {"cuda": (1024, 4096, 8192), "cpu": (24,)}
CONSTANTS = {"sm_80": "_AMPERE", "sm_90": "_HOPPER", "sm_100": "_BLACKWELL"}  # what triton_configs.py calls its tiles

# Every combination of rows x tokens x features, warps, stages, group_v, parts and flatten is tried, if it fits.
Sizes = tuple[int, ...]
Space = tuple[tuple[tuple[int, int, int], ...], Sizes, Sizes, Sizes, Sizes, tuple[bool, ...]]
TMA: Space = (
    ((128, 256, 64), (128, 128, 64), (256, 128, 64), (128, 256, 128)), (4, 8), (2, 3, 4), (4, 8, 16), (1, 2, 4),
    (True, False),
)  # fmt: skip
POINTER: Space = (((128, 128, 32), (128, 128, 64), (128, 256, 32)), (4, 8), (3, 4), (8,), (1, 2), (False,))


class Candidate(NamedTuple):
    """A form and a tile, and whether they are for a head with a softcap, which has a tile of its own."""

    form: Form
    tile: Tile
    capped: bool

    def __str__(self) -> str:
        n, v, h, warps, stages, group, parts, flatten = self.tile
        marks = (" flat" if flatten else "") + (" capped" if self.capped else "")
        return f"{self.form} {n}x{v}x{h} w{warps} s{stages} g{group} p{parts}{marks}"


@dataclass(frozen=True)
class TuneRow:
    """One candidate on one head and number of rows; figures are None where there are none, ``reason`` says why."""

    case: str
    rows: int
    candidate: Candidate
    status: TuneStatus
    reason: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    mm_ms: float | None = None  # the plain product, timed in turn with this candidate
    ratio: float | None = None  # median_ms / mm_ms
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    def flat(self) -> dict[str, object]:
        """For JSON: the candidate's and the tile's fields by name."""
        form, tile, capped = self.candidate
        return {**asdict(self), "candidate": str(self.candidate), "form": form, "capped": capped, **tile._asdict()}


@dataclass(frozen=True)
class Work:
    """What a candidate is run on, and what it should find: rows of trained-like hidden states against one head."""

    case: Case
    hidden: Tensor  # [n, H]
    targets: Tensor  # [n]
    head: Head
    shift: Tensor  # [n] float32, the label's capped logit
    sample: Tensor  # [s] rows that are compared
    exps: Tensor  # [s, V] float32, their E
    total: Tensor  # [s] float64, their S


def candidates(arch: str, *, capped: bool) -> list[Candidate]:
    """What could run on a chip: the shipped choice, then by how few of its settings another one changes."""
    interpreted = arch == "interpreter"
    row = config(arch, torch.float32 if interpreted else torch.bfloat16)
    form, tile = row.choose(aligned=True, biased=False, capped=capped)
    shipped = Candidate(cast(Form, form), tile, capped)
    near: dict[Form, Tile | None] = {
        "tma": (row.tma_capped if capped else None) or row.tma,
        "pointer": row.pointer_capped if capped else row.pointer,
        "library": PASS,
    }
    found = [shipped, *(Candidate(form, tile, capped) for form, tile in near.items() if tile is not None)]
    spaces: tuple[tuple[Form, Space], ...] = (("tma", TMA), ("pointer", POINTER))
    for name, space in spaces if not interpreted else ():
        for blocks, warps, stages, group, parts, flatten in product(*space) if near[name] else ():
            tile = Tile(*blocks, warps, stages, group, parts * CAPPED_PARTS if capped else parts, flatten)
            if _fits(name, tile, arch):
                found.append(Candidate(name, tile, capped))

    def changes(one: Candidate) -> int:
        other = near[one.form] or one.tile
        blocks = one.tile[:3] != other[:3]
        return (one.form != form) + blocks + sum(a != b for a, b in zip(one.tile[3:], other[3:], strict=True))

    return sorted(dict.fromkeys(found), key=lambda one: (one != shipped, changes(one)))


def _fits(form: Form, tile: Tile, arch: str) -> bool:
    """Whether shared memory holds the stages and what TMA stores from, and a thread's registers the accumulator.

    A thread has 255 registers. Where tensor memory holds the accumulator the epilogue still reads it through them.
    """
    (n, v, h), target = tile[:3], TARGETS[arch]
    shared = tile.stages * (n * h + v * h) * 2 + (n * v // tile.parts * 2 if form == "tma" else 0)
    return shared <= target.shared_limit and n * v // (target.warp * tile.warps) < 255


def plan(cases: Sequence[Case], arch: str) -> list[Candidate]:
    """Candidates in the order they are run; with and without a softcap in turn, so that a budget cuts both alike."""
    kinds = sorted({case.softcap is not None for case in cases})
    ranks = zip_longest(*(candidates(arch, capped=capped) for capped in kinds))
    return [candidate for rank in ranks for candidate in rank if candidate is not None]


def cases_of(names: Sequence[str] | None, device: str, dry: bool) -> tuple[list[Case], str]:
    """The heads to race and the chip they are raced on.

    Raises:
        ValueError: this machine cannot; the message is the remedy.
    """
    interpreted = device == "cpu"
    known = TINY if interpreted else {**CASES, **TINY}
    wanted = names or (list(TINY) if interpreted else HEADS)
    if set(wanted) - set(known):
        raise ValueError(f"--cases {' '.join(wanted)}: --device cpu interprets the kernels, so only {', '.join(known)}")
    if interpreted and not dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--device cpu runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    if not interpreted and not dry and not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device; --dry-run lists the candidates, --device cpu tries a tiny case")
    found = torch.device(device) if interpreted or torch.cuda.is_available() else None
    arch = arch_of(found) if found else "sm_90"  # what the space was written for
    if arch == "none":
        raise ValueError("the Triton backend needs compute capability 8.0 or newer, so there is nothing to tune")
    return [known[name] for name in wanted], arch


def run(
    cases: Sequence[Case], arch: str, device: torch.device, seconds: float,
    keep: Callable[[list[TuneRow]], None] = lambda _: None,
) -> list[TuneRow]:  # fmt: skip
    """A row for every candidate, head and number of rows. ``keep`` sees the rows so far after each candidate."""
    deadline = time.monotonic() + seconds
    works = [work for case in cases for work in make_work(case, device)]
    about: dict[str, Any] = {
        "device": machine.device_name(device), "torch": torch.__version__, "triton": machine.version("triton"),
        "commit": machine.commit(), "date": machine.today(),
    }  # fmt: skip
    rows: list[TuneRow] = []
    lost = ""
    for candidate in tqdm(plan(cases, arch), desc="tune"):
        broken: TuneRow | None = None
        for work in works:
            if (work.case.softcap is not None) != candidate.capped:
                continue
            row = TuneRow(work.case.name, work.targets.numel(), candidate, "ok", **about)
            if lost or time.monotonic() > deadline:
                row = replace(row, status="not reached", reason=lost or f"--seconds {seconds:g} were used up")
            elif broken is not None:  # the binary is the same for every head, so it is not compiled to fail again
                row = replace(row, status=broken.status, reason=broken.reason)
            else:
                row = measure(candidate, work, row)
                broken = row if row.status in ("out of resources", "failed") else None
                lost = _device_lost(device, candidate)
            rows.append(row)
        keep(rows)
    return rows


def make_work(case: Case, device: torch.device) -> list[Work]:
    """One head and its rows, few before many: the few are the first of the many."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # the interpreter multiplies float32 alone
    weight = torch.empty((case.vocab, case.features), dtype=dtype, device=device)
    weight.normal_(0, WEIGHT_STD, generator=generator)
    most = max(ROWS[device.type])
    targets = torch.randint(case.vocab, (most,), generator=generator, device=device)
    hidden = make_hidden(weight, targets, STATES["trained-like"], case.softcap, generator)
    head = Head(weight, None, 1.0, case.softcap)
    shift = head.cap((hidden.float() * weight[targets].float()).sum(1))
    works = []
    for n in ROWS[device.type]:
        sample = torch.linspace(0, n - 1, min(n, SAMPLE_ROWS), device=device).long()
        some = hidden[sample].float()
        slices = (weight[start : start + SAMPLE_TOKENS].float() for start in range(0, case.vocab, SAMPLE_TOKENS))
        logits = torch.cat([reference.logits(some, part, softcap=case.softcap) for part in slices], 1)
        exps = (logits - shift[sample, None]).exp().scatter_(1, targets[sample, None], 0.0)
        total = exps.sum(1, dtype=torch.float64)
        if case.softcap is not None:
            exps *= 1 - (logits / case.softcap) ** 2
        works.append(Work(case, hidden[:n], targets[:n], head, shift[:n], sample, exps, total))
    return works


def measure(candidate: Candidate, work: Work, row: TuneRow) -> TuneRow:
    """Check a candidate, then time it against the plain product. Whatever goes wrong becomes the row's status."""
    try:
        score, exps, sums = score_pass(candidate, work)
        score()
        wrong = _wrong(work, exps, sums)
        if wrong:
            return replace(row, status="wrong", reason=wrong)
        logits = torch.empty_like(exps)
        mine, plain = race(score, lambda: torch.mm(work.hidden, work.head.weight.T, out=logits), work.hidden.device)
    except torch.OutOfMemoryError as error:
        return replace(row, status="out of memory", reason=_words(error))
    except Exception as error:  # what a compiler or a launch raises has no common class; a row keeps what it said
        status: TuneStatus = "out of resources" if type(error).__name__ == "OutOfResources" else "failed"
        return replace(row, status=status, reason=_words(error))
    quintiles, median, mm = statistics.quantiles(mine, n=5, method="inclusive"), *map(statistics.median, (mine, plain))
    return replace(row, median_ms=median, p20_ms=quintiles[0], p80_ms=quintiles[3], mm_ms=mm, ratio=median / mm)


def score_pass(candidate: Candidate, work: Work) -> tuple[Callable[[], None], Tensor, Tensor]:
    """The backend's own pass over the whole vocabulary with this candidate, and where it leaves E and the sums."""
    backend = TritonBackend(config=Config(candidate.form, *[candidate.tile] * 4))
    everything = slice(0, work.head.vocab)
    hidden, targets, head, shift = work.hidden, work.targets, work.head, work.shift
    if backend._choose(hidden, head) != candidate[:2]:
        raise ValueError(f"rows of {hidden.shape[1]} features are not 16-byte aligned, so another form would run")
    n, tiles = hidden.shape[0], -(-head.vocab // candidate.tile.block_v)
    exps = _new_exps(n, head.vocab, hidden).fill_(math.nan)  # an entry that nobody writes shall fail the check
    sums = shift.new_full((tiles, n), math.nan)
    return lambda: backend._score(hidden, targets, head, shift, everything, exps, sums, None), exps, sums


def _wrong(work: Work, exps: Tensor, sums: Tensor) -> str:
    """What differs from float32 by more than rounding, row by row, or nothing. A NaN differs."""
    found = exps[work.sample].float()
    error = ((found - work.exps).norm(dim=1) / work.exps.norm(dim=1)).max().item()
    sum_error = (sums[:, work.sample].sum(0, dtype=torch.float64) / work.total - 1).abs().max().item()
    allowed = SUM_ERROR + torch.finfo(exps.dtype).eps
    if error <= allowed and sum_error <= SUM_ERROR:
        return ""
    return f"E has error {error:.1e} (allowed {allowed:.1e}), its sums {sum_error:.1e} (allowed {SUM_ERROR:.1e})"


def race(
    mine: Callable[[], object], plain: Callable[[], object], device: torch.device
) -> tuple[list[float], list[float]]:
    """Milliseconds of both, in turn. On a GPU nothing waits in between, so that starting a kernel costs no time."""
    found: tuple[list[Callable[[], float]], ...] = ([], [])
    for _ in range(WARM_UP + REPEATS):
        for call, times in zip((mine, plain), found, strict=True):
            times.append(_timed(call, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first, second = ([time() for time in times[WARM_UP:]] for times in found)
    return first, second


def _timed(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: 1e3 * seconds
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    return lambda: float(before.elapsed_time(after))


def _words(error: Exception) -> str:
    """One line of a message: compilers say what at the end of where."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _device_lost(device: torch.device, candidate: Candidate) -> str:
    """After an illegal access every later call fails, whatever it is: why nothing more can be measured, or nothing."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"{candidate} lost the device: {_words(error)}"
    return ""


def print_plan(cases: Sequence[Case], arch: str, console: Console) -> None:
    wanted = plan(cases, arch)
    console.print(f"{len(wanted)} candidates for {arch} on {', '.join(case.name for case in cases)}, the shipped first")
    for candidate in wanted:
        console.print(str(candidate), highlight=False)


def print_rows(rows: Sequence[TuneRow], arch: str, console: Console) -> None:
    """The best of each head and number of rows, what came to nothing, and the row that the table should have."""
    for (case, n), members in groupby(sorted(rows, key=lambda r: (r.case, r.rows)), key=lambda r: (r.case, r.rows)):
        done = sorted((row for row in members if row.ratio is not None), key=lambda row: row.ratio or 0.0)
        console.print(f"\n[bold]{case}, {n} rows[/bold]: ms, of a plain product in turn, ratio", highlight=False)
        for row in done[:BEST]:
            figures = f"{row.median_ms:8.3f} ({row.p20_ms:.3f}-{row.p80_ms:.3f}) {row.mm_ms:8.3f} {row.ratio:6.3f}"
            console.print(f"{figures}  {row.candidate}", highlight=False, soft_wrap=True)
    lost = sorted({(row.status, row.reason, str(row.candidate)) for row in rows if row.status != "ok"})
    for (status, reason), some in groupby(lost, key=lambda entry: entry[:2]):
        names = [name for *_, name in some]
        console.print(f"{status}, {len(names)} candidates ({names[0]} ...): {reason}", highlight=False)
    for capped in sorted({row.candidate.capped for row in rows}):
        text = suggestion([row for row in rows if row.candidate.capped == capped], arch)
        console.print(text, highlight=False, soft_wrap=True)


def suggestion(rows: Sequence[TuneRow], arch: str) -> str:
    """The tile with the smallest worst ratio, as the table's own text. One tile serves every number of rows."""
    wanted = {(row.case, row.rows) for row in rows}
    by_candidate: dict[Candidate, list[TuneRow]] = {}
    for row in rows:
        if row.ratio is not None:
            by_candidate.setdefault(row.candidate, []).append(row)
    worst = [max(own, key=lambda row: row.ratio or 0.0) for own in by_candidate.values() if len(own) == len(wanted)]
    kind = "with" if rows[0].candidate.capped else "without"
    if not worst:
        return f"# no candidate {kind} a softcap ran on every head and number of rows: give it more --seconds"
    best = min(worst, key=lambda row: row.ratio or 0.0)
    n, v, h, warps, stages, group_v, parts, flatten = best.candidate.tile
    name = CONSTANTS.get(arch, "_TILE") + ("_CAPPED" if best.candidate.capped else "")
    sizes = f"{n}, {v}, {h}, warps={warps}, stages={stages}, group_v={group_v}, parts={parts}, flatten={flatten}"
    line = f"{name} = Tile({sizes})"
    if best.candidate.form == "library":  # its pass over the products has one tile for every chip
        line = 'form="library"'
    evidence = (
        f"{best.ratio:.3f} of a plain product at worst ({best.case}, {best.rows} rows); {best.device}, {best.date}"
    )
    return f"# {best.candidate.form}, {kind} a softcap: {evidence}\n{line}"


def save(path: Path, rows: Sequence[TuneRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.flat() for row in rows], indent=1) + "\n")
