"""The page that ``make gpu`` ends with: what ran, what holds, and where the time of a call goes.

A call takes the products of its floor, of which E's GEMM is one, and what is around them. Two ratios so tell why a
target is missed: that of E's GEMM to a plain product, beside what the model of its pipeline expects, and that of the
whole call to its floor, beside what the first alone would make of it.
"""

from collections.abc import Iterable

import pandas as pd
import torch

from benchmarks.harness.record import Record, Row
from benchmarks.lab import pipeline, proof, tune
from benchmarks.problems.cases import CASES, HEADS
from benchmarks.problems.floor import products
from benchmarks.report import promises, tables
from orpo_kernels.backends.kernels.configs import arch_of

# Of a measured tile over the model: up to the first the main loop is as good as the library's; from the second on its
# operands wait for L2, which the model does not know.
FINE, WAITS = 1.05, 1.08
IDLE_MS = 0.1  # of a call, in which the device waits for the host
ODD = 1.03  # of the library's products over their share of the floor

Lines = Iterable[dict[str, str]]
Tiles = dict[str, tuple[Row, float | None]]  # of a head: its tile as measured, and the ratio that the model has for it


def written(found: Record, device: torch.device, ended: str) -> str:
    """The page, as Markdown. ``ended`` says what ended the run early, if anything did."""
    ran: Lines = ({"": c.name, "status": c.status, "s": f"{c.seconds:.0f}", "detail": c.detail} for c in found.checks)
    parts = [f"# {found.machine}, {found.date}, commit {found.commit}", ended and f"Ended early: {ended}."]
    parts += [_section("Checks", ran), _section("Kinds of call that do not hold", _unproven(found.rows))]
    if device.type == "cpu":
        parts.append("Toy sizes on a CPU: no target applies, and no time means anything.")
    else:
        tiles = tiles_of(found.rows, arch_of(device))
        parts.append(_section("E's GEMM over a plain product", _gemms(tiles)))
        parts.append(_section("Where a call's time goes", _profiles(found.rows)))
        parts.append(_section("Whole calls over their floor", _calls(found.rows, tiles)))
        verdicts = promises.verdicts("gpu", found)
        missed = [{"missed": v.claim, "bound": v.bound, "measured": v.measured} for v in verdicts if v.holds is False]
        hold, unknown = (sum(v.holds is said for v in verdicts) for said in (True, None))
        parts += [
            _section("Targets", missed),
            f"{hold} targets hold, {len(missed)} are missed, {unknown} not measured.",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, lines: Lines) -> str:
    """Nothing, where there is nothing to say."""
    table = tables.markdown(pd.DataFrame(lines).replace("\n", " / ", regex=True))
    return table and f"## {title}\n\n{table}"


def _unproven(rows: Iterable[Row]) -> Lines:
    """And the changes that were tried of one."""
    for row in rows:
        if row.task == proof.TASK and (row.setting or not proof.holds(row)):
            yield {"call": row.case, "form": row.provider, "changed": row.setting, "status": row.status, "": row.reason}


def tiles_of(rows: Iterable[Row], arch: str) -> Tiles:
    """By the most rows that were timed."""
    found: Tiles = {}
    for row in sorted((row for row in rows if row.task == "tune" and row.ratio), key=lambda row: row.targets):
        case = CASES[row.case]
        capped = case.softcap is not None
        tile = tune.shipped(arch, case.features, capped=capped)
        name = tile.form + (", two programs" if tile.tile.programs == 2 else "")
        known = name in pipeline.FORMS and arch == "sm_90"  # whose cycles the model counts
        if row.provider == str(tile):
            found[row.case] = row, pipeline.ratio(name, case.features, capped=capped) if known else None
    return found


def _gemms(tiles: Tiles) -> Lines:
    for head, (row, model) in tiles.items():
        loop = None if model is None else (row.ratio or 0.0) / model
        meaning = "there is no model of this form or chip"
        if loop is not None:
            meaning = "between the two: time it again"
        if loop is not None and loop < FINE:
            meaning = "the main loop is fine, what it loses is the epilogue's"
        if loop is not None and loop > WAITS:
            meaning = "the main loop waits, most likely for L2"
        ratios = {"measured": row.ratio, "model": model, "over it": loop}
        said = {name: tables.number(ratio, ".3f") for name, ratio in ratios.items()}
        yield {"head": head, "tile": row.provider, "rows": str(row.targets), **said, "": meaning}


def _profiles(rows: list[Row]) -> Lines:
    for call in (row for row in rows if row.task == "profile" and row.provider == "whole call"):
        steps = {row.provider: row.median_ms or 0.0 for row in rows if row.group == call.group}
        idle, count = call.figures["idle_ms"], products(call.phase, trains=call.head == HEADS[0])
        said = [f"the device waits {idle:.2f} ms for the host" if idle > IDLE_MS else "the host keeps up"]
        if "reductions" in steps:
            said.append(f"{steps['reductions']:.2f} ms of reductions, of which the pass over the head is one")
        share = (call.floor_ms or 0.0) * (count - 1) / count  # without E's product
        if share and (over := steps.get("products", 0.0) / share) > ODD:
            said.append(f"the library's products take {over:.2f} of theirs in the floor: odd shapes")
        total = f"{call.figures['total_ms']:.2f}"
        yield {"head": call.case, "batch": call.batch, "ms": total, "": "; ".join(said)}


def _calls(rows: Iterable[Row], tiles: Tiles) -> Lines:
    for row in rows:
        if row.task == "loss" and row.provider == "ours" and row.ratio and row.case in tiles:
            count = products(row.phase, trains=row.head == HEADS[0])
            alone = ((tiles[row.case][0].ratio or 1.0) + count - 1) / count
            said = {"time / floor": f"{row.ratio:.3f}", "with E's GEMM alone": f"{alone:.3f}"}
            around = f"{(row.ratio - alone) * (row.floor_ms or 0.0):.2f}"
            call = ", ".join((row.case, row.batch, row.head, row.phase))
            yield {"call": call, **said, "ms around the products": around}
