"""Rows as tables: what every command prints, two records side by side, and what the figures say about each other."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import pandas as pd

from benchmarks.harness.record import GROUP, AccuracyRow, Row
from benchmarks.problems.objectives import AGAINST_REFERENCE, OBJECTIVES
from benchmarks.problems.providers import FLOOR, NAMES

# Below these a difference is noise of the machine, not a property of a provider. docs/performance.md names them.
NOISE_TIME = 1.03
NOISE_MIB = 8.0

FLOATS = [field.name for field in fields(Row) if "float" in str(field.type)]
# A heading, the field under it and the form of its numbers.
RACE = {
    "provider": ("provider", ""),
    "ms": ("median_ms", ".0f"),
    "p20-p80": ("spread", ""),
    "x floor": ("ratio", ".2f"),
    "peak MiB": ("peak_mib", ".0f"),
    "RSS MiB": ("peak_rss_mib", ".0f"),
    "err dH": ("err_hidden", ".1e"),
    "err dW": ("err_weight", ".1e"),
    "note": ("note", ""),
}
RELEASED = {name: RACE[name] for name in ("provider", "ms", "p20-p80", "x floor")} | {
    "products": ("products", ".1f"),
    **{name: RACE[name] for name in ("peak MiB", "err dH", "err dW", "note")},
}


def number(value: Any, form: str = ".0f") -> str:
    """A number in its form, "-" for none, a text as it is; a small one keeps two digits."""
    if isinstance(value, str) or pd.isna(value):
        return value if isinstance(value, str) else "-"
    return format(value, ".2g" if form == ".0f" and 0 < abs(value) < 9.5 else form)


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows by group, within a group the fastest first, then what has no time."""
    found = pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(Row)])
    found = found.astype(dict.fromkeys(FLOATS, float))
    found["note"] = (found.status + ": " + found.reason).where(found.status != "ok", "")
    found["spread"] = [f"{number(a)}-{number(b)}" if a == a else "-" for a, b in found[["p20_ms", "p80_ms"]].values]
    found["products"] = [figures.get("products") for figures in found.figures]
    found["rank"] = [NAMES.index(name) if name in NAMES else len(NAMES) for name in found.provider]
    return found.sort_values([*GROUP, "median_ms", "rank"], na_position="last", kind="stable")


def cells(found: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """The named fields as text, under their headings."""
    return pd.DataFrame({name: [number(value, form) for value in found[key]] for name, (key, form) in columns.items()})


def markdown(table: pd.DataFrame) -> str:
    """For a document; nothing for a table without rows."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy()]
    said = ["| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines]
    return "\n".join(said) if len(table) else ""


def text(table: pd.DataFrame) -> str:
    """For a terminal."""
    return str(table.to_string(index=False, float_format="{:.3g}".format)) if len(table) else "nothing"


def costs(rows: Iterable[Row]) -> pd.DataFrame:
    """One line for each loss: our time and memory, and of the others how many times as long and their memory. Compared
    are times over the floor, so that the speed of the machine, which varies, is in none of it."""
    lines: dict[str, dict[str, str]] = {}
    for _, members in groups(frame(rows)):
        fine = members[members.peak_mib.notna()].set_index("provider")
        if "ours" not in fine.index:
            continue
        name = type(OBJECTIVES[members.task.iloc[0]]).__name__
        mine, line = fine.loc["ours"], lines.setdefault(f"[{name}](#{name.lower()})", {})
        line["ours"] = f"{number(mine.median_ms)} ms, {number(mine.peak_mib)} MiB"
        for name, package in (("naive", "torch"), ("trl", "TRL"), ("liger", "Liger"), ("liger_eager", "Liger")):
            if name in fine.index:
                other = fine.loc[name]
                said = f"x {number(other.ratio / mine.ratio, '.1f')}, {number(other.peak_mib)} MiB"
                line[f"{name} ({package} {other.provider_version})"] = said
    return pd.DataFrame([{"loss": name, **line} for name, line in lines.items()]).fillna("-")


def groups(found: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each group's title and rows."""
    for _, members in found.groupby(list(GROUP), sort=False):
        yield title(members.iloc[0]), members


def title(row: Any) -> str:
    task = {"loss": "", "logprobs": "log-probabilities, "}.get(row["task"], f"{row['task']}, ")
    task += "a reference's forward within, " if row["task"] in AGAINST_REFERENCE else ""
    case, batch, states, head, dtype, phase, *_ = (row[name] for name in GROUP)
    return f"{task}{case}, {batch}, {dtype}, head {head}, {phase}, {states} states"


def print_rows(rows: Iterable[Row]) -> None:
    """A table for each group; what has no figures follows it, with the reason in full."""
    for name, members in groups(frame(rows)):
        print(f"\n{name}\n{text(cells(members[members.median_ms.notna()], RACE).drop(columns='note'))}")
        for row in members[members.note != ""].itertuples():
            print(f"{row.provider}: {row.note}")


def print_accuracy(rows: Iterable[AccuracyRow]) -> None:
    print(text(pd.DataFrame([{**asdict(row), "": "" if row.holds else "ABOVE"} for row in rows])))


def compare(before: Iterable[Row], after: Iterable[Row]) -> str:
    """What a change did: each row of both records, as ratios after / before. Rows of one record alone are counted."""
    both = frame(before).merge(
        frame(after), on=[*GROUP, "provider"], how="outer", suffixes=("", "_after"), indicator="side"
    )

    def change(row: Any, name: str, form: str) -> str:
        return f"{number(row[name], form)} -> {number(row[f'{name}_after'], form)}"

    def ratio(row: Any, name: str) -> str:
        return number(row[f"{name}_after"] / row[name] if row[name] else None, ".2f")

    lines = []
    for _, row in both[both.side == "both"].iterrows():
        status = row.status if row.status == row.status_after else change(row, "status", "")
        time = change(row, "median_ms", ".0f"), ratio(row, "median_ms"), change(row, "ratio", ".2f")
        memory = change(row, "peak_mib", ".0f"), ratio(row, "peak_mib")
        lines.append((title(row), row.provider, *time, *memory, status))
    header = ["measurement", "provider", "ms", "ratio", "x floor", "peak MiB", "ratio", "status"]
    said = [text(pd.DataFrame(lines, columns=header))]
    for side, name in (("left_only", "first"), ("right_only", "second")):
        if count := (both.side == side).sum():
            said.append(f"{count} rows only in the {name} record")
    return "\n".join(said)


def beaten(rows: Iterable[Row]) -> pd.DataFrame:
    """Every place where somebody is faster or leaner than ours, by how much. Of ours the default is compared, not the
    best of several settings; the floor and wrong gradients are no rivals."""
    lines = []
    for name, members in groups(frame(rows)):
        fine = members[members.status == "ok"]
        for mine in fine[(fine.provider == "ours") & fine.peak_mib.notna()].itertuples():
            for row in fine[(fine.provider != FLOOR) & ~fine.provider.str.startswith("ours")].itertuples():
                if row.median_ms * NOISE_TIME < mine.median_ms:
                    by = f"{number(row.median_ms)} ms against {number(mine.median_ms)} ms"
                    lines.append((name, row.provider, "time", by))
                if row.peak_mib + NOISE_MIB < mine.peak_mib:
                    by = f"{number(row.peak_mib)} MiB against {number(mine.peak_mib)} MiB"
                    lines.append((name, row.provider, "memory", by))
    return pd.DataFrame(lines, columns=["measurement", "provider", "better in", "by"])
