"""The GEMM of E in Gluon, for Hopper: a producer warp and two consumer warpgroups that are not in step.

Each consumer owns 64 rows of a tile of 128. They share every stage of the head's rows, which is free again when both
have read it, so one may be up to the stages ahead of the other: what is in its epilogue leaves the tensor cores to the
other, at the L2 traffic of one large tile. The Triton form, whose epilogue this is, stays the specification: Gluon
has no interpreter. Symbols and rules as in ``common.py``.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from orpo_kernels.backends.kernels import Chunk, Out
from orpo_kernels.backends.kernels.common import ANY_BATCH, LOG2E, _halves, _place, _tanh
from orpo_kernels.backends.kernels.configs import Tile
from orpo_kernels.backends.kernels.exp_gemm import _cores, _tiles

REGISTERS = (240, 24)  # of a thread of the second consumer and of the producer; the first consumer has what is left


@gluon.jit
def _produce(
    hidden_desc, weight_desc, a_bufs, b_bufs, ready, free, tiles_n, tiles_v, H,
    STAGES: gl.constexpr, GROUP_V: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Both operands of every step of every tile, a stage as soon as both consumers have read what was in it."""
    ROWS: gl.constexpr = hidden_desc.block_shape[0]
    BLOCK_V: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_H: gl.constexpr = weight_desc.block_shape[1]
    step = 0
    for tile in range(gl.program_id(0), tiles_n * tiles_v, PROGRAMS):
        tile_n, tile_v = _place(tile, tiles_n, tiles_v, GROUP_V)
        for feature in range(0, H, BLOCK_H):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)  # passes at first: nothing was ever in it
            full = ready.index(stage)
            mbarrier.expect(full, (2 * ROWS + BLOCK_V) * BLOCK_H * 2)  # bytes, also of what lies past the matrices
            row = tile_n * 2 * ROWS
            tma.async_copy_global_to_shared(hidden_desc, [row, feature], full, a_bufs.index(2 * stage))
            tma.async_copy_global_to_shared(hidden_desc, [row + ROWS, feature], full, a_bufs.index(2 * stage + 1))
            tma.async_copy_global_to_shared(weight_desc, [tile_v * BLOCK_V, feature], full, b_bufs.index(stage))
            step += 1


@gluon.jit
def _labels(ids_ptr, rows, N, first):
    return (gl.load(ids_ptr + rows, mask=rows < N, other=-1) - first).to(gl.int32)


@gluon.jit
def _part(
    raw, rows, column, bias_ptr, shift_log2, ids_ptr, special, N, V, first, logit_scale, softcap, LAYOUT: gl.constexpr
):  # fmt: skip
    """Entries of E from raw products, and the row sums of plain exponentials and of capped logits: ``common._part``."""
    columns = gl.expand_dims(column + gl.arange(0, raw.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    if bias_ptr is not None:
        raw += gl.load(bias_ptr + first + columns, mask=columns < V, other=0.0).to(gl.float32)
    if softcap is not None:
        bent, quarter = _tanh(raw, logit_scale / softcap)
        logit_sum = gl.sum(bent, 1) * softcap
        entries = gl.exp2(bent * (softcap * LOG2E) - gl.expand_dims(shift_log2 - 2, 1))  # four times as much
    else:
        logit_sum = gl.sum(raw, 1) * logit_scale
        entries = gl.exp2(raw * (logit_scale * LOG2E) - gl.expand_dims(shift_log2, 1))
    if special:
        label = gl.expand_dims(_labels(ids_ptr, rows, N, first), 1)  # again, as few tiles need it
        entries = gl.where((columns < V) & (columns != label), entries, 0.0)
    sum_exp = gl.sum(entries, 1)
    if softcap is not None:
        sum_exp *= 0.25
        entries *= quarter
    return entries, sum_exp, logit_sum


@gluon.jit
def _consume(
    exp_logits_desc, a_bufs, b_bufs, e_bufs, ready, free, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
    N, V, H, first, logit_scale, softcap, tiles_n, tiles_v,
    WHICH: gl.constexpr, STAGES: gl.constexpr, GROUP_V: gl.constexpr, PROGRAMS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Products and epilogue of the upper or lower half of every tile's rows."""
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_V: gl.constexpr = b_bufs.shape[1]
    BLOCK_H: gl.constexpr = b_bufs.shape[2]
    WIDTH: gl.constexpr = BLOCK_V // PARTS
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, PART)
    # Every warp has all rows, so that it asks no other for a maximum over them.
    OF_WARP: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, ROWS // 32], [1, 32], [4, 1], [1, 0]))
    step = 0
    for tile in range(gl.program_id(0), tiles_n * tiles_v, PROGRAMS):
        tile_n, tile_v = _place(tile, tiles_n, tiles_v, GROUP_V)
        row, column = (2 * tile_n + WHICH) * ROWS, tile_v * BLOCK_V
        rows = row + gl.arange(0, ROWS, layout=OF_ROWS)
        known = rows < N
        shift_log2 = gl.load(shift_ptr + rows, mask=known, other=0.0) * LOG2E
        label = _labels(ids_ptr, row + gl.arange(0, ROWS, layout=OF_WARP), N, first)
        inside = (label >= column) & (label < column + BLOCK_V)
        special = (column + BLOCK_V > V) | (gl.max(inside.to(gl.int32), 0) > 0)
        products = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_V], gl.float32, WHOLE))
        for feature in range(0, H, BLOCK_H):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            a, b = a_bufs.index(2 * stage + WHICH), b_bufs.index(stage).permute((1, 0))
            products = warpgroup_mma(a, b, products, use_acc=feature > 0, is_async=True)
            products = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(products,)))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=feature > 0)  # the step before is read
            step += 1
        raw = warpgroup_mma_wait(0, deps=(products,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))

        parts = _halves(raw)
        if PARTS > 2:
            parts = _halves(parts[0]) + _halves(parts[1])
        if PARTS > 4:
            parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])
        sum_exp = gl.zeros([ROWS], gl.float32, OF_ROWS)
        logit_sum = gl.zeros([ROWS], gl.float32, OF_ROWS)
        for part in gl.static_range(PARTS):
            at = column + part * WIDTH
            entries, more, more_logits = _part(
                gl.convert_layout(parts[part], PART), rows, at, bias_ptr, shift_log2, ids_ptr, special, N, V, first,
                logit_scale, softcap, PART,
            )  # fmt: skip
            sum_exp += more
            logit_sum += more_logits
            if exp_logits_desc is not None:
                buffer = e_bufs.index(2 * WHICH + part % 2)
                tma.store_wait(1)  # what was in it has left, what is in the other may be on its way
                buffer.store(entries.to(buffer.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(exp_logits_desc, [row, at], buffer)
        place = gl.cast(tile_v, gl.int64) * N + rows
        if sums_ptr is not None:
            gl.store(sums_ptr + place, sum_exp, mask=known)
        if logit_sums_ptr is not None:
            gl.store(logit_sums_ptr + place, logit_sum, mask=known)
    if exp_logits_desc is not None:
        tma.store_wait(0)


@gluon.jit(**ANY_BATCH)
def exp_gemm_gluon_kernel(
    hidden_desc, weight_desc, exp_logits_desc, bias_ptr, shift_ptr, ids_ptr, sums_ptr, logit_sums_ptr,
    N, V, H, first, logit_scale, softcap,
    BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_H: gl.constexpr, GROUP_V: gl.constexpr,
    PROGRAMS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    """E of a slice by a persistent GEMM with warps of three kinds, each in a loop of its own over the same tiles."""
    ROWS: gl.constexpr = BLOCK_N // 2
    dtype: gl.constexpr = hidden_desc.dtype
    a_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_H], hidden_desc.layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_V, BLOCK_H], weight_desc.layout)
    e_bufs = a_bufs  # where there is no E, nobody stores
    if exp_logits_desc is not None:
        e_bufs = gl.allocate_shared_memory(exp_logits_desc.dtype, [4, ROWS, BLOCK_V // PARTS], exp_logits_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    tiles_n, tiles_v = gl.cdiv(N, BLOCK_N), gl.cdiv(V, BLOCK_V)
    gl.warp_specialize(
        [
            (_consume, (
                exp_logits_desc, a_bufs, b_bufs, e_bufs, ready, free, bias_ptr, shift_ptr, ids_ptr, sums_ptr,
                logit_sums_ptr, N, V, H, first, logit_scale, softcap, tiles_n, tiles_v,
                0, STAGES, GROUP_V, PROGRAMS, PARTS,
            )),
            (_consume, (
                exp_logits_desc, a_bufs, b_bufs, e_bufs, ready, free, bias_ptr, shift_ptr, ids_ptr, sums_ptr,
                logit_sums_ptr, N, V, H, first, logit_scale, softcap, tiles_n, tiles_v,
                1, STAGES, GROUP_V, PROGRAMS, PARTS,
            )),
            (_produce, (
                hidden_desc, weight_desc, a_bufs, b_bufs, ready, free, tiles_n, tiles_v, H, STAGES, GROUP_V, PROGRAMS,
            )),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def exp_gemm_gluon(tile: Tile, chunk: Chunk, tokens: slice, out: Out) -> None:
    """E of the ``tokens``; rows of hidden, weight and E begin at multiples of 16 bytes."""
    (hidden, ids, head, shift), (exp_logits, sums, logit_sums) = chunk, out
    size, programs = tokens.stop - tokens.start, tile.programs * _cores(hidden.device)
    a = _described(hidden, tile.block_n // 2, tile.block_h)
    b = _described(head.weight[tokens], tile.block_v, tile.block_h)
    e = None if exp_logits is None else _described(exp_logits, tile.block_n // 2, tile.block_v // tile.parts)
    tensors = (a, b, e, head.bias, shift, ids, sums, logit_sums)
    scalars = (hidden.shape[0], size, hidden.shape[1], tokens.start, head.logit_scale, head.softcap)
    grid = (min(programs, _tiles(tile, hidden.shape[0], size)),)
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h, "GROUP_V": tile.group_v}
    meta = {**blocks, "PROGRAMS": programs, "PARTS": tile.parts, "STAGES": tile.stages}
    consumer, producer = REGISTERS
    meta |= {"CONSUMER": consumer, "PRODUCER": producer, "num_warps": tile.warps // 2}  # of the first consumer
    exp_gemm_gluon_kernel[grid](*tensors, *scalars, **meta)


def _described(matrix: Tensor, *block: int) -> TensorDescriptor:
    dtype = getattr(gl, str(matrix.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
    return TensorDescriptor.from_tensor(matrix, list(block), layout)
