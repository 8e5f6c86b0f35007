"""A head split over ranks by rows of its vocabulary, and what the ranks tell one another: numbers of rows.

Every rank of the group holds the same hidden states and labels and its own rows of the weight. With the label's logit
as the shift c of all of them (``docs/kernels.md`` has the mathematics), each has the exponentials of its own tokens,
and only their sums S_r have to meet:

    z_y   = sum_r [r holds y] z_y                  the label's logit, before the products
    c     = max_r c_r                              c_r differs from z_y only in rows that overflowed on rank r
    S     = sum_r S_r exp(c_r - c)                 then logp, 1 / (a + S) and E_y := -S are those of the whole head
    dh    = sum_r k (E_r W_r)                      as behind any layer split by columns
    dW_r  = E_r^T (k h)                            and the bias's own: nothing to add, rows have one owner

S is known before anything is scaled by it, so plans that form d logp / d hidden in forward need no correction. Mean
logits are means of the ranks' means, weighted by their tokens. A target costs four numbers a rank; logits, E and the
weight stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def summed(values: Tensor, group: Any) -> Tensor:
    """Sum over the ranks of a group, in a tensor of its own."""
    found = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, group=group)
    return found


def largest(values: Tensor, group: Any) -> Tensor:
    """The largest over the ranks of a group, in a tensor of its own."""
    found = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


@dataclass(frozen=True)
class Shard:
    """How a vocabulary is split: rank r of ``group`` holds its tokens ``offsets[r]`` to ``offsets[r + 1]``.

    ``weight`` is then ``[V_r, H]``, ``bias`` ``[V_r]``; hidden and labels, which name tokens of the whole vocabulary,
    are the same on every rank, and so are all other arguments. Every rank gets the same values, its own rows of the
    weight's gradient, and the whole gradient of hidden.

    Raises:
        ValueError: offsets that do not rise from 0, one more than the group has ranks.
    """

    group: dist.ProcessGroup | None  # None for the default group
    offsets: tuple[int, ...]
    # False where what made hidden adds its gradient up over the group by itself: Megatron's copy to the tensor-parallel
    # region, or a gather whose backward scatters the sum.
    sums_hidden: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(int(offset) for offset in self.offsets))
        ranks = dist.get_world_size(self.group)
        rises = all(a < b for a, b in pairwise(self.offsets))
        if ranks < 1 or len(self.offsets) != ranks + 1 or self.offsets[0] != 0 or not rises:
            raise ValueError(
                f"offsets must rise from 0 to the size of the vocabulary, one more than the {ranks} ranks of a group "
                f"that this process is one of, got {self.offsets}: every rank holds at least one token"
            )

    @classmethod
    def even(cls, vocab: int, group: dist.ProcessGroup | None = None, *, sums_hidden: bool = True) -> Shard:
        """``vocab`` tokens in runs of the same length, the last as long as what is left: as DTensor and others do."""
        ranks = dist.get_world_size(group)
        each = -(-vocab // max(ranks, 1))
        return cls(group, tuple(min(rank * each, vocab) for rank in range(ranks + 1)), sums_hidden)

    @classmethod
    def of(cls, weight: Tensor) -> Shard:
        """How a DTensor ``[V, H]`` is split.

        Raises:
            ValueError: no DTensor split over one dimension of a mesh, by rows.
        """
        mesh: Any = getattr(weight, "device_mesh", None)
        placements: Any = getattr(weight, "placements", None)
        if mesh is not None and mesh.ndim == 1 and placements[0].is_shard(0):
            group = mesh.get_group()
            if mesh.get_local_rank() == dist.get_rank(group):
                return cls.even(weight.shape[0], group)
        raise ValueError(
            "weight must be a DTensor placed as Shard(0) over one dimension of a mesh, whose ranks are in order, got "
            f"{placements or type(weight).__name__} on {mesh}: redistribute it, or pass its local rows with "
            "Shard(group, offsets)"
        )

    @property
    def start(self) -> int:
        return self.offsets[dist.get_rank(self.group)]

    @property
    def rows(self) -> int:
        """Tokens that this rank holds."""
        return self.offsets[dist.get_rank(self.group) + 1] - self.start

    @property
    def widest(self) -> int:
        """Tokens of the rank that holds most; plans follow it, as ranks must cut the work alike."""
        return max(b - a for a, b in pairwise(self.offsets))

    @property
    def vocab(self) -> int:
        return self.offsets[-1]

    def places(self, tokens: Tensor) -> Tensor:
        """Rows of this rank's weight, -1 for tokens that another rank holds."""
        places = tokens - self.start
        return torch.where((places >= 0) & (places < self.rows), places, -1)

    def of_owner(self, values: Tensor, places: Tensor) -> Tensor:
        """``values [n]`` of the rank whose ``places`` are not -1, on every rank."""
        return self.sum(torch.where(places >= 0, values, 0))

    def sum(self, values: Tensor) -> Tensor:
        return summed(values, self.group)

    def largest(self, values: Tensor) -> Tensor:
        return largest(values, self.group)

    def finish(self, grad_hidden: Tensor | None) -> None:
        """Add up hidden's gradient over the group, in place, where nobody else does."""
        if grad_hidden is not None and self.sums_hidden:
            dist.all_reduce(grad_hidden, group=self.group)

    def mean(self, means: Tensor) -> Tensor:
        """Means over the whole vocabulary from those over this rank's tokens."""
        return self.sum(means * (self.rows / self.vocab))
