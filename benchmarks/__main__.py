"""``python -m benchmarks``: loss, compare, accuracy, record, render, compile, train, tune, profile, gpu."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks import accuracy, race
from benchmarks.harness import machine
from benchmarks.harness.measure import UnsupportedError
from benchmarks.harness.record import Record, Row
from benchmarks.lab import compare, compile, gpu, profile, train, tune
from benchmarks.problems import sections
from benchmarks.problems.cases import BATCHES, CASES, DTYPES, HEADS, PHASES, STATES, TASKS, fitting
from benchmarks.problems.providers import NAMES, default_names
from benchmarks.report import plots, render, tables

app = typer.Typer(help="Time, memory and accuracy of the ORPO loss.", add_completion=False)
HERE: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


def _names(known: Iterable[str]) -> Any:
    """An option that takes names of ``known``, several where it is a list."""
    known = list(known)

    def check(given: Any) -> Any:
        asked = [given] if isinstance(given, str) else given or ()
        if unknown := sorted(set(asked) - set(known)):
            raise typer.BadParameter(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return given

    return typer.Option(metavar="NAME", callback=check, help=f"of {', '.join(known)}")


Names = list[str] | None
Cases = Annotated[Names, _names(CASES)]
Batches = Annotated[Names, _names(BATCHES)]
Heads = Annotated[Names, _names(HEADS)]
Dtypes = Annotated[Names, _names(DTYPES)]
Providers = Annotated[Names, _names(NAMES)]
Device = Annotated[Literal["cpu", "cuda"], typer.Option()]
Json = Annotated[Path | None, typer.Option("--json", help="write the rows to this file")]
OtherFile = Annotated[Path | None, typer.Option("--json", help="another file than the machine's own")]
Seconds = Annotated[float, typer.Option(help="what everything together may take")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be measured")]


@app.command()
def loss(
    task: Annotated[str, _names(TASKS)] = "loss",
    cases: Cases = None,
    batches: Batches = None,
    providers: Providers = None,
    states: Annotated[list[str], _names(STATES)] = ["trained-like"],  # noqa: B006  typer reads it, nobody writes
    heads: Heads = None,
    dtypes: Dtypes = None,
    phases: Annotated[list[str], _names(PHASES)] = ["full"],  # noqa: B006
    device: Device = HERE,
    repeats: Annotated[int, typer.Option(help="timed calls of each provider at most")] = 7,
    seconds: Annotated[float, typer.Option(help="no new timed call after this long")] = 15.0,
    path: Json = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="draw the rows into this PNG")] = None,
) -> int:
    """Race the providers on cases of your choice: the loss, or log-probabilities under a random upstream gradient."""
    cases = cases or fitting(CASES, device)
    batches = batches or [name for name in fitting(BATCHES, device) if not name.startswith("length-")]
    names = providers or default_names(device, task)
    kinds = heads or HEADS[:1], dtypes or DTYPES[:1]
    wanted = sections.rows(cases, batches, *kinds, names, states=states, phases=phases, tasks=[task])
    rows = race.run(wanted, device, repeats=repeats, seconds=seconds, keep=_keeper(path, device))
    tables.print_rows(rows)
    if picture:
        plots.plot(rows, picture)
    return _code(rows)


@app.command("compare")
def _compare(
    records: Annotated[Names, typer.Argument(metavar="[BEFORE.json AFTER.json]")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="run the loss of both checkouts instead")
    ] = None,
    cases: Cases = None,
    batches: Batches = None,
    dtypes: Dtypes = None,
    heads: Heads = None,
    device: Device = HERE,
    rounds: Annotated[int, typer.Option(min=1, help="processes of each side, in the order A B B A")] = 5,
    path: Json = None,
) -> int:
    """Two records side by side, as ratios; or this working tree against COMMIT, in turn in one run."""
    if against is not None:
        wanted = sections.compared(device, cases, batches, heads, dtypes)
        rows = compare.run(wanted, against, device, rounds, _keeper(path, device))
        print(tables.text(compare.table(rows)))
        return _code(rows)
    if records is None or len(records) != 2:
        raise UnsupportedError("compare takes two records, or --against COMMIT")
    before, after = (Record.load(Path(name)).rows for name in records)
    print(tables.compare(before, after))
    return 0


@app.command("accuracy")
def _accuracy(device: Device = HERE, path: Json = None) -> int:
    """Errors against float64 from hopeless to certain predictions."""
    rows = accuracy.run(device)
    tables.print_accuracy(rows)
    _save(path, device, accuracy=rows)
    return int(not all(row.holds for row in rows))


@app.command()
def record(
    only: Annotated[Names, typer.Option(metavar="SECTION", help="sections to measure (again)")] = None,
    providers: Providers = None,
    path: OtherFile = None,
    device: Device = HERE,
) -> int:
    """Record this machine under benchmarks/results/."""
    known = [*sections.sections(device), race.ACCURACY]
    if unknown := [name for name in only or [] if name not in known]:
        raise typer.BadParameter(f"no section {', '.join(unknown)}; there are {', '.join(known)}", param_hint="--only")
    path = path or race.path_of(torch.device(device))
    kept = race.record(torch.device(device), only or known, path, providers or ())
    tables.print_rows(kept.rows)
    tables.print_accuracy(kept.accuracy)
    print(f"written to {path}; `python -m benchmarks render` puts it into the documents")
    return _code(kept.rows)


@app.command("render")
def _render(check: Annotated[bool, typer.Option("--check", help="only say whether they differ")] = False) -> int:
    """Write the newest records into README.md and docs/."""
    found = render.render(write=not check)
    for reason in render.newest()[1]:
        print(reason)
    for differing in found:
        name = differing.relative_to(machine.ROOT)
        print(f"{name} differs from the newest record: run `python -m benchmarks render`" if check else f"wrote {name}")
    return int(check and bool(found))


@app.command("compile")
def _compile(targets: Annotated[Names, _names(compile.TARGETS)] = None, path: Json = None) -> int:
    """Compile every kernel for chips that need not be there."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnsupportedError("TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter: unset it")
    rows = compile.run(targets or list(compile.TARGETS))
    print(compile.report(rows))
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(map(compile.problem, rows)))


@app.command("train")
def _train(
    models: Annotated[Names, _names(train.MODELS)] = None,
    device: Device = HERE,
    steps: Annotated[int, typer.Option(help="timed optimiser steps")] = train.STEPS,
    longest_limit: Annotated[int | None, typer.Option(help="tokens a side that end the search")] = None,
    seconds: Seconds = train.SECONDS,
    dry_run: DryRun = False,
    path: Json = None,
) -> int:
    """TRL training steps, stock against patched, and the longest pair that trains."""
    wanted, limit = train.plan(models, device, steps, longest_limit)
    if dry_run:
        print(tables.text(train.plan_table(wanted, steps, limit)))
        return 0
    rows = train.run(wanted, device, steps, limit, seconds, _keeper(path, device))
    print(tables.text(train.table(rows)), *train.remarks(rows), sep="\n")
    return _code(rows)


@app.command("gpu")
def _gpu(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cpu: toy sizes, in Triton's interpreter")] = "cuda",
    seconds: Seconds = 530.0,
    only: Annotated[Names, _names(gpu.STEPS)] = None,
    dry_run: DryRun = False,
    path: OtherFile = None,
) -> int:
    """Everything that needs a GPU: the suite, the sanitizers, the race and its targets."""
    if dry_run:
        gpu.print_plan(device, seconds)
        return 0
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, here and in every process started here
        path = path or Path(tempfile.mkdtemp(), "gpu.json")
    elif not torch.cuda.is_available():
        remedy = "--dry-run says what would run, --device cpu tries it at toy sizes"
        raise UnsupportedError(f"gpu needs a CUDA device and torch sees none; {remedy}")
    place = torch.device(device)
    return gpu.run(place, seconds, path or race.path_of(place), only or ())


@app.command("tune")
def _tune(
    cases: Annotated[Names, _names([*CASES, *tune.TINY])] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu interprets a tiny case")] = "cuda",
    seconds: Annotated[float, typer.Option(help="no new measurement after this long")] = tune.SECONDS,
    shipped: Annotated[bool, typer.Option("--shipped", help="only the tiles that these heads run as it is")] = False,
    dry_run: DryRun = False,
    path: Json = None,
) -> int:
    """Race tiles of the exp GEMM against the library's plain product."""
    chosen, arch = tune.cases_of(cases, device, dry_run)
    wanted = tune.plan(chosen, arch, only_shipped=shipped)
    if dry_run:
        print(f"{len(wanted)} candidates for {arch} on {', '.join(one.name for one in chosen)}, the shipped first")
        print(*wanted, sep="\n")
        return 0
    rows = tune.run(chosen, wanted, torch.device(device), seconds, _keeper(path, device))
    tune.print_rows(rows, arch)
    return int(any(row.status == "wrong" for row in rows))


@app.command("profile")
def _profile(
    case: Annotated[str | None, _names(CASES)] = None,
    batch: Annotated[str | None, _names(BATCHES)] = None,
    head: Annotated[str, _names(HEADS)] = HEADS[0],
    device: Device = HERE,
    path: Json = None,
) -> None:
    """One call of the loss by its steps, and over its floor."""
    usual = profile.DEFAULTS[device]
    call, *steps = profile.run(case or usual[0], batch or usual[1], head, torch.device(device))
    profile.print_rows(call, steps)
    _keeper(path, device)([call, *steps])


def _save(path: Path | None, device: str, **contents: Any) -> None:
    """Write a record of this machine to ``path``, if there is one."""
    if path:
        Record(machine.device_name(torch.device(device)), machine.today(), machine.commit(), **contents).save(path)


def _keeper(path: Path | None, device: str) -> Callable[[list[Row]], None]:
    return lambda rows: _save(path, device, rows=rows)


def _code(rows: Iterable[Row]) -> int:
    return int(any(row.status == "failed" for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where something measured failed, 2 where it could not be measured, with the reason."""
    words: list[str] = []
    for word in sys.argv[1:] if arguments is None else arguments:
        # "--cases a b" is "--cases a --cases b", the only form that typer knows.
        options = [earlier for earlier in words if earlier.startswith("--")]
        if options and not word.startswith("--") and words[-1] != options[-1]:
            words.append(options[-1])
        words.append(word)
    try:
        return int(app(words, standalone_mode=False, prog_name="python -m benchmarks") or 0)
    except (typer.TyperException, UnsupportedError) as problem:
        print(problem.format_message() if isinstance(problem, typer.TyperException) else problem, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
