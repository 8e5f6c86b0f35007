"""Triton kernels, each with what launches it right below it.

    exp_gemm    hidden states and head to E, and the overflowed rows of it again
    exp_gemm_gluon    the same GEMM in Gluon, for the versions of triton it compiles with
    rows        what stands between the products: vectors over targets, rows of features
    pairs       counting and compacting labels, and the odds-ratio loss
    common      the epilogue, and functions of several kernels
    configs     tiles, as data

All but ``configs`` import triton, so they load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from orpo_kernels.settings import Head

if TYPE_CHECKING:
    from orpo_kernels.backends.kernels import common, exp_gemm, exp_gemm_gluon, pairs, rows

__all__ = ["Chunk", "Out", "common", "exp_gemm", "exp_gemm_gluon", "pairs", "rows"]


class Chunk(NamedTuple):
    """What logits are made of: gathered hidden rows, one for each of n targets, and the head."""

    hidden: Tensor  # [n, H]
    ids: Tensor  # [n]
    head: Head
    shift: Tensor  # [n] float32, what each row's logits are shifted by


class Out(NamedTuple):
    """What a slice of s tokens leaves, each where it is given."""

    exp_logits: Tensor | None  # E, [n, s]
    sums: Tensor | None = None  # [tiles or more, n] float32, of the exponentials in a tile of tokens
    logit_sums: Tensor | None = None  # of the capped logits


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
