"""Two pictures of a record: time and memory by provider, and both as sequences grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.cases import BATCHES
from benchmarks.providers import FLOOR, NAMES
from benchmarks.report import groups
from benchmarks.rows import Row

COLOURS = {name: plt.get_cmap("tab20")(index % 20) for index, name in enumerate(NAMES)}
OURS = "#d62728"


def colour(provider: str) -> Any:
    return OURS if provider == "ours" else COLOURS.get(provider, "grey")


def plot(rows: Sequence[Row], path: Path, source: str = "") -> None:
    """All panels that the rows can fill, in one PNG whose metadata names the source of its figures."""
    bars = [row for row in rows if not _is_length(row)]
    lines = [row for row in rows if _is_length(row)]
    compared = [(group, [row for row in found if row.ratio is not None]) for group, found in groups(bars)]
    compared = [(group, found) for group, found in compared if found]
    growing = _series(lines)
    count = len(compared) + len(growing)
    if count == 0:
        raise ValueError("no row has a time, so there is nothing to plot")
    figure, axes = plt.subplots(count, 2, figsize=(11, 3.2 * count), squeeze=False, layout="constrained")
    for (left, right), (group, found) in zip(axes, compared, strict=False):
        _bars(left, right, group, found)
    for (left, right), (group, series) in zip(axes[len(compared) :], growing, strict=True):
        _lines(left, right, group, series)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})
    plt.close(figure)


def _is_length(row: Row) -> bool:
    return row.batch.startswith("length-")


def _bars(left: Any, right: Any, group: Sequence[str], rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row.provider != FLOOR][::-1]
    names, colours = [row.provider for row in rows], [colour(row.provider) for row in rows]
    case, batch, states, head, dtype, phase = group
    times = left.barh(names, [row.ratio or 0.0 for row in rows], color=colours)
    left.bar_label(times, [f" {row.median_ms:.0f} ms" for row in rows], fontsize=8)
    left.axvline(1, color="black", linestyle=":", linewidth=1)
    left.set_title(f"{case}, {batch}, {dtype}, {head} head, {phase}, {states}", fontsize=9, loc="left")
    left.set_xlabel("time / floor (dotted: the products alone)", fontsize=8)
    sizes = right.barh(names, [row.peak_mib or 0.0 for row in rows], color=colours)
    right.bar_label(sizes, fmt=" %.0f", fontsize=8)
    right.set_xlabel("peak MiB beyond inputs and returned gradients", fontsize=8)
    for axis in (left, right):
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)


Series = dict[str, list[Row]]  # provider -> rows by length


def _series(rows: Iterable[Row]) -> list[tuple[tuple[str, ...], Series]]:
    """Rows that differ in length alone, where there is more than one length."""
    found: dict[tuple[str, ...], Series] = {}
    for row in sorted(rows, key=lambda row: BATCHES[row.batch].positions):
        if row.median_ms is not None:
            found.setdefault((row.case, *row.group[2:]), {}).setdefault(row.provider, []).append(row)
    return [(group, series) for group, series in found.items() if any(len(line) > 1 for line in series.values())]


def _lines(left: Any, right: Any, group: Sequence[str], series: Series) -> None:
    case, states, head, dtype, phase = group
    lengths = sorted({BATCHES[row.batch].positions for rows in series.values() for row in rows})
    for provider, rows in series.items():
        places = [BATCHES[row.batch].positions for row in rows]
        style = (
            {"color": "black", "linestyle": ":"} if provider == FLOOR else {"color": colour(provider), "marker": "."}
        )
        left.plot(places, [row.median_ms or 0.0 for row in rows], label=provider, **style)
        if provider != FLOOR:
            right.plot(places, [max(row.peak_mib or 0.0, 1.0) for row in rows], label=provider, **style)
    left.set_title(f"{case}, one pair, {dtype}, {head} head, {phase}, {states}", fontsize=9, loc="left")
    left.set_ylabel("ms", fontsize=8)
    right.set_ylabel("peak MiB beyond inputs and gradients", fontsize=8)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("tokens a side", fontsize=8)
        axis.tick_params(labelsize=8)
    left.legend(fontsize=7)
