"""What several kernels share: the epilogue that makes E, and functions that do not cancel.

Symbols as in docs/kernels.md: N targets, that is pairs of a hidden row and a token id; V tokens of a *slice* ``[first,
first + V)`` of the vocabulary; H features; E the shifted exponentials of the logits and S their sums. Every sum has one
owner and a fixed order, so two runs give the same bits; there are no atomics. Offsets that grow with N times V are
64-bit. An argument that is None is a constant to Triton: what hangs on it is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Triton compiles anew for another divisibility of a size or another alignment of a pointer. Those that follow from the
# batch or from where a slice of it begins are left out of that, so that no batch compiles anything new.
ANY_BATCH = {
    "do_not_specialize": [
        "N", "V", "first", "tiles", "pairs", "group", "first_pair", "base", "size", "ignore",
    ],
    "do_not_specialize_on_alignment": [
        "labels_ptr", "nll_labels_ptr", "starts_ptr", "counts_ptr", "rows_ptr", "means_ptr",
        "shift_ptr", "ids_ptr", "sums_ptr", "logit_sums_ptr", "label_ptr", "slope_ptr", "sum_exp_ptr",
        "overflowed_ptr", "maxima_ptr", "logps_ptr", "inv_denom_ptr", "label_entry_ptr", "source_rows_ptr",
        "out_rows_ptr", "a_ptr", "b_ptr", "kind_ptr", "offsets_ptr", "g_ptr", "table_ptr",
    ],
}  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def stride_of(tensor: Tensor | None) -> int | None:
    """Elements from one row to the next."""
    return None if tensor is None else tensor.stride(0)


@triton.jit
def _cap(logits, softcap):
    """Capped logits ``softcap * tanh(z / softcap)`` and the cap's slope ``1 - tanh^2``, from one exponential."""
    if softcap is not None:
        small = tl.exp(tl.abs(logits) * (-2 / softcap))
        inverse = 1 / (1 + small)
        bent = softcap * (1 - small) * inverse
        return tl.where(logits >= 0, bent, -bent), 4 * small * inverse * inverse
    else:
        return logits, tl.full(logits.shape, 1.0, tl.float32)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for x > -1: near 0 as ``2 atanh(x / (2 + x))``, where log(1 + x) would cancel."""
    s = x / (2 + x)
    q = s * s
    near = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11)))))
    return tl.where(tl.abs(x) < 0.5, near, tl.log(1 + x))


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` with relative precision near 0: nine terms of the series up to 0.5, where they reach 2e-10."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1)


@triton.jit
def _place(tile, tiles_n, tiles_v, GROUP_V: tl.constexpr):
    """Row and column of a tile. GROUP_V columns go through all rows before the next, so that their part of the head
    stays in L2 while hidden, the smaller matrix, is read again for each group."""
    in_group = GROUP_V * tiles_n
    first = tile // in_group * GROUP_V
    width = tl.minimum(tiles_v - first, GROUP_V)
    return tile % in_group // width, first + tile % in_group % width


@triton.jit
def _logits(raw, columns, bias_ptr, V, first, logit_scale, softcap):
    """From raw products to capped logits and the cap's slope; places past the slice stay 0."""
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + first + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    return _cap(raw * logit_scale, softcap)


@triton.jit
def _part(
    raw, row, column, known, exp_logits, exp_stride, bias_ptr, shift, label, V, first, logit_scale, softcap
):  # fmt: skip
    """From raw products to stored entries of E; returns the row sums of plain exponentials and of capped logits.

    The label's place and places past the slice hold 0: summed with the label's own term and without it afterwards, S
    would cancel as p -> 1. ``exp_logits`` is a pointer for the ``known`` rows, or without a stride a descriptor.
    """
    columns = column + tl.arange(0, raw.shape[1])
    logits, slope = _logits(raw, columns, bias_ptr, V, first, logit_scale, softcap)
    logit_sum = tl.sum(logits, 1)  # before the exponentials, so that the logits need no registers after them
    plain = tl.exp(logits - shift[:, None])
    plain = tl.where((columns[None, :] < V) & (columns[None, :] != label[:, None]), plain, 0.0)
    sum_exp = tl.sum(plain, 1)
    if softcap is not None:
        # Where exp overflowed the row is done again; until then its slope of 0 must not make a NaN of it.
        plain = tl.where(slope > 0, plain * slope, 0.0)
    if exp_logits is not None:
        if exp_stride is None:
            exp_logits.store([row, column], plain.to(exp_logits.dtype))
        else:
            rows = row + tl.arange(0, raw.shape[0])
            places = exp_logits + rows[:, None].to(tl.int64) * exp_stride + columns[None, :]
            tl.store(places, plain.to(exp_logits.dtype.element_ty), mask=known[:, None] & (columns[None, :] < V))
    return sum_exp, logit_sum


@triton.jit
def _halves(tile):
    """Left and right columns of a tile. In a tensor core's layout a thread holds some of both, so nothing moves."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    raw, row, column, tile_v, exp_logits, exp_stride, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
    N, V, first, logit_scale, softcap, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile's raw products to E and its sums, in PARTS runs of columns in turn, to hold fewer registers."""
    rows = row + tl.arange(0, raw.shape[0])
    known = rows < N
    shift = tl.load(shift_ptr + rows, mask=known, other=0.0)
    label = tl.load(ids_ptr + rows, mask=known, other=-1) - first
    sum_exp = tl.zeros((raw.shape[0],), tl.float32)
    logit_sum = tl.zeros((raw.shape[0],), tl.float32)
    width: tl.constexpr = raw.shape[1] // PARTS
    tiles = (raw,)
    if PARTS > 1:
        tiles = _halves(raw)
    if PARTS > 2:
        tiles = _halves(tiles[0]) + _halves(tiles[1])
    if PARTS > 4:
        tiles = _halves(tiles[0]) + _halves(tiles[1]) + _halves(tiles[2]) + _halves(tiles[3])
    for part in tl.static_range(PARTS):
        more, more_logits = _part(
            tiles[part], row, column + part * width, known, exp_logits, exp_stride, bias_ptr, shift,
            label.to(tl.int32), V, first, logit_scale, softcap,
        )  # fmt: skip
        sum_exp += more
        logit_sum += more_logits
    place = tile_v.to(tl.int64) * N + rows
    if sums_ptr is not None:
        tl.store(sums_ptr + place, sum_exp, mask=known)
    if logit_sums_ptr is not None:
        tl.store(logit_sums_ptr + place, logit_sum, mask=known)
