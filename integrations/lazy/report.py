"""What became of lazy logits: answered, computed in full, where, and at what cost."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

from orpo_kernels.plan import Plan

# Frames of these are never where a user asked for the logits.
OURS = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.abspath(torch.__file__)))


@dataclass
class Materialised:
    """Full logits computed for an operation that is not known to be lazy."""

    operation: str
    where: str  # file:line of who asked
    bytes: int  # of the logits, each time
    count: int = 0


@dataclass
class Report:
    """Of one model, since ``fuse`` or ``reset``."""

    refusal: str | None = None  # why the model is not fused
    fused: bool = False
    calls: int = 0  # of the head, that gave lazy logits
    rows: int = 0  # hidden states that these calls were given
    products: float = 0.0  # of the head's size, over all rows of a call, forward and backward
    chains: Counter[str] = field(default_factory=Counter)  # operations, from the head to what was computed
    materialised: list[Materialised] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)  # the last plan of each name
    notes: list[str] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was counted."""
        self.calls, self.rows, self.products = 0, 0, 0.0
        for each in (self.chains, self.materialised, self.plans, self.notes):
            each.clear()  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, object]) -> Report:
        """Of a copied model: nothing has been counted of that yet."""
        return Report(self.refusal, self.fused)

    def take(self, other: Report) -> None:
        """Add what another report counted, that of a copied head."""
        self.calls, self.rows = self.calls + other.calls, self.rows + other.rows
        self.products += other.products
        self.chains += other.chains
        self.materialised += other.materialised
        self.plans |= other.plans
        self.notes += [note for note in other.notes if note not in self.notes]

    def note(self, line: str) -> None:
        """Say once, here and as a warning."""
        if line not in self.notes:
            self.notes.append(line)
            warnings.warn(f"orpo_kernels: {line}", stacklevel=2)

    def materialise(self, operation: str, size: int) -> None:
        """Count an operation that needs all logits, ``size`` bytes of them; the first at a place warns."""
        where = _caller()
        for found in self.materialised:
            if (found.operation, found.where) == (operation, where):
                break
        else:
            found = Materialised(operation, where, size)
            self.materialised.append(found)
            warnings.warn(
                f"orpo_kernels: {operation} needed the full logits ({size / 2**20:.1f} MiB) at {where}; they were "
                "computed. Where this is in every step, unfuse(model) is faster, as the stock model keeps them",
                stacklevel=2,
            )
        found.count += 1
        found.bytes = max(found.bytes, size)

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"not fused: {self.refusal}"
        each = self.products / self.calls if self.calls else 0.0
        lines = [
            f"{'fused' if self.fused else 'not fused now'}: {self.calls} calls of the head gave lazy logits of "
            f"{self.rows} rows, {self.products:.2f} products of its size were run ({each:.2f} a call)"
        ]
        lines += [f"  {count} x {chain}" for chain, count in self.chains.most_common()]
        lines += [f"  {plan}" for plan in self.plans.values()]
        lines += [f"  {note}" for note in self.notes]
        for found in self.materialised:
            lines.append(
                f"  full logits for {found.operation} at {found.where}: {found.count} times, up to "
                f"{found.bytes / 2**20:.1f} MiB"
            )
        if self.materialised:
            lines.append("  what is computed in full in every step gains nothing: unfuse(model) gives the stock head")
        return "\n".join(lines)


def _caller() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
