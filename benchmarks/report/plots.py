"""Two pictures of a record: time and memory by provider, and both as sequences grow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.harness.record import Row
from benchmarks.problems.cases import BATCHES
from benchmarks.problems.providers import FLOOR, NAMES
from benchmarks.report.tables import frame, title

COLOURS = {name: plt.get_cmap("tab20")(index % 20) for index, name in enumerate(NAMES)} | {"ours": "#d62728"}
OTHERWISE_ALIKE = ["case", "states", "head", "dtype", "phase", "task", "setting"]


def plot(rows: Sequence[Row], path: Path, source: str = "") -> None:
    """Draw into a PNG whose metadata names the source of its figures."""
    figure = drawn(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})
    plt.close(figure)


def drawn(rows: Sequence[Row]) -> Any:
    """All panels that the rows can fill."""
    found = frame(row for row in rows if row.median_ms is not None)
    found["tokens"] = [BATCHES[batch].positions for batch in found.batch]
    grows = found.batch.str.startswith("length-")
    compared = [members for _, members in found[~grows].groupby([*OTHERWISE_ALIKE, "batch"], sort=False)]
    growing = [members for _, members in found[grows].groupby(OTHERWISE_ALIKE, sort=False)]
    panels = [(_bars, members) for members in compared]
    panels += [(_lines, members) for members in growing if members.tokens.nunique() > 1]
    if not panels:
        raise ValueError("no row has a time, so there is nothing to plot")
    with plt.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.fontsize": 7}):
        size = (11, 3.4 * len(panels))
        figure, axes = plt.subplots(len(panels), 2, figsize=size, squeeze=False, layout="constrained")
        for (left, right), (draw, members) in zip(axes, panels, strict=True):
            draw(left, right, members)
    return figure


def _bars(left: Any, right: Any, members: pd.DataFrame) -> None:
    rivals = members[members.provider != FLOOR][::-1]
    colours = [COLOURS.get(name, "grey") for name in rivals.provider]
    times = left.barh(rivals.provider, rivals.ratio, color=colours)
    left.bar_label(times, [f" {milliseconds:.0f} ms" for milliseconds in rivals.median_ms])
    left.axvline(1, color="black", linestyle=":", linewidth=1)
    left.set(title=title(members.iloc[0]), xlabel="time / floor (dotted: the products alone)")
    sizes = right.barh(rivals.provider, rivals.peak_mib.fillna(0), color=colours)
    right.bar_label(sizes, fmt=" %.0f")
    right.set(xlabel="peak MiB beyond inputs and returned gradients")
    left.margins(x=0.2)
    right.margins(x=0.15)


def _lines(left: Any, right: Any, members: pd.DataFrame) -> None:
    lengths = sorted(members.tokens.unique())
    for name in sorted(members.provider.unique(), key=list(NAMES).index):
        line = members[members.provider == name].sort_values("tokens")
        style = {"color": "black", "linestyle": ":"} if name == FLOOR else {"color": COLOURS[name], "marker": "."}
        left.plot(line.tokens, line.median_ms, label=name, **style)
        if name != FLOOR:
            right.plot(line.tokens, line.peak_mib.fillna(0).clip(lower=1.0), label=name, **style)
    left.set(title=title({**members.iloc[0], "batch": "one pair"}), ylabel="ms")
    right.set(ylabel="peak MiB beyond inputs and gradients")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="tokens a side")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    # Beside both panels: inside one it would cover a line.
    right.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0)
