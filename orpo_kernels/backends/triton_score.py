"""Triton kernels that turn hidden states and head into E, the shifted exponentials of the logits, tile by tile.

Symbols as in docs/kernels.md: N scores, V tokens of a *slice* ``[first, first + V)`` of the vocabulary, H features.
Every sum has one owner and a fixed order, so two runs give the same bits; there are no atomics. Offsets that grow with
N times V are 64-bit. Logits exist only in registers, except in ``exp_pass_kernel``, whose tile another product wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compiles anew for another divisibility of a size or another alignment of a pointer. Those that follow from the
# batch or from where a slice of it begins are left out of that, so that no batch compiles anything new.
ANY_BATCH = {
    "do_not_specialize": ["N", "V", "first", "tiles", "pairs", "base", "size", "ignore"],
    "do_not_specialize_on_alignment": [
        "labels_ptr", "nll_labels_ptr", "starts_ptr", "counts_ptr", "rows_ptr", "means_ptr",
        "shift_ptr", "targets_ptr", "sums_ptr", "logit_sums_ptr", "label_ptr", "slope_ptr", "total_ptr",
        "lost_ptr", "maxima_ptr", "logps_ptr", "inverse_ptr", "entry_ptr", "source_rows_ptr",
        "out_rows_ptr", "a_ptr", "b_ptr", "answer_weight_ptr", "nll_weight_ptr", "offsets_ptr", "valid_ptr",
        "coefficients_ptr", "table_ptr",
    ],
}  # fmt: skip


@triton.jit
def _cap(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """Capped logits ``softcap * tanh(z / softcap)`` and the cap's slope ``1 - tanh^2``, from one exponential."""
    if HAS_SOFTCAP:
        small = tl.exp(tl.abs(logits) * (-2 / softcap))
        inverse = 1 / (1 + small)
        bent = softcap * (1 - small) * inverse
        return tl.where(logits >= 0, bent, -bent), 4 * small * inverse * inverse
    else:
        return logits, tl.full(logits.shape, 1.0, tl.float32)


@triton.jit
def _place(tile, tiles_n, tiles_v, GROUP_V: tl.constexpr):
    """Row and column of a tile. GROUP_V columns go through all rows before the next, so that their part of the head
    stays in L2 while hidden, the smaller matrix, is read again for each group."""
    in_group = GROUP_V * tiles_n
    first = tile // in_group * GROUP_V
    width = tl.minimum(tiles_v - first, GROUP_V)
    return tile % in_group // width, first + tile % in_group % width


@triton.jit
def _store_tile(exps, row, column, exps_ptr, exps_stride, N, V):
    rows = row + tl.arange(0, exps.shape[0])
    columns = column + tl.arange(0, exps.shape[1])
    places = exps_ptr + rows[:, None].to(tl.int64) * exps_stride + columns[None, :]
    tl.store(places, exps.to(exps_ptr.dtype.element_ty), mask=(rows[:, None] < N) & (columns[None, :] < V))


@triton.jit
def _part(
    raw, row, column, exps, exps_stride, bias_ptr, shift, label, N, V, first, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOGIT_SUMS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """From raw products to stored entries of E; returns the row sums of plain exponentials and of capped logits.

    The label's place and places past the slice hold 0: summed with the label's own term and without it afterwards, S
    would cancel as p -> 1. STORE is "tma" (``exps`` a descriptor), "pointer" or empty.
    """
    columns = column + tl.arange(0, raw.shape[1])
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first + columns, mask=columns < V, other=0.0).to(tl.float32)
        raw += bias[None, :]
    logits, slope = _cap(raw * logit_scale, softcap, HAS_SOFTCAP)
    logit_sum = tl.zeros((raw.shape[0],), tl.float32)
    if LOGIT_SUMS:
        logit_sum = tl.sum(logits, 1)  # places past the slice hold 0, capped or not
    plain = tl.exp(logits - shift[:, None])
    plain = tl.where((columns[None, :] < V) & (columns[None, :] != label[:, None]), plain, 0.0)
    total = tl.sum(plain, 1)
    if HAS_SOFTCAP:
        # Where exp overflowed the row is done again; until then its slope of 0 must not make a NaN of it.
        plain = tl.where(slope > 0, plain * slope, 0.0)
    if STORE == "tma":
        exps.store([row, column], plain.to(exps.dtype))
    elif STORE == "pointer":
        _store_tile(plain, row, column, exps, exps_stride, N, V)
    return total, logit_sum


@triton.jit
def _halves(tile):
    """Left and right columns of a tile. In a tensor core's layout a thread holds some of both, so nothing moves."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    raw, row, column, tile_v, exps, exps_stride, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
    N, V, first, logit_scale, softcap,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUMS: tl.constexpr,
    LOGIT_SUMS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """A tile's raw products to E and its sums, in PARTS runs of columns in turn, to hold fewer registers."""
    rows = row + tl.arange(0, raw.shape[0])
    shift = tl.load(shift_ptr + rows, mask=rows < N, other=0.0)
    label = tl.load(targets_ptr + rows, mask=rows < N, other=-1) - first
    total = tl.zeros((raw.shape[0],), tl.float32)
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
            tiles[part], row, column + part * width, exps, exps_stride, bias_ptr, shift, label.to(tl.int32), N, V,
            first, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, LOGIT_SUMS, STORE,
        )  # fmt: skip
        total += more
        logit_sum += more_logits
    place = tile_v.to(tl.int64) * N + rows
    if SUMS:
        tl.store(sums_ptr + place, total, mask=rows < N)
    if LOGIT_SUMS:
        tl.store(logit_sums_ptr + place, logit_sum, mask=rows < N)


@triton.jit(**ANY_BATCH)
def score_tma_kernel(
    hidden_desc, weight_desc, exps_desc, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
    N, V, H, first, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_V: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, PARTS: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr,
    LOGIT_SUMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """E of a slice by a persistent GEMM: TMA loads, float32 accumulators, the exponential in the epilogue."""
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, PROGRAMS, flatten=FLATTEN):
        tile_n, tile_v = _place(tile, tiles_n, tiles_v, GROUP_V)
        row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
        raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for step in range(tl.cdiv(H, BLOCK_H)):
            a = hidden_desc.load([row, step * BLOCK_H])
            b = weight_desc.load([column, step * BLOCK_H])
            raw = tl.dot(a, b.T, raw, input_precision="ieee")
        _epilogue(
            raw, row, column, tile_v, exps_desc, 0, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
            N, V, first, logit_scale, softcap, PARTS, HAS_BIAS, HAS_SOFTCAP, SUMS, LOGIT_SUMS, STORE,
        )  # fmt: skip


@triton.jit(**ANY_BATCH)
def score_kernel(
    hidden_ptr, weight_ptr, exps_ptr, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
    N, V, H, first, hidden_stride, weight_stride, exps_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_V: tl.constexpr,
    PARTS: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, LOGIT_SUMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """E of a slice by a plain GEMM over pointers: chips without TMA, and rows that no descriptor can address."""
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    tile_n, tile_v = _place(tl.program_id(0), tiles_n, tiles_v, GROUP_V)
    row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
    # Rows past the end read a row that exists; what comes of it is never stored nor summed.
    rows = ((row + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    columns = ((column + tl.arange(0, BLOCK_V)) % V).to(tl.int64)
    features = tl.arange(0, BLOCK_H)
    a_ptrs = hidden_ptr + rows[:, None] * hidden_stride + features[None, :]
    b_ptrs = weight_ptr + (first + columns[None, :]) * weight_stride + features[:, None]
    raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for step in range(tl.cdiv(H, BLOCK_H)):
        if EVEN_H:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            left = features < H - step * BLOCK_H
            a = tl.load(a_ptrs, mask=left[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=left[:, None], other=0.0)
        raw = tl.dot(a, b, raw, input_precision="ieee")
        a_ptrs += BLOCK_H
        b_ptrs += BLOCK_H
    if LOGIT_SUMS:
        raw = tl.where((column + tl.arange(0, BLOCK_V))[None, :] < V, raw, 0.0)
    _epilogue(
        raw, row, column, tile_v, exps_ptr, exps_stride, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
        N, V, first, logit_scale, softcap, PARTS, HAS_BIAS, HAS_SOFTCAP, SUMS, LOGIT_SUMS, STORE,
    )  # fmt: skip


@triton.jit(**ANY_BATCH)
def exp_pass_kernel(
    logits_ptr, exps_ptr, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
    N, V, first, logits_stride, exps_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, LOGIT_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The epilogue alone, over float32 products that a library's GEMM left in a tile; ``exps`` may be that tile."""
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    tile_n, tile_v = _place(tl.program_id(0), tiles_n, tiles_v, 1)
    row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
    rows, columns = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_V)
    places = logits_ptr + rows[:, None].to(tl.int64) * logits_stride + columns[None, :]
    raw = tl.load(places, mask=(rows[:, None] < N) & (columns[None, :] < V), other=0.0)
    _epilogue(
        raw, row, column, tile_v, exps_ptr, exps_stride, bias_ptr, shift_ptr, targets_ptr, sums_ptr, logit_sums_ptr,
        N, V, first, logit_scale, softcap, 1, HAS_BIAS, HAS_SOFTCAP, SUMS, LOGIT_SUMS, STORE,
    )  # fmt: skip


@triton.jit(**ANY_BATCH)
def rescue_kernel(
    hidden_ptr, weight_ptr, exps_ptr, bias_ptr, shift_ptr, targets_ptr, lost_ptr, maxima_ptr, sums_ptr,
    N, V, H, first, hidden_stride, weight_stride, exps_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
    EXPS: tl.constexpr, STORE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Lost rows again, one split of the slice a program; programs without a lost row return at once.

    Without EXPS it finds the split's largest logit of each row. With it, the rows take the largest of all (never
    below the shift they had) as their shift, and E and its sums are written anew.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    lost = tl.load(lost_ptr + rows, mask=rows < N, other=0) != 0
    if tl.sum(lost.to(tl.int32), 0) == 0:
        return
    target = tl.load(targets_ptr + rows, mask=rows < N, other=0)
    shift = tl.load(shift_ptr + rows, mask=rows < N, other=0.0)
    if EXPS:
        splits = tl.arange(0, SPLITS)
        maxima = tl.load(
            maxima_ptr + splits[:, None].to(tl.int64) * N + rows[None, :], mask=lost[None, :], other=-float("inf")
        )
        shift = tl.maximum(tl.max(maxima, 0), shift)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(split, tiles, SPLITS):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, H, BLOCK_H):
            features = start + tl.arange(0, BLOCK_H)
            a = tl.load(
                hidden_ptr + rows[:, None].to(tl.int64) * hidden_stride + features[None, :],
                mask=lost[:, None] & (features[None, :] < H), other=0.0,
            )  # fmt: skip
            b = tl.load(
                weight_ptr + (first + columns[None, :]).to(tl.int64) * weight_stride + features[:, None],
                mask=(columns[None, :] < V) & (features[:, None] < H), other=0.0,
            )  # fmt: skip
            raw = tl.dot(a, b, raw, input_precision="ieee")
        if HAS_BIAS:
            raw += tl.load(bias_ptr + first + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        logits, slope = _cap(raw * logit_scale, softcap, HAS_SOFTCAP)
        if EXPS:
            other = (columns[None, :] < V) & (first + columns[None, :] != target[:, None]) & lost[:, None]
            plain = tl.where(other, tl.exp(tl.where(other, logits - shift[:, None], 0.0)), 0.0)
            total += tl.sum(plain, 1)
            if STORE:
                places = exps_ptr + rows[:, None].to(tl.int64) * exps_stride + columns[None, :]
                exps = (plain * slope).to(exps_ptr.dtype.element_ty)
                tl.store(places, exps, mask=(columns[None, :] < V) & lost[:, None])
        else:
            best = tl.maximum(best, tl.max(tl.where(columns[None, :] < V, logits, -float("inf")), 1))
    place = split.to(tl.int64) * N + rows
    if EXPS:
        tl.store(sums_ptr + place, total, mask=lost)
    else:
        tl.store(maxima_ptr + place, best, mask=lost)
