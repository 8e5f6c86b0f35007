"""The torch backend: tuned for CPUs, in plain torch that other devices run too (not yet tried on one).

Layout: E is stored transposed, ``[V, n]``, so that a slice of the vocabulary is one contiguous block. Per slice of
``s`` rows of the head, while the ``[s, n]`` tile is in cache:

    tile   = exp(scale * (W_s @ hidden^T + b_s) - shift)    the label's entry set to 0
    S     += sum of the tile over its rows                  [n]
    unit  += W_s^T @ tile                                   [H, n], if hidden needs a gradient; over several slices
                                                            at once where E is kept

and, once S and the upstream gradient are known, from kept or recomputed tiles whose label entries are -S:

    grad_weight_s = tile @ (k * hidden)                     k = -g * r * scale

The shift enters the first product as its bias, so it is subtracted in the product's float32 accumulator, before the
rounding to bfloat16: entries near the label's logit, which make up S, keep their precision where rounded logits would
have lost it. Any shift gives the same result, so it may itself be rounded to the dtype of the product; the label's
distance to it is kept in the accumulation dtype.

Dtypes: bfloat16 stores E in bfloat16 and sums in float32. float32 and float64 stay what they are (float32 products
follow torch's matmul precision setting). float16 cannot hold E under the label's shift, so it is computed in float32,
tile by tile.

Owner of each accumulation: S and unit belong to one chunk and are summed in slice order; grad_weight is summed within
one product if there is one chunk, else in float32 by chunk order. No atomics, so two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.backends import Forward, acc_dtype
from orpo_kernels.pairs import pair_table
from orpo_kernels.scores import Head, compact_scores, count_scores

# A tile of this many bytes stays in the last-level cache of current servers through its three or four passes.
# Measured at n = 2697: slices of 2,048 rows (11 MB) are a little faster than 4,096, and 8,192 cost 1.7x.
TILE_BYTES = 12 << 20
TILE_ROWS = (256, 2048)
# Where E is kept, hidden's product takes a run of the head of this many bytes at once, which is also the size of its
# transposed copy: the float32 sum is added to less often. Measured at n = 2697, H = 896: 1.64 s in all with runs of
# 4,096 rows, 1.61 with 8,192, 1.55 with 32,768, which is this size.
PRODUCT_BYTES = 56 << 20
# Rows whose S passes this take their largest logit as shift instead of the label's. exp(60) times any vocabulary and
# any weight still fits a float32, which exp(80) would not.
RESCUE_ABOVE = math.exp(60.0)
RESCUE_ROWS = 256
# The sum over a tile's rows is taken in this many partial sums: torch adds a bfloat16 reduction in float32 but rounds
# its result, so short sums rounded separately and added in float32 are both fast and accurate.
PARTIAL_SUMS = 64
# From this many scores on, a bfloat16 product is faster by more than its transposed operand costs to copy first.
# Measured (ms over V = 32,000, H = 896, copied and not): n = 256, 41 and 16; 666, 81 and 41; 1,300, 85 and 88; 2,697,
# 367 and 492. A float32 product takes a transposed operand as it is.
COPY_TRANSPOSED_FROM = 1024
TRANSPOSE_BLOCK = 128
# Scores of one pass where E is not kept. Each pass reads the whole head, so not too few; the float32 [H, n] sum of
# hidden's product grows with them, so not too many.
STREAM_ROWS = 4096

# The memory of the last kept E on a CPU, by dtype, at most what the workspace allowed. The system hands out fresh pages
# one fault at a time, which for the E of a head of 128,256 tokens costs 0.2 s of 1.6, and up to 1 s on a busy virtual
# machine. Whoever uses it takes it out first, so two threads never share it.
_spare: dict[torch.dtype, Tensor] = {}


def release() -> None:
    """Give the memory kept between calls back to the system."""
    _spare.clear()


class TorchBackend:
    """See the module's docstring."""

    name = "torch"
    tuned_for = "cpu"
    count_scores = staticmethod(count_scores)
    compact_scores = staticmethod(compact_scores)
    pair_table = staticmethod(pair_table)
    least_room = 0  # its tiles live in the cache whatever the room, so it never asks how much there is

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def kept_itemsize(self, dtype: torch.dtype) -> int:
        return _compute_dtype(dtype).itemsize

    def rows_at_once(self, features: int, room: int) -> int:
        return STREAM_ROWS

    def scratch_bytes(self, n: int, vocab: int, features: int, dtype: torch.dtype, room: int, *, kept: bool) -> int:
        return 0

    def column_mean(self, weight: Tensor) -> Tensor:
        acc = acc_dtype(weight.dtype)
        rows = _tile_rows(weight.shape[1], weight.element_size())
        total = torch.zeros(weight.shape[1], dtype=acc, device=weight.device)
        for start in range(0, weight.shape[0], rows):
            total += _sum_rows(weight[start : start + rows], acc)
        return total / weight.shape[0]

    def forward(
        self, hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, *, keep: bool, unit: bool,
        logit_means: bool, centre: Tensor | None, room: int,
    ) -> Forward:  # fmt: skip
        compute, acc = _compute_dtype(hidden.dtype), acc_dtype(hidden.dtype)
        hidden = hidden[rows].to(compute)
        n, vocab = hidden.shape[0], head.vocab
        label_raw = _label_logits(hidden, targets, head, acc)
        label = head.cap(label_raw * head.logit_scale)
        shift = _representable(label, head, compute)
        exps = _take_exps(vocab, n, hidden) if keep else None

        total, unit_t, sums = _stream(hidden, targets, head, shift, exps, unit=unit, logit_sum=logit_means)
        means = None if sums is None else sums / vocab
        if logit_means and centre is not None:
            means = torch.cat([hidden[part].to(acc) @ centre for part in _row_parts(hidden)] or [label])
            means *= head.logit_scale

        # One host sync on a GPU, free on a CPU; almost always there is no such row.
        rescued = torch.nonzero(~(total < RESCUE_ABOVE)).view(-1)
        for lost in rescued.split(RESCUE_ROWS) if rescued.numel() else ():
            some, wanted = hidden[lost], targets[lost]
            shift[lost] = _representable(_row_max(some, head), head, compute)
            columns = exps.new_empty((vocab + 1, lost.numel())) if exps is not None else None
            redone = _stream(some, wanted, head, shift[lost], columns, unit=unit, logit_sum=False)
            total[lost] = redone[0]
            if unit_t is not None and redone[1] is not None:
                unit_t[:, lost] = redone[1]
            if exps is not None and columns is not None:
                exps[:, lost] = columns

        distance = label - shift
        # Above -30 the label's own form keeps relative precision as p -> 1; far below, exp(-distance) would overflow
        # where the plain log-sum-exp has nothing to lose.
        logps = torch.where(
            distance > -30,
            -torch.log1p(total * torch.exp(-distance.clamp(min=-30))),
            distance - torch.log(torch.exp(distance) + total.clamp(min=torch.finfo(acc).tiny)),
        )
        inverse = 1 / (torch.exp(distance) + total)
        entry = -total * _slope(label, head)
        if exps is not None:
            exps.index_put_((targets, torch.arange(n, device=targets.device)), entry.to(compute))
        result_unit = None
        if unit_t is not None:
            result_unit = torch.empty_like(hidden, dtype=acc)
            for part in _row_parts(hidden):
                label_term = entry[part, None] * head.weight[targets[part]].to(acc)
                result_unit[part] = (unit_t[:, part].T + label_term) * (-head.logit_scale * inverse[part, None])
        return Forward(logps, shift, inverse, entry, result_unit, exps, means)

    def grad_hidden(
        self, result: Forward, rows: Tensor, targets: Tensor, head: Head, grad_logps: Tensor | None, out: Tensor, *,
        shared: bool, room: int,
    ) -> None:  # fmt: skip
        assert result.unit is not None  # asked of forward
        values = result.unit if grad_logps is None else result.unit.mul_(grad_logps[:, None])
        if shared:  # two terms at most meet in a row, so their order cannot change the sum
            out.index_add_(0, rows, values.to(out.dtype))
        else:
            out.index_copy_(0, rows, values.to(out.dtype))

    def scale_rows(self, out: Tensor, rows: Tensor, factors: Tensor) -> None:
        for start in range(0, rows.numel(), STREAM_ROWS):
            part = slice(start, start + STREAM_ROWS)
            out[rows[part]] = (factors[part, None] * out[rows[part]]).to(out.dtype)

    def scale(self, values: Tensor, by: Tensor) -> None:
        if by.device.type != "cpu" or float(by) != 1.0:  # a host read costs nothing on a CPU
            values.mul_(by)

    def grad_head(
        self, result: Forward, hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, grad_logps: Tensor,
        grad_weight: Tensor | None, grad_bias: Tensor | None, *, accumulate: bool, room: int,
    ) -> None:  # fmt: skip
        compute = _compute_dtype(hidden.dtype)
        hidden = hidden[rows].to(compute)
        coefficient = -grad_logps * result.inverse * head.logit_scale
        scaled = torch.empty_like(hidden)
        for part in _row_parts(hidden):
            scaled[part] = coefficient[part, None] * hidden[part]
        column = coefficient.to(compute)[:, None]
        if result.exps is not None:
            tiles = _kept_tiles(result.exps)
        else:
            tiles = _tiles(hidden, targets, head, result.shift, None, result.entry.to(compute))
        for tokens, tile in tiles:
            if grad_weight is not None:
                _product(grad_weight[tokens], tile, scaled, accumulate=accumulate)
            if grad_bias is not None:
                _product(grad_bias[tokens, None], tile, column, accumulate=accumulate)
        if result.exps is not None:
            _give_back(result.exps)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _tile_rows(columns: int, itemsize: int) -> int:
    """Rows of the head in one slice, a multiple of the partial sums."""
    rows = TILE_BYTES // max(columns * itemsize, 1) // PARTIAL_SUMS * PARTIAL_SUMS
    return min(max(rows, TILE_ROWS[0]), TILE_ROWS[1])


def _take_exps(vocab: int, n: int, like: Tensor) -> Tensor:
    """Room for E and a spare row, ``[V + 1, n]``, out of the kept memory if that is large enough."""
    size = (vocab + 1) * n
    kept = _spare.pop(like.dtype, None) if like.device.type == "cpu" else None
    flat = kept[:size] if kept is not None and kept.numel() >= size else like.new_empty(size)
    return flat.view(vocab + 1, n)


def _give_back(exps: Tensor) -> None:
    """Keep the memory of E, all of it, for the next call."""
    if exps.device.type == "cpu":
        _spare[exps.dtype] = exps.new_empty(0).set_(exps.untyped_storage())


def _row_parts(hidden: Tensor) -> Iterator[slice]:
    """Slices of the scores, so that a float32 copy of a part is small beside a tile."""
    for start in range(0, hidden.shape[0], 1024):
        yield slice(start, start + 1024)


def _label_logits(hidden: Tensor, targets: Tensor, head: Head, acc: torch.dtype) -> Tensor:
    """``h . W_y + b_y`` per score, in the accumulation dtype."""
    raw = torch.empty(targets.shape, dtype=acc, device=hidden.device)
    for part in _row_parts(hidden):
        raw[part] = (hidden[part].to(acc) * head.weight[targets[part]].to(acc)).sum(-1)
    return raw if head.bias is None else raw + head.bias[targets].to(acc)


def _representable(logit: Tensor, head: Head, compute: torch.dtype) -> Tensor:
    """The shift nearest to ``logit`` that the first product can subtract exactly: its bias has the product's dtype."""
    if head.softcap is not None:  # the shift follows the cap, in the accumulation dtype
        return logit.clone()  # rescued rows are overwritten, the label's logit is still needed
    return (logit / head.logit_scale).to(compute).to(logit.dtype) * head.logit_scale


def _slope(logit: Tensor, head: Head) -> Tensor | float:
    """d cap(z) / dz at a capped logit: ``1 - (logit / softcap)^2``."""
    return 1.0 if head.softcap is None else 1 - (logit / head.softcap) ** 2


def _logits(hidden: Tensor, head: Head, rows: slice, bias: Tensor | None) -> Tensor:
    """Uncapped ``scale * (W_s @ hidden^T + bias + b_s)``, ``[s, n]``; ``bias [n]`` is added in the accumulator."""
    tile = F.linear(head.weight[rows].to(hidden.dtype), hidden, bias)
    if head.bias is not None:
        tile += head.bias[rows, None]
    return tile if head.logit_scale == 1 else tile.mul_(head.logit_scale)


def _tiles(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    shift: Tensor,
    exps: Tensor | None,
    entry: Tensor | None,
    logit_sum: Tensor | None = None,
    total: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """E slice by slice, ``[s, n]`` in the product's dtype, written into ``exps [V + 1, n]`` if given.

    Label entries are ``entry``, or 0 without it. Under a softcap E carries the cap's slope and the sum of plain
    exponentials is added to ``total`` here, where both are at hand.
    """
    n, vocab, compute = hidden.shape[0], head.vocab, hidden.dtype
    step = _tile_rows(n, shift.element_size() if head.softcap is not None else hidden.element_size())
    scratch = hidden.new_empty((min(step, vocab) + 1, n)) if exps is None else None
    entries = hidden.new_zeros(()) if entry is None else entry
    columns = torch.arange(n, device=hidden.device)
    zero = shift.new_zeros(())
    centre = None if head.softcap is not None else -(shift / head.logit_scale).to(compute)
    for start in range(0, vocab, step):
        rows = slice(start, min(start + step, vocab))
        size = rows.stop - start
        # One row more than the slice: labels of other slices are written there, which costs no mask and no sync. In a
        # kept E that row is the next slice's first, not computed yet, or the spare row at the end.
        room = scratch[: size + 1] if scratch is not None else exps[start : rows.stop + 1]  # type: ignore[index]
        tile = room[:size]
        places = targets - start
        places = torch.where((places >= 0) & (places < size), places, size)
        if head.softcap is None:
            torch.exp(_logits(hidden, head, rows, centre), out=tile)
            room.index_put_((places, columns), entries)
            if total is not None:
                total += _sum_rows(tile, total.dtype)
        else:
            bent = _logits(hidden, head, rows, None).to(shift.dtype).div_(head.softcap).tanh_()
            if logit_sum is not None:
                logit_sum.add_(bent.sum(0), alpha=head.softcap)
            plain = torch.exp(bent * head.softcap - shift)
            if total is not None:
                # Summed with the label's own exp(0 or less) and without it afterwards would cancel as p -> 1.
                total += F.pad(plain, (0, 0, 0, 1)).index_put_((places, columns), zero)[:size].sum(0)
            tile.copy_(plain.mul_(bent.square_().neg_().add_(1)))
            room.index_put_((places, columns), entries)
        yield rows, tile


def _kept_tiles(exps: Tensor) -> Iterator[tuple[slice, Tensor]]:
    vocab = exps.shape[0] - 1
    step = 2 * _tile_rows(exps.shape[1], exps.element_size())
    for start in range(0, vocab, step):
        rows = slice(start, min(start + step, vocab))
        yield rows, exps[rows]


def _stream(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    shift: Tensor,
    exps: Tensor | None,
    *,
    unit: bool,
    logit_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over the vocabulary: S ``[n]``, the sum over v != y of ``E_v W_v`` ``[H, n]``, logit sums ``[n]``."""
    n, acc = hidden.shape[0], shift.dtype
    total = torch.zeros(n, dtype=acc, device=hidden.device)
    sums = torch.zeros_like(total) if logit_sum and head.softcap is not None else None
    unit_t = torch.zeros((hidden.shape[1], n), dtype=acc, device=hidden.device) if unit else None
    several = PRODUCT_BYTES // (hidden.shape[1] * hidden.element_size()) if exps is not None else 1
    done = 0
    for rows, tile in _tiles(hidden, targets, head, shift, exps, None, sums, total):
        if unit_t is not None and (rows.stop - done >= several or rows.stop == head.vocab):
            group = slice(done, rows.stop)
            _add_hidden_product(unit_t, head.weight[group], tile if exps is None else exps[group])
            done = rows.stop
    return total, unit_t, sums


def _add_hidden_product(unit_t: Tensor, weight: Tensor, tile: Tensor) -> None:
    """``unit_t [H, n] += weight^T @ tile`` for a slice of the head ``[s, H]`` and its tile ``[s, n]``."""
    weight_t = weight.to(tile.dtype).T
    if tile.dtype == torch.bfloat16 and tile.shape[1] >= COPY_TRANSPOSED_FROM:
        weight_t = _transposed(weight)
    _product(unit_t, weight_t, tile, accumulate=True)


def _transposed(weight: Tensor) -> Tensor:
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


def _row_max(hidden: Tensor, head: Head) -> Tensor:
    """The largest capped logit of each row, ``[n]`` in the accumulation dtype."""
    step = _tile_rows(hidden.shape[0], hidden.element_size())
    largest = [_logits(hidden, head, slice(start, start + step), None).amax(0) for start in range(0, head.vocab, step)]
    return head.cap(torch.stack(largest).amax(0).to(acc_dtype(hidden.dtype)))


def _product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
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


def _sum_rows(tile: Tensor, acc: torch.dtype) -> Tensor:
    """Sum over dimension 0 in the accumulation dtype."""
    if tile.dtype == acc:
        return tile.sum(0)
    each = tile.shape[0] // PARTIAL_SUMS
    whole = each * PARTIAL_SUMS
    total = tile[:whole].view(PARTIAL_SUMS, each, *tile.shape[1:]).sum(1).to(acc).sum(0)
    return total + tile[whole:].to(acc).sum(0) if whole < tile.shape[0] else total
