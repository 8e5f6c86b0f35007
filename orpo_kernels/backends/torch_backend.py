"""The torch backend: tuned for CPUs, in plain torch that other devices run too (not yet tried on one).

Layout: E is stored transposed, ``[V, n]``, so that a slice of the vocabulary is one contiguous block. Per slice of
``s`` rows of the head, while the ``[s, n]`` tile is in cache:

    tile       = exp(scale * (W_s @ hidden^T + b_s) - shift)    the label's entry set to 0
    S         += sum of the tile over its rows                  [n]
    product   += W_s^T @ tile                                   [H, n], if hidden needs a gradient; over several slices
                                                                at once where E is stored

and, once S and the upstream gradient are known, from stored or recomputed tiles whose label entries are -S:

    grad_weight_s = tile @ (k * hidden)                         k = -g * inv_denom * scale

The shift enters the first product as its bias, so it is subtracted in the product's float32 accumulator, before the
rounding to bfloat16: entries near the label's logit, which make up S, keep their precision where rounded logits would
have lost it. Any shift gives the same result, so it may itself be rounded to the dtype of the product; the label's
distance to it is kept in the accumulation dtype.

Dtypes: bfloat16 stores E in bfloat16 and sums in float32. float32 and float64 stay what they are (float32 products
follow torch's matmul precision setting). float16 cannot hold E under the label's shift, so it is computed in float32,
tile by tile. Overflowed rows are computed in the accumulation dtype: where logits are so large that a rounded maximum
is no maximum, nothing less will do.

Owner of each accumulation: S and the product belong to one chunk of rows and are summed in slice order; grad_weight is
summed within one product if there is one chunk, else in float32 by chunk order. No atomics, so two runs give the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.backends import Backend, Cost, Found, Grads, Part, acc_dtype, finalize
from orpo_kernels.settings import Head

# A tile of this many bytes stays in the last-level cache of current servers through its three or four passes.
# Measured at n = 2697: slices of 2,048 rows (11 MB) are a little faster than 4,096, and 8,192 cost 1.7x.
TILE_BYTES = 12 << 20
TILE_ROWS = (256, 2048)
# Where E is stored, hidden's product takes a run of the head of this many bytes at once, which is also the size of its
# transposed copy: the float32 sum is added to less often. Measured at n = 2697, H = 896: 1.64 s in all with runs of
# 4,096 rows, 1.61 with 8,192, 1.55 with 32,768, which is this size.
PRODUCT_BYTES = 56 << 20
# Rows whose S passes this take their largest logit as shift instead of the label's. exp(60) times any vocabulary and
# any weight still fits a float32, which exp(80) would not.
OVERFLOW_ABOVE = math.exp(60.0)
OVERFLOW_ROWS = 256
# So do rows whose label is this many nats from its rounded shift, which only logits above some 10^4 are: their entries
# may all have underflowed.
LARGEST_DISTANCE = 20.0
# The sum over a tile's rows is taken in this many partial sums: torch adds a bfloat16 reduction in float32 but rounds
# its result, so short sums rounded separately and added in float32 are both fast and accurate.
PARTIAL_SUMS = 64
# From this many targets on, a bfloat16 product is faster by more than its transposed operand costs to copy first.
# Measured (ms over V = 32,000, H = 896, copied and not): n = 256, 41 and 16; 666, 81 and 41; 1,300, 85 and 88; 2,697,
# 367 and 492. A float32 product takes a transposed operand as it is.
COPY_TRANSPOSED_FROM = 1024
TRANSPOSE_BLOCK = 128
# Most and fewest targets of one pass that stores no E. Each pass reads the whole head, so not too few; copies of rows
# grow with them, so not too many, and few where scratch is short.
CHUNK_ROWS = (1024, 4096)

# The memory of the last stored E on a CPU, by dtype, at most what the workspace allowed. The system hands out fresh
# pages one fault at a time, which for the E of a head of 128,256 tokens costs 0.2 s of 1.6, and up to 1 s on a busy
# virtual machine. Whoever uses it takes it out first, so two threads never share it.
_spare: dict[torch.dtype, Tensor] = {}


def release() -> None:
    """Give the memory kept between calls back to the system."""
    _spare.clear()


class _State(NamedTuple):
    """Of n targets; ``[n]`` in the accumulation dtype."""

    shift: Tensor  # what each row's logits were shifted by
    inv_denom: Tensor  # 1 / (exp(z_y - shift) + S)
    label_entry: Tensor  # what stands at the label's place in E: -S, times the cap's slope at the label
    overflowed: Tensor  # [n] bool, rows whose E is computed in the accumulation dtype
    grad_logp_hidden: Tensor | None  # [n, H] accumulation dtype, d logp / d hidden where it does not wait elsewhere
    exp_logits: Tensor | None  # E, [V + 1, n] with a spare row


class TorchBackend(Backend):
    """See the module's docstring."""

    name = "torch"
    tuned_for = "cpu"

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def cost(self, n: int, vocab: int, features: int, dtype: torch.dtype, budget: int, *, store: bool) -> Cost:
        if store:
            return Cost(n * vocab * _compute_dtype(dtype).itemsize, n * _row_bytes(features, dtype), budget)
        return Cost(0, min(n, _chunk_rows(features, dtype, budget)) * _row_bytes(features, dtype), budget)

    def mean_weight(self, weight: Tensor) -> Tensor:
        acc = acc_dtype(weight.dtype)
        rows = _tile_rows(weight.shape[1], weight.element_size())
        total = torch.zeros(weight.shape[1], dtype=acc, device=weight.device)
        for start in range(0, weight.shape[0], rows):
            total += _sum_rows(weight[start : start + rows], acc)
        return total / weight.shape[0]

    def forward(self, part: Part, into: Grads, *, store: bool) -> Found:
        if store:
            return self._chunk(part, store=True, unit=into.hidden is not None)
        parts: list[Found] = []
        for of in _slices(part.rows.numel(), _chunk_rows(part.hidden.shape[1], part.hidden.dtype, part.scratch)):
            chunk = part._replace(rows=part.rows[of], ids=part.ids[of])
            found = self._chunk(chunk, store=False, unit=into.hidden is not None)
            state: _State = found.state
            # d logp / d hidden waits in the gradient's own place, unless two targets share a row.
            if into.hidden is not None and not part.shared_rows:
                assert state.grad_logp_hidden is not None  # asked for
                into.hidden.index_copy_(0, chunk.rows, state.grad_logp_hidden.to(into.hidden.dtype))
                found = found._replace(state=state._replace(grad_logp_hidden=None))
            parts.append(found)
            del found, state  # and d logp / d hidden, before the next chunk's is allocated
        joined = (_cat(columns) for columns in zip(*(found.state for found in parts), strict=True))
        logps, means, _ = zip(*parts, strict=True)
        return Found(torch.cat(logps), _cat(means), _State(*joined))  # type: ignore[arg-type]

    def backward(self, part: Part, found: Found, g: Tensor, into: Grads, *, accumulate: bool) -> None:
        state: _State = found.state
        if into.hidden is not None:
            self._grad_hidden(part, state.grad_logp_hidden, g, into.hidden)
        if into.weight is not None or into.bias is not None:
            state = state._replace(grad_logp_hidden=None)
            coefficients = -g * state.inv_denom * part.head.logit_scale
            if state.exp_logits is None:
                self._recompute(part, state, coefficients, into)
            else:
                self._from_stored(part, state.exp_logits, coefficients, into, accumulate)
        if state.exp_logits is not None:
            _give_back(state.exp_logits)

    def _chunk(self, part: Part, *, store: bool, unit: bool) -> Found:
        """``forward`` of rows that are computed at once."""
        head, ids = part.head, part.ids
        compute, acc = _compute_dtype(part.hidden.dtype), acc_dtype(part.hidden.dtype)
        hidden = part.hidden[part.rows].to(compute)
        n, vocab = hidden.shape[0], head.vocab
        label = head.cap(_label_logits(hidden, ids, head, acc) * head.logit_scale)
        shift = _representable(label, head, compute)
        exp_logits = _take_exp_logits(vocab, n, hidden) if store else None

        from_tiles = part.logit_means and head.softcap is not None
        sum_exp, unit_t, sums = _stream(hidden, ids, head, shift, exp_logits, unit=unit, logit_sum=from_tiles)
        means = None if sums is None else sums / vocab
        if part.logit_means and part.mean_weight is not None:
            means = torch.cat([hidden[of].to(acc) @ part.mean_weight for of in _slices(n, 1024)] or [label])
            means *= head.logit_scale

        # One host sync on a GPU, free on a CPU; almost always there is no such row.
        overflowed = ~((sum_exp < OVERFLOW_ABOVE) & ((label - shift).abs() <= LARGEST_DISTANCE))
        for again in _indices(overflowed):
            some, wanted = hidden[again].to(acc), ids[again]
            shift[again] = _row_max(some, head)
            columns = some.new_empty((vocab + 1, again.numel())) if exp_logits is not None else None
            redone = _stream(some, wanted, head, shift[again], columns, unit=unit, logit_sum=False)
            sum_exp[again] = redone[0]
            if unit_t is not None and redone[1] is not None:
                unit_t[:, again] = redone[1]
            if exp_logits is not None and columns is not None:
                exp_logits[:, again] = columns.to(compute)

        logps, inv_denom, entry = finalize(label, shift, sum_exp, head.slope(label))
        if exp_logits is not None:
            exp_logits.index_put_((ids, torch.arange(n, device=ids.device)), entry.to(compute))
        waiting = None
        if unit_t is not None:
            waiting = torch.empty_like(hidden, dtype=acc)
            for of in _slices(n, 1024):
                label_term = entry[of, None] * head.weight[ids[of]].to(acc)
                waiting[of] = (unit_t[:, of].T + label_term) * (-head.logit_scale * inv_denom[of, None])
        return Found(logps, means, _State(shift, inv_denom, entry, overflowed, waiting, exp_logits))

    def _grad_hidden(self, part: Part, waiting: Tensor | None, g: Tensor, out: Tensor) -> None:
        """``g * d logp / d hidden``, from where it waits: ``out`` itself, or ``waiting [n, H]``."""
        rows = part.rows
        for of in _slices(rows.numel(), CHUNK_ROWS[1]):
            if waiting is None:
                out[rows[of]] = (g[of, None] * out[rows[of]]).to(out.dtype)
            elif part.shared_rows:  # two terms at most meet in a row: the order changes nothing
                out.index_add_(0, rows[of], (g[of, None] * waiting[of]).to(out.dtype))
            else:
                out.index_copy_(0, rows[of], (g[of, None] * waiting[of]).to(out.dtype))

    def _from_stored(self, part: Part, exp_logits: Tensor, coefficients: Tensor, into: Grads, accumulate: bool) -> None:
        """The head's gradients from E, for the last time."""
        scaled, column = _scaled(part.hidden[part.rows].to(exp_logits.dtype), coefficients)
        vocab, step = part.head.vocab, 2 * _tile_rows(exp_logits.shape[1], exp_logits.element_size())
        for tokens in _slices(vocab, step):
            if into.weight is not None:
                _product(into.weight[tokens], exp_logits[tokens], scaled, accumulate=accumulate)
            if into.bias is not None:
                _product(into.bias[tokens, None], exp_logits[tokens], column, accumulate=accumulate)

    def _recompute(self, part: Part, state: _State, coefficients: Tensor, into: Grads) -> None:
        """The head's gradients slice by slice, from E computed again in chunks of rows, added in float32."""
        head, (n, features) = part.head, (part.rows.numel(), part.hidden.shape[1])
        compute = _compute_dtype(part.hidden.dtype)
        chunks = list(_slices(n, _chunk_rows(features, part.hidden.dtype, part.scratch)))
        widest, several = chunks[0].stop, len(chunks) > 1
        again = [_indices(state.overflowed[of]) for of in chunks]
        step = _tile_rows(widest, (coefficients if head.softcap is not None else part.hidden).element_size())
        scratch = torch.empty((min(step, head.vocab) + 1) * widest, dtype=compute, device=part.hidden.device)
        hidden = scaled = column = scratch
        for tokens in _slices(head.vocab, step):
            size = tokens.stop - tokens.start
            final = [None if grad is None else grad[tokens].view(size, -1) for grad in into[1:]]
            sums = final
            if several:  # chunks meet in float32
                sums = [None if grad is None else torch.zeros_like(grad, dtype=coefficients.dtype) for grad in final]
            for of, overflowed in zip(chunks, again, strict=True):
                if several or tokens.start == 0:
                    hidden = part.hidden[part.rows[of]].to(compute)
                    scaled, column = _scaled(hidden, coefficients[of])
                ids, shift, entry = part.ids[of], state.shift[of], state.label_entry[of]
                room = scratch[: (size + 1) * hidden.shape[0]].view(size + 1, -1)
                tile = _exp_tile(hidden, ids, head, shift, tokens, room, entry)
                for rows in overflowed:
                    wide = torch.empty((size + 1, rows.numel()), dtype=shift.dtype, device=tile.device)
                    some = hidden[rows].to(shift.dtype)
                    tile[:, rows] = _exp_tile(some, ids[rows], head, shift[rows], tokens, wide, entry[rows]).to(compute)
                for total, right in zip(sums, (scaled, column), strict=True):
                    if total is not None:
                        _product(total, tile, right, accumulate=several)
            for grad, total in zip(final, sums, strict=True):
                if several and grad is not None and total is not None:
                    grad.copy_(total)


def _cat(columns: Sequence[Tensor | None]) -> Tensor | None:
    there = [column for column in columns if column is not None]
    return torch.cat(there) if there else None


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _row_bytes(features: int, dtype: torch.dtype) -> int:
    """Bytes held for each target of a chunk: its hidden row, a scaled copy of it or the transposed sum of hidden's
    product, and d logp / d hidden."""
    return features * (_compute_dtype(dtype).itemsize + 2 * acc_dtype(dtype).itemsize)


def _chunk_rows(features: int, dtype: torch.dtype, budget: int) -> int:
    """Targets of one pass that stores no E."""
    return min(max(budget // _row_bytes(features, dtype), CHUNK_ROWS[0]), CHUNK_ROWS[1])


def _tile_rows(columns: int, itemsize: int) -> int:
    """Rows of the head in one slice, a multiple of the partial sums."""
    rows = TILE_BYTES // max(columns * itemsize, 1) // PARTIAL_SUMS * PARTIAL_SUMS
    return min(max(rows, TILE_ROWS[0]), TILE_ROWS[1])


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _indices(mask: Tensor) -> tuple[Tensor, ...]:
    """Where a mask of rows holds, in runs of OVERFLOW_ROWS; none where it holds nowhere."""
    found = torch.nonzero(mask).view(-1)
    return found.split(OVERFLOW_ROWS) if found.numel() else ()


def _take_exp_logits(vocab: int, n: int, like: Tensor) -> Tensor:
    """Room for E and a spare row, ``[V + 1, n]``, out of the kept memory if that is large enough."""
    size = (vocab + 1) * n
    kept = _spare.pop(like.dtype, None) if like.device.type == "cpu" else None
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=like.dtype, device=like.device)
    return kept[:size].view(vocab + 1, n)


def _give_back(exp_logits: Tensor) -> None:
    """Keep the memory of E, all of it, for the next call. What inference mode made is of no use outside it."""
    if exp_logits.device.type == "cpu" and not exp_logits.is_inference():
        _spare[exp_logits.dtype] = exp_logits.new_empty(0).set_(exp_logits.untyped_storage())


def _scaled(hidden: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """``k * hidden`` and ``k``, the right operands of the head's two products."""
    scaled = torch.empty_like(hidden)
    for of in _slices(hidden.shape[0], 1024):
        scaled[of] = coefficients[of, None] * hidden[of]
    return scaled, coefficients.to(hidden.dtype)[:, None]


def _label_logits(hidden: Tensor, ids: Tensor, head: Head, acc: torch.dtype) -> Tensor:
    """``h . W_y + b_y`` per target, in the accumulation dtype."""
    raw = torch.empty(ids.shape, dtype=acc, device=hidden.device)
    for of in _slices(ids.numel(), 1024):
        raw[of] = (hidden[of].to(acc) * head.weight[ids[of]].to(acc)).sum(-1)
    return raw if head.bias is None else raw + head.bias[ids].to(acc)


def _representable(logit: Tensor, head: Head, compute: torch.dtype) -> Tensor:
    """The shift nearest to ``logit`` that the first product can subtract exactly: its bias has the product's dtype."""
    if head.softcap is not None:  # the shift follows the cap, in the accumulation dtype
        return logit.clone()  # overflowed rows are overwritten, the label's logit is still needed
    return (logit / head.logit_scale).to(compute).to(logit.dtype) * head.logit_scale


def _logits(hidden: Tensor, head: Head, tokens: slice, bias: Tensor | None) -> Tensor:
    """Uncapped ``scale * (W_s @ hidden^T + bias + b_s)``, ``[s, n]``; ``bias [n]`` is added in the accumulator."""
    tile = F.linear(head.weight[tokens].to(hidden.dtype), hidden, bias)
    if head.bias is not None:
        tile += head.bias[tokens, None]
    return tile if head.logit_scale == 1 else tile.mul_(head.logit_scale)


def _exp_tile(
    hidden: Tensor,  # [n, H], the dtype of the product
    ids: Tensor,
    head: Head,
    shift: Tensor,
    tokens: slice,
    room: Tensor,  # [s + 1, n], where the tile is written
    entry: Tensor | None,  # what stands at the labels' places, 0 without it
    logit_sum: Tensor | None = None,
    sum_exp: Tensor | None = None,
) -> Tensor:
    """E of some tokens, ``[s, n]`` in the product's dtype; S is added to ``sum_exp`` where labels hold 0.

    Under a softcap E carries the cap's slope and S sums plain exponentials. The room has one row more than the slice:
    labels of other slices are written there, which costs no mask and no sync. In a stored E that row is the next
    slice's first, not computed yet, or the spare row at the end.
    """
    size, compute = tokens.stop - tokens.start, hidden.dtype
    columns = torch.arange(hidden.shape[0], device=hidden.device)
    places = ids - tokens.start
    places = torch.where((places >= 0) & (places < size), places, size)
    entries = hidden.new_zeros(()) if entry is None else entry.to(compute)
    tile = room[:size]
    if head.softcap is None:
        torch.exp(_logits(hidden, head, tokens, -(shift / head.logit_scale).to(compute)), out=tile)
        room.index_put_((places, columns), entries)
        if sum_exp is not None:
            sum_exp += _sum_rows(tile, sum_exp.dtype)
        return tile
    bent = _logits(hidden, head, tokens, None).to(shift.dtype).div_(head.softcap).tanh_()
    if logit_sum is not None:
        logit_sum.add_(bent.sum(0), alpha=head.softcap)
    plain = torch.exp(bent * head.softcap - shift)
    if sum_exp is not None:
        # Summed with the label's own exp(0 or less) and without it afterwards would cancel as p -> 1.
        sum_exp += F.pad(plain, (0, 0, 0, 1)).index_put_((places, columns), shift.new_zeros(()))[:size].sum(0)
    tile.copy_(plain.mul_(bent.square_().neg_().add_(1)))
    room.index_put_((places, columns), entries)
    return tile


def _stream(
    hidden: Tensor, ids: Tensor, head: Head, shift: Tensor, exp_logits: Tensor | None, *, unit: bool, logit_sum: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over the vocabulary: S ``[n]``, the sum over v != y of ``E_v W_v`` ``[H, n]``, logit sums ``[n]``."""
    n, acc, vocab = hidden.shape[0], shift.dtype, head.vocab
    sum_exp = torch.zeros(n, dtype=acc, device=hidden.device)
    sums = torch.zeros_like(sum_exp) if logit_sum else None
    unit_t = torch.zeros((hidden.shape[1], n), dtype=acc, device=hidden.device) if unit else None
    several = PRODUCT_BYTES // (hidden.shape[1] * hidden.element_size()) if exp_logits is not None else 1
    step = _tile_rows(n, shift.element_size() if head.softcap is not None else hidden.element_size())
    scratch = torch.empty(0, dtype=hidden.dtype, device=hidden.device)
    if exp_logits is None:
        scratch = torch.empty((min(step, vocab) + 1, n), dtype=hidden.dtype, device=hidden.device)
    done = 0
    for tokens in _slices(vocab, step):
        size = tokens.stop - tokens.start
        room = scratch[: size + 1] if exp_logits is None else exp_logits[tokens.start : tokens.stop + 1]
        tile = _exp_tile(hidden, ids, head, shift, tokens, room, None, sums, sum_exp)
        if unit_t is not None and (tokens.stop - done >= several or tokens.stop == vocab):
            group = slice(done, tokens.stop)
            _add_hidden_product(unit_t, head.weight[group], tile if exp_logits is None else exp_logits[group])
            done = tokens.stop
    return sum_exp, unit_t, sums


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
    """The largest capped logit of each row, ``[n]``, for hidden states in the accumulation dtype."""
    step = _tile_rows(hidden.shape[0], hidden.element_size())
    largest = [_logits(hidden, head, tokens, None).amax(0) for tokens in _slices(head.vocab, step)]
    return head.cap(torch.stack(largest).amax(0))


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
