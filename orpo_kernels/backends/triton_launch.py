"""One method for each kernel: from tensors to its arguments, its grid and its tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.backends import triton_rows, triton_score
from orpo_kernels.backends.triton_configs import RESCUE, RESCUE_FLOAT32, Tile
from orpo_kernels.scores import Columns, Head

SPLITS = 16  # programs that a row block of the rescue is spread over
VECTOR = 128  # elements of a program that only touches vectors
SETTLE_ROWS = 32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Launches:
    """Starts kernels; with ``take``, hands each kernel, its grid and its arguments to that instead."""

    def __init__(self, take: Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None] | None) -> None:
        self._take = take

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if self._take is None:
            kernel[grid](*args, **meta)
        else:
            self._take(kernel, grid, args, meta)

    def label(
        self, hidden: Tensor, targets: Tensor, head: Head, centre: Tensor | None, label: Tensor, slope: Tensor,
        shift: Tensor, total: Tensor, means: Tensor | None,
    ) -> None:  # fmt: skip
        n, features = hidden.shape
        self._launch(
            triton_rows.label_kernel, (n,),
            hidden, head.weight, head.bias, targets, centre, label, slope, shift, total, means, features,
            hidden.stride(0), head.weight.stride(0), head.logit_scale, head.softcap or 0.0,
            BLOCK_H=_block(features), HAS_CENTRE=centre is not None, num_warps=4, **_of(head),
        )  # fmt: skip

    def score(
        self, form: str, tile: Tile, hidden: Tensor, targets: Tensor, head: Head, shift: Tensor, tokens: slice,
        exps: Tensor | None, sums: Tensor | None, logit_sums: Tensor | None,
    ) -> None:  # fmt: skip
        """E of the ``tokens`` by one of Triton's GEMMs."""
        (n, features), weight = hidden.shape, head.weight
        size = tokens.stop - tokens.start
        tiles = cdiv(n, tile.block_n) * cdiv(size, tile.block_v)
        scalars = (head.logit_scale, head.softcap or 0.0)
        flags = {**_sums(sums, logit_sums), **_of(head), "PARTS": tile.parts, "GROUP_V": tile.group_v}
        if form == "tma":
            a = TensorDescriptor.from_tensor(hidden, [tile.block_n, tile.block_h])
            b = TensorDescriptor.from_tensor(weight[tokens], [tile.block_v, tile.block_h])
            e = a if exps is None else TensorDescriptor.from_tensor(exps, [tile.block_n, tile.block_v // tile.parts])
            programs = _cores(hidden.device)
            self._launch(
                triton_score.score_tma_kernel, (min(programs, tiles),),
                a, b, e, head.bias, shift, targets, sums, logit_sums, n, size, features, tokens.start, *scalars,
                PROGRAMS=programs, FLATTEN=tile.flatten, STORE="" if exps is None else "tma", **_blocks(tile), **flags,
            )  # fmt: skip
        else:
            self._launch(
                triton_score.score_kernel, (tiles,),
                hidden, weight, exps, head.bias, shift, targets, sums, logit_sums, n, size, features, tokens.start,
                hidden.stride(0), weight.stride(0), _stride(exps), *scalars,
                STORE=_store(exps), EVEN_H=features % tile.block_h == 0, **_blocks(tile), **flags,
            )  # fmt: skip

    def exp_pass(
        self, tile: Tile, logits: Tensor, targets: Tensor, head: Head, shift: Tensor, first: int, exps: Tensor | None,
        sums: Tensor | None, logit_sums: Tensor | None,
    ) -> None:  # fmt: skip
        """E of the tokens from ``first`` on, out of their float32 products ``logits [n, s]``."""
        n, size = logits.shape
        self._launch(
            triton_score.exp_pass_kernel, (cdiv(n, tile.block_n) * cdiv(size, tile.block_v),),
            logits, exps, head.bias, shift, targets, sums, logit_sums, n, size, first, logits.stride(0), _stride(exps),
            head.logit_scale, head.softcap or 0.0,
            BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, STORE=_store(exps), num_warps=tile.warps,
            **_sums(sums, logit_sums), **_of(head),
        )  # fmt: skip

    def settle(
        self, sums: Tensor, logit_sums: Tensor | None, total: Tensor, means: Tensor | None, lost: Tensor,
        tiles: int, most: float, share: float,
    ) -> None:  # fmt: skip
        n = total.numel()
        self._launch(
            triton_rows.settle_kernel, (cdiv(n, SETTLE_ROWS),),
            sums, logit_sums, total, means, lost, n, tiles, most, share,
            BLOCK_N=SETTLE_ROWS, BLOCK_T=32, LOGIT_SUMS=logit_sums is not None, num_warps=4,
        )  # fmt: skip

    def rescue(
        self, hidden: Tensor, targets: Tensor, head: Head, tokens: slice, exps: Tensor | None, shift: Tensor,
        lost: Tensor, total: Tensor, unit: Tensor | None,
    ) -> None:  # fmt: skip
        """Lost rows of a slice again under their largest logit, and S and ``unit`` of earlier slices with them."""
        (n, features), weight = hidden.shape, head.weight
        tile = RESCUE_FLOAT32 if hidden.dtype == torch.float32 else RESCUE
        maxima, sums = total.new_empty((SPLITS, n)), total.new_empty((SPLITS, n))
        for with_exps in (False, True):
            self._launch(
                triton_score.rescue_kernel, (cdiv(n, tile.block_n), SPLITS),
                hidden, weight, exps, head.bias, shift, targets, lost, maxima, sums, n, tokens.stop - tokens.start,
                features, tokens.start, hidden.stride(0), weight.stride(0), _stride(exps), head.logit_scale,
                head.softcap or 0.0,
                SPLITS=SPLITS, EXPS=with_exps, STORE=exps is not None and with_exps, **_blocks(tile), **_of(head),
            )  # fmt: skip
        self._launch(
            triton_rows.resettle_kernel, (cdiv(n, SETTLE_ROWS),),
            sums, maxima, total, shift, lost, unit, n, features, _stride(unit),
            BLOCK_N=SETTLE_ROWS, BLOCK_H=64, SPLITS=SPLITS, HAS_UNIT=unit is not None, num_warps=4,
        )  # fmt: skip

    def finish(
        self, label: Tensor, shift: Tensor, total: Tensor, logps: Tensor, inverse: Tensor, entry: Tensor
    ) -> None:
        """``entry`` holds the cap's slope at the label and becomes the label's entry."""
        n = total.numel()
        self._launch(
            triton_rows.finish_kernel, (cdiv(n, VECTOR),),
            label, shift, total, logps, inverse, entry, n, BLOCK_N=VECTOR, num_warps=4,
        )  # fmt: skip

    def label_entries(self, exps: Tensor, entry: Tensor, targets: Tensor, first: int) -> None:
        """Write ``entry`` at the labels' places in E of the tokens from ``first`` on."""
        self._launch(
            triton_rows.label_entry_kernel, (cdiv(exps.shape[0], VECTOR),),
            exps, entry, targets, *exps.shape, first, exps.stride(0), BLOCK_N=VECTOR, num_warps=4,
        )  # fmt: skip

    def rows(
        self, source: Tensor, out: Tensor, factor: float, a: Tensor | None, b: Tensor | None = None, *,
        source_rows: Tensor | None = None, out_rows: Tensor | None = None,
        label: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """``out = factor * a * b * (source + entry * weight[targets])``; ``label`` is entry, weight and targets.

        Rows of source and of out go by an index where one is given.
        """
        index = source_rows if source_rows is not None else out_rows
        n, features = source.shape[0] if index is None else index.numel(), source.shape[1]
        entry, weight, targets = label or (None, None, None)
        block = _block(features)
        if n:
            self._launch(
                triton_rows.rows_kernel, (n, cdiv(features, block)),
                source, out, source_rows, out_rows, a, b, entry, weight, targets, features, source.stride(0),
                out.stride(0), _stride(weight), factor,
                BLOCK_H=block, GATHER=source_rows is not None, SCATTER=out_rows is not None, HAS_A=a is not None,
                HAS_B=b is not None, HAS_ENTRY=entry is not None, num_warps=4,
            )  # fmt: skip

    def scale(self, values: Tensor, by: Tensor) -> None:
        block, steps = 1024, 16
        if values.numel():
            self._launch(
                triton_rows.scale_kernel, (cdiv(values.numel(), block * steps),),
                values, by, values.numel(), BLOCK=block, STEPS=steps, num_warps=4,
            )  # fmt: skip

    def odds_ratio(
        self, logps: Tensor, means: Tensor, answer_weight: Tensor, nll_weights: Tensor, offsets: Tensor, valid: Tensor,
        coefficients: Tensor, table: Tensor, *scalars: float,
    ) -> None:  # fmt: skip
        """``scalars``: first score, beta, nll_weight, share of a pair, the two bounds, the smallest normal number."""
        pairs = table.shape[1]
        self._launch(
            triton_rows.odds_ratio_kernel, (pairs,),
            logps, means, answer_weight, nll_weights, offsets, valid, coefficients, table, pairs, *scalars,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def count(self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, table: Tensor, ignore_index: int) -> None:
        sequences = table.shape[0]
        self._launch(
            triton_rows.count_kernel, (sequences,),
            labels, nll_labels, offsets, table, sequences // 2, ignore_index, BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def compact(
        self, labels: Tensor, nll_labels: Tensor, starts: Tensor, counts: Tensor, columns: Columns, ignore_index: int,
        by_sequence: bool,
    ) -> None:  # fmt: skip
        sequences = counts.shape[0]
        self._launch(
            triton_rows.compact_kernel, (sequences,),
            labels, nll_labels, starts, counts, *columns, sequences // 2, ignore_index,
            BLOCK=1024, SEQUENCES=128, BY_SEQUENCE=by_sequence, num_warps=4,
        )  # fmt: skip


def _of(head: Head) -> dict[str, Any]:
    return {"HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None}


def _sums(sums: Tensor | None, logit_sums: Tensor | None) -> dict[str, Any]:
    return {"SUMS": sums is not None, "LOGIT_SUMS": logit_sums is not None}


def _store(exps: Tensor | None) -> str:
    return "" if exps is None else "pointer"


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_H": tile.block_h,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _block(features: int) -> int:
    """A power of two for a loop over features, 1,024 at most."""
    return min(1024, 1 << max(features - 1, 15).bit_length())


def _cores(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
