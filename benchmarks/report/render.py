"""Figures in the documents come from records, by this, and from nowhere else.

A document holds ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks -->``; what is between them is written here. NAME
is a table's, see ``TABLES``, with ``cpu-`` (as without) or ``gpu-`` before it: the newest record of that class of
machine fills it. Without such a record it stays as it is. ``compiled`` alone belongs to no machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import accuracy, record, report, targets
from benchmarks.compile import CompileRow
from benchmarks.machine import ROOT
from benchmarks.providers import FLOOR
from benchmarks.report import number
from benchmarks.rows import Record, Row

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "kernels.md")
PICTURES = ROOT / "docs" / "images"
MARKED = re.compile(r"(<!-- benchmarks:([a-z0-9-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
HEADLINES = {"cpu": ("qwen2.5-0.5b-cpu", "ragged-cpu"), "gpu": ("llama3-8b", "ultrafeedback")}


def render(documents: Sequence[Path] = DOCUMENTS, pictures: Path = PICTURES) -> list[Path]:
    """Write what differs; returns what was written."""
    written = []
    records = record.newest()
    for path in documents:
        if path.exists() and (text := filled(path.read_text(), records)) != path.read_text():
            path.write_text(text)
            written.append(path)
    for machine_class, (source, found) in records.items():
        picture = pictures / f"{machine_class}.png"
        if found.rows and _source_in(picture) != _digest(source):
            from benchmarks.plot import plot

            plot(_pictured(found.rows), picture, _digest(source))
            written.append(picture)
    return written


def stale(documents: Sequence[Path] = DOCUMENTS, pictures: Path = PICTURES) -> list[str]:
    """What ``render`` would change, in words. A picture is judged by the record it names, not by its pixels."""
    records = record.newest()
    found = [
        f"{path.name} differs from the newest record"
        for path in documents
        if path.exists() and filled(path.read_text(), records) != path.read_text()
    ]
    for machine_class, (source, kept) in records.items():
        picture = pictures / f"{machine_class}.png"
        if kept.rows and _source_in(picture) != _digest(source):
            found.append(f"{picture.name} is not drawn from {source.name}")
    return found


def filled(text: str, records: dict[str, tuple[Path, Record]]) -> str:
    """The document with every marked place written anew.

    Raises:
        ValueError: a marker names no table.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] == "compiled":
            return f"{match[1]}{_compiled()}\n{match[3]}"
        full = match[2] if match[2].startswith(tuple(f"{kind}-" for kind in HEADLINES)) else f"cpu-{match[2]}"
        machine_class, _, name = full.partition("-")
        if name not in TABLES:
            raise ValueError(f"marker benchmarks:{match[2]} names no table; there are {', '.join(TABLES)}")
        if machine_class not in records:
            return match[0]
        return f"{match[1]}{TABLES[name](machine_class, records[machine_class][1])}\n{match[3]}"

    return MARKED.sub(table, text)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


HEADLINE = ("provider", "ms", "time / ours", "time / floor", "peak MiB", "RSS MiB", "gradient error", "")


def _headline(machine_class: str, found: Record) -> str:
    """The claim: one case, every provider, fastest first."""
    return _where(found) + _markdown(HEADLINE, _headline_rows(machine_class, found))


def _readme(machine_class: str, found: Record) -> str:
    """The headline without the columns that need explaining. Nobody is left out."""
    shown = (0, 1, 2, 3, 4, 7)
    rows = [[row[column] for column in shown] for row in _headline_rows(machine_class, found)]
    return _where(found) + _markdown([HEADLINE[column] for column in shown], rows)


def _headline_rows(machine_class: str, found: Record) -> list[tuple[str, ...]]:
    members = report.in_order(row for row in found.rows if _is_headline(machine_class, row))
    ours = next((row.median_ms for row in members if row.provider == "ours"), None)
    return [
        (
            row.provider,
            number(row.median_ms),
            number(row.median_ms / ours if row.median_ms and ours else None, ".2f"),
            number(row.ratio, ".2f"),
            number(row.peak_mib),
            number(row.peak_rss_mib),
            number(row.err_weight, ".1e"),
            "" if row.status == "ok" else f"{row.status}: {row.reason}",
        )
        for row in members
    ]


def _race(_: str, found: Record) -> str:
    """Every row of the record."""
    parts = [_where(found).rstrip("\n") + "\n"]
    for group, members in report.groups(found.rows):
        parts.append(f"**{report.title(group)}**\n\n" + _markdown(report.HEADER, map(report.cells, members)) + "\n")
    return "\n".join(parts).rstrip()


def _beaten(_: str, found: Record) -> str:
    """Where somebody else is faster or leaner than ours, by how much."""
    rows = []
    for mine, other, what in report.losses_to_others(found.rows):
        if what == "time":
            by = f"{number(other.median_ms)} ms against {number(mine.median_ms)} ms"
        else:
            by = f"{number(other.peak_mib)} MiB against {number(mine.peak_mib)} MiB"
        rows.append((report.title(mine.group), other.provider, what, by))
    if not rows:
        return _where(found) + "No provider is faster or leaner than `ours` on any row of this record."
    return _where(found) + _markdown(("measurement", "provider", "better in", "by"), rows)


def _accuracy(_: str, found: Record) -> str:
    """One line a regime: naive and ours of each quantity; what exceeds its bound says so."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in found.accuracy:
        line = lines.setdefault((row.dtype, row.regime), [row.dtype, f"{row.mean_logp:.1e}"])
        line += [f"{row.naive:.1e}", f"{row.ours:.1e}" + ("" if row.holds else f" (allowed {row.allowed:.1e})")]
    header = ["dtype", "mean logp"]
    header += [f"{quantity}: {whose}" for quantity in accuracy.QUANTITIES for whose in ("naive", "ours")]
    return _where(found) + _markdown(header, lines.values())


def _picture(machine_class: str, _: Record) -> str:
    return f"![Time over the floor and peak memory by provider, and both as sequences grow](images/{machine_class}.png)"


def _targets(machine_class: str, found: Record) -> str:
    """What was promised beside what was measured, as factors: larger is better."""
    rows = [(*verdict[:3], verdict.word) for verdict in targets.verdicts(machine_class, found)]
    return _where(found) + _markdown(("claim", "bound", "measured", "holds"), rows)


def _checks(_: str, found: Record) -> str:
    """What was proven beside the race."""
    rows = [
        (check.name, check.status, number(check.seconds), check.detail.splitlines()[0] if check.detail else "")
        for check in found.checks
    ]
    return _where(found) + _markdown(("check", "status", "seconds", "its last words"), rows)


TABLES: dict[str, Callable[[str, Record], str]] = {
    "readme": _readme,
    "headline": _headline,
    "targets": _targets,
    "picture": _picture,
    "race": _race,
    "beaten": _beaten,
    "accuracy": _accuracy,
    "checks": _checks,
}


def _compiled() -> str:
    """The score GEMMs of the newest compilation, and what all of its binaries come to."""
    rows = [CompileRow(**row) for row in json.loads(max((record.RESULTS / "compiled").glob("*.json")).read_text())]
    bad = sum(1 for row in rows if row.problem)
    shown = [
        (row.target, row.kernel, row.config, str(row.registers), str(row.shared_bytes), row.tensor_core)
        for row in rows
        if row.kernel.startswith("score_")
    ]
    said = f"{len(rows)} binaries with triton {rows[0].triton}, {bad} with a problem; these are the score GEMMs.\n\n"
    return said + _markdown(("chip", "kernel", "configuration", "registers", "shared bytes", "tensor core"), shown)


def _where(found: Record) -> str:
    versions = sorted({row.torch for row in found.rows})
    return f"Recorded on {found.date} on {found.machine}, torch {', '.join(versions)}, commit {found.commit}.\n\n"


def _is_headline(machine_class: str, row: Row) -> bool:
    case, batch = HEADLINES[machine_class]
    return (row.case, row.batch, row.dtype, row.head, row.phase, row.states) == (
        case, batch, "bfloat16", "trainable", "full", "trained-like",
    )  # fmt: skip


def _pictured(rows: Sequence[Row]) -> list[Row]:
    """The headline and the growth with length; every other group would be a picture of the same shape."""
    chosen = [
        row for row in rows if any(_is_headline(kind, row) for kind in HEADLINES) or row.batch.startswith("length-")
    ]
    return chosen if any(row.median_ms and row.provider != FLOOR for row in chosen) else list(rows)


def _digest(source: Path) -> str:
    return f"{source.name} sha256 {hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"


def _source_in(picture: Path) -> str | None:
    """The "Source" text of a PNG, read from its chunks: length, type, data, checksum."""
    if not picture.exists():
        return None
    data, at = picture.read_bytes(), 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and body.startswith(b"Source\0"):
            return body.split(b"\0", 1)[1].decode("latin-1")
        at += size + 12
    return None
