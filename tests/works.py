"""What works with what: every test marked ``works`` is a cell of a table, and no cell has another source.

``@pytest.mark.works("FSDP2, head in its own unit", by="lazy logits")`` says which row and column a test stands for,
with ``outcome="refused"`` where it shows a clear error instead. ``python -m tests.works`` runs these tests, records
them in ``docs/works.json`` and writes the table in ``docs/works.md``; ``--render`` writes it again from the record.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pandas
import pytest

from benchmarks.report.tables import markdown

DOCS = Path(__file__).parents[1] / "docs"
RECORD, TABLE = DOCS / "works.json", DOCS / "works.md"
MARKED = re.compile(r"(<!-- works -->\n).*?(<!-- /works -->)", re.DOTALL)
COLUMNS = ("ORPO patch", "CPO patch", "lazy logits", "own loop")
OUTCOMES = {"works": "yes", "refused": "refused"}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")


def cells_of(item: pytest.Item) -> list[str]:
    """The cells a test stands for, each as ``row | column | outcome``.

    Raises:
        ValueError: a mark names no row, or a column or outcome that the table has not.
    """
    found = []
    for mark in item.iter_markers("works"):
        what, by, outcome = mark.args[0], mark.kwargs["by"], mark.kwargs.get("outcome", "works")
        if by not in COLUMNS or outcome not in OUTCOMES:
            raise ValueError(f"{item.nodeid}: by must be one of {COLUMNS} and outcome of {[*OUTCOMES]}, got {mark}")
        found.append(f"{what} | {by} | {outcome}")
    return found


def ran(xml: Path) -> None:
    """Run the marked tests, and write what became of them as pytest's ``--junitxml`` does.

    Raises:
        RuntimeError: one of them failed.
    """
    command = [sys.executable, "-m", "pytest", "-m", "works", "-n", "2", "-q", f"--junitxml={xml}"]
    status = subprocess.run(command, cwd=DOCS.parent, check=False).returncode
    if status:
        raise RuntimeError(f"a test behind the table failed (status {status}): nothing is recorded")


def measured(*runs: Path) -> list[dict[str, object]]:
    """Every cell of some runs of tests, with its outcome and the number of tests that showed it.

    Raises:
        RuntimeError: one of them failed.
    """
    rows = []
    for case in (case for xml in runs for case in ElementTree.parse(xml).getroot().iter("testcase")):
        named = [each.get("value", "") for each in case.iter("property") if each.get("name") == "works"]
        if named and (case.find("failure") is not None or case.find("error") is not None):
            raise RuntimeError(f"{case.get('classname')}.{case.get('name')} failed: nothing is recorded")
        if case.find("skipped") is None:
            rows += [(*cell.split(" | "), f"{case.get('classname')}") for cell in named]
    frame = pandas.DataFrame(rows, columns=["what", "by", "outcome", "module"])
    of_cell = frame.groupby(["what", "by", "outcome"], sort=False)
    cells = of_cell.agg(tests=("module", "size"), module=("module", "first")).reset_index()
    found: list[dict[str, object]] = cells.sort_values(["module", "what"]).to_dict("records")
    return found


def rendered(record: dict[str, object]) -> str:
    """The table of a record, as Markdown."""
    frame = pandas.DataFrame(record["cells"])
    frame["cell"] = frame["outcome"].map(OUTCOMES) + " (" + frame["tests"].astype(str) + ")"
    table = frame.pivot_table(index="what", columns="by", values="cell", aggfunc="; ".join, sort=False).fillna("")
    table = table.reindex(columns=[name for name in COLUMNS if name in table]).rename_axis("").reset_index()
    versions = record["versions"]
    assert isinstance(versions, dict)
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{markdown(table)}\n\nRun with {said}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--render", action="store_true", help="write the table from the record alone")
    parser.add_argument(
        "--xml",
        type=Path,
        nargs="+",
        help="record runs of pytest --junitxml: of all tests, and of those that need an environment of their own",
    )
    options = parser.parse_args()
    if not options.render:
        with tempfile.TemporaryDirectory() as folder:
            runs = options.xml or [Path(folder) / "works.xml"]
            if options.xml is None:
                ran(runs[0])
            record = {"versions": {name: version(name) for name in PACKAGES}, "cells": measured(*runs)}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    text = rendered(json.loads(RECORD.read_text()))
    TABLE.write_text(MARKED.sub(lambda found: found[1] + text + found[2], TABLE.read_text()))


if __name__ == "__main__":
    main()
