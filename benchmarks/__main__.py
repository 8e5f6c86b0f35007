"""``python -m benchmarks``: loss, compare, accuracy, record, render, compile, train, tune, profile."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import accuracy, compile, gpu, machine, profile, race, record, render, report, train, tune
from benchmarks.cases import BATCHES, CASES, DTYPES, HEADS, PHASES, STATES, Batch, Case
from benchmarks.providers import NAMES, default_names
from benchmarks.rows import Record, Row, Spec


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    result: int = options.command(options, Console())
    return result


def _loss(options: argparse.Namespace, console: Console) -> int:
    """The race."""
    device = torch.device(options.device)
    cases = options.cases or _fitting(CASES, device)
    batches = options.batches or [name for name in _fitting(BATCHES, device) if not name.startswith("length-")]
    wanted = race.specs(
        cases, batches, options.states, options.head, options.dtype, options.phase,
        options.providers or default_names(device),
        device=options.device, repeats=options.repeats, seconds=options.seconds,
    )  # fmt: skip
    kept = Record(machine.device_name(device), machine.today(), machine.commit())

    def keep(rows: list[Row]) -> None:
        kept.rows = rows
        if options.json:
            kept.save(options.json)

    rows = race.run(wanted, keep)
    report.print_rows(rows, console)
    if options.plot:
        from benchmarks.plot import plot

        plot(rows, options.plot)
    return 1 if any(row.status == "failed" for row in rows) else 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    report.compare(Record.load(options.before).rows, Record.load(options.after).rows, console)
    return 0


def _accuracy(options: argparse.Namespace, console: Console) -> int:
    rows = accuracy.run(options.device)
    report.print_accuracy(rows, console)
    if options.json:
        device = torch.device(options.device)
        Record(machine.device_name(device), machine.today(), machine.commit(), accuracy=rows).save(options.json)
    return 0 if all(row.holds for row in rows) else 1


def _record(options: argparse.Namespace, console: Console) -> int:
    device = torch.device(options.device)
    known = [*record.sections(device), record.ACCURACY]
    unknown = [name for name in options.only or [] if name not in known]
    if unknown:
        console.print(f"no section {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    path = options.json or record.path_of(device)
    kept = record.record(device, options.only or known, path, options.providers or ())
    report.print_rows(kept.rows, console)
    report.print_accuracy(kept.accuracy, console)
    console.print(f"written to {path}; `python -m benchmarks render` puts it into the documents")
    return 1 if any(row.status == "failed" for row in kept.rows) else 0


def _render(options: argparse.Namespace, console: Console) -> int:
    if options.check:
        problems = render.stale()
        for problem in problems:
            console.print(f"{problem}: run `python -m benchmarks render`")
        return 1 if problems else 0
    for path in render.render():
        console.print(f"wrote {path.relative_to(machine.ROOT)}")
    return 0


def _compile(options: argparse.Namespace, console: Console) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        console.print("TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter: unset it")
        return 2
    rows = compile.run(options.targets)
    report.print_compiled(rows, console)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.problem for row in rows) else 0


def _train(options: argparse.Namespace, console: Console) -> int:
    try:
        wanted = train.specs(options.models, options.device, options.steps, options.longest_limit)
    except ValueError as problem:
        console.print(str(problem))
        return 2
    if options.dry_run:
        train.print_plan(wanted, console)
        return 0
    rows: list[train.TrainRow] = []
    for found in train.run(wanted, options.seconds):
        rows += found
        if options.json:
            train.save(options.json, rows, torch.device(options.device))
    train.print_rows(rows, console)
    return 1 if any(row.status == "failed" for row in rows) else 0


def _gpu(options: argparse.Namespace, console: Console) -> int:
    device = torch.device(options.device)
    if options.dry_run:
        gpu.plan(device, options.seconds, console)
        return 0
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, here and in every process started here
    path = options.json or (record.path_of(device) if device.type == "cuda" else Path(tempfile.mkdtemp(), "gpu.json"))
    return gpu.run(device, options.seconds, path, options.only or (), console)


def _tune(options: argparse.Namespace, console: Console) -> int:
    try:
        cases, arch = tune.cases_of(options.cases, options.device, options.dry_run)
    except ValueError as problem:
        console.print(str(problem))
        return 2
    if options.dry_run:
        tune.print_plan(cases, arch, console)
        return 0

    def keep(rows: list[tune.TuneRow]) -> None:
        if options.json:
            tune.save(options.json, rows)

    rows = tune.run(cases, arch, torch.device(options.device), options.seconds, keep)
    tune.print_rows(rows, arch, console)
    return 1 if any(row.status == "wrong" for row in rows) else 0


def _profile(options: argparse.Namespace, console: Console) -> int:
    device = torch.device(options.device)
    case, batch = profile.DEFAULTS[device.type]
    found = profile.run(options.case or case, options.batch or batch, options.head, device)
    profile.print_profile(found, console)
    if options.json:
        profile.save(options.json, found)
    return 0


def _fitting(known: dict[str, Case] | dict[str, Batch], device: torch.device) -> list[str]:
    return [name for name, entry in known.items() if entry.cpu == (device.type == "cpu")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Time, memory and accuracy of the ORPO loss.")
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    def several(to: argparse.ArgumentParser, flag: str, known: Sequence[str], default: list[str] | None) -> None:
        shown = "what suits the device" if default is None else " ".join(default)
        to.add_argument(
            flag, nargs="+", choices=list(known), metavar="NAME", default=default,
            help=f"of {', '.join(known)} (default: {shown})",
        )  # fmt: skip

    def on_device(to: argparse.ArgumentParser) -> None:
        to.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")

    loss = command("loss", _loss, "race the providers on cases of your choice")
    several(loss, "--cases", list(CASES), None)
    several(loss, "--batches", list(BATCHES), None)
    several(loss, "--providers", NAMES, None)
    several(loss, "--states", list(STATES), ["trained-like"])
    several(loss, "--head", HEADS, ["trainable"])
    several(loss, "--dtype", DTYPES, ["bfloat16"])
    several(loss, "--phase", PHASES, ["full"])
    on_device(loss)
    loss.add_argument("--repeats", type=int, default=Spec.repeats, help="timed calls of each provider at most")
    loss.add_argument("--seconds", type=float, default=Spec.seconds, help="no new timed call after this long")
    loss.add_argument("--json", type=Path, help="write the rows to this file")
    loss.add_argument("--plot", type=Path, help="draw them into this PNG")

    compare = command("compare", _compare, "two records side by side, as ratios")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)

    errors = command("accuracy", _accuracy, "errors against float64 from hopeless to certain predictions")
    on_device(errors)
    errors.add_argument("--json", type=Path, help="write the rows to this file")

    recording = command("record", _record, "record this machine under benchmarks/results/")
    recording.add_argument("--only", nargs="+", metavar="SECTION", help="sections to measure (again)")
    several(recording, "--providers", NAMES, None)
    recording.add_argument("--json", type=Path, help="another file than the machine's own")
    on_device(recording)

    compiling = command("compile", _compile, "compile every kernel for chips that need not be there")
    several(compiling, "--targets", list(compile.TARGETS), list(compile.TARGETS))
    compiling.add_argument("--json", type=Path, help="write the rows to this file")

    training = command("train", _train, "TRL training steps, stock against patched, and the longest pair that trains")
    several(training, "--models", list(train.MODELS), None)
    on_device(training)
    training.add_argument("--steps", type=int, default=train.TrainSpec.steps, help="timed optimiser steps")
    training.add_argument("--longest-limit", type=int, help="tokens a side that end the search for the longest pair")
    training.add_argument("--seconds", type=float, default=train.SECONDS, help="time for everything together")
    training.add_argument("--dry-run", action="store_true", help="only say what would be measured")
    training.add_argument("--json", type=Path, help="write the rows to this file")

    whole = command("gpu", _gpu, "everything that needs a GPU: the suite, the sanitizers, the race and its targets")
    on_device(whole)
    whole.add_argument("--seconds", type=float, default=530.0, help="what all steps together may take")
    whole.add_argument("--only", nargs="+", metavar="STEP", choices=gpu.STEPS, help=f"of {', '.join(gpu.STEPS)}")
    whole.add_argument("--dry-run", action="store_true", help="say what would run")
    whole.add_argument("--json", type=Path, help="another file than the machine's own")

    tuning = command("tune", _tune, "race tiles of the score GEMM against the library's plain product")
    several(tuning, "--cases", [*CASES, *tune.TINY], None)
    tuning.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu interprets a tiny case")
    tuning.add_argument("--seconds", type=float, default=tune.SECONDS, help="no new measurement after this long")
    tuning.add_argument("--dry-run", action="store_true", help="only list the candidates, in their order")
    tuning.add_argument("--json", type=Path, help="write the rows to this file")

    profiling = command("profile", _profile, "one call of the loss by its steps, each against its own floor")
    profiling.add_argument("--case", choices=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    profiling.add_argument("--batch", choices=list(BATCHES), metavar="NAME", help=f"of {', '.join(BATCHES)}")
    profiling.add_argument("--head", choices=HEADS, default=HEADS[0])
    on_device(profiling)
    profiling.add_argument("--json", type=Path, help="write the steps to this file")

    rendering = command("render", _render, "write the newest records into README.md and docs/")
    rendering.add_argument("--check", action="store_true", help="only say whether they differ")
    return parser


if __name__ == "__main__":
    sys.exit(main())
