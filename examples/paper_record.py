"""What `python -m examples.paper` records, and the file it is kept in."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from examples.training import Run


@dataclass
class Diversity:
    """Mean cosine similarities of sampled answers, and one of these answers for the eye."""

    per_input: float
    across_input: float
    example: str


@dataclass
class Seed:
    """Everything trained from one seed."""

    seed: int
    runs: list[Run]
    by_heart: list[Run]  # ORPO and the probability ratio on a few pairs, measured on those; empty where not asked for
    step_seconds: dict[str, float]  # by method, median of steps taken in turn
    diversity: dict[str, Diversity]  # of base, sft, orpo and dpo

    def run(self, method: str, beta: float | None = None) -> Run:
        """The training by a method, at a weight where it was tried at several."""
        return next(run for run in self.runs if run.method == method and beta in (None, run.beta))


@dataclass
class Record:
    """One call of the command."""

    settings: dict[str, Any]  # its options
    pairs: int
    parameters: int
    vocabulary: int
    device: str
    threads: int
    versions: dict[str, str]
    date: str
    commit: str
    seeds: list[Seed]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """The record in a file.

        Raises:
            ValueError: the file holds none.
        """
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "seeds" not in found:
            raise ValueError(f"{path} is no record of this command: write one with python -m examples.paper")
        seeds = [
            Seed(
                seed["seed"],
                [Run(**run) for run in seed["runs"]],
                [Run(**run) for run in seed["by_heart"]],
                seed["step_seconds"],
                {name: Diversity(**values) for name, values in seed["diversity"].items()},
            )
            for seed in found.pop("seeds")
        ]
        return cls(**found, seeds=seeds)
