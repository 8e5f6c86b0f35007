"""Rows as text: tables in a terminal, two records side by side, and what the figures say about each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.compile import CompileRow
from benchmarks.providers import FLOOR, NAMES
from benchmarks.rows import AccuracyRow, Row

# Below these a difference is noise of the machine, not a property of a provider. docs/performance.md names them.
NOISE_TIME = 1.03
NOISE_MIB = 8.0


def number(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By group, and within a group the fastest first, then what has no time."""

    def key(row: Row) -> tuple[object, ...]:
        known = NAMES.index(row.provider) if row.provider in NAMES else len(NAMES)
        return (*row.group, row.median_ms is None, row.median_ms or 0.0, known)

    return sorted(rows, key=key)


def groups(rows: Iterable[Row]) -> list[tuple[tuple[str, ...], list[Row]]]:
    return [(group, list(members)) for group, members in groupby(in_order(rows), key=lambda row: row.group)]


HEADER = ("provider", "ms", "p20-p80", "x floor", "peak MiB", "RSS MiB", "err dH", "err dW", "note")


def cells(row: Row) -> tuple[str, ...]:
    """One row under ``HEADER``."""
    note = "" if row.status == "ok" else f"{row.status}: {row.reason}"
    spread = "-" if row.p20_ms is None else f"{number(row.p20_ms)}-{number(row.p80_ms)}"
    return (
        row.provider,
        number(row.median_ms),
        spread,
        number(row.ratio, ".2f"),
        number(row.peak_mib),
        number(row.peak_rss_mib),
        number(row.err_hidden, ".1e"),
        number(row.err_weight, ".1e"),
        note,
    )


def title(group: Sequence[str]) -> str:
    case, batch, states, head, dtype, phase = group
    return f"{case}, {batch}, {dtype}, head {head}, {phase}, {states} states"


def print_rows(rows: Iterable[Row], console: Console) -> None:
    """A table for each group; what has no figures follows it, with the reason in full."""
    for group, members in groups(rows):
        console.print(f"\n[bold]{title(group)}[/bold]", highlight=False)
        table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), highlight=True)
        for name in HEADER[:-1]:
            table.add_column(name, no_wrap=True, justify="left" if name == "provider" else "right")
        for row in members:
            if row.median_ms is not None:
                table.add_row(*cells(row)[:-1])
        console.print(table)
        for row in members:
            if row.status != "ok":
                console.print(f"{row.provider}: {row.status}: {row.reason}", highlight=False)


def print_accuracy(rows: Iterable[AccuracyRow], console: Console) -> None:
    table = Table("dtype", "mean logp", "quantity", "naive", "ours", "allowed", "", box=SIMPLE, highlight=True)
    for row in rows:
        verdict = "" if row.holds else "ABOVE"
        table.add_row(
            row.dtype, f"{row.mean_logp:.2g}", row.quantity, f"{row.naive:.1e}", f"{row.ours:.1e}",
            f"{row.allowed:.1e}", verdict,
        )  # fmt: skip
    console.print(table)


def print_compiled(rows: Sequence[CompileRow], console: Console) -> None:
    """One line a binary; what is wrong with any stands at the end."""
    table = Table("target", "kernel", "configuration", "registers", "spilled", "shared", "tensor core", box=SIMPLE)
    for row in rows:
        table.add_row(
            row.target, row.kernel, row.config, str(row.registers), str(row.spill_bytes), str(row.shared_bytes),
            row.tensor_core,
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(f"[red]{row.target} {row.kernel} {row.config}: {row.problem}", highlight=False)
    wrong = sum(1 for row in rows if row.problem)
    console.print(f"{len(rows)} binaries, {wrong} with a problem")


def compare(before: Iterable[Row], after: Iterable[Row], console: Console) -> None:
    """What a change did: each row of both records, as ratios after / before. Rows of one record alone are counted."""
    old = {(*row.group, row.provider): row for row in before}
    new = {(*row.group, row.provider): row for row in after}
    table = Table("measurement", "provider", "ms", "ratio", "x floor", "peak MiB", "ratio", "status", box=SIMPLE)
    for key in sorted(old.keys() & new.keys()):
        a, b = old[key], new[key]
        table.add_row(
            title(key[:-1]),
            key[-1],
            _change(a.median_ms, b.median_ms),
            _ratio(a.median_ms, b.median_ms),
            _change(a.ratio, b.ratio, ".2f"),
            _change(a.peak_mib, b.peak_mib),
            _ratio(a.peak_mib, b.peak_mib),
            a.status if a.status == b.status else f"{a.status} -> {b.status}",
        )
    console.print(table)
    for name, only in (("first", old.keys() - new.keys()), ("second", new.keys() - old.keys())):
        if only:
            console.print(f"{len(only)} rows only in the {name} record")


def _change(a: float | None, b: float | None, form: str = ".0f") -> str:
    return f"{number(a, form)} -> {number(b, form)}"


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if not a or b is None else f"{b / a:.2f}"


def losses_to_others(rows: Iterable[Row]) -> list[tuple[Row, Row, str]]:
    """Every place where somebody beats ours: (ours, the other, what about). What a reader should see first.

    Of ours the default is compared, not the best of several settings. The floor and wrong gradients are no rivals.
    """
    found: list[tuple[Row, Row, str]] = []
    for _, members in groups(rows):
        mine = next((row for row in members if row.provider == "ours" and row.status == "ok"), None)
        if mine is None or mine.median_ms is None or mine.peak_mib is None:
            continue
        for row in members:
            if row.status != "ok" or row.provider == FLOOR or row.provider.startswith("ours"):
                continue
            if row.median_ms is not None and row.median_ms * NOISE_TIME < mine.median_ms:
                found.append((mine, row, "time"))
            if row.peak_mib is not None and row.peak_mib + NOISE_MIB < mine.peak_mib:
                found.append((mine, row, "memory"))
    return found
