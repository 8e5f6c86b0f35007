"""How the work is cut: which plan, how many groups, how many bytes, and why.

One pass is a matrix product of ``2 * N * V * H`` FLOP over the N targets. ``E`` is the matrix of shifted exponentials.

| plan | when | passes |
|---|---|---|
| ``forward`` | nothing needs a gradient | 1 |
| ``frozen`` | the head is frozen, hidden needs a gradient | 2 |
| ``store`` | the head trains; E of a group of whole pairs fits the budget and is stored for the weight's product | 3 |
| ``recompute`` | the head trains and no such group fits | 4 |

``linear_logprobs`` takes the same plans. Its upstream gradient comes late, so ``store`` there keeps E of everything
until backward and has one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from orpo_kernels.backends import Backend, acc_dtype, grad_dtype
from orpo_kernels.settings import Needs
from orpo_kernels.targets import Sizes

# E of about 4,000 targets at a vocabulary of 128,256 in bfloat16: large enough that the accumulation of the weight's
# gradient over groups is rare, small beside the activations of any model with such a head.
DEFAULT_WORKSPACE = 1 << 30


class Group(NamedTuple):
    """A run of whole pairs and their targets, half-open."""

    first_pair: int
    last_pair: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """A decision of the planner; ``str(plan)`` is what ``explain`` prints."""

    name: str  # forward, frozen, store or recompute
    passes: int
    groups: tuple[Group, ...]
    targets: int
    positions: int
    stored_bytes: int  # E kept for the weight's product, of the largest group
    accumulator_bytes: int  # float32 sum of the weight's gradient over several groups
    rounded_bytes: int  # the gradient returned in its place, which is allocated when E is gone
    scratch_bytes: int  # tiles that do not live in a cache, and copies of rows
    scratch_budget: int  # bytes of scratch the backend may hold
    reason: str
    backend: str
    form: str = ""  # how the backend multiplies, where it has a choice; only ``explain`` asks

    @property
    def bytes(self) -> int:
        """Beyond inputs and returned gradients, without the tiles that stay in cache."""
        beside = self.accumulator_bytes - self.rounded_bytes
        return max(beside + self.stored_bytes + self.scratch_bytes, self.accumulator_bytes)

    def __str__(self) -> str:
        share = f"{self.targets / self.positions:.0%}" if self.positions else "0%"
        groups = f"{len(self.groups)} group" + ("" if len(self.groups) == 1 else "s")
        passes = f"{self.passes} pass" + ("" if self.passes == 1 else "es")
        return (
            f"plan {self.name} on backend {self.backend}: {passes} over {self.targets} targets "
            f"({share} of {self.positions} positions), {groups}, {self.bytes / 2**20:.0f} MiB beyond inputs and "
            f"gradients; {self.reason}" + (f"; {self.form}" if self.form else "")
        )


def choose(
    needs: Needs,
    sizes: Sizes,
    *,
    vocab: int,
    features: int,
    trained: int | None = None,  # the last columns of weight that take a gradient; None for all of them
    dtype: torch.dtype,  # of hidden and weight
    workspace_bytes: int | None,
    backend: Backend,
    form: str = "",
    splits: bool = True,  # whether pairs may be computed group by group
) -> Plan:
    """Pick the plan with the fewest passes that keeps to the workspace.

    ``workspace_bytes=None`` allows 1 GiB and, on top, the place of one float32 copy of the weight, which several groups
    would need anyway; a number bounds everything the plan holds beyond inputs, returned gradients and tiles in cache,
    as far as the backend's least scratch allows. Several groups return a gradient that does not exist while they hold
    an E, so its place is E's as well: every group less saves a pass over the accumulator.
    """
    everything = Group(0, len(sizes.pairs), 0, sizes.count)
    columns = features if trained is None else trained
    thin = "" if columns == features else f"; the weight's product has {columns} of {features} columns"
    # A returned gradient in the accumulation dtype serves as its own accumulator.
    accumulator, rounded = 4 * vocab * columns, grad_dtype(dtype).itemsize * vocab * columns
    if grad_dtype(dtype) == acc_dtype(dtype):
        accumulator = rounded = 0
    streaming = DEFAULT_WORKSPACE if workspace_bytes is None else workspace_bytes  # of a pass that stores no E
    limit = streaming + accumulator if workspace_bytes is None else workspace_bytes

    def plan(name: str, passes: int, reason: str, groups: tuple[Group, ...] = (everything,)) -> Plan:
        store, several = name == "store", len(groups) > 1
        sums, late = (accumulator, rounded) if several else (0, 0)
        after = thin if name in ("store", "recompute") else ""
        budget = limit - sums + late if store else streaming
        largest = max(group.last - group.first for group in groups)
        cost = backend.cost(largest, vocab, features, dtype, budget, store=store)
        held = (cost.stored, sums, late, cost.scratch, cost.budget)
        return Plan(name, passes, groups, sizes.count, sizes.positions, *held, reason + after, backend.name, form)

    def fits(n: int, budget: int) -> bool:
        return need(n, budget) <= budget

    def need(n: int, budget: int) -> int:
        return sum(backend.cost(n, vocab, features, dtype, budget, store=True)[:2])

    if not needs.hidden and not needs.head:
        return plan("forward", 1, "nothing needs a gradient")
    if not needs.head:
        return plan("frozen", 2, "the head is frozen, so only hidden's product remains and no E is stored")
    if fits(sizes.count, limit):
        return plan("store", 3, "E of all targets fits the workspace")
    room = limit - accumulator + rounded  # for E, of one of several groups
    if splits and accumulator <= limit and fits(max(sizes.pairs), room):
        groups = _whole_pairs(sizes.pairs, lambda n: fits(n, room))
        return plan("store", 3, f"E of {len(groups)} groups of whole pairs fits in turn", groups)
    most, what = (max(sizes.pairs), "the longest pair") if splits else (sizes.count, "all targets")
    sums = f" and the accumulator ({accumulator / 2**20:.0f} MiB)" if splits and accumulator else ""
    return plan(
        "recompute",
        4,
        f"E of {what} ({need(most, limit) / 2**20:.0f} MiB){sums} does not fit {limit / 2**20:.0f} MiB, so the "
        "weight's gradient is written slice by slice from recomputed tiles",
    )


def _whole_pairs(sizes: Sequence[int], fits: Callable[[int], bool]) -> tuple[Group, ...]:
    """Runs of whole pairs that fit, each as long as it can be."""
    groups: list[Group] = []
    first_pair = first = last = 0
    for pair, size in enumerate(sizes):
        if last > first and not fits(last - first + size):
            groups.append(Group(first_pair, pair, first, last))
            first_pair, first = pair, last
        last += size
    groups.append(Group(first_pair, len(sizes), first, last))
    return tuple(groups)
