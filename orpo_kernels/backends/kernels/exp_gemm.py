"""From hidden states and head to E, the shifted exponentials of the logits, tile by tile: the GEMMs with an exponential
in their epilogue, the epilogue alone, and overflowed rows again.

Symbols and rules as in ``common.py``. Logits exist only in registers, except in ``exp_pass_kernel``, whose tile another
product wrote.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.backends.kernels import Chunk, Out
from orpo_kernels.backends.kernels.common import (
    ANY_BATCH,
    LOG2E,
    _biased,
    _cap,
    _epilogue,
    _part,
    _place,
    cdiv,
    stride_of,
)
from orpo_kernels.backends.kernels.configs import RECOMPUTE, RECOMPUTE_FLOAT32, Tile

SPLITS = 16  # programs that a block of overflowed rows is spread over


@triton.jit(**ANY_BATCH)
def exp_gemm_tma_kernel(
    hidden_desc, weight_desc, exp_logits_desc, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
    N, V, H, first, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_V: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """E of a slice by a persistent GEMM: TMA loads, float32 accumulators, the exponential in the epilogue."""
    tl.assume(H > 0)  # or the compiler keeps a second loop, for tiles whose products have no steps
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
            raw, row, column, tile_v, exp_logits_desc, None, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
            N, V, first, logit_scale, softcap, PARTS, True,
        )  # fmt: skip


def exp_gemm_tma(tile: Tile, chunk: Chunk, tokens: slice, out: Out) -> None:
    """E of the ``tokens``; rows of hidden, weight and E begin at multiples of 16 bytes."""
    (hidden, ids, head, shift), (exp_logits, sums, logit_sums) = chunk, out
    size, programs = tokens.stop - tokens.start, tile.programs * _cores(hidden.device)
    a = TensorDescriptor.from_tensor(hidden, [tile.block_n, tile.block_h])
    b = TensorDescriptor.from_tensor(head.weight[tokens], [tile.block_v, tile.block_h])
    e = None
    if exp_logits is not None:
        e = TensorDescriptor.from_tensor(exp_logits, [tile.block_n, tile.block_v // tile.parts])
    tensors = (a, b, e, head.bias, shift, ids, sums, logit_sums)
    scalars = (hidden.shape[0], size, hidden.shape[1], tokens.start, head.logit_scale, head.softcap)
    grid = (min(programs, _tiles(tile, hidden.shape[0], size)),)
    exp_gemm_tma_kernel[grid](*tensors, *scalars, PROGRAMS=programs, FLATTEN=tile.flatten, **_gemm(tile))


@triton.jit(**ANY_BATCH)
def exp_gemm_kernel(
    hidden_ptr, weight_ptr, exp_logits_ptr, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
    N, V, H, first, hidden_stride, weight_stride, exp_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_V: tl.constexpr,
    PARTS: tl.constexpr, EVEN_H: tl.constexpr,
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
    if logit_sums_ptr is not None:
        raw = tl.where((column + tl.arange(0, BLOCK_V))[None, :] < V, raw, 0.0)
    _epilogue(
        raw, row, column, tile_v, exp_logits_ptr, exp_stride, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
        N, V, first, logit_scale, softcap, PARTS, False,
    )  # fmt: skip


def exp_gemm(tile: Tile, chunk: Chunk, tokens: slice, out: Out) -> None:
    """E of the ``tokens``; features lie next to each other, rows may begin anywhere."""
    (hidden, ids, head, shift), (exp_logits, sums, logit_sums) = chunk, out
    (n, features), weight, size = hidden.shape, head.weight, tokens.stop - tokens.start
    tensors = (hidden, weight, exp_logits, head.bias, shift, ids, sums, logit_sums)
    sizes = (n, size, features, tokens.start, hidden.stride(0), weight.stride(0), stride_of(exp_logits))
    scalars, even = (*sizes, head.logit_scale, head.softcap), features % tile.block_h == 0
    exp_gemm_kernel[(_tiles(tile, n, size),)](*tensors, *scalars, EVEN_H=even, **_gemm(tile))


@triton.jit(**ANY_BATCH)
def exp_pass_kernel(
    logits_ptr, exp_logits_ptr, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
    N, V, first, logits_stride, exp_stride, logit_scale, softcap, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The epilogue alone, over float32 products that a library's GEMM left in a tile; E may take that tile's place."""
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    tile_n, tile_v = _place(tl.program_id(0), tiles_n, tiles_v, 1)
    row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
    rows, columns = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_V)
    places = logits_ptr + rows[:, None].to(tl.int64) * logits_stride + columns[None, :]
    raw = tl.load(places, mask=(rows[:, None] < N) & (columns[None, :] < V), other=0.0)
    _epilogue(
        raw, row, column, tile_v, exp_logits_ptr, exp_stride, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
        N, V, first, logit_scale, softcap, 1, False,
    )  # fmt: skip


def exp_pass(tile: Tile, chunk: Chunk, logits: Tensor, first: int, out: Out) -> None:
    """E of the tokens from ``first`` on, out of their float32 products ``logits [n, s]``."""
    (_, ids, head, shift), (exp_logits, sums, logit_sums), (n, size) = chunk, out, logits.shape
    tensors = (logits, exp_logits, head.bias, shift, ids, sums, logit_sums)
    scalars = (n, size, first, logits.stride(0), stride_of(exp_logits), head.logit_scale, head.softcap)
    meta = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "num_warps": tile.warps}
    exp_pass_kernel[(_tiles(tile, n, size),)](*tensors, *scalars, **meta)


@triton.jit(**ANY_BATCH)
def recompute_overflowed_kernel(
    hidden_ptr, weight_ptr, exp_logits_ptr, bias_ptr, shift_ptr, ids_ptr, overflowed_ptr, maxima_ptr, sums_ptr,
    N, V, H, first, hidden_stride, weight_stride, exp_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Overflowed rows again, one split of the slice a program; programs without such a row return at once.

    Without ``sums_ptr`` it finds the split's largest logit of each row. With it, the rows take the largest of all
    (never below the shift they had) as their shift, and E and its sums are written anew.
    """
    row = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    overflowed = tl.load(overflowed_ptr + rows, mask=rows < N, other=0) != 0
    if tl.sum(overflowed.to(tl.int32), 0) == 0:
        return
    label = (tl.load(ids_ptr + rows, mask=rows < N, other=0) - first).to(tl.int32)
    shift = tl.load(shift_ptr + rows, mask=rows < N, other=0.0)
    if sums_ptr is not None:
        splits = tl.arange(0, SPLITS)
        places = splits[:, None].to(tl.int64) * N + rows[None, :]
        maxima = tl.load(maxima_ptr + places, mask=overflowed[None, :], other=-float("inf"))
        shift = tl.maximum(tl.max(maxima, 0), shift)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(split, tl.cdiv(V, BLOCK_V), SPLITS):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, H, BLOCK_H):
            features = start + tl.arange(0, BLOCK_H)
            a = tl.load(
                hidden_ptr + rows[:, None].to(tl.int64) * hidden_stride + features[None, :],
                mask=overflowed[:, None] & (features[None, :] < H), other=0.0,
            )  # fmt: skip
            b = tl.load(
                weight_ptr + (first + columns[None, :]).to(tl.int64) * weight_stride + features[:, None],
                mask=(columns[None, :] < V) & (features[:, None] < H), other=0.0,
            )  # fmt: skip
            raw = tl.dot(a, b, raw, input_precision="ieee")
        if sums_ptr is not None:
            more, _ = _part(
                raw, row, tile * BLOCK_V, overflowed, exp_logits_ptr, exp_stride, bias_ptr, shift * LOG2E, label, True,
                V, first, logit_scale, softcap,
            )  # fmt: skip
            sum_exp += more
        else:
            logits, _ = _cap(_biased(raw, columns, bias_ptr, V, first), logit_scale, softcap)
            best = tl.maximum(best, tl.max(tl.where(columns[None, :] < V, logits, -float("inf")), 1))
    place = split.to(tl.int64) * N + rows
    if sums_ptr is not None:
        tl.store(sums_ptr + place, sum_exp, mask=overflowed)
    else:
        tl.store(maxima_ptr + place, best, mask=overflowed)


def recompute_overflowed(
    chunk: Chunk, overflowed: Tensor, tokens: slice, exp_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """E of the overflowed rows of a slice under their largest logit; the chunk's shift stays as it is.

    Returns, for overflowed rows, the ``sums [splits, n]`` of E under the new shift and the ``maxima`` of the logits.
    """
    hidden, ids, head, shift = chunk
    (n, features), weight, size = hidden.shape, head.weight, tokens.stop - tokens.start
    tile = RECOMPUTE_FLOAT32 if hidden.dtype == torch.float32 else RECOMPUTE
    sums, maxima = shift.new_empty((2, SPLITS, n))
    for out, own_sums in ((None, None), (exp_logits, sums)):
        tensors = (hidden, weight, out, head.bias, shift, ids, overflowed, maxima, own_sums)
        sizes = (n, size, features, tokens.start, hidden.stride(0), weight.stride(0), stride_of(out))
        scalars, grid = (*sizes, head.logit_scale, head.softcap), (cdiv(n, tile.block_n), SPLITS)
        recompute_overflowed_kernel[grid](*tensors, *scalars, SPLITS=SPLITS, **_blocks(tile))
    return sums, maxima


def _tiles(tile: Tile, n: int, size: int) -> int:
    return cdiv(n, tile.block_n) * cdiv(size, tile.block_v)


def _blocks(tile: Tile) -> dict[str, Any]:
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h}
    return {**blocks, "num_warps": tile.warps, "num_stages": tile.stages}


def _gemm(tile: Tile) -> dict[str, Any]:
    return {**_blocks(tile), "GROUP_V": tile.group_v, "PARTS": tile.parts}


def _cores(device: torch.device) -> int:
    """Multiprocessors, or what stands for them in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
