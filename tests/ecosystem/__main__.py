"""Make a stack's environment, train in it stock and fused, and record how the two agree.

usage: python -m tests.ecosystem [--again] [--check] [NAME ...]    NAMEs as in stacks.py; without any, all of them
       python -m tests.ecosystem matrix                            the versions of TRL among them
       python -m tests.ecosystem trl-suite [--source CLONE] [--minutes N] [NAME ...]
                                                                   TRL's own tests, of the versions in suites.py
       python -m tests.ecosystem render                            write docs/stacks.md's tables from the records
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT, commit, today
from tests.ecosystem import suites
from tests.ecosystem.compare import compare
from tests.ecosystem.stacks import MATRIX, STACKS, Stack
from tests.ecosystem.table import RECORD, load, render

RECIPES = Path(__file__).parent / "recipes"
ENVIRONMENTS = ROOT / "build" / "ecosystem"
# No hub, no GPU, and no other processes: what is compared is arithmetic.
ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "PYTHONPATH": "",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ecosystem", description=__doc__.partition("\n")[0])
    parser.add_argument("--again", action="store_true", help="install anew what is installed")
    parser.add_argument("--check", action="store_true", help="record nothing, and fail where a stack does not run")
    parser.add_argument("--source", default=suites.REPOSITORY, help="for trl-suite: a clone of TRL's repository")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for trl-suite: bound on a suite's stock run")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"render, matrix, trl-suite, or of {', '.join(STACKS)} (default: all)"
    )
    options = parser.parse_intermixed_args()
    if options.names == ["render"]:
        render()
        return 0
    if options.names[:1] == ["trl-suite"]:
        names = options.names[1:] or list(suites.TAGS)
        if unknown := set(names) - set(suites.TAGS):
            parser.error(f"no such version: {', '.join(sorted(unknown))}; there are {', '.join(suites.TAGS)}")
        return trl_suites(names, options.source, options.minutes, again=options.again)
    names = [name for given in options.names or STACKS for name in (MATRIX if given == "matrix" else [given])]
    if unknown := set(names) - set(STACKS):
        parser.error(f"no such stack: {', '.join(sorted(unknown))}; there are {', '.join(STACKS)}")
    agree, at = True, commit()  # before the record and the document change
    for name in names:
        found = {"date": today(), "commit": at, **run(name, STACKS[name], again=options.again)}
        if not options.check:
            keep(RECORD, STACKS, name, found)
        wrong = [f"{key}: {each['disagrees']}" for key, each in found["runs"].items() if each["disagrees"]]
        if options.check:
            wrong += [found["reason"]] if "reason" in found else []
        print(f"{name}: {found.get('reason') or wrong or 'agrees'}", flush=True)
        agree = agree and not wrong
    return 0 if agree else 1


def trl_suites(names: Iterable[str], source: str, minutes: float, *, again: bool) -> int:
    """Run TRL's suites and record them; 1 where a test that passes stock fails fused."""
    agree, at = True, commit()
    for name in names:
        python = install(name, STACKS[name], again=again)
        command([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *suites.NEEDS])
        found = {"date": today(), "commit": at, **suites.run(python, ENVIRONMENTS / name, name, source, minutes)}
        keep(suites.RECORD, suites.TAGS, name, found)
        for suite, each in found["suites"].items():
            wrong = {**each["failed_fused"], **each.get("patched", {}).get("failed", {})}
            print(f"{name}, {suite}: {wrong or 'what passes stock passes fused'}", flush=True)
            agree = agree and not wrong
    return 0 if agree else 1


def keep(record: Path, order: Iterable[str], name: str, found: dict[str, Any]) -> None:
    """Put what was found into a record, and the record into the document."""
    every = {**load(record), name: found}
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({key: every[key] for key in order if key in every}, indent=1) + "\n")
    render()


def run(name: str, stack: Stack, *, again: bool) -> dict[str, Any]:
    """What the record holds of a stack."""
    found: dict[str, Any] = {"versions": {}, "runs": {}}
    try:
        python = install(name, stack, again=again)
        with tempfile.TemporaryDirectory() as folder:
            stock = train(python, [stack.recipe], Path(folder, "stock.json"))
            fused = train(python, ["-m", "orpo_kernels", "run", stack.recipe], Path(folder, "fused.json"))
            found["versions"] = fused["versions"]
            asked = [each for each, of in stock["runs"].items() if not of.get("error", "").startswith("LookupError")]
            found["runs"] = {each: compare(stock["runs"][each], fused["runs"][each]) for each in asked}
            if stack.fused_in_script:
                ours = train(
                    python, [stack.recipe], Path(folder, "script.json"), *stack.fused_in_script, fuse=stack.in_script
                )
                for each in stack.fused_in_script:
                    found["runs"][f"{each}, {stack.in_script}"] = compare(stock["runs"][each], ours["runs"][each])
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip()
        found["reason"] = said.splitlines()[-1] if said else str(error)
        print(said, file=sys.stderr)
    return found


def install(name: str, stack: Stack, *, again: bool) -> Path:
    """The Python of a stack's environment, which is made where it does not stand."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    wanted = repr(stack)
    if again or not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        constraints = ROOT / "constraints.txt"
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        command([*pip, stack.torch or torch, *stack.requires])
        command([*pip, "--no-deps", "--editable", str(ROOT), *stack.alone])
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        for module, names in stack.hollow.items():
            hollow(packages, module, names)
        stamp.write_text(wanted)
    return python


def hollow(packages: Path, module: str, names: tuple[str, ...]) -> None:
    """A module that can be imported, and whose names are None."""
    folder = packages
    for part in module.split("."):
        folder /= part
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / "__init__.py").write_text("".join(f"{name} = None\n" for name in names))


def train(python: Path, arguments: list[str], output: Path, *objectives: str, fuse: str = "") -> dict[str, Any]:
    """Run a recipe, the last of ``arguments``, and return what it wrote."""
    *before, recipe = arguments
    environ = {**os.environ, **ENVIRON, "ECOSYSTEM_FUSE": fuse}
    command([str(python), *before, str(RECIPES / recipe), str(output), *objectives], environ, output.parent)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def command(line: list[str], environ: dict[str, str] | None = None, folder: Path | None = None) -> None:
    print("$", *line, file=sys.stderr, flush=True)
    subprocess.run(
        line, env=environ, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    raise SystemExit(main())
