"""What one machine's record consists of, section by section, and the file it is kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import accuracy, machine, race, targets
from benchmarks.cases import HEADS, LENGTHS, LENGTHS_CPU, DTypeName, HeadName
from benchmarks.providers import FLOOR, default_names
from benchmarks.rows import Record, Row, Spec

RESULTS = Path(__file__).parent / "results"
ACCURACY = "accuracy"

# A process each and a compilation each: their place among the others is in the sections of all providers, and four
# lengths more would only repeat it.
NOT_IN_LENGTHS = ("compiled", "liger")
# Timed calls of one measurement at most, and seconds after which none is begun.
REPEATS, SECONDS = {"cpu": 9, "cuda": 30}, {"cpu": 25.0, "cuda": 0.6}


def sections(device: torch.device) -> dict[str, list[Spec]]:
    """The race's sections on such a device. ``accuracy`` beside them needs no specs."""
    return _on_cpu() if device.type == "cpu" else _on_gpu(device.type)


def _on_cpu() -> dict[str, list[Spec]]:
    """Full size where the claims are made; elsewhere a quarter of the positions, which keeps a section to minutes."""
    large, small, capped = "qwen2.5-0.5b-cpu", "small-v32k-cpu", "gemma-cpu"
    quarter = ("ragged-small-cpu",)
    lengths = [f"length-{length}-cpu" for length in LENGTHS_CPU]
    return {
        "headline": _specs("cpu", [large], ["ragged-cpu"], heads=["trainable"], dtypes=["bfloat16"]),
        # The claims in float32, at full size: naive takes most of a minute a call here, so they meet nobody else.
        "float32": _specs(
            "cpu",
            [large, small],
            ["ragged-cpu"],
            heads=["trainable"],
            dtypes=["float32"],
            only=("naive", "ours", FLOOR),
        ),
        "large": [
            *_specs("cpu", [large], quarter, heads=["frozen"], dtypes=["bfloat16"]),
            *_specs("cpu", [large], quarter, heads=HEADS, dtypes=["float32"]),
        ],
        "small": _specs("cpu", [small], quarter, heads=HEADS, dtypes=["bfloat16", "float32"]),
        "softcap": _specs("cpu", [capped], quarter, heads=["trainable"], dtypes=["bfloat16", "float32"]),
        "lengths": _specs("cpu", [small], lengths, heads=["trainable"], dtypes=["bfloat16"], skip=NOT_IN_LENGTHS),
    }


# Each compiles for every shape, which takes longer than all else: they come last.
COMPILED = ("compiled", "liger")


def gpu_race() -> dict[str, list[Spec]]:
    """The race that the targets are about: ourselves first, last who compiles, so that a budget cuts the least."""
    batches, everyone = targets.GPU_BATCHES, default_names(torch.device("cuda"))
    ourselves = ("ours", "ours_recompute", FLOOR)
    others = [name for name in everyone if name not in (*COMPILED, *ourselves, "ours_torch")]

    def specs(case: str, providers: Sequence[str]) -> list[Spec]:
        return _specs("cuda", [case], batches, heads=HEADS, dtypes=["bfloat16"], only=providers)

    return {
        "ours": [
            spec
            for case in targets.GPU_CASES
            for spec in (*specs(case, ourselves), *_evaluation([case], batches, ("ours", FLOOR)))
        ],
        "others": [
            spec
            for case in targets.GPU_CASES
            for spec in (*specs(case, others), *_evaluation([case], batches, ("naive",)))
        ],
        "compiled": [spec for case in targets.GPU_CASES for spec in specs(case, COMPILED)],
    }


def _evaluation(cases: Sequence[str], batches: Sequence[str], providers: Sequence[str]) -> list[Spec]:
    return race.specs(
        cases, batches, ["trained-like"], ["trainable"], ["bfloat16"], ["forward"], providers,
        device="cuda", repeats=REPEATS["cuda"], seconds=SECONDS["cuda"],
    )  # fmt: skip


def _on_gpu(device: str) -> dict[str, list[Spec]]:
    lengths = [f"length-{length}" for length in LENGTHS]
    return {
        **gpu_race(),
        "mistral": _specs(device, ["mistral-7b"], targets.GPU_BATCHES, heads=HEADS, dtypes=["bfloat16"]),
        "long": _specs(device, ["llama3-8b"], ["long"], heads=HEADS, dtypes=["bfloat16"]),
        "lengths": _specs(
            device, ["llama3-8b"], lengths, heads=["trainable"], dtypes=["bfloat16"], skip=NOT_IN_LENGTHS
        ),
    }


def _specs(
    device: str,
    cases: Sequence[str],
    batches: Sequence[str],
    *,
    heads: Sequence[HeadName],
    dtypes: Sequence[DTypeName],
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[Spec]:
    names = [name for name in default_names(torch.device(device)) if name not in skip]
    names = [name for name in names if not only or name in only]
    return race.specs(
        cases,
        batches,
        ["trained-like"],
        heads,
        dtypes,
        ["full"],
        names,
        device=device,
        repeats=REPEATS[device],
        seconds=SECONDS[device],
    )


def path_of(device: torch.device) -> Path:
    """One file for a machine and a day."""
    return RESULTS / f"{machine.kind(device)}-{machine.today()}.json"


def record(device: torch.device, only: Sequence[str], path: Path, providers: Sequence[str] = ()) -> Record:
    """Run the sections and keep every answer at once. What ``path`` holds already stays, unless measured again.

    ``providers`` measures these alone again, after a change that touches no other.
    """
    kept = Record.load(path) if path.exists() else Record()
    kept.machine, kept.date, kept.commit = machine.device_name(device), machine.today(), machine.commit()
    wanted = [
        spec
        for name, specs in sections(device).items()
        if name in only
        for spec in specs
        if not providers or spec.provider in providers
    ]
    before = kept.rows

    def keep(rows: list[Row]) -> None:
        kept.rows = merged(before, rows)
        kept.save(path)

    race.run(wanted, keep)
    if ACCURACY in only:
        kept.accuracy = accuracy.run(device.type)
    kept.save(path)
    return kept


def merged(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """What was measured again replaces what it was."""
    rows = {(*row.group, row.provider): row for row in (*before, *after)}
    return list(rows.values())


def newest() -> dict[str, tuple[Path, Record]]:
    """The newest record of each class of machine, "cpu" and "gpu", where there is one."""
    found: dict[str, tuple[Path, Record]] = {}
    for path in RESULTS.glob("*.json"):
        machine_class = "cpu" if path.name.startswith("cpu-") else "gpu"
        candidate = (path, Record.load(path))
        if machine_class not in found or _age(candidate) > _age(found[machine_class]):
            found[machine_class] = candidate
    return found


def _age(entry: tuple[Path, Record]) -> tuple[str, str]:
    return entry[1].date, entry[0].name
