"""One measurement as a row: what is asked for and, once answered, what came of it. And the file rows are kept in."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

Status = Literal["ok", "unsupported", "out of memory", "wrong", "failed", "not reached"]

# What providers are compared within, in the order tables are sorted by.
GROUP = ("case", "batch", "states", "head", "dtype", "phase", "task", "setting")


@dataclass(frozen=True)
class Row:
    """The loss, log-probabilities, a training step, a tile or a profile's step: each names its subject in the first
    fields. Numbers are None where there are none; ``reason`` says why. A row nobody has answered is "not reached", and
    so is one whose measurement was cut short: its figures are then those up to that moment.
    """

    case: str  # of the head, or the model
    batch: str = ""
    states: str = ""
    head: str = ""
    dtype: str = ""
    phase: str = ""
    provider: str = ""
    status: Status = "not reached"
    reason: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    peak_mib: float | None = None  # beyond inputs and returned gradients
    peak_rss_mib: float | None = None  # CPU only: maximum resident size of the process, inputs and libraries included
    floor_ms: float | None = None  # the products alone, timed in turn with this row's own calls in the same process
    ratio: float | None = None  # median_ms / floor_ms
    loss: float | None = None
    err_loss: float | None = None  # relative, against float64, on the sample
    err_hidden: float | None = None  # relative Frobenius norms of the gradients' errors
    err_weight: float | None = None
    naive_err_loss: float | None = None  # the naive implementation's on the same sample
    naive_err_hidden: float | None = None
    naive_err_weight: float | None = None
    targets: int = 0
    positions: int = 0
    provider_version: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    task: str = "loss"  # or logprobs, train, tune, profile
    setting: str = ""  # what else tells measurements apart: gradient checkpointing, a number of rows
    cut: str = ""  # which cut of the floor's products was the fastest
    figures: dict[str, Any] = field(default_factory=dict)  # by name, what only this task has

    @property
    def group(self) -> tuple[str, ...]:
        """What providers are compared within."""
        return tuple(getattr(self, name) for name in GROUP)

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.group, self.provider)

    def with_(self, **changes: Any) -> Self:
        return replace(self, **changes)


@dataclass(frozen=True)
class AccuracyRow:
    """Relative Frobenius error of one quantity in one regime, the naive implementation's beside ours."""

    regime: str
    mean_logp: float  # of the float64 truth
    dtype: str
    quantity: str  # logps, grad_hidden or grad_weight
    naive: float
    ours: float
    allowed: float  # twice the naive error, or the dtype's floor

    @property
    def holds(self) -> bool:
        return self.ours <= self.allowed


@dataclass(frozen=True)
class Check:
    """One command that proves something or fails: the test suite, a sanitizer."""

    name: str
    status: Literal["ok", "failed", "not available", "not reached"]
    seconds: float
    detail: str  # the command's own last words, or why it did not run


@dataclass
class Record:
    """One file: where and when, the rows, the accuracy, what was checked beside them."""

    machine: str = ""
    date: str = ""
    commit: str = ""
    rows: list[Row] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {**asdict(self), "rows": [_told(row) for row in self.rows]}
        path.write_text(json.dumps(held, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """The record in a file; ValueError where it holds none."""
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or "rows" not in found:
            raise ValueError(f"{path} is not a record of this benchmark: it has no rows; write one with --json")
        kinds = {"rows": Row, "accuracy": AccuracyRow, "checks": Check}
        lists: dict[str, Any] = {name: [kind(**row) for row in found.get(name, [])] for name, kind in kinds.items()}
        return cls(**{name: found[name] for name in ("machine", "date", "commit") if name in found}, **lists)


def _told(row: Row) -> dict[str, Any]:
    """A row without the fields that say nothing; reading gives them back."""
    return {one.name: value for one in fields(row) if (value := getattr(row, one.name)) not in ("", None, {})}


Keep = Callable[[list[Row]], None]  # sees the rows so far, so that an interrupted run is not lost


def merged(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """What was measured again replaces what it was."""
    return list({row.key: row for row in (*before, *after)}.values())
