"""What stands between the products: vectors over targets, and rows of features.

Symbols and rules as in ``common.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.backends.kernels import Chunk
from orpo_kernels.backends.kernels.common import ANY_BATCH, _cap, _log1p, cdiv, stride_of

VECTOR = 128  # elements of a program that only touches vectors
REDUCED_ROWS = 32  # rows of a program that reduces something over tiles or splits


@triton.jit(**ANY_BATCH)
def label_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, mean_weight_ptr, label_ptr, slope_ptr, shift_ptr, sum_exp_ptr,
    means_ptr, H, hidden_stride, weight_stride, logit_scale, softcap, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The label's capped logit of one row and the cap's slope there; the row's first shift is that logit, its S 0.

    With the mean row of the head, ``mean_weight``, also the row's mean logit.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    terms = tl.zeros((BLOCK_H,), tl.float32)
    central = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, H, BLOCK_H):
        features = start + tl.arange(0, BLOCK_H)
        h = tl.load(hidden_ptr + row * hidden_stride + features, mask=features < H, other=0.0)
        w = tl.load(weight_ptr + token * weight_stride + features, mask=features < H, other=0.0)
        terms += h.to(tl.float32) * w.to(tl.float32)
        if mean_weight_ptr is not None:
            central += h.to(tl.float32) * tl.load(mean_weight_ptr + features, mask=features < H, other=0.0)
    raw = tl.sum(terms, 0)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + token).to(tl.float32)
    logit, slope = _cap(raw, logit_scale, softcap)
    tl.store(label_ptr + row, logit)
    tl.store(slope_ptr + row, slope)
    tl.store(shift_ptr + row, logit)
    tl.store(sum_exp_ptr + row, 0.0)
    if mean_weight_ptr is not None:
        tl.store(means_ptr + row, logit_scale * tl.sum(central, 0))


def label(
    chunk: Chunk,
    mean_weight: Tensor | None,  # [H], where mean logits are wanted that no tile gives
    label: Tensor,  # [n], as all below
    slope: Tensor,
    sum_exp: Tensor,
    means: Tensor | None,
) -> None:
    """Write ``label``, ``slope``, the chunk's ``shift``, ``sum_exp`` and ``means``."""
    hidden, ids, head, shift = chunk
    n, features = hidden.shape
    tensors = (hidden, head.weight, head.bias, ids, mean_weight, label, slope, shift, sum_exp, means)
    scalars = (features, hidden.stride(0), head.weight.stride(0), head.logit_scale, head.softcap)
    label_kernel[(n,)](*tensors, *scalars, BLOCK_H=_block(features), num_warps=4)


@triton.jit(**ANY_BATCH)
def reduce_tiles_kernel(
    sums_ptr, logit_sums_ptr, sum_exp_ptr, means_ptr, overflowed_ptr, N, tiles, most, inv_vocab,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``S += `` the tiles' sums, in tile order. A row whose S passes ``most`` or overflowed is marked for
    ``recompute_overflowed_kernel``.

    Under a softcap the sums of logits times ``inv_vocab = 1 / V`` go to the mean logit.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = rows < N
    parts = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    logit_parts = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        places = tile[:, None].to(tl.int64) * N + rows[None, :]
        here = (tile[:, None] < tiles) & known[None, :]
        parts += tl.load(sums_ptr + places, mask=here, other=0.0)
        if logit_sums_ptr is not None:
            logit_parts += tl.load(logit_sums_ptr + places, mask=here, other=0.0)
    before = tl.load(sum_exp_ptr + rows, mask=known, other=0.0)
    sum_exp = before + tl.sum(parts, 0)
    fits = sum_exp < most  # false for inf and NaN too
    tl.store(overflowed_ptr + rows, tl.where(fits, 0, 1), mask=known)
    tl.store(sum_exp_ptr + rows, tl.where(fits, sum_exp, before), mask=known)
    if logit_sums_ptr is not None:
        mean = tl.load(means_ptr + rows, mask=known, other=0.0) + inv_vocab * tl.sum(logit_parts, 0)
        tl.store(means_ptr + rows, mean, mask=known)


def reduce_tiles(
    sums: Tensor,  # [tiles or more, n]
    logit_sums: Tensor | None,
    sum_exp: Tensor,  # [n], as all below
    means: Tensor | None,
    overflowed: Tensor,
    tiles: int,
    most: float,
    inv_vocab: float,
) -> None:
    """Add the first ``tiles`` rows of sums to ``sum_exp`` and ``means``; write ``overflowed``."""
    n = sum_exp.numel()
    tensors, blocks = (sums, logit_sums, sum_exp, means, overflowed), {"BLOCK_N": REDUCED_ROWS, "BLOCK_T": 32}
    reduce_tiles_kernel[(cdiv(n, REDUCED_ROWS),)](*tensors, n, tiles, most, inv_vocab, **blocks, num_warps=4)


@triton.jit(**ANY_BATCH)
def rescale_kernel(
    sums_ptr, maxima_ptr, sum_exp_ptr, shift_ptr, overflowed_ptr, grad_logp_hidden_ptr, N, H, grad_stride,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """New shift and S of overflowed rows; what earlier slices left in S and in the product for hidden's gradient is
    brought to that shift."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    overflowed = tl.load(overflowed_ptr + rows, mask=rows < N, other=0) != 0
    if tl.sum(overflowed.to(tl.int32), 0) == 0:
        return
    splits = tl.arange(0, SPLITS)
    places = splits[:, None].to(tl.int64) * N + rows[None, :]
    before = tl.load(shift_ptr + rows, mask=overflowed, other=0.0)
    best = tl.max(tl.load(maxima_ptr + places, mask=overflowed[None, :], other=-float("inf")), 0)
    shift = tl.maximum(best, before)
    factor = tl.exp(tl.where(overflowed, before - shift, 0.0))
    sum_exp = tl.load(sum_exp_ptr + rows, mask=overflowed, other=0.0) * factor
    sum_exp += tl.sum(tl.load(sums_ptr + places, mask=overflowed[None, :], other=0.0), 0)
    tl.store(sum_exp_ptr + rows, sum_exp, mask=overflowed)
    tl.store(shift_ptr + rows, shift, mask=overflowed)
    if grad_logp_hidden_ptr is not None:
        for start in range(0, H, BLOCK_H):
            features = start + tl.arange(0, BLOCK_H)
            here = grad_logp_hidden_ptr + rows[:, None].to(tl.int64) * grad_stride + features[None, :]
            mask = overflowed[:, None] & (features[None, :] < H)
            tl.store(here, tl.load(here, mask=mask, other=0.0) * factor[:, None], mask=mask)


def rescale(
    sums: Tensor,  # [splits, n], as maxima
    maxima: Tensor,
    sum_exp: Tensor,  # [n], as shift and overflowed
    shift: Tensor,
    overflowed: Tensor,
    grad_logp_hidden: Tensor | None,  # [n, H], where earlier slices left something in it
) -> None:
    """Bring overflowed rows to the shift that ``exp_gemm.recompute_overflowed`` found, in place."""
    splits, n = sums.shape
    features = 0 if grad_logp_hidden is None else grad_logp_hidden.shape[1]
    tensors = (sums, maxima, sum_exp, shift, overflowed, grad_logp_hidden)
    blocks = {"BLOCK_N": REDUCED_ROWS, "BLOCK_H": 64, "SPLITS": splits}
    sizes = (n, features, stride_of(grad_logp_hidden))
    rescale_kernel[(cdiv(n, REDUCED_ROWS),)](*tensors, *sizes, **blocks, num_warps=4)


@triton.jit(**ANY_BATCH)
def finalize_kernel(
    label_ptr, shift_ptr, sum_exp_ptr, logps_ptr, inv_denom_ptr, label_entry_ptr, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """From S to logp, ``r = 1 / (a + S)`` and the label's entry ``-S`` times the cap's slope, which stands in entry."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = rows < N
    label = tl.load(label_ptr + rows, mask=known, other=0.0)
    sum_exp = tl.load(sum_exp_ptr + rows, mask=known, other=1.0)
    distance = label - tl.load(shift_ptr + rows, mask=known, other=0.0)
    # Above -30 the label's own form keeps relative precision as p -> 1; far below, exp(-distance) would overflow where
    # the plain log-sum-exp has nothing to lose.
    near = -_log1p(sum_exp * tl.exp(-tl.maximum(distance, -30.0)))
    own = tl.exp(distance)
    far = distance - tl.log(own + tl.maximum(sum_exp, 1e-37))
    slope = tl.load(label_entry_ptr + rows, mask=known, other=1.0)
    tl.store(logps_ptr + rows, tl.where(distance > -30, near, far), mask=known)
    tl.store(inv_denom_ptr + rows, 1 / (own + sum_exp), mask=known)
    tl.store(label_entry_ptr + rows, -sum_exp * slope, mask=known)


def finalize(
    label: Tensor, shift: Tensor, sum_exp: Tensor, logps: Tensor, inv_denom: Tensor, label_entry: Tensor
) -> None:
    """All are ``[n]``. ``label_entry`` holds the cap's slope at the label and becomes the label's entry."""
    n = sum_exp.numel()
    tensors = (label, shift, sum_exp, logps, inv_denom, label_entry)
    finalize_kernel[(cdiv(n, VECTOR),)](*tensors, n, BLOCK_N=VECTOR, num_warps=4)


@triton.jit(**ANY_BATCH)
def label_entry_kernel(exp_logits_ptr, label_entry_ptr, ids_ptr, N, V, first, exp_stride, BLOCK_N: tl.constexpr):
    """Write each row's entry at its label's place, where that lies in the slice."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(ids_ptr + rows, mask=rows < N, other=-1) - first
    entry = tl.load(label_entry_ptr + rows, mask=rows < N, other=0.0)
    here = (rows < N) & (label >= 0) & (label < V)
    places = exp_logits_ptr + rows.to(tl.int64) * exp_stride + label
    tl.store(places, entry.to(exp_logits_ptr.dtype.element_ty), mask=here)


def label_entries(exp_logits: Tensor, label_entry: Tensor, ids: Tensor, first: int) -> None:
    """Write ``label_entry [n]`` at the labels' places in E ``[n, s]`` of the tokens from ``first`` on."""
    n, size = exp_logits.shape
    tensors, sizes = (exp_logits, label_entry, ids), (n, size, first, exp_logits.stride(0))
    label_entry_kernel[(cdiv(n, VECTOR),)](*tensors, *sizes, BLOCK_N=VECTOR, num_warps=4)


@triton.jit(**ANY_BATCH)
def rows_kernel(
    source_ptr, out_ptr, source_rows_ptr, out_rows_ptr, a_ptr, b_ptr, label_entry_ptr, weight_ptr, ids_ptr,
    H, source_stride, out_stride, weight_stride, factor, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``out[i] = factor * a_i * b_i * (source[i] + label_entry_i * weight[id_i])``, one row a program, in float32.

    Rows of the source and of the output go by an index where one is given; a row of the output has one writer.
    """
    i = tl.program_id(0).to(tl.int64)
    source_row, out_row = i, i
    if source_rows_ptr is not None:
        source_row = tl.load(source_rows_ptr + i)
    if out_rows_ptr is not None:
        out_row = tl.load(out_rows_ptr + i)
    k = factor
    if a_ptr is not None:
        k *= tl.load(a_ptr + i)
    if b_ptr is not None:
        k *= tl.load(b_ptr + i)
    features = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    values = tl.load(source_ptr + source_row * source_stride + features, mask=features < H, other=0.0).to(tl.float32)
    if label_entry_ptr is not None:
        row = weight_ptr + tl.load(ids_ptr + i) * weight_stride
        values += tl.load(label_entry_ptr + i) * tl.load(row + features, mask=features < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_row * out_stride + features, (k * values).to(out_ptr.dtype.element_ty), mask=features < H)


def rows(
    source: Tensor,
    out: Tensor,
    factor: float,
    a: Tensor | None,
    b: Tensor | None = None,
    *,
    source_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """``out = factor * a * b * (source + label_entry * weight[ids])``; ``label`` is label_entry, weight and ids.

    Rows of source and of out go by an index where one is given.
    """
    index = source_rows if source_rows is not None else out_rows
    n, features = source.shape[0] if index is None else index.numel(), source.shape[1]
    label_entry, weight, ids = label or (None, None, None)
    block = _block(features)
    tensors = (source, out, source_rows, out_rows, a, b, label_entry, weight, ids)
    scalars = (features, source.stride(0), out.stride(0), stride_of(weight), factor)
    rows_kernel[(n, cdiv(features, block))](*tensors, *scalars, BLOCK_H=block, num_warps=4)


@triton.jit(**ANY_BATCH)
def scale_kernel(values_ptr, scale_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """``values *= scale`` in place. The scale stays on the device; when it is 1, the usual case, nothing is touched."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale == 1.0:
        return
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    for step in range(STEPS):
        places = start + step * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + places, mask=places < size, other=0.0).to(tl.float32)
        tl.store(values_ptr + places, (values * scale).to(values_ptr.dtype.element_ty), mask=places < size)


def scale(values: Tensor, by: Tensor) -> None:
    """``values *= by`` in place, for a scalar ``by`` on the device."""
    size, block, steps = values.numel(), 1024, 16
    if size:
        scale_kernel[(cdiv(size, block * steps),)](values, by, size, BLOCK=block, STEPS=steps, num_warps=4)


def _block(features: int) -> int:
    """A power of two for a loop over features, 1,024 at most."""
    return min(1024, 1 << max(features - 1, 15).bit_length())
