"""Triton kernels, each with what launches it right below it.

    exp_gemm    hidden states and head to E, and the overflowed rows of it again
    rows        what stands between the products: vectors over targets, rows of features
    pairs       counting and compacting labels, and the odds-ratio loss
    common      the epilogue, and functions of several kernels
    configs     tiles, as data

All but ``configs`` import triton, so they load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_kernels.backends.kernels import common, exp_gemm, pairs, rows

__all__ = ["common", "exp_gemm", "pairs", "rows"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
