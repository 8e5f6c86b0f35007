"""The Triton backend, for CUDA and ROCm: what is launched in which order, and in how much memory. The kernels and
their tiles stand in ``kernels``.

Layout: E is stored row by row, ``[n, V]`` with its rows padded to 128 bytes, in bfloat16 for bfloat16 inputs and in
float32 otherwise (float16 could not hold E under the label's shift). Per slice of the vocabulary:

    exp_gemm               E = exp(z - shift) without the label's column, sums per tile            1 pass
    reduce_tiles           S += the tiles' sums, in order; rows whose S is past e^60 are marked overflowed
    recompute_overflowed   those rows again with their largest logit as shift, and
    rescale                what earlier slices left of them (three launches that return at once when there are none)
    product                grad_logp_hidden += E @ weight_slice, float32, where hidden's gradient is wanted and E is not
                           stored

and after the last slice ``finalize`` turns S into log-probabilities. A stored E serves both products at once; the
head's gradient without it computes E again, slice by slice, with the shift known and the label's ``-S`` in place.

Nothing here waits for the device. Scratch beyond a stored E and the returned gradients stays near ``Part.scratch``:
hidden rows are gathered chunk by chunk, and the rows that multiply E for the head's gradient column by column if
need be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import (
    OVERFLOW_ABOVE,
    PAIR_ROWS,
    Backend,
    Cost,
    Found,
    GivenPairs,
    Grads,
    PairTable,
    Part,
    grad_dtype,
    kernels,
    slices,
)
from orpo_kernels.backends.kernels import Chunk, Out
from orpo_kernels.backends.kernels.configs import Config, Tile, arch_of, config, gluon_lacks
from orpo_kernels.backends.products import LIBRARY_TILE, product, times_head
from orpo_kernels.objectives import ORPO
from orpo_kernels.settings import Head
from orpo_kernels.targets import Columns, Pairs

CHUNK_ROWS = 1024  # fewest rows of a chunk: one wave of 128 x 256 tiles over 4,096 features on a chip with 132 cores
STREAM_ROWS = 8192  # most rows of one slice of E: enough for full waves of both products
SLICE_TOKENS = 256  # the width of a slice is a multiple of this, and so of every tile
SLICE_BYTES = (2 << 30) - 1  # of one slice of E, which every chip's tensor maps can describe
PRODUCT_COLUMNS = 512  # fewest features of one product for the head's gradient


class _State(NamedTuple):
    """Of n targets; ``[n]`` float32."""

    shift: Tensor  # what each row's logits were shifted by
    inv_denom: Tensor  # 1 / (exp(z_y - shift) + S)
    label_entry: Tensor  # what stands at the label's place in E: -S, times the cap's slope at the label
    grad_logp_hidden: Tensor | None  # [n, H], where it cannot wait in the gradient itself
    exp_logits: Tensor | None  # E


class TritonBackend(Backend):
    """See the module's docstring.

    ``config`` stands in for the shipped one, to try another; ``arch`` names the row of the configuration table to use,
    for compiling without a device.
    """

    name = "triton"
    tuned_for = "cuda"
    takes_shards = True
    least_scratch = 20 << 20  # a gathered chunk or the float32 product of one, at H = 4,096

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

    def cost(self, n: int, vocab: int, features: int, dtype: torch.dtype, budget: int, *, store: bool) -> Cost:
        itemsize = _exp_dtype(dtype).itemsize
        if store:  # chunks of rows, with the sums of their tiles or as float32 products
            stored = n * vocab * itemsize
            room = max(budget - stored, self.least_scratch)
            return Cost(stored, min(room, n * (4 * features + _sums_bytes(vocab, False))), room)
        room = max(budget, self.least_scratch)
        n = min(n, _chunk_rows(features, room))
        return Cost(0, n * (8 * features + _slice_width(n * itemsize, vocab, room) * itemsize) if n else 0, room)

    def form(self, hidden: Tensor, head: Head) -> str:
        rows, head = hidden.new_empty((1, hidden.shape[-1])), _addressable(head)
        form, tile = self._choose(rows, head)
        n, v, h, warps, *_ = tile
        said = f"form {form}, tiles of {n} x {v}" + (f" x {h}" if h else "") + f" in {warps} warps"
        if tile.programs > 1:
            said += f", {tile.programs} programs a multiprocessor"
        row, capped, biased = self._row(rows), head.softcap is not None, head.bias is not None
        if form != row.form:
            lacks = ("a softcap" if capped else "it") + (" and a bias" if capped and biased else "")
            version = gluon_lacks() if row.form == "gluon" and row.gluon else ""
            chip = f"this chip has no {row.form} tile for {lacks}"
            said += f": {row.unmapped(rows, head.weight) or version or chip}"
        return said

    # What the engine calls, in the order it does.

    def count(self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
        table = labels.new_empty((offsets.numel() - 1, 8))
        with _on(labels):
            kernels.pairs.count(labels, nll_labels, offsets, table, ignore_index)
        return table

    def compact(
        self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, table: Tensor, size: int, ignore_index: int
    ) -> Columns:
        rows, ids = labels.new_empty((2, size))
        columns = Columns(rows, ids, torch.empty(size, dtype=torch.int8, device=ids.device), torch.empty_like(offsets))
        with _on(labels):
            kernels.pairs.compact(labels, nll_labels, offsets, table, columns, ignore_index)
        return columns

    def forward(self, part: Part, into: Grads, *, store: bool) -> Found:
        (n, features), vocab, hidden = (part.ids.numel(), part.hidden.shape[1]), part.head.vocab, part.hidden
        part = part._replace(head=_addressable(part.head))
        logps, shift, inv_denom, label_entry = torch.empty((4, n), dtype=torch.float32, device=hidden.device)
        means = torch.zeros_like(logps) if part.logit_means else None
        wanted = into.hidden is not None and not store
        waiting = None
        if wanted and part.shared_rows:
            waiting = torch.empty((n, features), dtype=grad_dtype(hidden.dtype), device=hidden.device)
        exp_logits = _new_exp_logits(n, vocab, hidden) if store else None
        state = _State(shift, inv_denom, label_entry, waiting, exp_logits)
        most = _chunk_rows(features, part.scratch)
        if store:
            row = features * hidden.element_size() + _sums_bytes(part.head.widest, part.head.softcap is not None)
            most = part.scratch // row
            mapped = self._row(hidden).mapped
            if exp_logits is not None and mapped is not None:
                most = min(most, (mapped - 1) // (exp_logits.stride(0) * exp_logits.element_size()))
        with _on(hidden):
            for of in _chunks(n, most):
                chunk = part._replace(rows=part.rows[of], ids=part.ids[of])
                own = _State(*(None if t is None else t[of] for t in state))  # type: ignore[arg-type]
                product = self._forward_rows(chunk, own, logps[of], None if means is None else means[of], wanted)
                if product is not None and into.hidden is not None:
                    out, out_rows = (into.hidden, chunk.rows) if waiting is None else (waiting[of], None)
                    label = (own.label_entry, part.head.weight, _readable(chunk.ids, chunk.head))
                    factor = -part.head.logit_scale
                    kernels.rows.rows(product, out, factor, own.inv_denom, out_rows=out_rows, label=label)
                del product  # before the next chunk's is allocated
        return Found(logps, means, state)

    def pair_terms(self, found: Found, pairs: Pairs, given: GivenPairs) -> PairTable:
        objective = given.objective
        if type(objective) is not ORPO or pairs.group is not None or pairs.weights is not None:
            return super().pair_terms(found, pairs, given)
        assert found.logit_means is not None  # asked for
        logps = found.logps
        rows = len(PAIR_ROWS) + 1 + len(objective.metric_names)
        values, g = logps.new_empty((rows, pairs.last - pairs.first)), torch.empty_like(logps)
        with _on(logps):
            kernels.pairs.odds_ratio(logps, found.logit_means, pairs, given, objective.beta, g, values)
        return PairTable(values, g)

    def backward(self, part: Part, found: Found, g: Tensor, into: Grads, *, accumulate: bool) -> None:
        state, hidden = found.state, part.hidden
        part = part._replace(head=_addressable(part.head))
        with _on(hidden):
            if into.hidden is not None:
                self._grad_hidden(part, state, g, into.hidden)
            if into.weight is not None or into.bias is not None:
                if hidden.stride(1) != 1:
                    part = part._replace(hidden=hidden.contiguous())
                coefficients = -part.head.logit_scale * state.inv_denom * g
                if state.exp_logits is None:
                    self._recompute(part, state, coefficients, into[1:])
                else:
                    self._head_product(state.exp_logits, part, coefficients, into[1:], accumulate)

    def scale(self, values: Tensor, by: Tensor) -> None:
        with _on(values):
            kernels.rows.scale(values, by)

    # Parts of them.

    def _grad_hidden(self, part: Part, state: _State, g: Tensor, out: Tensor) -> None:
        rows, (n, features), head = part.rows, (g.numel(), out.shape[1]), part.head
        if state.exp_logits is None:
            if state.grad_logp_hidden is None:
                kernels.rows.rows(out, out, 1.0, g, source_rows=rows, out_rows=rows)
            else:  # two terms at most meet in a row, so their order cannot change the sum
                kernels.rows.rows(state.grad_logp_hidden, state.grad_logp_hidden, 1.0, g)
                out.index_add_(0, rows, state.grad_logp_hidden)
            return
        for of in _chunks(n, part.scratch // (4 * features)):
            product = g.new_empty((of.stop - of.start, features))
            times_head(product, state.exp_logits[of], head.weight, accumulate=False)  # the label's entry stands in it
            a, b = state.inv_denom[of], g[of]
            if part.shared_rows:
                kernels.rows.rows(product, product, -head.logit_scale, a, b)
                out.index_add_(0, rows[of], product.to(out.dtype))
            else:
                kernels.rows.rows(product, out, -head.logit_scale, a, b, out_rows=rows[of])
            del product  # before the next chunk's is allocated

    def _forward_rows(
        self, part: Part, state: _State, logps: Tensor, means: Tensor | None, product: bool
    ) -> Tensor | None:
        """``forward`` of one chunk of rows; the sum of ``E_v W_v`` over v != y ``[n, H]`` if ``product``."""
        ids, head, vocab = part.ids, part.head, part.head.vocab
        hidden = part.hidden.index_select(0, part.rows)
        chunk, n = Chunk(hidden, ids, head, state.shift), hidden.shape[0]
        label, sum_exp = torch.empty((2, n), dtype=torch.float32, device=hidden.device)
        overflowed = torch.empty(n, dtype=torch.int32, device=hidden.device)
        shift, label_entry = state.shift, state.label_entry
        readable = chunk._replace(ids=_readable(ids, head))
        kernels.rows.label(readable, part.mean_weight, label, label_entry, sum_exp, means)
        if head.shard is not None:
            label.copy_(head.shard.of_owner(label, ids))
            shift.copy_(label)
        width, of_slice, total = vocab, None, None
        if product:
            width = _slice_width(n * _exp_dtype(hidden.dtype).itemsize, vocab, part.scratch)
            of_slice, total = _new_exp_logits(n, width, hidden), logps.new_empty(hidden.shape)
        block = self._choose(hidden, head)[1].block_v
        sums = label.new_empty((-(-width // block), n))
        logit_sums = torch.empty_like(sums) if means is not None and head.softcap is not None else None
        for tokens in slices(vocab, width):
            size = tokens.stop - tokens.start
            exp_logits = state.exp_logits if of_slice is None else of_slice[:, :size]
            self._exp_logits(chunk, tokens, Out(exp_logits, sums, logit_sums))
            tiles = -(-size // block)
            kernels.rows.reduce_tiles(sums, logit_sums, sum_exp, means, overflowed, tiles, OVERFLOW_ABOVE, 1 / vocab)
            found = kernels.exp_gemm.recompute_overflowed(chunk, overflowed, tokens, exp_logits)
            before = total if tokens.start else None  # nothing is in it yet
            kernels.rows.rescale(*found, sum_exp, shift, overflowed, before)
            if total is not None and exp_logits is not None:
                times_head(total, exp_logits, head.weight[tokens], accumulate=tokens.start > 0)
        if head.shard is not None:
            common = head.shard.largest(shift)  # other ranks' where rows overflowed on them alone
            matrix = state.exp_logits if total is None else total
            lower = (common > shift).int()
            kernels.rows.rescale(torch.zeros_like(common)[None], common[None], sum_exp, shift, lower, matrix)
            sum_exp.copy_(head.shard.sum(sum_exp))
            label_entry.masked_fill_(ids < 0, 0)
        kernels.rows.finalize(label, shift, sum_exp, logps, state.inv_denom, label_entry)
        if state.exp_logits is not None:
            kernels.rows.label_entries(state.exp_logits, label_entry, ids, 0)
        return total

    def _exp_logits(self, chunk: Chunk, tokens: slice, out: Out) -> None:
        """E of the tokens and its sums per tile, in the form the configuration names."""
        (hidden, _, head, shift), exp_logits = chunk, out.exp_logits
        form, tile = self._choose(hidden, head)
        if form == "gluon":
            kernels.exp_gemm_gluon.exp_gemm_gluon(tile, chunk, tokens, out)
            return
        if form != "library":
            gemm = kernels.exp_gemm.exp_gemm_tma if form == "tma" else kernels.exp_gemm.exp_gemm
            gemm(tile, chunk, tokens, out)
            return
        n, size = hidden.shape[0], tokens.stop - tokens.start
        step = max(LIBRARY_TILE // (4 * n) // tile.block_v, 1) * tile.block_v
        in_place = exp_logits is not None and exp_logits.dtype == torch.float32
        scratch = None if in_place else shift.new_empty((n, min(step, size)))
        for part in slices(size, step):
            of = slice(part.start // tile.block_v, -(-part.stop // tile.block_v))
            own = Out(
                None if exp_logits is None else exp_logits[:, part],
                *(None if t is None else t[of] for t in out[1:]),
            )
            logits = own.exp_logits if scratch is None else scratch[:, : part.stop - part.start]
            assert logits is not None  # in place only where there is an E
            first = tokens.start + part.start
            product(logits, hidden, head.weight[first : tokens.start + part.stop].T, accumulate=False)
            kernels.exp_gemm.exp_pass(tile, chunk, logits, first, own)

    def _head_product(
        self, exp_logits: Tensor, part: Part, coefficients: Tensor, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        """The head's gradients from E of some tokens: ``E^T @ (k * hidden)`` and ``E^T @ k``."""
        n, (grad_weight, grad_bias) = part.rows.numel(), grads
        if grad_weight is not None:
            features, hidden = grad_weight.shape[1], Grads(None, grad_weight, None).columns(part.hidden)
            # By columns, so that little scratch still serves any number of targets; E is read once for each.
            most = max(part.scratch // (n * exp_logits.element_size()), PRODUCT_COLUMNS)
            columns = -(-features // -(-features // most))
            for of in slices(features, -(-columns // 64) * 64):
                scaled = exp_logits.new_empty((n, of.stop - of.start))
                kernels.rows.rows(hidden[:, of], scaled, 1.0, coefficients, source_rows=part.rows)
                product(grad_weight[:, of], exp_logits.T, scaled, accumulate=accumulate)
                del scaled  # before the next slice's is allocated
        if grad_bias is not None:
            column = coefficients.to(exp_logits.dtype)[:, None]
            product(grad_bias[:, None], exp_logits.T, column, accumulate=accumulate)

    def _recompute(self, part: Part, state: _State, coefficients: Tensor, grads: Sequence[Tensor | None]) -> None:
        """The head's gradients slice by slice, each written once in its final dtype, from E computed again."""
        hidden, head, room = part.hidden, part.head, part.scratch
        features, itemsize = hidden.shape[1], _exp_dtype(hidden.dtype).itemsize
        chunks = list(_chunks(part.rows.numel(), _chunk_rows(features, room)))
        several, most = len(chunks) > 1, chunks[0].stop
        width = _slice_width(most * itemsize + (4 * features if several else 0), head.vocab, room)
        left = max(room - width * most * itemsize, self.least_scratch)
        buffer = _new_exp_logits(most, width, hidden)
        gathered = None if several else hidden.index_select(0, part.rows)
        for tokens in slices(head.vocab, width):
            final = [None if grad is None else grad[tokens] for grad in grads]
            sums = final
            if several:
                sums = [None if g is None else torch.empty_like(g, dtype=torch.float32) for g in final]
            for of in chunks:
                own = part._replace(rows=part.rows[of], ids=part.ids[of], scratch=left)
                some = hidden.index_select(0, own.rows) if gathered is None else gathered
                exp_logits = buffer[: some.shape[0], : tokens.stop - tokens.start]
                unread = None
                if head.bias is not None and head.softcap is None:
                    # Nobody reads these sums; without them the form with a bias spills 8 bytes on sm_100 (triton 3.7).
                    tiles = -(-exp_logits.shape[1] // self._choose(some, head)[1].block_v)
                    unread = state.shift.new_empty((tiles, some.shape[0]))
                self._exp_logits(Chunk(some, own.ids, head, state.shift[of]), tokens, Out(exp_logits, unread))
                kernels.rows.label_entries(exp_logits, state.label_entry[of], own.ids, tokens.start)
                self._head_product(exp_logits, own, coefficients[of], sums, of.start > 0)
            for grad, total in zip(final, sums, strict=True):
                if several and grad is not None and total is not None:
                    grad.copy_(total)

    def _choose(self, hidden: Tensor, head: Head) -> tuple[str, Tile]:
        """The form and the tile of the GEMM of E for such matrices."""
        biased, capped, features = head.bias is not None, head.softcap is not None, hidden.shape[1]
        row = self._row(hidden)
        mapped = not row.unmapped(hidden, head.weight)
        return row.choose(mapped=mapped, biased=biased, capped=capped, features=features)

    def _row(self, hidden: Tensor) -> Config:
        return self._given or config(self._arch or arch_of(hidden.device), hidden.dtype)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _exp_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float32


def _new_exp_logits(n: int, vocab: int, like: Tensor) -> Tensor:
    """Room for E ``[n, V]``; rows begin at multiples of 128 bytes, as TMA and fast products ask."""
    dtype = _exp_dtype(like.dtype)
    stride = -(-vocab * dtype.itemsize // 128) * 128 // dtype.itemsize
    return torch.empty((n, stride), dtype=dtype, device=like.device)[:, :vocab]


def _addressable(head: Head) -> Head:
    """The head as kernels read it, features and biases next to each other; views that are not so are copied."""
    weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
    return head._replace(weight=weight, bias=None if head.bias is None else head.bias.contiguous())


def _readable(ids: Tensor, head: Head) -> Tensor:
    """Rows of the weight that are there to be read, any for a label that another rank holds."""
    return ids if head.shard is None else ids.clamp(min=0)


def _chunk_rows(features: int, room: int) -> int:
    """Rows of one pass that stores no E: gathered rows and their float32 product take half the room, E the other."""
    return min(max(room // 2 // (8 * features) // CHUNK_ROWS, 1) * CHUNK_ROWS, STREAM_ROWS)


def _sums_bytes(vocab: int, capped: bool) -> int:
    """Of one row's sums over the tiles of the vocabulary, the narrowest tiles assumed."""
    return -(-vocab // 128) * 4 * (2 if capped else 1)


def _slice_width(bytes_per_token: int, vocab: int, room: int) -> int:
    """Tokens of a slice that fits half the room, in whole tiles; the least is one."""
    return min(max(min(room // 2, SLICE_BYTES) // bytes_per_token // SLICE_TOKENS, 1) * SLICE_TOKENS, vocab)


def _chunks(n: int, most: int) -> Iterator[slice]:
    """Slices of n rows, of ``most`` or a little less each, in whole CHUNK_ROWS."""
    step = max(most // CHUNK_ROWS, 1) * CHUNK_ROWS
    even = -(-n // -(-n // step))
    return slices(n, -(-even // CHUNK_ROWS) * CHUNK_ROWS)
