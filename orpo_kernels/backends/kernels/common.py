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

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is an instruction; exp is that, a product and a guard for denormals


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def stride_of(tensor: Tensor | None) -> int | None:
    """Elements from one row to the next."""
    return None if tensor is None else tensor.stride(0)


@triton.jit
def _tanh(raw, scale):
    """``tanh(raw * scale)`` and a quarter of its slope ``1 - tanh^2``, which does not cancel where tanh saturates.

    With ``u = exp(-2 raw scale)`` they are ``(1 - u) / (1 + u)`` and ``u / (1 + u)^2``, for either sign: u stops at
    2^126, where tanh has long been -1. The square of an approximate inverse root is the inverse in one instruction and
    a product; a division takes several, as the exact root would.
    """
    u = tl.exp2(tl.minimum(raw * (scale * (-2 * LOG2E)), 126.0, propagate_nan=tl.PropagateNan.ALL))
    root = tl.rsqrt(1 + u)
    inverse = root * root
    return (1 - u) * inverse, u * inverse * inverse


@triton.jit
def _cap(raw, logit_scale, softcap):
    """Capped logits ``softcap * tanh(z / softcap)`` and the cap's slope ``1 - tanh^2``; z is ``raw * logit_scale``."""
    if softcap is not None:
        bent, quarter = _tanh(raw, logit_scale / softcap)
        return softcap * bent, 4 * quarter
    else:
        return raw * logit_scale, tl.full(raw.shape, 1.0, tl.float32)


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
def _biased(raw, columns, bias_ptr, V, first):
    """Raw products and the bias; places past the slice stay as they are."""
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + first + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit
def _part(
    raw, row, column, known, exp_logits, exp_stride, bias_ptr, shift_log2, label, special, V, first, logit_scale,
    softcap,
):  # fmt: skip
    """From raw products to stored entries of E; returns the row sums of plain exponentials and of capped logits.

    The label's place and places past the slice hold 0: summed with the label's own term and without it afterwards, S
    would cancel as p -> 1; where no place of the part is ``special`` nobody looks for one. ``shift_log2`` is the shift
    times log2(e). ``exp_logits`` is a pointer for the ``known`` rows, or without a stride a descriptor.
    """
    columns = column + tl.arange(0, raw.shape[1])
    raw = _biased(raw, columns, bias_ptr, V, first)
    if softcap is not None:
        bent, quarter = _tanh(raw, logit_scale / softcap)
        logit_sum = tl.sum(bent, 1) * softcap  # before the exponentials: the logits need no registers after them
        plain = tl.exp2(bent * (softcap * LOG2E) - (shift_log2 - 2)[:, None])  # four times as much
    else:
        logit_sum = tl.sum(raw, 1) * logit_scale
        plain = tl.exp2(raw * (logit_scale * LOG2E) - shift_log2[:, None])
    if special:
        plain = tl.where((columns[None, :] < V) & (columns[None, :] != label[:, None]), plain, 0.0)
    sum_exp = tl.sum(plain, 1)
    if softcap is not None:
        sum_exp *= 0.25
        plain *= quarter
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
    N, V, first, logit_scale, softcap, PARTS: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A tile's raw products to E and its sums, in PARTS runs of columns in turn, to hold fewer registers.

    BRANCH passes over the search for labels and for the slice's end in the tiles that have neither, most of them. It
    costs registers, which pays where they do not decide how many programs a multiprocessor holds.
    """
    rows = row + tl.arange(0, raw.shape[0])
    known = rows < N
    shift_log2 = tl.load(shift_ptr + rows, mask=known, other=0.0) * LOG2E
    label = (tl.load(ids_ptr + rows, mask=known, other=-1) - first).to(tl.int32)
    special = True
    if BRANCH:
        inside = (label >= column) & (label < column + raw.shape[1])
        special = (column + raw.shape[1] > V) | (tl.max(inside.to(tl.int32), 0) > 0)
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
            tiles[part], row, column + part * width, known, exp_logits, exp_stride, bias_ptr, shift_log2,
            label, special, V, first, logit_scale, softcap,
        )  # fmt: skip
        sum_exp += more
        logit_sum += more_logits
    place = tile_v.to(tl.int64) * N + rows
    if sums_ptr is not None:
        tl.store(sums_ptr + place, sum_exp, mask=known)
    if logit_sums_ptr is not None:
        tl.store(logit_sums_ptr + place, logit_sum, mask=known)
