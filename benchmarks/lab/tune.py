"""Tiles of the exp GEMM, raced against the library's plain product on the heads that the benchmark knows.

A shipped tile serves every batch, so a candidate is judged by its worst ratio over heads and numbers of rows, each
ratio taken against a product timed in turn with it. What does not compile, does not fit or is wrong is a row as well.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import product, zip_longest
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import isolate, machine
from benchmarks.harness.measure import UnsupportedError, in_turn, measured, one_line, summary
from benchmarks.harness.record import Keep, Row
from benchmarks.lab.compile import TARGETS, WIDE
from benchmarks.problems.cases import CASES, STATES, Case
from benchmarks.problems.inputs import WEIGHT_STD, make_hidden
from benchmarks.report.tables import frame, text
from orpo_kernels import reference
from orpo_kernels.backends.kernels import Chunk, Out
from orpo_kernels.backends.kernels.configs import PASS, Config, Tile, arch_of, config, gluon_lacks
from orpo_kernels.backends.triton_backend import TritonBackend, _new_exp_logits
from orpo_kernels.settings import Head

Form = Literal["tma", "gluon", "pointer", "library"]

SECONDS = 480.0
REPEATS, WARM_UP = 7, 2
BEST = 5  # rows shown of each case and number of rows
SHOWN = ["provider", "median_ms", "p20_ms", "p80_ms", "floor_ms", "ratio"]  # of a row, floor_ms the plain product
SAMPLE_ROWS = 32  # rows compared with float32, over the whole vocabulary
SAMPLE_TOKENS = 16384  # tokens of a float32 copy of the head on the way there
SUM_ERROR = 1e-3  # relative, of float32 sums of positive terms: far above any order of adding, far below a missing tile
RESERVED = 1 << 10  # bytes of a multiprocessor's shared memory that every program on it costs
CAPPED_PARTS = 2  # a softcap needs twice the registers an entry, so its runs of columns start half as wide

TINY = {"tiny": Case("tiny", 48, 200), "tiny-capped": Case("tiny-capped", 48, 200, softcap=30.0)}
HEADS = ("llama3-8b", "qwen2.5-7b", "gemma2-2b", "qwen2.5-0.5b")
ROWS = {"cuda": (1024, 4096, 8192), "cpu": (24,)}
CONSTANTS = {"sm_80": "_AMPERE", "sm_90": "_HOPPER", "sm_100": "_BLACKWELL"}  # what kernels/configs.py calls its tiles

# Rows x tokens x features, then every combination of warps, stages, group_v, parts, flatten and programs, if it fits.
# Few, so that minutes are enough for all: two programs hide one's epilogue behind the other's products, and then each
# has half the shared memory; one has the widest instruction and more stages.
BOTH, ONE, TWO = (True, False), (1,), (2,)
SPACES: dict[Form, list[tuple[tuple[int, int, int], *tuple[Sequence[int], ...]]]] = {
    "tma": [
        ((128, 256, 64), (8,), (3, 4), (8,), (1, 2, 4), BOTH, ONE),
        ((128, 256, 64), (8,), (3,), (4, 16), (2,), BOTH, ONE),
        ((256, 128, 64), (8,), (3,), (8,), (1, 2), BOTH, ONE),
        ((128, 128, 64), (4,), (2, 3), (8,), (1, 2, 4), BOTH, TWO),
        ((128, 128, 64), (8,), (3, 4), (8,), (1, 2), BOTH, (1, 2)),
        ((64, 256, 64), (4,), (2,), (8,), (2, 4), BOTH, TWO),
    ],
    "gluon": [((128, 256, h), (8,), stages, (8,), (2, 4), (False,), ONE) for h, stages in ((64, (3, 4)), (32, (6, 8)))],
    "pointer": [(blocks, (4, 8), (3, 4), (8,), (1, 2), (False,), ONE) for blocks in ((128, 128, 32), (128, 128, 64))],
}


class Candidate(NamedTuple):
    """A form and a tile, and whether they are for a head with a softcap, which has a tile of its own."""

    form: Form
    tile: Tile
    capped: bool

    def config(self) -> Config:
        """What runs this form and tile alone."""
        form, tile, _ = self
        return Config(form, tile, tile, tile, tile, gluon=tile)

    def __str__(self) -> str:
        n, v, h, warps, stages, group, parts, flatten, programs = self.tile
        marks = (" flat" if flatten else "") + (f" x{programs}" if programs > 1 else "")
        marks += " capped" if self.capped else ""
        return f"{self.form} {n}x{v}x{h} w{warps} s{stages} g{group} p{parts}{marks}"


class Work(NamedTuple):
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
    """What could run on a chip: the shipped choice, then by how few of its settings another one changes; among them the
    Gluon form, which no chip takes before a record shows it faster."""
    interpreted, row, first = arch == "interpreter", _row(arch), shipped(arch, WIDE, capped=capped)
    near: dict[Form, Tile | None] = {
        "tma": (row.tma_capped if capped else None) or row.tma,
        "gluon": None if gluon_lacks() else row.gluon,
        "pointer": row.pointer_capped if capped else row.pointer,
        "library": PASS,
    }
    found = [first, *(Candidate(form, tile, capped) for form, tile in near.items() if tile is not None)]
    for name, space in SPACES.items() if not interpreted else ():
        for blocks, *settings in space if near[name] else ():
            for warps, stages, group, parts, flatten, programs in product(*settings):
                parts *= CAPPED_PARTS if capped else 1
                tile = Tile(*blocks, warps, stages, group, parts, bool(flatten), programs)
                if _fits(name, tile, arch):
                    found.append(Candidate(name, tile, capped))

    def changes(one: Candidate) -> int:
        other = near[one.form] or one.tile
        settings = sum(a != b for a, b in zip(one.tile[3:], other[3:], strict=True))
        return 10 * (one.form not in (first.form, "gluon")) + (one.tile[:3] != other[:3]) + settings

    return sorted(dict.fromkeys(found), key=lambda one: (one != first, changes(one)))


def shipped(arch: str, features: int, *, capped: bool) -> Candidate:
    """What a head runs."""
    form, tile = _row(arch).choose(mapped=True, biased=False, capped=capped, features=features)
    return Candidate(cast(Form, form), tile, capped)


def _row(arch: str) -> Config:
    return config(arch, torch.float32 if arch == "interpreter" else torch.bfloat16)


def _fits(form: Form, tile: Tile, arch: str) -> bool:
    """Whether shared memory holds the stages and what TMA stores from, and a thread's 255 registers the accumulator:
    where tensor memory holds it, the epilogue still reads it through them."""
    (n, v, h), target = tile[:3], TARGETS[arch]
    buffers = {"tma": 1, "gluon": 2}.get(form, 0)  # what a part of E is stored from
    shared = tile.stages * (n * h + v * h) * 2 + buffers * n * v // tile.parts * 2
    fits = tile.programs * (shared + RESERVED) <= target.shared_limit + RESERVED
    return fits and n * v // (target.warp * tile.warps) < 255


def plan(cases: Sequence[Case], arch: str, *, only_shipped: bool = False) -> list[Candidate]:
    """Candidates in the order they are run; with and without a softcap in turn, so that a budget cuts both alike."""
    if only_shipped:
        return list(dict.fromkeys(shipped(arch, case.features, capped=case.softcap is not None) for case in cases))
    kinds = sorted({case.softcap is not None for case in cases})
    ranks = zip_longest(*(candidates(arch, capped=capped) for capped in kinds))
    return [candidate for rank in ranks for candidate in rank if candidate is not None]


def cases_of(names: Sequence[str] | None, device: str, dry: bool) -> tuple[list[Case], str]:
    """The heads to race and the chip they are raced on; UnsupportedError, with a remedy, where this machine cannot."""
    interpreted, there = device == "cpu", torch.cuda.is_available()
    known = TINY if interpreted else {**CASES, **TINY}
    wanted = names or (TINY if interpreted else HEADS)
    problem = ""
    if set(wanted) - set(known):
        problem = f"--cases {' '.join(wanted)}: --device cpu interprets the kernels, so only {', '.join(known)}"
    elif interpreted and not dry and os.environ.get("TRITON_INTERPRET") != "1":
        problem = "--device cpu runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1"
    elif not interpreted and not dry and not there:
        problem = "tuning needs a CUDA device; --dry-run lists the candidates, --device cpu tries a tiny case"
    arch = arch_of(torch.device(device)) if interpreted or there else "sm_90"  # what the space was written for
    if arch == "none":
        problem = "the Triton backend needs compute capability 8.0 or newer, so there is nothing to tune"
    if problem:
        raise UnsupportedError(problem)
    return [known[name] for name in wanted], arch


def run(
    cases: Sequence[Case],
    wanted: Sequence[Candidate],
    device: torch.device,
    seconds: float,
    keep: Keep = lambda _: None,
) -> list[Row]:
    """A row for every candidate, head and number of rows, all in this process, whose compiled kernels and heads they
    share: a candidate that fails is a row."""
    deadline = time.monotonic() + seconds
    if device.type == "cuda":
        isolate.everywhere(_start, wanted)  # one after the other, compiling takes longer than timing
    works = [work for case in cases for work in make_work(case, device)]
    about = machine.about(device)
    rows: list[Row] = []
    lost = ""
    for candidate in tqdm(wanted, desc="tune"):
        failed: Row | None = None
        for work in works:
            if (work.case.softcap is not None) != candidate.capped:
                continue
            row = row_of(candidate, work).with_(**about)
            if lost or time.monotonic() > deadline:
                row = row.with_(reason=lost or f"--seconds {seconds:g} were used up")
            elif failed is not None:  # the binary is the same for every head, so it is not compiled to fail again
                row = row.with_(status=failed.status, reason=failed.reason)
            else:
                row = measured(row, measure, candidate, work)
                failed = row if row.status == "failed" else None
                try:  # after an illegal access every later call fails, whatever it is
                    machine.synchronize(device)
                except RuntimeError as error:
                    lost = f"{candidate} lost the device: {one_line(error)}"
            rows.append(row)
        keep(rows)
    return rows


def _start(candidate: Candidate) -> None:
    """One call at a toy size, which compiles what every size runs. What fails is a row of the run itself."""
    hidden, weight = (torch.zeros(n, 256, dtype=torch.bfloat16, device="cuda") for n in (128, 512))
    shift, exps = hidden.new_zeros(128, dtype=torch.float32), _new_exp_logits(128, 512, hidden)
    head = Head(weight, None, 1.0, 30.0 if candidate.capped else None)
    chunk = Chunk(hidden, torch.zeros(128, dtype=torch.int64, device="cuda"), head, shift)
    backend = TritonBackend(config=candidate.config())
    with suppress(Exception):
        backend._exp_logits(chunk, slice(0, 512), Out(exps, shift.new_empty(512 // candidate.tile.block_v, 128)))


def row_of(candidate: Candidate, work: Work) -> Row:
    """The row of a candidate, with its form and tile by name. Its yardstick, ``floor_ms``, is the plain product."""
    n, (form, tile, capped) = work.targets.numel(), candidate
    figures = {"rows": n, "form": form, "capped": capped, **tile._asdict()}
    return Row(work.case.name, f"{n} rows", provider=str(candidate), targets=n, task="tune", figures=figures)


def make_work(case: Case, device: torch.device) -> list[Work]:
    """One head and its rows, few before many: the few are the first of the many."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # the interpreter multiplies float32 alone
    weight = torch.empty((case.vocab, case.features), dtype=dtype, device=device)
    weight.normal_(0, WEIGHT_STD, generator=generator)
    targets = torch.randint(case.vocab, (max(ROWS[device.type]),), generator=generator, device=device)
    hidden = make_hidden(weight, targets, STATES["trained-like"], case.softcap, generator)
    head = Head(weight, None, 1.0, case.softcap)
    shift = head.cap((hidden.float() * weight[targets].float()).sum(1))
    works = []
    for n in ROWS[device.type]:
        sample = torch.linspace(0, n - 1, min(n, SAMPLE_ROWS), device=device).long()
        some, slices = hidden[sample].float(), weight.split(SAMPLE_TOKENS)
        logits = torch.cat([reference.logits(some, part.float(), softcap=case.softcap) for part in slices], 1)
        exps = (logits - shift[sample, None]).exp().scatter_(1, targets[sample, None], 0.0)
        total = exps.sum(1, dtype=torch.float64)
        if case.softcap is not None:
            exps *= 1 - (logits / case.softcap) ** 2
        works.append(Work(case, hidden[:n], targets[:n], head, shift[:n], sample, exps, total))
    return works


def measure(row: Row, candidate: Candidate, work: Work) -> Row:
    """The backend's own pass over the whole vocabulary with this candidate, checked, then timed against the plain
    product in turn."""
    backend = TritonBackend(config=candidate.config())
    hidden, head = work.hidden, work.head
    if backend._choose(hidden, head) != candidate[:2]:
        raise ValueError(f"rows of {hidden.shape[1]} features are not 16-byte aligned, so another form would run")
    n, tiles = hidden.shape[0], -(-head.vocab // candidate.tile.block_v)
    exps = _new_exp_logits(n, head.vocab, hidden).fill_(math.nan)  # an entry that nobody writes shall fail the check
    sums = work.shift.new_full((tiles, n), math.nan)
    chunk, out = Chunk(hidden, work.targets, head, work.shift), Out(exps, sums)
    everything = slice(0, head.vocab)

    def step() -> None:
        backend._exp_logits(chunk, everything, out)

    step()
    # Against float32, row by row; a NaN is no error allowed.
    found, sum_of_tiles = exps[work.sample].float(), sums[:, work.sample].sum(0, dtype=torch.float64)
    error = ((found - work.exps).norm(dim=1) / work.exps.norm(dim=1)).max().item()
    sum_error = (sum_of_tiles / work.total - 1).abs().max().item()
    allowed = SUM_ERROR + torch.finfo(exps.dtype).eps
    if not (error <= allowed and sum_error <= SUM_ERROR):
        sums_said = f"its sums {sum_error:.1e} (allowed {SUM_ERROR:.1e})"
        return row.with_(status="wrong", reason=f"E has error {error:.1e} (allowed {allowed:.1e}), {sums_said}")
    logits = torch.empty_like(exps)

    def plain() -> None:
        torch.mm(hidden, head.weight.T, out=logits)

    # Nothing waits in between, so that starting a kernel costs no time.
    times, floors = in_turn([step, plain], hidden.device, repeats=REPEATS, warm_up=WARM_UP, wait=False)
    return row.with_(status="ok", **summary(times, floors))


def print_rows(rows: Sequence[Row], arch: str) -> None:
    """The best of each head and number of rows, what came to nothing, and the row that the table should have."""
    found = frame(rows)
    for (case, n), members in found.groupby(["case", "targets"]):
        print(f"\n{case}, {n} rows: ms, of a plain product in turn, ratio")
        print(text(members.nsmallest(BEST, "ratio")[SHOWN].dropna()))
    for note, members in found[found.note != ""].groupby("note"):
        names = sorted(set(members.provider))
        print(f"{len(names)} candidates ({names[0]} ...): {note}")
    for capped in (False, True):
        if some := [row for row in rows if row.figures["capped"] == capped]:
            print(suggestion(some, arch))


def suggestion(rows: Sequence[Row], arch: str) -> str:
    """The tile with the smallest worst ratio, as the table's own text. One tile serves every number of rows."""
    found = frame(rows)
    kind = "with" if rows[0].figures["capped"] else "without"
    everywhere = found.groupby("provider").ratio.count() == found.groupby(["case", "targets"]).ngroups
    worst = found.groupby("provider").ratio.max()[everywhere]
    if worst.empty:
        return f"# no candidate {kind} a softcap ran on every head and number of rows: give it more --seconds"
    best = max((row for row in rows if row.provider == worst.idxmin()), key=lambda row: row.ratio or 0.0)
    n, v, h, *others = (best.figures[name] for name in Tile._fields)
    settings = ", ".join(f"{name}={value}" for name, value in zip(Tile._fields[3:], others, strict=True))
    name = CONSTANTS.get(arch, "_TILE") + ("_CAPPED" if best.figures["capped"] else "")
    form = best.figures["form"]
    name = name.replace("_CAPPED", "") + "_GLUON" if form == "gluon" else name
    # The library's pass over the products has one tile for every chip.
    line = 'form="library"' if form == "library" else f"{name} = Tile({n}, {v}, {h}, {settings})"
    where = f"{best.case}, {best.targets} rows"
    evidence = f"{best.ratio:.3f} of a plain product at worst ({where}); {best.device}, {best.date}"
    return f"# {form}, {kind} a softcap: {evidence}\n{line}"
