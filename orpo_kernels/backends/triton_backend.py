"""The Triton backend, for CUDA and ROCm: what is launched in which order, and in how much memory. The kernels and
their tiles stand in ``kernels``.

Layout: E is stored row by row, ``[n, V]`` with its rows padded to 128 bytes, in bfloat16 for bfloat16 inputs and in
float32 otherwise (float16 could not hold E under the label's shift). Per slice of the vocabulary:

    exp_gemm               E = exp(z - shift) without the label's column, sums per tile              1 mm
    reduce_tiles           S += the tiles' sums, in order; rows whose S is past e^60 are marked overflowed
    recompute_overflowed   those rows again with their largest logit as shift, and
    rescale                what earlier slices left of them (three launches that return at once when there are none)
    product                grad_logp_hidden += E @ weight_slice, float32, where hidden's gradient is wanted and E is not
                           kept

and after the last slice ``finalize`` turns S into log-probabilities. Kept E serves both products at once; the head's
gradient without it computes E again, slice by slice, with the shift known and the label's ``-S`` in place.

Nothing here waits for the device. Scratch beyond a kept E and the returned gradients stays near ``room`` bytes: hidden
rows are gathered chunk by chunk, and the rows that multiply E for the head's gradient column by column if need be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.backends import Forward, kernels
from orpo_kernels.backends.kernels.configs import Config, Tile, arch_of, config
from orpo_kernels.backends.products import LIBRARY_TILE, product, slices, times_head
from orpo_kernels.objective import CHOSEN_BOUND, REJECTED_BOUND, OddsRatio, PairTerms
from orpo_kernels.pairs import PairTable, pair_table
from orpo_kernels.scores import Columns, Head, Scores

# Rows whose S passes this take their largest logit as shift: e^60 times any vocabulary and weight still fits float32.
OVERFLOW_ABOVE = math.exp(60.0)
CHUNK_ROWS = 1024  # fewest rows of a chunk: one wave of 128 x 256 tiles over 4,096 features on a chip with 132 cores
STREAM_ROWS = 8192  # most rows of one slice of E: enough for full waves of both products
SLICE_TOKENS = 256  # the width of a slice is a multiple of this, and so of every tile
PRODUCT_COLUMNS = 512  # fewest features of one product for the head's gradient


class TritonBackend:
    """See the module's docstring.

    ``config`` stands in for the shipped one, to try another; ``arch`` names the row of the configuration table to use,
    for compiling without a device.
    """

    name = "triton"
    tuned_for = "cuda"
    least_room = 20 << 20  # a gathered chunk or the float32 product of one, at H = 4,096

    def __init__(self, *, config: Config | None = None, arch: str | None = None) -> None:
        self._given, self._arch = config, arch

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "its kernels add in float32, so float64 inputs would lose what they are for"
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return "torch sees no CUDA device"
            if arch_of(device) == "none":
                return "it needs compute capability 8.0 or newer"
        elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs a CUDA or ROCm device (or TRITON_INTERPRET=1 on a CPU), the inputs are on {device.type}"
        elif dtype != torch.float32:
            return f"Triton's interpreter multiplies {dtype} wrongly; it is for float32"
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        return None

    def kept_itemsize(self, dtype: torch.dtype) -> int:
        return _kept_dtype(dtype).itemsize

    def rows_at_once(self, features: int, room: int) -> int:
        # Gathered rows and their float32 product take half the room, a slice of E the other.
        return min(max(room // 2 // (8 * features) // CHUNK_ROWS, 1) * CHUNK_ROWS, STREAM_ROWS)

    def scratch_bytes(self, n: int, vocab: int, features: int, dtype: torch.dtype, room: int, *, kept: bool) -> int:
        if kept:  # chunks of rows, with the sums of their tiles or as float32 products
            return min(room, n * (4 * features + _sums_bytes(vocab, False)))
        n, itemsize = min(n, self.rows_at_once(features, room)), self.kept_itemsize(dtype)
        return n * (8 * features + _slice_width(n * itemsize, vocab, room) * itemsize) if n else 0

    def column_mean(self, weight: Tensor) -> Tensor:
        return weight.mean(0, dtype=torch.float32)

    # What the engine calls, in the order it does.

    def count_scores(self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
        table = labels.new_empty((offsets.numel() - 1, 8))
        with self._on(labels):
            kernels.pairs.count(labels, nll_labels, offsets, table, ignore_index)
        return table

    def compact_scores(
        self,
        labels: Tensor,
        nll_labels: Tensor,
        offsets: Tensor,
        table: Tensor,
        count: int,
        ignore_index: int,
        by_sequence: bool,
        dtype: torch.dtype,
    ) -> Columns:
        places, shares = labels.new_empty((2, count)), torch.empty((2, count), dtype=dtype, device=labels.device)
        valid = torch.empty(table.shape[0] // 2, dtype=torch.bool, device=labels.device)
        columns = Columns(places[0], places[1], shares[0], shares[1], torch.empty_like(offsets), valid)
        with self._on(labels):
            kernels.pairs.compact(labels, nll_labels, offsets, table, columns, ignore_index, by_sequence)
        return columns

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        *,
        keep: bool,
        unit: bool,
        logit_means: bool,
        centre: Tensor | None,
        room: int,
    ) -> Forward:
        n, vocab, features = targets.numel(), head.vocab, hidden.shape[1]
        head = _row_major(head)
        logps, shift, inverse, entry = torch.empty((4, n), dtype=torch.float32, device=hidden.device)
        result = Forward(
            logps=logps,
            shift=shift,
            inverse=inverse,
            entry=entry,
            unit=logps.new_empty((n, features)) if unit and not keep else None,
            exps=_new_exp_logits(n, vocab, hidden) if keep else None,
            logit_means=torch.zeros_like(logps) if logit_means else None,
        )
        row = features * hidden.element_size() + _sums_bytes(vocab, head.softcap is not None)
        with self._on(hidden):
            for part in _chunks(n, room // row if keep else n):
                chosen = Forward(*(None if t is None else t[part] for t in result))  # type: ignore[arg-type]
                self._forward_rows(hidden.index_select(0, rows[part]), targets[part], head, chosen, centre, room)
        return result

    def pair_table(
        self,
        logps: Tensor,
        logit_means: Tensor,
        scores: Scores,
        pairs: slice,
        part: slice,
        objective: Callable[[Tensor, Tensor], PairTerms],
        nll_weight: float,
    ) -> PairTable:
        count = pairs.stop - pairs.start
        if type(objective) is not OddsRatio or count == 0:
            return pair_table(logps, logit_means, scores, pairs, part, objective, nll_weight)
        table, coefficients = logps.new_empty((8, count)), torch.empty_like(logps)
        with self._on(logps):
            kernels.pairs.odds_ratio(
                logps,
                logit_means,
                scores.answer_weight[part],
                scores.nll_weight[part],
                scores.offsets[2 * pairs.start : 2 * pairs.stop + 1],
                scores.pair_valid[pairs],
                coefficients,
                table,
                part.start,
                objective.beta,
                nll_weight,
                1.0 / max(scores.valid_pairs, 1),
                CHOSEN_BOUND,
                REJECTED_BOUND,
                torch.finfo(torch.float32).tiny,
            )
        return PairTable(*table.unbind(), coefficients)  # type: ignore[call-arg]

    def grad_hidden(
        self,
        result: Forward,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        grad_logps: Tensor | None,
        out: Tensor,
        *,
        shared: bool,
        room: int,
    ) -> None:
        n, features = targets.numel(), out.shape[1]
        head = _row_major(head)
        with self._on(out):
            for part in _chunks(n, n if result.exps is None else room // (4 * features)):
                label = None
                if result.exps is not None:  # the label's entry stands in it
                    grad = result.logps.new_empty((part.stop - part.start, features))
                    times_head(grad, result.exps[part], head.weight, accumulate=False)
                else:
                    assert result.unit is not None  # asked of forward where E is not kept
                    grad, label = result.unit[part], (result.entry[part], head.weight, targets[part])
                a, b = result.inverse[part], None if grad_logps is None else grad_logps[part]
                if shared:  # two terms at most meet in a row, so their order cannot change the sum
                    kernels.rows.rows(grad, grad, -head.logit_scale, a, b, label=label)
                    out.index_add_(0, rows[part], grad.to(out.dtype))
                else:
                    kernels.rows.rows(grad, out, -head.logit_scale, a, b, out_rows=rows[part], label=label)
                del grad  # before the next chunk's is allocated

    def scale_rows(self, out: Tensor, rows: Tensor, factors: Tensor) -> None:
        with self._on(out):
            kernels.rows.rows(out, out, 1.0, factors, source_rows=rows, out_rows=rows)

    def grad_head(
        self,
        result: Forward,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        grad_logps: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        *,
        accumulate: bool,
        room: int,
    ) -> None:
        head, grads = _row_major(head), (grad_weight, grad_bias)
        if targets.numel() == 0:
            for grad in grads:
                if grad is not None and not accumulate:
                    grad.zero_()
            return
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        coefficients = -head.logit_scale * result.inverse * grad_logps
        with self._on(hidden):
            if result.exps is not None:
                self._head_product(result.exps, hidden, rows, coefficients, grads, accumulate, room)
            else:
                self._recompute(result, hidden, rows, targets, head, coefficients, grads, room)

    def scale(self, values: Tensor, by: Tensor) -> None:
        with self._on(values):
            kernels.rows.scale(values, by)

    # Parts of them.

    def _forward_rows(
        self, hidden: Tensor, ids: Tensor, head: Head, result: Forward, mean_weight: Tensor | None, room: int
    ) -> None:
        """``forward`` for rows that were gathered."""
        (n, _), vocab, grad_logp_hidden = hidden.shape, head.vocab, result.unit
        if n == 0:
            return
        label, sum_exp = torch.empty((2, n), dtype=torch.float32, device=hidden.device)
        overflowed = torch.empty(n, dtype=torch.int32, device=hidden.device)
        shift, label_entry, means = result.shift, result.entry, result.logit_means
        kernels.rows.label(hidden, ids, head, mean_weight, label, label_entry, shift, sum_exp, means)
        width, of_slice = vocab, None
        if grad_logp_hidden is not None:
            width = _slice_width(n * self.kept_itemsize(hidden.dtype), vocab, room)
            of_slice = _new_exp_logits(n, width, hidden)
        block = self._choose(hidden, head)[1].block_v
        sums = label.new_empty((-(-width // block), n))
        logit_sums = torch.empty_like(sums) if means is not None and head.softcap is not None else None
        for tokens in slices(vocab, width):
            size = tokens.stop - tokens.start
            exp_logits = result.exps if of_slice is None else of_slice[:, :size]
            self._exp_logits(hidden, ids, head, shift, tokens, exp_logits, sums, logit_sums)
            tiles = -(-size // block)
            kernels.rows.reduce_tiles(sums, logit_sums, sum_exp, means, overflowed, tiles, OVERFLOW_ABOVE, 1 / vocab)
            found = kernels.exp_gemm.recompute_overflowed(hidden, ids, head, shift, overflowed, tokens, exp_logits)
            before = grad_logp_hidden if tokens.start else None  # nothing is in it yet
            kernels.rows.rescale(*found, sum_exp, shift, overflowed, before)
            if grad_logp_hidden is not None and exp_logits is not None:
                times_head(grad_logp_hidden, exp_logits, head.weight[tokens], accumulate=tokens.start > 0)
        kernels.rows.finalize(label, shift, sum_exp, result.logps, result.inverse, label_entry)
        if result.exps is not None:
            kernels.rows.label_entries(result.exps, label_entry, ids, 0)

    def _exp_logits(
        self,
        hidden: Tensor,
        ids: Tensor,
        head: Head,
        shift: Tensor,
        tokens: slice,
        exp_logits: Tensor | None,
        sums: Tensor | None,
        logit_sums: Tensor | None,
    ) -> None:
        """E of the tokens and its sums per tile, in the form the configuration names."""
        form, tile = self._choose(hidden, head)
        if form != "library":
            gemm = kernels.exp_gemm.exp_gemm_tma if form == "tma" else kernels.exp_gemm.exp_gemm
            gemm(tile, hidden, ids, head, shift, tokens, exp_logits, sums, logit_sums)
            return
        n, size = hidden.shape[0], tokens.stop - tokens.start
        step = max(LIBRARY_TILE // (4 * n) // tile.block_v, 1) * tile.block_v
        in_place = exp_logits is not None and exp_logits.dtype == torch.float32
        scratch = None if in_place else shift.new_empty((n, min(step, size)))
        for part in slices(size, step):
            of = slice(part.start // tile.block_v, -(-part.stop // tile.block_v))
            out = None if exp_logits is None else exp_logits[:, part]
            logits = out if scratch is None else scratch[:, : part.stop - part.start]
            assert logits is not None  # in place only where there is an E
            first = tokens.start + part.start
            product(logits, hidden, head.weight[first : tokens.start + part.stop].T, accumulate=False)
            own_sums, own_logit_sums = (None if t is None else t[of] for t in (sums, logit_sums))
            kernels.exp_gemm.exp_pass(tile, logits, ids, head, shift, first, out, own_sums, own_logit_sums)

    def _head_product(
        self,
        exp_logits: Tensor,
        hidden: Tensor,
        rows: Tensor,
        coefficients: Tensor,
        grads: tuple[Tensor | None, Tensor | None],
        accumulate: bool,
        room: int,
    ) -> None:
        """The head's gradients from E of some tokens: ``E^T @ (k * hidden)`` and ``E^T @ k``."""
        (n, features), (grad_weight, grad_bias) = (rows.numel(), hidden.shape[1]), grads
        if grad_weight is not None:
            # By columns, so that a small room still serves any number of scores; E is read once for each.
            most = max(room // (n * exp_logits.element_size()), PRODUCT_COLUMNS)
            columns = -(-features // -(-features // most))
            for of in slices(features, -(-columns // 64) * 64):
                scaled = exp_logits.new_empty((n, of.stop - of.start))
                kernels.rows.rows(hidden[:, of], scaled, 1.0, coefficients, source_rows=rows)
                product(grad_weight[:, of], exp_logits.T, scaled, accumulate=accumulate)
                del scaled  # before the next slice's is allocated
        if grad_bias is not None:
            column = coefficients.to(exp_logits.dtype)[:, None]
            product(grad_bias[:, None], exp_logits.T, column, accumulate=accumulate)

    def _recompute(
        self,
        result: Forward,
        hidden: Tensor,
        rows: Tensor,
        ids: Tensor,
        head: Head,
        coefficients: Tensor,
        grads: tuple[Tensor | None, Tensor | None],
        room: int,
    ) -> None:
        """The head's gradients slice by slice, each written once in its final dtype, from E computed again."""
        features, itemsize = hidden.shape[1], self.kept_itemsize(hidden.dtype)
        parts = list(_chunks(rows.numel(), self.rows_at_once(features, room)))
        several, most = len(parts) > 1, parts[0].stop
        width = _slice_width(most * itemsize + (4 * features if several else 0), head.vocab, room)
        left = max(room - width * most * itemsize, self.least_room)
        buffer = _new_exp_logits(most, width, hidden)
        gathered = None if several else hidden.index_select(0, rows)
        for tokens in slices(head.vocab, width):
            final = tuple(None if grad is None else grad[tokens] for grad in grads)
            sums = final
            if several:
                sums = tuple(None if g is None else torch.empty_like(g, dtype=torch.float32) for g in final)
            for part in parts:
                some = hidden.index_select(0, rows[part]) if gathered is None else gathered
                exp_logits = buffer[: some.shape[0], : tokens.stop - tokens.start]
                self._exp_logits(some, ids[part], head, result.shift[part], tokens, exp_logits, None, None)
                kernels.rows.label_entries(exp_logits, result.entry[part], ids[part], tokens.start)
                self._head_product(exp_logits, hidden, rows[part], coefficients[part], sums, part.start > 0, left)  # type: ignore[arg-type]
            for grad, total in zip(final, sums, strict=True):
                if several and grad is not None and total is not None:
                    grad.copy_(total)

    def _choose(self, hidden: Tensor, head: Head) -> tuple[str, Tile]:
        """The form and the tile of the GEMM of E for such matrices."""
        row = self._given or config(self._arch or arch_of(hidden.device), hidden.dtype)
        aligned = all(
            t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, head.weight)
        )
        return row.choose(aligned=aligned, biased=head.bias is not None, capped=head.softcap is not None)

    def _on(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """Kernels start on the current device, which need not be the tensors'."""
        return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float32


def _new_exp_logits(n: int, vocab: int, like: Tensor) -> Tensor:
    """Room for E ``[n, V]``; rows begin at multiples of 128 bytes, as TMA and fast products ask."""
    dtype = _kept_dtype(like.dtype)
    stride = -(-vocab * dtype.itemsize // 128) * 128 // dtype.itemsize
    return torch.empty((n, stride), dtype=dtype, device=like.device)[:, :vocab]


def _row_major(head: Head) -> Head:
    """The head with features next to each other; a weight that is a transposed view is copied."""
    if head.weight.stride(1) == 1:
        return head
    return Head(head.weight.contiguous(), head.bias, head.logit_scale, head.softcap)


def _sums_bytes(vocab: int, capped: bool) -> int:
    """Of one row's sums over the tiles of the vocabulary, the narrowest tiles assumed."""
    return -(-vocab // 128) * 4 * (2 if capped else 1)


def _slice_width(bytes_per_token: int, vocab: int, room: int) -> int:
    """Tokens of a slice that fits half the room, in whole tiles; the least is one."""
    return min(max(room // 2 // bytes_per_token // SLICE_TOKENS, 1) * SLICE_TOKENS, vocab)


def _chunks(n: int, most: int) -> Iterator[slice]:
    """Slices of n rows, of ``most`` or a little less each, in whole CHUNK_ROWS; one for no rows."""
    step = max(most // CHUNK_ROWS, 1) * CHUNK_ROWS
    if n <= step:
        yield slice(0, n)
        return
    even = -(-n // -(-n // step))
    yield from slices(n, -(-even // CHUNK_ROWS) * CHUNK_ROWS)
