"""What was promised, as data, and what a record says about it."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from benchmarks.accuracy import QUANTITIES
from benchmarks.harness.record import AccuracyRow, Record, Row
from benchmarks.problems.cases import BATCHES, CASES, HEADS
from benchmarks.problems.providers import FLOOR
from benchmarks.problems.sections import GPU_BATCHES, GPU_CASES
from benchmarks.report.tables import number

GIB_IN_MIB = 1024.0
CONFIDENT = -0.5  # nats: above this mean log-probability a model is sure of most of its tokens


class Verdict(NamedTuple):
    claim: str
    bound: str
    measured: str
    holds: bool | None  # None: not measured


class Promise(NamedTuple):
    """The figure of ``other`` over that of ``provider`` is at least ``bound``; without ``other``, the figure itself is
    at most ``bound``. The floor is timed in turn with whom it is compared."""

    claim: str
    group: tuple[str, ...]
    bound: float
    other: str = ""
    figure: str = "median_ms"  # a field of Row
    provider: str = "ours"


def _group(case: str, batch: str, head: str, dtype: str = "bfloat16", phase: str = "full") -> tuple[str, ...]:
    return Row(case, batch, "trained-like", head, dtype, phase).group


def _on_cpu() -> Iterable[Promise]:
    large = _group("qwen2.5-0.5b-cpu", "ragged-cpu", "trainable")
    yield Promise("floor / time, bfloat16, V 128256", large, 1 / 1.25, FLOOR)
    yield Promise("faster than Liger uncompiled, bfloat16, V 128256", large, 5, "liger_eager")
    yield Promise("faster than naive, bfloat16, V 128256", large, 3.5, "naive")
    yield Promise("less memory of the process than naive, bfloat16, V 128256", large, 3, "naive", "peak_rss_mib")
    for case, vocab, least in (("qwen2.5-0.5b-cpu", 128256, 1.5), ("small-v32k-cpu", 32000, 1)):
        group = _group(case, "ragged-cpu", "trainable", "float32")
        yield Promise(f"faster than naive, float32, V {vocab}", group, least, "naive")


# How many times faster than whom, on ragged batches.
RIVALS = {"naive": 1.5, "compiled": 1.5, "cce": 1.5, "trl_fused": 1.5, "liger": 5.0, "liger_eager": 5.0}


def _on_gpu() -> Iterable[Promise]:
    for case in GPU_CASES:
        accumulator = 4 * CASES[case].vocab * CASES[case].features / 2**20
        for batch in GPU_BATCHES:
            ragged = batch == "ultrafeedback"
            for head in HEADS:
                where, group, trains = f"{case}, {batch}, {head}", _group(case, batch, head), head == "trainable"
                yield Promise(f"floor / time, {where}", group, 1 / (1.10 if trains else 1.15), FLOOR)
                yield Promise(f"memory, {where}", group, GIB_IN_MIB + accumulator * trains, figure="peak_mib")
                for rival, on_ragged in RIVALS.items():
                    yield Promise(f"faster than {rival}, {where}", group, on_ragged if ragged else 1.0, rival)
            where, group = f"{case}, {batch}, trainable in 1 GiB", _group(case, batch, "trainable")
            yield Promise(f"memory, {where}", group, GIB_IN_MIB, figure="peak_mib", provider="ours_recompute")
            if BATCHES[batch].targets * CASES[case].vocab * 2 > 2**30:  # E does not fit and is computed again: 4 passes
                yield Promise(f"floor / time, {where}", group, 3 / 4 / 1.10, FLOOR, provider="ours_recompute")
            evaluation = _group(case, batch, "trainable", phase="forward")
            yield Promise(f"floor / time, {case}, {batch}, evaluation", evaluation, 1 / 1.15, FLOOR)
            yield Promise(f"memory, {case}, {batch}, evaluation", evaluation, GIB_IN_MIB, figure="peak_mib")


PROMISES = {"cpu": tuple(_on_cpu()), "gpu": tuple(_on_gpu())}


def verdicts(machine_class: str, found: Record) -> list[Verdict]:
    """Every claim about such a machine beside what the record holds."""
    rows = {row.key: row for row in found.rows}
    out = [_verdict(promise, rows) for promise in PROMISES[machine_class]]
    return out if machine_class == "cpu" else [*out, *_accurate(found.accuracy)]


def _verdict(promise: Promise, rows: dict[tuple[str, ...], Row]) -> Verdict:
    ours, other = rows.get((*promise.group, promise.provider)), rows.get((*promise.group, promise.other))
    mine, theirs = (None if row is None else getattr(row, promise.figure) for row in (ours, other))
    if not promise.other:
        bound = f"at most {promise.bound:.0f} MiB"
        measured = "-" if mine is None else f"{mine:.0f} MiB"
        return Verdict(promise.claim, bound, measured, None if mine is None else mine <= promise.bound)
    if promise.other == FLOOR and ours is not None:
        theirs = ours.floor_ms  # timed in turn with ours, not minutes apart
    bound = f"at least {promise.bound:.2g}"
    if not mine or not theirs:
        reason = "" if other is None or other.status == "ok" else f"{other.status}: {other.reason}"
        return Verdict(promise.claim, bound, reason or "-", None)
    return Verdict(promise.claim, bound, f"{theirs / mine:.2f}", theirs / mine >= promise.bound)


def _accurate(rows: Sequence[AccuracyRow]) -> Iterable[Verdict]:
    """No larger than naive's in every regime, ten times smaller where the model is confident."""
    regimes = ("in every regime", 1.0, float("-inf")), (f"where mean logp is above {CONFIDENT}", 10.0, CONFIDENT)
    for quantity, (where, least, above) in product(QUANTITIES[1:], regimes):  # gradients
        members = [
            row for row in rows if row.quantity == quantity and row.dtype == "bfloat16" and row.mean_logp > above
        ]
        worst = min((row.naive / row.ours for row in members), default=None)
        claim, bound = f"naive's error of {quantity} over ours, {where}", f"at least {least:.2g}"
        yield Verdict(claim, bound, number(worst, ".2f"), None if worst is None else worst >= least)
