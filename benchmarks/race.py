"""The race: the loss, or log-probabilities under a random upstream gradient, by everyone, checked and then timed."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy
from benchmarks.accuracy import relative_error
from benchmarks.harness import isolate, machine
from benchmarks.harness.measure import flops, in_turn, measured, summary, timed
from benchmarks.harness.memory import MIB, peak_of
from benchmarks.harness.record import Keep, Record, Row, merged
from benchmarks.problems.cases import IGNORE, OBJECTIVE_TASKS
from benchmarks.problems.floor import build_floor
from benchmarks.problems.inputs import Problem, problem_of
from benchmarks.problems.objectives import AGAINST_REFERENCE, posed
from benchmarks.problems.providers import FLOOR, NAIVE, PROVIDERS, Provider
from benchmarks.problems.sections import sections

RESULTS = Path(__file__).parent / "results"
ACCURACY = "accuracy"
# Timed calls of one measurement at most, and seconds after which none is begun; three are made in any case, the one
# whose memory is watched among them.
EFFORT: dict[str, dict[str, Any]] = {"cpu": {"repeats": 9, "seconds": 25.0}, "cuda": {"repeats": 30, "seconds": 0.6}}
MIN_REPEATS = 3
WARM_UP = {"cpu": 1, "cuda": 3}
WRONG_FACTOR = 20  # times the naive implementation's own error


def run(
    wanted: Sequence[Row], device: str, *, keep: Keep = lambda _: None, budget: float = inf, **effort: Any
) -> list[Row]:
    """One answer for each row, with an ``EFFORT`` for each; after ``budget`` seconds nothing more is started. On a GPU,
    whose allocator counts calls apart, the providers of a head share a process: starting would outlast measuring."""
    together = attrgetter("key" if device == "cpu" else "case")
    options = {"device": device, **effort}
    return isolate.run("benchmarks.race", wanted, options, together=together, seconds=budget, keep=keep)


def measure(rows: Sequence[Row], *, device: str, repeats: int, seconds: float, until: float) -> Iterator[Row]:
    """Check, then time. Whatever goes wrong becomes the row's status, with its message."""
    place = torch.device(device)
    about = machine.about(place)
    for row in rows:
        if time.time() > until:
            return
        package = PROVIDERS[row.provider].package if row.provider != FLOOR else "torch"
        row = row.with_(**about, provider_version=machine.version(package))
        found = measured(row, _measure, place, repeats, seconds)
        yield found
        if found.status == "failed":
            return  # an error on a GPU poisons the process; who asked goes on in another
        gc.collect()
        torch.compiler.reset()
        if place.type == "cuda":
            torch.cuda.empty_cache()


def _measure(row: Row, device: torch.device, repeats: int, seconds: float) -> Row:
    provider = PROVIDERS.get(row.provider)
    if provider is not None:
        row = check(provider, row, problem_of(row, device, sample=True))
        if row.status != "ok":
            return row
        torch.compiler.reset()  # or the sample's shapes would turn what is timed into a dynamic-shape kernel
    problem = posed(problem_of(row, device), row.task)
    targets, forwards = int((problem.targets != IGNORE).sum()), 1 + (row.task in AGAINST_REFERENCE)
    row = row.with_(status="ok", targets=targets, positions=problem.labels.numel())
    if provider is None:  # the floor as an entry of its own: its calls are their own yardstick
        cut, floor = build_floor(problem, row.phase, forwards)
        (times,) = in_turn([floor], device, repeats=repeats, least=MIN_REPEATS, seconds=seconds)
        return row.with_(cut=cut, **summary(times, times))
    step = provider.build(problem, row.task)
    losses: list[float] = []

    def call() -> None:
        with torch.set_grad_enabled(row.phase == "full"):
            problem.clear_gradients()
            loss = step()
            if row.phase == "full":
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())

    for _ in range(WARM_UP[device.type]):
        call()
    problem.clear_gradients()
    first: list[Callable[[], float]] = []
    peak = peak_of(lambda: first.append(timed(call, device)), device)
    returned = sum(grad.numel() * grad.element_size() for grad in problem.gradients().values()) / MIB
    if row.task in OBJECTIVE_TASKS and device.type == "cpu":  # where every product is one of torch's
        row = row.with_(figures={"products": flops(call) / (2 * targets * problem.weight.numel())})
    problem.clear_gradients()
    cut, floor = build_floor(problem, row.phase, forwards)
    times, floors = in_turn([call, floor], device, repeats=repeats - 1, least=MIN_REPEATS - 1, seconds=seconds)
    row = row.with_(cut=cut, **summary([first[0](), *times], floors))
    return row.with_(loss=losses[-1], peak_mib=max(peak.beyond_mib - returned, 0.0), peak_rss_mib=peak.absolute_mib)


def check(provider: Provider, row: Row, sample: Problem) -> Row:
    """Errors of the provider and of the naive implementation on the sample; "wrong" beyond 20 times the latter."""
    sample = posed(sample, row.task)
    exact = sample.double()
    true = _outputs(exact, NAIVE.build(exact, row.task))

    def errors(of: Provider) -> dict[str, float]:
        found = _outputs(sample, of.build(sample, row.task))
        return {name: relative_error(found[name], value) for name, value in true.items() if name in found}

    naive = errors(NAIVE)
    mine = naive if provider is NAIVE else errors(provider)
    found = {f"err_{name}": error for name, error in mine.items()}
    row = row.with_(status="ok", **found, **{f"naive_err_{name}": error for name, error in naive.items()})
    for name, yardstick in naive.items():
        error = mine.get(name)
        if name != "loss" and not (error is not None and error <= WRONG_FACTOR * yardstick):
            reason = f"gradient of {name} has error {error}, the naive implementation's is {yardstick:.1e}"
            return row.with_(status="wrong", reason=reason)
    return row


def _outputs(problem: Problem, step: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scalar, and every gradient that there is."""
    problem.clear_gradients()
    (loss := step()).backward()  # type: ignore[no-untyped-call]
    found = {"loss": loss.detach(), **problem.gradients()}
    problem.clear_gradients()
    return found


def path_of(device: torch.device) -> Path:
    """One file for a machine and a day."""
    return RESULTS / f"{machine.kind(device)}-{machine.today()}.json"


def opened(path: Path, device: torch.device) -> Record:
    """What the file holds already, or an empty record, of this machine as it is now."""
    kept = Record.load(path) if path.exists() else Record()
    kept.machine, kept.date, kept.commit = machine.device_name(device), machine.today(), machine.commit()
    return kept


def record(device: torch.device, only: Sequence[str], path: Path, providers: Sequence[str] = ()) -> Record:
    """Run the sections, or ``providers`` alone of them, and keep every answer at once. What ``path`` holds already
    stays, unless measured again."""
    kept = opened(path, device)
    before = kept.rows

    def keep(rows: list[Row]) -> None:
        kept.rows = merged(before, rows)
        kept.save(path)

    asked = [row for name, rows in sections(device.type).items() if name in only for row in rows]
    wanted = [row for row in asked if not providers or row.provider in providers]
    run(wanted, device.type, keep=keep, **EFFORT[device.type])
    if ACCURACY in only:
        kept.accuracy = accuracy.run(device.type)
    kept.save(path)
    return kept
