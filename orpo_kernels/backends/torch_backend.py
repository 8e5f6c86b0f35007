"""The torch backend: tuned for CPUs, in plain torch that other devices run too (not yet tried on one).

Layout: E is stored transposed, ``[V, n]``, so that a slice of the vocabulary is one contiguous block. Per slice of
``s`` rows of the head, while the ``[s, n]`` tile is in cache:

    tile       = exp(scale * (W_s @ hidden^T + b_s) - shift)    the label's entry set to 0
    S         += sum of the tile over its rows                  [n]
    product   += W_s^T @ tile                                   [H, n], if hidden needs a gradient; over several slices
                                                                at once where E is stored

and, once S and the upstream gradient are known, from stored or recomputed tiles whose label entries are -S:

    grad_weight_s = tile @ (k * hidden)                         k = g * coefficient

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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import (
    OVERFLOW_ABOVE,
    Backend,
    Cost,
    Found,
    Grads,
    Moments,
    MomentSums,
    Part,
    acc_dtype,
    finalize,
    slices,
)
from orpo_kernels.backends.torch_tiles import (
    Tiles,
    add_hidden_product,
    multiply,
    row_max,
    sum_rows,
    tile_rows,
)
from orpo_kernels.settings import Head

# Where E is stored, hidden's product takes a run of the head of this many bytes at once, which is also the size of its
# transposed copy: the float32 sum is added to less often. Measured at n = 2697, H = 896: 1.64 s in all with runs of
# 4,096 rows, 1.61 with 8,192, 1.55 with 32,768, which is this size.
PRODUCT_BYTES = 56 << 20
# Overflowed rows are done again in runs of at most and at least this many, between them as many as scratch has room
# for.
OVERFLOW_ROWS = (256, 8)
# Rows whose label is this many nats from its rounded shift, which only logits above some 10^4 are, count as overflowed:
# their entries may all have underflowed.
LARGEST_DISTANCE = 20.0
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
    coefficient: Tensor  # -scale / (exp(z_y - shift) + S)
    label_entry: Tensor  # what stands at the label's place in E: -S, times the cap's slope at the label
    overflowed: Tensor  # [n] bool, rows whose E is computed in the accumulation dtype
    grad_logp_hidden: Tensor | None  # [n, H] accumulation dtype, d logp / d hidden where it does not wait elsewhere
    exp_logits: Tensor | None  # E, [V + 1, n] with a spare row


class TorchBackend(Backend):
    """See the module's docstring."""

    name = "torch"
    tuned_for = "cpu"
    takes_shards = True

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def cost(self, n: int, vocab: int, features: int, dtype: torch.dtype, budget: int, *, store: bool) -> Cost:
        if store:
            stored, rows = n * vocab * _compute_dtype(dtype).itemsize, n * _row_bytes(features, dtype)
            return Cost(stored, rows, max(budget - stored - rows, 0))
        return Cost(0, min(n, _chunk_rows(features, dtype, budget)) * _row_bytes(features, dtype), budget)

    def mean_weight(self, weight: Tensor) -> Tensor:
        acc = acc_dtype(weight.dtype)
        rows = tile_rows(weight.shape[1], weight.element_size())
        total = torch.zeros(weight.shape[1], dtype=acc, device=weight.device)
        for start in range(0, weight.shape[0], rows):
            total += sum_rows(weight[start : start + rows], acc)
        return total / weight.shape[0]

    def forward(self, part: Part, into: Grads, *, store: bool) -> Found:
        if store:
            return self._chunk(part, store=True, product=into.hidden is not None)
        parts: list[Found] = []
        for of in slices(part.rows.numel(), _chunk_rows(part.hidden.shape[1], part.hidden.dtype, part.scratch)):
            chunk = part._replace(rows=part.rows[of], ids=part.ids[of])
            found = self._chunk(chunk, store=False, product=into.hidden is not None)
            state: _State = found.state
            # d logp / d hidden waits in the gradient's own place, unless two targets share a row.
            if into.hidden is not None and not part.shared_rows:
                assert state.grad_logp_hidden is not None  # asked for
                into.hidden.index_copy_(0, chunk.rows, state.grad_logp_hidden.to(into.hidden.dtype))
                found = found._replace(state=state._replace(grad_logp_hidden=None))
            parts.append(found)
            del found, state  # and d logp / d hidden, before the next chunk's is allocated
        joined = (_cat(columns) for columns in zip(*(found.state for found in parts), strict=True))
        logps, means, _, moments, labels = zip(*parts, strict=True)
        joined_moments = Moments.joined(moments) if part.moments else None
        state = _State(*joined)  # type: ignore[arg-type]
        return Found(torch.cat(logps), _cat(means), state, joined_moments, torch.cat(labels))

    def backward(self, part: Part, found: Found, g: Tensor, into: Grads, *, accumulate: bool) -> None:
        state: _State = found.state
        if into.hidden is not None:
            self._grad_hidden(part, state.grad_logp_hidden, g, into.hidden)
        if into.weight is not None or into.bias is not None:
            state = state._replace(grad_logp_hidden=None)
            coefficients = g * state.coefficient
            if state.exp_logits is None:
                self._recompute(part, state, coefficients, into)
            else:
                self._from_stored(part, state.exp_logits, coefficients, into, accumulate)
        if state.exp_logits is not None:
            _give_back(state.exp_logits)

    def _chunk(self, part: Part, *, store: bool, product: bool) -> Found:
        """``forward`` of rows that are computed at once."""
        head, ids = part.head, part.ids
        compute, acc = _compute_dtype(part.hidden.dtype), acc_dtype(part.hidden.dtype)
        hidden = part.hidden[part.rows].to(compute)
        n, vocab = hidden.shape[0], head.vocab
        raw = _label_logits(hidden, ids, head, acc)
        label, slope = head.cap(raw), head.slope(raw)
        if head.shard is not None:
            label = head.shard.of_owner(label, ids)
        shift = _representable(label, head, compute)
        exp_logits = _take_exp_logits(vocab, n, hidden) if store else None

        from_tiles = part.logit_means and head.softcap is not None
        moments = MomentSums(shift, part.moments, head) if part.moments else None
        tiles = Tiles(hidden, ids, head, shift)
        sum_exp, product_t, sums = _stream(tiles, exp_logits, moments, product=product, logit_sum=from_tiles)
        found_moments = None if moments is None else moments.moments()
        means = None if sums is None else sums / vocab
        if part.logit_means and part.mean_weight is not None:
            means = torch.cat([hidden[of].to(acc) @ part.mean_weight for of in slices(n, 1024)] or [label])
            means *= head.logit_scale

        # One host sync on a GPU, free on a CPU; almost always there is no such row.
        overflowed = ~((sum_exp < OVERFLOW_ABOVE) & ((label - shift).abs() <= LARGEST_DISTANCE))
        most = part.scratch // (vocab * shift.element_size()) if store else OVERFLOW_ROWS[0]
        for again in _indices(overflowed, most):
            some = hidden[again].to(acc)
            shift[again] = row_max(some, head)
            columns = some.new_empty((vocab + 1, again.numel())) if exp_logits is not None else None
            moments = MomentSums(shift[again], part.moments, head) if part.moments else None
            wide = Tiles(some, ids[again], head, shift[again])
            redone = _stream(wide, columns, moments, product=product, logit_sum=False)
            if found_moments is not None and moments is not None:
                for every, value in zip(found_moments, moments.moments(), strict=True):
                    if every is not None and value is not None:
                        every[again] = value
            sum_exp[again] = redone[0]
            if product_t is not None and redone[1] is not None:
                product_t[:, again] = redone[1]
            if exp_logits is not None and columns is not None:
                exp_logits[:, again] = columns.to(compute)
            del columns  # before the next run's is allocated

        if head.shard is not None:
            common = head.shard.largest(shift)
            for again in _indices(common > shift):  # overflowed on another rank alone
                factor = (shift[again] - common[again]).exp()
                sum_exp[again] *= factor
                for columns in (product_t, exp_logits):
                    if columns is not None:
                        columns[:, again] = (columns[:, again] * factor).to(columns.dtype)
                overflowed[again] = True
            shift, sum_exp = common, head.shard.sum(sum_exp)
            slope = torch.where(ids >= 0, slope, 0.0)  # the label's entry is its owner's
        logps, inv_denom, entry = finalize(label, shift, sum_exp, slope)
        coefficient = inv_denom * -head.logit_scale
        if exp_logits is not None:
            exp_logits.index_put_((ids, tiles.columns), entry.to(compute))
        waiting = None
        if product_t is not None:
            waiting = torch.empty_like(hidden, dtype=acc)
            for of in slices(n, 1024):
                rows = torch.addcmul(product_t[:, of].T, entry[of, None], head.weight[ids[of]].to(acc))
                torch.mul(rows, coefficient[of, None], out=waiting[of])
        state = _State(shift, coefficient, entry, overflowed, waiting, exp_logits)
        return Found(logps, means, state, found_moments, label)

    def _grad_hidden(self, part: Part, waiting: Tensor | None, g: Tensor, out: Tensor) -> None:
        """``g * d logp / d hidden``, from where it waits: ``out`` itself, or ``waiting [n, H]``."""
        rows = part.rows
        for of in slices(rows.numel(), CHUNK_ROWS[0]):
            if waiting is None:
                out[rows[of]] = (g[of, None] * out[rows[of]]).to(out.dtype)
            elif part.shared_rows:  # two terms at most meet in a row: the order changes nothing
                out.index_add_(0, rows[of], (g[of, None] * waiting[of]).to(out.dtype))
            else:
                out.index_copy_(0, rows[of], (g[of, None] * waiting[of]).to(out.dtype))

    def _from_stored(self, part: Part, exp_logits: Tensor, coefficients: Tensor, into: Grads, accumulate: bool) -> None:
        """The head's gradients from E, for the last time."""
        scaled, column = _scaled(into.columns(part.hidden)[part.rows].to(exp_logits.dtype), coefficients)
        vocab, step = part.head.vocab, 2 * tile_rows(exp_logits.shape[1], exp_logits.element_size())
        for tokens in slices(vocab, step):
            if into.weight is not None:
                multiply(into.weight[tokens], exp_logits[tokens], scaled, accumulate=accumulate)
            if into.bias is not None:
                multiply(into.bias[tokens, None], exp_logits[tokens], column, accumulate=accumulate)

    def _recompute(self, part: Part, state: _State, coefficients: Tensor, into: Grads) -> None:
        """The head's gradients slice by slice, from E computed again in chunks of rows, added in float32."""
        head, (n, features) = part.head, (part.rows.numel(), part.hidden.shape[1])
        compute = _compute_dtype(part.hidden.dtype)
        chunks = list(slices(n, _chunk_rows(features, part.hidden.dtype, part.scratch)))
        several = len(chunks) > 1

        def prepared(of: slice) -> tuple[Tiles, list[tuple[Tensor, Tiles]], tuple[Tensor, Tensor]]:
            """Tiles of a chunk, those of its overflowed rows, and the right operands."""
            hidden, ids = part.hidden[part.rows[of]].to(compute), part.ids[of]
            shift, entry = state.shift[of], state.label_entry[of]
            again = [
                (rows, Tiles(hidden[rows].to(shift.dtype), ids[rows], head, shift[rows], entry[rows]))
                for rows in _indices(state.overflowed[of])
            ]
            return Tiles(hidden, ids, head, shift, entry), again, _scaled(into.columns(hidden), coefficients[of])

        ready = prepared(chunks[0])
        step = ready[0].step
        scratch = coefficients.new_empty((min(step, head.vocab) + 1) * chunks[0].stop, dtype=compute)
        for tokens in slices(head.vocab, step):
            size = tokens.stop - tokens.start
            final = [None if grad is None else grad[tokens].view(size, -1) for grad in into[1:]]
            sums = final
            if several:  # chunks meet in float32
                sums = [None if grad is None else torch.zeros_like(grad, dtype=coefficients.dtype) for grad in final]
            for of in chunks:
                tiles, again, operands = prepared(of) if several else ready
                room = scratch[: (size + 1) * (of.stop - of.start)].view(size + 1, -1)
                tile = tiles.exp(tokens, room)
                for rows, wide in again:
                    tile[:, rows] = wide.exp(tokens, wide.shift.new_empty((size + 1, rows.numel()))).to(compute)
                for total, operand in zip(sums, operands, strict=True):
                    if total is not None:
                        multiply(total, tile, operand, accumulate=several)
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


def _indices(mask: Tensor, most: int = OVERFLOW_ROWS[0]) -> tuple[Tensor, ...]:
    """Where a mask of rows holds, in runs of ``most`` within OVERFLOW_ROWS; none where it holds nowhere."""
    found = torch.nonzero(mask).view(-1)
    return found.split(max(min(most, OVERFLOW_ROWS[0]), OVERFLOW_ROWS[1])) if found.numel() else ()


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
    for of in slices(hidden.shape[0], 1024):
        torch.mul(coefficients[of, None], hidden[of], out=scaled[of])
    return scaled, coefficients.to(hidden.dtype)[:, None]


def _label_logits(hidden: Tensor, ids: Tensor, head: Head, acc: torch.dtype) -> Tensor:
    """``scale * (h . W_y + b_y)`` per target, in the accumulation dtype."""
    raw = torch.empty(ids.shape, dtype=acc, device=hidden.device)
    for of in slices(ids.numel(), 1024):
        torch.sum(hidden[of].to(acc) * head.weight[ids[of]].to(acc), -1, out=raw[of])
    if head.bias is not None:
        raw += head.bias[ids].to(acc)
    return raw if head.logit_scale == 1 else raw * head.logit_scale


def _representable(logit: Tensor, head: Head, compute: torch.dtype) -> Tensor:
    """The shift nearest to ``logit`` that the first product can subtract exactly: its bias has the product's dtype."""
    # Under a softcap the shift follows the cap, in the accumulation dtype.
    if head.softcap is not None or (compute == logit.dtype and head.logit_scale == 1):
        return logit.clone()  # overflowed rows are overwritten, the label's logit is still needed
    return (logit / head.logit_scale).to(compute).to(logit.dtype) * head.logit_scale


def _stream(
    tiles: Tiles, exp_logits: Tensor | None, moments: MomentSums | None, *, product: bool, logit_sum: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over the vocabulary: S ``[n]``, the sum over v != y of ``E_v W_v`` ``[H, n]``, logit sums ``[n]``."""
    hidden, head, acc = tiles.hidden, tiles.head, tiles.shift.dtype
    n, vocab = hidden.shape[0], head.vocab
    sum_exp = torch.zeros(n, dtype=acc, device=hidden.device)
    sums = torch.zeros_like(sum_exp) if logit_sum else None
    product_t = torch.empty((hidden.shape[1], n), dtype=acc, device=hidden.device) if product else None
    several = PRODUCT_BYTES // (hidden.shape[1] * hidden.element_size()) if exp_logits is not None else 1
    step = tiles.step
    scratch = torch.empty(0, dtype=hidden.dtype, device=hidden.device)
    if exp_logits is None:
        scratch = torch.empty((min(step, vocab) + 1, n), dtype=hidden.dtype, device=hidden.device)
    done = 0
    for tokens in slices(vocab, step):
        size = tokens.stop - tokens.start
        room = scratch[: size + 1] if exp_logits is None else exp_logits[tokens.start : tokens.stop + 1]
        tile = tiles.exp(tokens, room, sum_exp, sums, moments)
        if product_t is not None and (tokens.stop - done >= several or tokens.stop == vocab):
            group = slice(done, tokens.stop)
            exps = tile if exp_logits is None else exp_logits[group]
            add_hidden_product(product_t, head.weight[group], exps, accumulate=done > 0)
            done = tokens.stop
    return sum_exp, product_t, sums
