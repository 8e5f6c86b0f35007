"""How the work is cut: which plan, how many chunks, how many bytes, and why.

One "mm" is ``2 * N * V * H`` FLOP over the N scores. ``E`` is the matrix of shifted exponentials, ``[V, N]``.

| plan | when | mm |
|---|---|---|
| ``score`` | nothing needs a gradient | 1 |
| ``frozen`` | the head is frozen, hidden needs a gradient | 2 |
| ``stash`` | the head trains; E of a group of whole pairs fits the budget and is kept for the weight's product | 3 |
| ``recompute`` | the head trains and no such group fits | 4 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from orpo_kernels.backends import Backend

# E of about 4,000 scores at a vocabulary of 128,256 in bfloat16: large enough that the accumulation of the weight's
# gradient over chunks is rare, small beside the activations of any model with such a head.
DEFAULT_WORKSPACE = 1 << 30


class Group(NamedTuple):
    """A run of whole pairs and their scores, half-open."""

    first_pair: int
    last_pair: int
    first_score: int
    last_score: int


class Needs(NamedTuple):
    """Which gradients autograd asks for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass(frozen=True)
class Plan:
    """A decision of the planner; ``str(plan)`` is what ``explain`` prints."""

    name: str  # score, frozen, stash or recompute
    mm: int
    groups: tuple[Group, ...]
    scores: int
    positions: int
    kept_bytes: int  # E kept for the weight's product, of the largest group
    accumulator_bytes: int  # float32 sum of the weight's gradient over several groups
    scratch_bytes: int  # tiles that do not live in a cache, and copies of rows
    room: int  # bytes of scratch the backend may hold
    reason: str
    backend: str

    @property
    def bytes(self) -> int:
        """Beyond inputs and returned gradients, without the tiles that stay in cache."""
        return self.kept_bytes + self.accumulator_bytes + self.scratch_bytes

    def __str__(self) -> str:
        share = f"{self.scores / self.positions:.0%}" if self.positions else "0%"
        chunks = f"{len(self.groups)} chunk" + ("" if len(self.groups) == 1 else "s")
        return (
            f"plan {self.name} on backend {self.backend}: {self.mm} mm over {self.scores} scores "
            f"({share} of {self.positions} positions), {chunks}, {self.bytes / 2**20:.0f} MiB beyond inputs and "
            f"gradients; {self.reason}"
        )


def choose(
    needs: Needs,
    pair_sizes: Sequence[int],
    *,
    vocab: int,
    features: int,
    dtype: torch.dtype,  # of hidden and weight
    accumulates_in_place: bool,  # the returned gradient has the accumulation dtype and serves as its own accumulator
    workspace_bytes: int | None,
    positions: int,
    backend: Backend,
) -> Plan:
    """Pick the plan with the fewest mm that keeps to the workspace.

    ``workspace_bytes=None`` allows 1 GiB and, on top, the place of one float32 copy of the weight, which several chunks
    would need anyway; a number bounds everything the plan holds beyond inputs, returned gradients and tiles in cache.
    """
    scores = sum(pair_sizes)
    whole = Group(0, len(pair_sizes), 0, scores)
    accumulator = 0 if accumulates_in_place else 4 * vocab * features
    limit = DEFAULT_WORKSPACE + accumulator if workspace_bytes is None else workspace_bytes
    column = vocab * backend.kept_itemsize(dtype)  # E of one score
    least = backend.least_room

    def plan(name: str, mm: int, reason: str, groups: tuple[Group, ...] = (whole,), kept: int = 0) -> Plan:
        sums = accumulator if len(groups) > 1 else 0
        room = max(limit - kept - sums, least) if kept else room_of(workspace_bytes, backend)
        scratch = backend.scratch_bytes(kept // column if kept else scores, vocab, features, dtype, room, kept=kept > 0)
        return Plan(name, mm, groups, scores, positions, kept, sums, scratch, room, reason, backend.name)

    if not needs.hidden and not needs.head:
        return plan("score", 1, "nothing needs a gradient")
    if not needs.head:
        return plan("frozen", 2, "the head is frozen, so only hidden's product remains and no E is kept")
    if scores * column + least <= limit:
        return plan("stash", 3, "E of all pairs fits the workspace", kept=scores * column)
    room = limit - accumulator - least
    if max(pair_sizes) * column <= room:
        groups = _whole_pairs(pair_sizes, room // column)
        kept = max(group.last_score - group.first_score for group in groups) * column
        return plan("stash", 3, f"E of {len(groups)} groups of whole pairs fits in turn", groups, kept)
    return plan(
        "recompute",
        4,
        f"E of the longest pair ({max(pair_sizes) * column / 2**20:.0f} MiB) and the accumulator "
        f"({accumulator / 2**20:.0f} MiB) do not fit {limit / 2**20:.0f} MiB, so the weight's gradient is written "
        "slice by slice from recomputed tiles",
    )


def room_of(workspace_bytes: int | None, backend: Backend) -> int:
    """Bytes of scratch for a pass that keeps no E: the workspace, or 1 GiB, and what the backend needs anyway."""
    return max(DEFAULT_WORKSPACE if workspace_bytes is None else workspace_bytes, backend.least_room)


def _whole_pairs(sizes: Sequence[int], most: int) -> tuple[Group, ...]:
    """Runs of whole pairs of at most ``most`` scores, each as long as it can be."""
    groups: list[Group] = []
    first_pair = first_score = score = 0
    for pair, size in enumerate(sizes):
        if score > first_score and score - first_score + size > most:
            groups.append(Group(first_pair, pair, first_score, score))
            first_pair, first_score = pair, score
        score += size
    groups.append(Group(first_pair, len(sizes), first_score, score))
    return tuple(groups)
