"""The records as tables of docs/stacks.md: each run of each stack, what agrees in each version of TRL, TRL's tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT
from tests.ecosystem import suites
from tests.ecosystem.stacks import MATRIX, STACKS

RECORD = ROOT / "benchmarks" / "results" / "ecosystem" / "stacks.json"
DOCUMENT = ROOT / "docs" / "stacks.md"
MARKED = re.compile(r"(<!-- (ecosystem|matrix|trl-suites) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
HEADER = ("stack", "objective", "losses differ", "gradient norms differ", "products a call", "full logits for")
# A column of the matrix, and the runs of which the worst is shown, or the first that called its head.
COLUMNS = {
    "ORPO patch": ("orpo",),
    "CPO patch": ("cpo", "simpo"),
    "lazy: SFT": ("sft", "sft-nll"),
    "DPO": ("dpo",),
    "KTO": ("kto",),
    "GRPO": ("grpo",),
    "ORPO": ("orpo, fuse(model)",),
    "CPO": ("cpo, fuse(model)", "simpo, fuse(model)"),
}
UNCALLED = {True: "trainer's patch", False: "head not called"}


def load(path: Path = RECORD) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def render(*, write: bool = True, document: Path = DOCUMENT) -> bool:
    """Put the records into the document; whether the document said something else."""
    text = document.read_text()
    written = {
        "ecosystem": table(load()),
        "matrix": matrix(load()),
        "trl-suites": suites.table(load(suites.RECORD)),
    }
    filled = MARKED.sub(lambda match: f"{match[1]}{written[match[2]]}{match[3]}", text)
    if write and filled != text:
        document.write_text(filled)
    return filled != text


def table(record: dict[str, Any]) -> str:
    rows = [HEADER, tuple("-" * 3 for _ in HEADER)]
    for name, found in record.items():
        title = _titled(STACKS[name].title, found["versions"])
        if "reason" in found:
            rows.append((title, "", "not run", "", "", _one_line(found["reason"])))
        for objective, run in found["runs"].items():
            rows.append((title, objective, *_cells(run)))
            title = ""
    return _of_rows(rows)


def matrix(record: dict[str, Any]) -> str:
    """For each environment of MATRIX the largest difference of any figure or weight."""
    header = ("TRL", "transformers", "torch", *COLUMNS)
    rows = [header, tuple("-" * 3 for _ in header)]
    for name in MATRIX:
        found = record.get(name, {"versions": {}, "runs": {}})
        versions = [found["versions"].get(each, "").partition("+")[0] for each in ("trl", "transformers", "torch")]
        rows.append((*versions, *(_agreement(found["runs"], of) for of in COLUMNS.values())))
    return _of_rows(rows)


def _agreement(runs: dict[str, Any], objectives: tuple[str, ...]) -> str:
    every = [runs[each] for each in objectives if each in runs]
    ran = [run for run in every if "skipped" not in run]
    if not ran:
        return "no trainer" if every and "this trl has no" in every[0]["skipped"] else "not run"
    if wrong := [run for run in ran if run["disagrees"] or run["refusals"]]:
        return f"**{_one_line(wrong[0]['disagrees'] or wrong[0]['refusals'][0])}**"
    fused = [run for run in ran if run["calls"] or run["fused_by_trainer"]]
    worst = [difference for run in fused for difference in run["differences"].values()]
    return f"{max(worst):.0e}" if worst else UNCALLED[False]


def _of_rows(rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _titled(title: str, versions: dict[str, str]) -> str:
    """The stack with its version and that of the transformers under it."""

    def own(name: str) -> bool:
        return title.lower().replace("-", "").startswith(name.replace("-", ""))

    names = [name for name in versions if name not in ("torch", "accelerate", "transformers")]
    names = [*sorted(names, key=own, reverse=True), *(["transformers"] if versions else [])]
    shown = [versions[name] if own(name) else f"{name} {versions[name]}" for name in names]
    return f"{title} ({', '.join(shown)})" if shown else title


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    if "skipped" in run:
        return "not run", "", "", _one_line(run["skipped"])
    if run["differences"] is None:
        return f"**{_one_line(run['disagrees'])}**", "", "", ""
    differ = [f"{run['differences'].get(name, 0.0):.0e}".replace("0e+00", "0") for name in ("loss", "gradient")]
    each = run["products_per_call"]
    products = f"{each:.2f}" if each else "refused" if run["refusals"] else UNCALLED[run["fused_by_trainer"]]
    full = sorted({f"{found['operation']} ({found['where']})" for found in run["materialised"]})
    return *differ, products, _one_line("; ".join([*full, *run["refusals"]]) or "nothing")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
