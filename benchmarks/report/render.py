"""Figures in the documents come from records, by this, and from nowhere else.

A document holds ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks -->``; what is between them is written here. NAME
is a table's, see ``TABLES``, with ``cpu-`` (as without) or ``gpu-`` before it: the newest record of that class of
machine fills it, unless an older one says more (see ``newest``). A table that the record has nothing for stays as it
is. ``compiled``, ``family`` and ``train`` alone are of no class of machine.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from PIL import Image

from benchmarks import accuracy
from benchmarks.harness.machine import ROOT
from benchmarks.harness.record import Record, Row
from benchmarks.lab import train
from benchmarks.lab.compile import problem
from benchmarks.problems.cases import LOGITS_TASKS, OBJECTIVE_TASKS
from benchmarks.problems.providers import FLOOR
from benchmarks.problems.sections import sections
from benchmarks.race import RESULTS
from benchmarks.report import family, promises, tables
from benchmarks.report.plots import plot

DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("performance", "compiled", "objectives")))
PICTURES = ROOT / "docs" / "images"
MARKED = re.compile(r"(<!-- benchmarks:([a-z0-9-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
HEADLINES = {"cpu": ("qwen2.5-0.5b-cpu", "ragged-cpu"), "gpu": ("llama3-8b", "ultrafeedback")}
README = {
    "provider": ("provider", ""),
    "ms": ("median_ms", ".0f"),
    "time / ours": ("over_ours", ".2f"),
    "time / floor": ("ratio", ".2f"),
    "peak MiB": ("peak_mib", ".0f"),
    "": ("note", ""),
}
HEADLINE = {**README, "RSS MiB": ("peak_rss_mib", ".0f"), "gradient error": ("err_weight", ".1e")}
HEADLINE[""] = HEADLINE.pop("")  # notes stand last
OTHER_CONTENTS = ("accuracy", "checks")
# Tables of tasks that are no race of the one loss.
APART = {"logprobs": ("logprobs",), "lazy": LOGITS_TASKS, "objectives": OBJECTIVE_TASKS}
TABLES = ("readme", "headline", "targets", "picture", "race", *APART, "costs", "beaten", "accuracy", "checks")


def newest() -> tuple[dict[str, tuple[Path, Record]], list[str]]:
    """The record that speaks for each class of machine, "cpu" and "gpu", and why newer ones do not: one of a few
    sections alone (``record --only``) says nothing about the others, so it must not empty their tables. Tables of
    ``APART`` have the newest record with rows of theirs, as "cpu-lazy"."""
    chosen: dict[str, tuple[Path, Record]] = {}
    refused = []
    found = [(path, Record.load(path)) for path in RESULTS.glob("*.json")]
    for path, record in sorted(found, key=lambda entry: (entry[1].date, entry[0].name)):
        machine_class = "cpu" if path.name.startswith("cpu-") else "gpu"
        for table, tasks in APART.items():
            if any(row.task in tasks for row in record.rows):
                chosen[f"{machine_class}-{table}"] = path, record
        asked = {row.key for rows in sections("cpu" if machine_class == "cpu" else "cuda").values() for row in rows}
        asked = {key for key in asked if "loss" in key}
        older, known = chosen.get(machine_class, (path, record)), _contents(record)
        if lost := (_contents(older[1]) & {*asked, *OTHER_CONTENTS}) - known:
            refused.append(f"{path.name} lacks {len(lost)} of the measurements in {older[0].name}, which stays shown")
        else:
            chosen[machine_class] = path, record
    return chosen, refused


def _contents(found: Record) -> set[object]:
    return {*(row.key for row in found.rows), *(name for name in OTHER_CONTENTS if getattr(found, name))}


def render(documents: Sequence[Path] = DOCUMENTS, pictures: Path = PICTURES, *, write: bool = True) -> list[Path]:
    """Write what differs, and return its paths; without ``write`` only return them. The record that a picture names
    judges it, not its pixels."""
    differing = []
    records, _ = newest()
    for path in documents:
        if path.exists() and (text := filled(path.read_text(), records)) != path.read_text():
            differing.append(path)
            if write:
                path.write_text(text)
    drawings: dict[str, tuple[str, Callable[[Path, str], None]]] = {}
    for name in HEADLINES:
        source, found = records.get(name, (Path(), Record()))
        if found.rows:
            digest = f"{source.name} sha256 {hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
            drawings[name] = digest, partial(plot, _pictured(found.rows))
    if any(path.exists() and "benchmarks:family" in path.read_text() for path in documents):
        drawings["objectives"] = family.digest(), family.draw
    for name, (digest, draw) in drawings.items():
        if _source_in(picture := pictures / f"{name}.png") != digest:
            differing.append(picture)
            if write:
                draw(picture, digest)
    return differing


def filled(text: str, records: dict[str, tuple[Path, Record]]) -> str:
    """The document with every marked place written anew; ValueError for a marker that names no table."""

    def table(match: re.Match[str]) -> str:
        if match[2] in (of_none := {"compiled": _compiled, "train": _trained, "family": family.page}):
            return f"{match[1]}{of_none[match[2]]()}\n{match[3]}"
        full = match[2] if match[2].startswith(tuple(f"{kind}-" for kind in HEADLINES)) else f"cpu-{match[2]}"
        machine_class, _, name = full.partition("-")
        if name not in TABLES:
            raise ValueError(f"marker benchmarks:{match[2]} names no table; there are {', '.join(TABLES)}")
        whole = full.replace("costs", "objectives")  # of which they are the sum
        _, found = records.get(whole) or records.get(machine_class) or (None, Record())
        versions = ", ".join(sorted({row.torch for row in found.rows if row.torch}))
        where = f"Recorded on {found.date} on {found.machine}, torch {versions}, commit {found.commit}.\n\n"
        shown = shown_as(name, machine_class, found)
        return f"{match[1]}{where if name != 'picture' else ''}{shown}\n{match[3]}" if shown else match[0]

    return MARKED.sub(table, text)


def shown_as(name: str, machine_class: str, found: Record) -> str:
    """One of ``TABLES`` of a record; "" where the record has nothing for it."""
    table = pd.DataFrame()
    match name:
        case "readme" | "headline":  # the claim: one case, every provider, fastest first
            members = tables.frame(row for row in found.rows if _is_headline(machine_class, row))
            ours = members[members.provider == "ours"].median_ms
            members["over_ours"] = members.median_ms / (ours.iloc[0] if len(ours) else float("nan"))
            table = tables.cells(members, README if name == "readme" else HEADLINE)
        case "race" | "logprobs" | "lazy" | "objectives":  # every row of the record
            members = tables.frame(row for row in found.rows if row.task in APART.get(name, ("loss",)))
            columns = tables.RELEASED if name == "objectives" else tables.RACE
            parts = [(title, tables.markdown(tables.cells(part, columns))) for title, part in tables.groups(members)]
            return "\n\n".join(f"**{title}**\n\n{part}" for title, part in parts)
        case "costs":
            table = tables.costs(row for row in found.rows if row.task in OBJECTIVE_TASKS)
        case "targets" if found.rows:  # what was promised beside what was measured, as factors: larger is better
            words = {None: "not measured", True: "yes", False: "no"}
            table = pd.DataFrame(promises.verdicts(machine_class, found)).replace({"holds": words})
        case "beaten" if found.rows:
            table = tables.beaten(found.rows)
            if table.empty:
                return "No provider is faster or leaner than `ours` on any row of this record."
        case "accuracy":  # one line a regime: naive and ours of each quantity; what exceeds its bound says so
            lines: dict[tuple[str, str], list[str]] = {}
            for row in found.accuracy:
                line = lines.setdefault((row.dtype, row.regime), [row.dtype, f"{row.mean_logp:.1e}"])
                line += [f"{row.naive:.1e}", f"{row.ours:.1e}" + ("" if row.holds else f" (allowed {row.allowed:.1e})")]
            header = [f"{quantity}: {whose}" for quantity in accuracy.QUANTITIES for whose in ("naive", "ours")]
            table = pd.DataFrame(lines.values(), columns=["dtype", "mean logp", *header])
        case "checks":  # what was proven beside the race
            proven = [(one.name, one.status, f"{one.seconds:.0f}", one.detail.split("\n")[0]) for one in found.checks]
            table = pd.DataFrame(proven, columns=["check", "status", "seconds", "its last words"])
        case "picture" if found.rows:
            alternative = "Time over the floor and peak memory by provider, and both as sequences grow"
            return f"![{alternative}](images/{machine_class}.png)"
    return tables.markdown(table)


def _compiled() -> str:
    """The exp GEMMs of the newest compilation, and what all of its binaries come to."""
    found = pd.read_json(max((RESULTS / "compiled").glob("*.json")))
    bad = sum(bool(problem(row)) for row in found.to_dict("records"))
    shown = found[found.kernel.str.startswith("exp_gemm")]
    table = shown[["target", "kernel", "config", "registers", "instructions", "shared_bytes", "tensor_core"]].fillna("")
    table.columns = ["chip", "kernel", "configuration", "registers", "instructions", "shared bytes", "tensor core"]
    said = f"{len(found)} binaries with triton {found.triton[0]}, {bad} with a problem; these are the exp GEMMs.\n\n"
    return said + tables.markdown(table)


def _trained() -> str:
    """Whole training steps of the newest record of them."""
    found = Record.load(max((RESULTS / "train").glob("*.json"), key=lambda path: path.stem[-10:]))
    where = f"Recorded on {found.date} on {found.machine}, torch {found.rows[0].torch}"
    return f"{where}, {found.rows[0].provider_version}.\n\n" + tables.markdown(train.table(found.rows))


def _is_headline(machine_class: str, row: Row) -> bool:
    return row.group == (*HEADLINES[machine_class], "trained-like", "trainable", "bfloat16", "full", "loss", "")


def _pictured(rows: Sequence[Row]) -> list[Row]:
    """The headline and the growth with length; every other group would be a picture of the same shape."""
    loss = [row for row in rows if row.task == "loss"]
    chosen = [row for row in loss if row.batch.startswith("length-") or any(_is_headline(k, row) for k in HEADLINES)]
    return chosen if any(row.median_ms and row.provider != FLOOR for row in chosen) else loss


def _source_in(picture: Path) -> str | None:
    """The "Source" that a PNG's metadata names."""
    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get("Source")
