"""TRL's own test suites, stock and fused: which of their tests pass, and what the fused ones computed."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT

RECORD = ROOT / "benchmarks" / "results" / "ecosystem" / "trl-suites.json"
RECIPES = Path(__file__).parent / "recipes"
REPOSITORY = "https://github.com/huggingface/trl"
TAGS = {"trl-0.24": "v0.24.0", "trl-0.29": "v0.29.1", "trl-1.9": "v1.9.0"}  # of the stack that lends its environment
SUITES = ("orpo", "cpo", "dpo", "kto", "sft", "grpo")
PATCHED = ("orpo", "cpo")  # whose trainers have patches of their own, with which the suites run once more
NEEDS = ("pytest", "parameterized", "pytest-datadir", "pytest-rerunfailures")  # in the environment, beside the stack
PYTEST = ("-m", "pytest", "-p", "trl_suite", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "not slow")
HEADER = ("TRL", "suite", "pass stock", "of these fused", "call a fused head", "full logits for", "not compared")


def run(python: Path, folder: Path, name: str, source: str, minutes: float) -> dict[str, Any]:
    """Every suite of one version, with the Python of its environment; what is made for them lies beside ``folder``.

    Args:
        python: of an environment with this version's requirements, ``NEEDS`` among them.
        folder: of the environment.
        name: a key of ``TAGS``.
        source: a clone of TRL's repository with its tags, or where git finds one.
        minutes: after which a suite begins no other test stock; the fused runs are of the tests that passed.

    Raises:
        CalledProcessError: there is no such tag, or the stand-ins for the hub could not be written.
    """
    checkout, hub, output = (folder.with_name(f"{name}-{what}") for what in ("source", "hub", "output.json"))
    if not checkout.exists():
        clone = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", TAGS[name]]
        subprocess.run([*clone, source, str(checkout)], check=True)
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(hub),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "PYTHONPATH": os.pathsep.join([str(checkout), str(RECIPES)]),
        "TRL_SUITE_OUTPUT": str(output),
    }
    if not hub.exists():
        subprocess.run([str(python), str(RECIPES / "trl_hub.py"), str(checkout), str(hub)], env=environ, check=True)
    line = [str(python), *PYTEST]
    found: dict[str, Any] = {"versions": {}, "suites": {}}
    for suite in SUITES:
        tests = checkout / "tests"
        homes = [home / f"test_{suite}_trainer.py" for home in (tests, tests / "experimental")]
        file = next(home for home in homes if home.exists())
        runs = {"": _pytest(line, [str(file)], environ | {"TRL_SUITE_SECONDS": str(60 * minutes)}, "")}
        passed = [test for test, of in runs[""]["tests"].items() if of["outcome"] == "passed"]
        for how in ("lazy", *(["patch"] if suite in PATCHED else [])):
            runs[how] = _pytest(line, passed, environ, how)
        found["versions"] = {"trl": TAGS[name].removeprefix("v"), **runs[""]["versions"]}
        found["suites"][suite] = judge(runs[""], runs["lazy"], runs.get("patch"))
    return found


def _pytest(line: list[str], tests: list[str], environ: dict[str, str], how: str) -> dict[str, Any]:
    """What the plugin wrote of these tests."""
    output, checkout = Path(environ["TRL_SUITE_OUTPUT"]), environ["PYTHONPATH"].partition(os.pathsep)[0]
    output.unlink(missing_ok=True)
    # Failed tests are what is recorded, so pytest's exit code says nothing; a record that is not there does.
    subprocess.run([*line, *tests], cwd=checkout, env={**environ, "TRL_SUITE_FUSED": how}, check=False)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def judge(stock: dict[str, Any], fused: dict[str, Any], patched: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record of a suite: what passes stock has to pass fused, and what does not is no question of ours."""
    tests = stock["tests"]
    passed = [name for name, test in tests.items() if test["outcome"] == "passed"]
    ran = [fused["tests"][name] for name in passed if name in fused["tests"]]
    found = {
        "collected": len(tests) + stock["unreached"],
        "passed_stock": len(passed),
        "passed_fused": len(passed) - len(failed(passed, fused)),
        "failed_fused": failed(passed, fused),
        "lazy": sum(test["lazy"] > 0 for test in ran),
        "full": sorted({each for test in ran for each in test["full"]}),
        "refusals": sorted({each for test in ran for each in test["refusals"]}),
        "failed_stock": {_name(name): _reason(test) for name, test in tests.items() if test["outcome"] == "failed"},
        "skipped": dict(Counter(_reason(test) for test in tests.values() if test["outcome"] == "skipped")),
        "slow": stock["slow"],
        "unreached": stock["unreached"],
    }
    if patched is not None:
        found["patched"] = {
            "passed": len(passed) - len(failed(passed, patched)),
            "failed": failed(passed, patched),
            "fused_by_trainer": sum(
                patched["tests"][name]["patched"] > 0 for name in passed if name in patched["tests"]
            ),
        }
    return found


def failed(passed: list[str], fused: dict[str, Any]) -> dict[str, str]:
    """Why each test that passes stock does not pass here."""
    lost = {"outcome": "lost", "reason": "it was not run"}
    here = {name: fused["tests"].get(name, lost) for name in passed}
    return {_name(name): _reason(test) for name, test in here.items() if test["outcome"] != "passed"}


def _name(node: str) -> str:
    return node.rpartition("::")[2]


def _reason(test: dict[str, Any]) -> str:
    """Its first line that says something, without what belongs to one machine."""
    line = next((line for line in test.get("reason", "").splitlines() if line.strip()), "")
    return line.strip()[:160]


def table(record: dict[str, Any]) -> str:
    rows = [HEADER, tuple("-" * 3 for _ in HEADER)]
    for found in record.values():
        title = f"{found['versions']['trl']}, transformers {found['versions']['transformers']}"
        for suite, run in found["suites"].items():
            stock = run["passed_stock"]
            full = "; ".join([*run["full"], *run["refusals"]]) or "nothing"
            passed = _of(run["passed_fused"], stock)
            rows.append((title, suite, str(stock), passed, str(run["lazy"]), full.replace("|", "/"), _away(run)))
            if "patched" in run:
                count = f"{run['patched']['fused_by_trainer']} by the patch"
                rows.append(("", f"{suite}, launcher", str(stock), _of(run["patched"]["passed"], stock), count, "", ""))
            title = ""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _of(count: int, stock: int) -> str:
    return str(count) if count == stock else f"**{count}**"


def _away(run: dict[str, Any]) -> str:
    away = {
        "fail stock": len(run["failed_stock"]),
        "skip themselves": sum(run["skipped"].values()),
        "slow": run["slow"],
    }
    return ", ".join(f"{count} {why}" for why, count in away.items() if count) or "none"
