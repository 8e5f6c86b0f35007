"""Tiles of E for the torch backend: slices of the head against all hidden rows of a chunk, while they stay in cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.backends import MomentSums, slices
from orpo_kernels.settings import Head

# A tile of this many bytes stays in the last-level cache of current servers through its three or four passes.
# Measured at n = 2697: slices of 2,048 rows (11 MB) are a little faster than 4,096, and 8,192 cost 1.7x.
TILE_BYTES = 12 << 20
TILE_ROWS = (256, 2048)
# The sum over a tile's rows is taken in this many partial sums: torch adds a bfloat16 reduction in float32 but rounds
# its result, so short sums rounded separately and added in float32 are both fast and accurate.
PARTIAL_SUMS = 64
# From this many targets on, a bfloat16 product is faster by more than its transposed operand costs to copy first.
# Measured (ms over V = 32,000, H = 896, copied and not): n = 256, 41 and 16; 666, 81 and 41; 1,300, 85 and 88; 2,697,
# 367 and 492. A float32 product takes a transposed operand as it is.
COPY_TRANSPOSED_FROM = 1024
TRANSPOSE_BLOCK = 128


def tile_rows(columns: int, itemsize: int) -> int:
    """Rows of the head in one slice, a multiple of the partial sums."""
    rows = TILE_BYTES // max(columns * itemsize, 1) // PARTIAL_SUMS * PARTIAL_SUMS
    return min(max(rows, TILE_ROWS[0]), TILE_ROWS[1])


class Tiles:
    """E of n targets, slice by slice of the vocabulary, under a given shift.

    ``hidden [n, H]`` has the dtype of the product and of the tiles. ``entry [n]`` is what stands at the labels' places,
    0 without it.
    """

    def __init__(self, hidden: Tensor, ids: Tensor, head: Head, shift: Tensor, entry: Tensor | None = None) -> None:
        self.hidden, self.ids, self.head, self.shift = hidden, ids, head, shift
        self.columns = torch.arange(hidden.shape[0], device=hidden.device)
        self._entries = hidden.new_zeros(()) if entry is None else entry.to(hidden.dtype)
        # Without a softcap the shift is the product's bias, so it is subtracted in its accumulator.
        self._bias = (shift / -head.logit_scale).to(hidden.dtype) if head.softcap is None else None

    @property
    def step(self) -> int:
        """Tokens of a slice whose tile stays in cache."""
        of = self.hidden if self.head.softcap is None else self.shift
        return tile_rows(self.hidden.shape[0], of.element_size())

    def exp(
        self,
        tokens: slice,
        room: Tensor,
        sum_exp: Tensor | None = None,
        logit_sum: Tensor | None = None,
        moments: MomentSums | None = None,
    ) -> Tensor:
        """E of the tokens ``[s, n]``, in ``room [s + 1, n]``; their S is added to ``sum_exp``, if the entry is 0.

        Under a softcap E carries the cap's slope, S sums plain exponentials, and ``logit_sum`` takes the capped logits.
        The room has one row more than the slice: labels of other slices are written there, which costs no mask and no
        sync. In a stored E that row is the next slice's first, not computed yet, or the spare row at the end.
        """
        size, softcap = tokens.stop - tokens.start, self.head.softcap
        places = (self.ids - tokens.start).remainder(1 << 62).clamp(max=size)  # a negative one becomes a large one
        tile, labels = room[:size], (places, self.columns)
        logits = logits_of(self.hidden, self.head, tokens, self._bias)
        if softcap is None:
            if moments is not None:
                moments.add(tokens.start, logits)
            torch.exp(logits, out=tile)
            room.index_put_(labels, self._entries)
            if sum_exp is not None:
                sum_exp += sum_rows(tile, sum_exp.dtype)
            return tile
        # With u = exp(-2z / cap) and d = 2 / (1 + u) the capped logit is cap (1 - u) d / 2, as cap (d - 1) would lose
        # what is small, and its slope u d^2, as 1 - tanh^2 would cancel where tanh saturates. u stops at e^80, where
        # tanh has long been -1.
        u = logits.to(self.shift.dtype).mul_(-2 / softcap).clamp_(max=80).exp_()
        d = torch.add(0.5, u, alpha=0.5).reciprocal_()
        doubled = torch.rsub(u, 1).mul_(d)  # twice the tanh
        if logit_sum is not None:
            logit_sum.add_(doubled.sum(0), alpha=softcap / 2)
        shifted = torch.add(-self.shift, doubled, alpha=softcap / 2)
        slope = u.mul_(d).mul_(d)
        if moments is not None:
            moments.add(tokens.start, shifted)
        plain = shifted.exp_()
        if sum_exp is not None:
            # Summed with the label's own exp(0 or less) and without it afterwards would cancel as p -> 1.
            sum_exp += F.pad(plain, (0, 0, 0, 1)).index_put_(labels, plain.new_zeros(()))[:size].sum(0)
        tile.copy_(plain.mul_(slope))
        room.index_put_(labels, self._entries)
        return tile


def logits_of(hidden: Tensor, head: Head, tokens: slice, bias: Tensor | None) -> Tensor:
    """Uncapped ``scale * (W_s @ hidden^T + bias + b_s)``, ``[s, n]``; ``bias [n]`` is added in the accumulator."""
    tile = F.linear(head.weight[tokens].to(hidden.dtype), hidden, bias)
    if head.bias is not None:
        tile += head.bias[tokens, None]
    return tile if head.logit_scale == 1 else tile.mul_(head.logit_scale)


def row_max(hidden: Tensor, head: Head) -> Tensor:
    """The largest capped logit of each row, ``[n]``, for hidden states in the accumulation dtype."""
    step = tile_rows(hidden.shape[0], hidden.element_size())
    largest = [logits_of(hidden, head, tokens, None).amax(0) for tokens in slices(head.vocab, step)]
    return head.cap(torch.stack(largest).amax(0))


def add_hidden_product(product_t: Tensor, weight: Tensor, tile: Tensor, *, accumulate: bool) -> None:
    """``weight^T @ tile [H, n]`` for a slice of the head ``[s, H]`` and its tile ``[s, n]``, as ``multiply`` has it."""
    weight_t = weight.to(tile.dtype).T
    if tile.dtype == torch.bfloat16 and tile.shape[1] >= COPY_TRANSPOSED_FROM:
        weight_t = transposed(weight)
    multiply(product_t, weight_t, tile, accumulate=accumulate)


def transposed(weight: Tensor) -> Tensor:
    """A contiguous copy of ``weight^T``, by products with an identity, which are exact for finite weights.

    A matrix product transposes its operand block by block in all cores; ``contiguous()`` is one thread's loop, and took
    a fifth of a whole call.
    """
    rows, features = weight.shape
    out = weight.new_empty((features, rows))
    identity = torch.eye(TRANSPOSE_BLOCK, dtype=weight.dtype, device=weight.device)
    for start in range(0, features, TRANSPOSE_BLOCK):
        block = weight[:, start : start + TRANSPOSE_BLOCK]
        width = block.shape[1]
        torch.mm(identity[:width, :width], block.T, out=out[start : start + width])
    return out


def multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out = a @ b`` or ``out += a @ b``; each product sums in its accumulator, ``out`` may be wider than a and b."""
    if out.dtype != a.dtype:
        product = a @ b
        if accumulate:
            out += product
        else:
            out.copy_(product)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def sum_rows(tile: Tensor, acc: torch.dtype) -> Tensor:
    """Sum over dimension 0 in the accumulation dtype."""
    if tile.dtype != torch.bfloat16:  # a partial sum in float16 could overflow
        return tile.sum(0, dtype=acc)
    each = tile.shape[0] // PARTIAL_SUMS
    whole = each * PARTIAL_SUMS
    total = tile[:whole].view(PARTIAL_SUMS, each, *tile.shape[1:]).sum(1).to(acc).sum(0)
    return total + tile[whole:].to(acc).sum(0) if whole < tile.shape[0] else total
