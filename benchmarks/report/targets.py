"""What was promised, as data, and what a record says about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.accuracy import QUANTITIES
from benchmarks.cases import BATCHES, CASES, HEADS
from benchmarks.providers import FLOOR
from benchmarks.rows import AccuracyRow, Record, Row

GIB_IN_MIB = 1024.0
CONFIDENT = -0.5  # nats: above this mean log-probability a model is sure of most of its tokens


class Verdict(NamedTuple):
    claim: str
    bound: str
    measured: str
    holds: bool | None  # None: not measured

    @property
    def word(self) -> str:
        return "not measured" if self.holds is None else "yes" if self.holds else "no"


class Target(NamedTuple):
    """``value`` of the other row over that of ``provider`` is at least ``least``; the floor is timed with ours."""

    claim: str
    group: tuple[str, ...]
    other: str
    value: Callable[[Row], float | None]
    least: float
    provider: str = "ours"


class Bound(NamedTuple):
    """Memory of ``provider`` beyond inputs and returned gradients is at most ``mib``."""

    claim: str
    group: tuple[str, ...]
    mib: float
    provider: str = "ours"


def _time(row: Row) -> float | None:
    return row.median_ms


def _resident(row: Row) -> float | None:
    return row.peak_rss_mib


def _group(case: str, batch: str, head: str, dtype: str = "bfloat16", phase: str = "full") -> tuple[str, ...]:
    return (case, batch, "trained-like", head, dtype, phase)


_LARGE, _SMALL = "qwen2.5-0.5b-cpu", "small-v32k-cpu"
_HEADLINE = _group(_LARGE, "ragged-cpu", "trainable")
CPU: tuple[Target | Bound, ...] = (
    Target("floor / time, bfloat16, V 128256", _HEADLINE, FLOOR, _time, 1 / 1.25),
    Target("faster than Liger uncompiled, bfloat16, V 128256", _HEADLINE, "liger_eager", _time, 5),
    Target("faster than naive, bfloat16, V 128256", _HEADLINE, "naive", _time, 3.5),
    Target("less memory of the process than naive, bfloat16, V 128256", _HEADLINE, "naive", _resident, 3),
    Target(
        "faster than naive, float32, V 128256",
        _group(_LARGE, "ragged-cpu", "trainable", "float32"), "naive", _time, 1.5,
    ),
    Target(
        "faster than naive, float32, V 32000", _group(_SMALL, "ragged-cpu", "trainable", "float32"), "naive", _time, 1
    ),
)  # fmt: skip

GPU_CASES = ("llama3-8b", "qwen2.5-7b", "gemma2-2b", "qwen2.5-0.5b")
GPU_BATCHES = ("dense", "ultrafeedback")
RIVALS = ("naive", "compiled", "cce", "trl_fused")
LIGER = ("liger", "liger_eager")


def _gpu() -> Iterable[Target | Bound]:
    for case in GPU_CASES:
        accumulator = 4 * CASES[case].vocab * CASES[case].features / 2**20
        for batch in GPU_BATCHES:
            for head in HEADS:
                where, group = f"{case}, {batch}, {head}", _group(case, batch, head)
                share = 1.10 if head == "trainable" else 1.15
                yield Target(f"floor / time, {where}", group, FLOOR, _time, 1 / share)
                memory = GIB_IN_MIB + (accumulator if head == "trainable" else 0)
                yield Bound(f"memory, {where}", group, memory)
                for rival in RIVALS:
                    factor = 1.5 if batch == "ultrafeedback" else 1.0
                    yield Target(f"faster than {rival}, {where}", group, rival, _time, factor)
                for liger in LIGER:
                    factor = 5.0 if batch == "ultrafeedback" else 1.0
                    yield Target(f"faster than {liger}, {where}", group, liger, _time, factor)
            group = _group(case, batch, "trainable")
            yield Bound(f"memory, {case}, {batch}, trainable in 1 GiB", group, GIB_IN_MIB, "ours_recompute")
            if BATCHES[batch].scores * CASES[case].vocab * 2 > 2**30:  # E does not fit, so it is computed again: 4 mm
                yield Target(
                    f"floor / time, {case}, {batch}, trainable in 1 GiB", group, FLOOR, _time, 3 / 4 / 1.10,
                    "ours_recompute",
                )  # fmt: skip
            evaluation = _group(case, batch, "trainable", phase="forward")
            yield Target(f"floor / time, {case}, {batch}, evaluation", evaluation, FLOOR, _time, 1 / 1.15)
            yield Bound(f"memory, {case}, {batch}, evaluation", evaluation, GIB_IN_MIB)


GPU: tuple[Target | Bound, ...] = tuple(_gpu())


def verdicts(machine_class: str, found: Record) -> list[Verdict]:
    """Every claim about such a machine beside what the record holds."""
    rows = {(*row.group, row.provider): row for row in found.rows}
    out = [
        _timed(target, rows) if isinstance(target, Target) else _bounded(target, rows)
        for target in (CPU if machine_class == "cpu" else GPU)
    ]
    return out if machine_class == "cpu" else [*out, *_accurate(found.accuracy)]


def _timed(target: Target, rows: dict[tuple[str, ...], Row]) -> Verdict:
    ours, other = rows.get((*target.group, target.provider)), rows.get((*target.group, target.other))
    mine, theirs = (None if row is None else target.value(row) for row in (ours, other))
    if target.other == FLOOR and ours is not None:
        theirs = ours.floor_ms  # timed in turn with ours, not minutes apart
    factor = theirs / mine if mine and theirs else None
    bound = f"at least {target.least:.2g}"
    if factor is None:
        reason = "" if other is None or other.status == "ok" else f"{other.status}: {other.reason}"
        return Verdict(target.claim, bound, reason or "-", None)
    return Verdict(target.claim, bound, f"{factor:.2f}", factor >= target.least)


def _bounded(target: Bound, rows: dict[tuple[str, ...], Row]) -> Verdict:
    row = rows.get((*target.group, target.provider))
    bound = f"at most {target.mib:.0f} MiB"
    if row is None or row.peak_mib is None:
        return Verdict(target.claim, bound, "-", None)
    return Verdict(target.claim, bound, f"{row.peak_mib:.0f} MiB", row.peak_mib <= target.mib)


def _accurate(rows: Sequence[AccuracyRow]) -> Iterable[Verdict]:
    """No larger than naive's in every regime, ten times smaller where the model is confident."""
    for quantity in QUANTITIES[1:]:  # gradients
        for confident in (False, True):
            members = [
                row for row in rows
                if row.quantity == quantity and row.dtype == "bfloat16" and (row.mean_logp > CONFIDENT or not confident)
            ]  # fmt: skip
            least = 10.0 if confident else 1.0
            where = f"where mean logp is above {CONFIDENT}" if confident else "in every regime"
            worst = min((row.naive / row.ours for row in members), default=None)
            claim, bound = f"naive's error of {quantity} over ours, {where}", f"at least {least:.2g}"
            if worst is None:
                yield Verdict(claim, bound, "-", None)
            else:
                yield Verdict(claim, bound, f"{worst:.2f}", worst >= least)
