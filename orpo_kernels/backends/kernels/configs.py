"""Shipped configurations as data: which form the GEMM of E takes, and its tiles, by chip and dtype.

Its forms, all with the same epilogue:

    tma      one persistent Triton GEMM with TMA loads and stores
    gluon    the same in Gluon, with a producer warp and two consumers that are not in step; no chip's form yet
    pointer  one Triton GEMM over pointers; also what stands in for ``tma`` where a row is not 16-byte aligned
    library  torch's own product into a float32 tile, then a pass over the tile; float32 inputs take it everywhere, as
             it follows torch's matmul precision setting

Nothing here depends on the number of targets, so a new batch never compiles anything new.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Block sizes of one kernel: targets, tokens of the vocabulary, features; warps and pipeline stages.

    ``group_v`` columns of tiles go through all rows together; the epilogue takes a tile in ``parts`` runs of columns.
    ``flatten`` makes one loop of a persistent kernel's two, so that a tile's first loads start in the epilogue before.
    With two ``programs`` on a multiprocessor one multiplies while the other is in its epilogue.
    """

    block_n: int
    block_v: int
    block_h: int
    warps: int = 4
    stages: int = 1
    group_v: int = 1
    parts: int = 1
    flatten: bool = False
    programs: int = 1  # of a persistent kernel, on a multiprocessor


class Config(NamedTuple):
    """What one chip runs for one dtype. The fewer features, the more of a tile's time is its epilogue: a ``narrow``
    tile serves heads of less than ``NARROW`` features."""

    form: Literal["tma", "gluon", "pointer", "library"]
    pointer: Tile
    pointer_capped: Tile  # a softcap needs twice the registers an entry
    tma: Tile | None = None
    tma_capped: Tile | None = None  # without a bias: both together run ``pointer_capped``
    narrow: Tile | None = None
    narrow_capped: Tile | None = None
    gluon: Tile | None = None  # with and without a softcap or a bias; its warps are those that hold the tile
    mapped: int | None = None  # bytes from which on a tensor map of a matrix cannot be trusted

    def choose(self, *, mapped: bool, biased: bool, capped: bool, features: int) -> tuple[str, Tile]:
        """The form and the tile of a call whose matrices a tensor map can or cannot describe."""
        if self.form == "library":
            return "library", PASS
        if self.form == "gluon" and mapped and self.gluon is not None and not gluon_lacks():
            return "gluon", self.gluon
        narrow = features < NARROW[capped]
        if capped:
            tma = None if biased else (narrow and self.narrow_capped) or self.tma_capped
        else:
            tma = (narrow and self.narrow) or self.tma
        if self.form != "pointer" and mapped and tma is not None:
            return "tma", tma
        return "pointer", self.pointer_capped if capped else self.pointer

    def unmapped(self, *matrices: Tensor) -> str:
        """Why no tensor map can describe one of the matrices, for people to read; nothing where one can."""
        for matrix in matrices:
            step, itemsize = matrix.stride(0) * matrix.element_size(), matrix.element_size()
            if step % 16 or matrix.data_ptr() % 16:
                return (
                    f"rows of {matrix.shape[1]} features do not begin at multiples of 16 bytes, which the form "
                    f"{self.form} asks for; pad H to a multiple of {16 // itemsize} where that can be chosen"
                )
            if self.mapped is not None and matrix.shape[0] * step >= self.mapped:
                return f"{matrix.shape[0] * step >> 20} MiB are more than the form {self.form} describes on this chip"
        return ""


def gluon_lacks() -> str:
    """Why the form ``gluon`` cannot run, for people to read; nothing where it can. Gluon is experimental: what another
    version makes of the kernel is not known."""
    import triton

    known = triton.__version__.rpartition(".")[0] in GLUON_VERSIONS
    return "" if known else f"triton is {triton.__version__}, the form gluon is for {' and '.join(GLUON_VERSIONS)}"


GLUON_VERSIONS = ("3.6", "3.7")  # of triton, that its kernel compiles with as it should

RECOMPUTE = Tile(32, 64, 32, warps=4, stages=2)
RECOMPUTE_FLOAT32 = Tile(32, 32, 32, warps=8, stages=2)  # with 4 warps the assembler spills to fit more programs
PASS = Tile(16, 256, 0, warps=4)

# Under this many features, without and with a softcap, two small programs a multiprocessor beat one large: measured
# from 896 to 4,096 features, where the first loses 4 to 11 % to a plain product and the second what 143 features cost
# (390 with a softcap).
NARROW = {False: 2048, True: 3072}

# Under drivers up to 13.1 triton 3.7 finds a matrix's last byte in 32 bits, and clears a bit of its tensor map where
# that is small, or negative. Hopper ignores the bit, Blackwell reads it.
_MAPPED = 2 << 30

# sm_90 by the clock (docs/log.md, entry 24). The others by the compiler: no spills, tensor cores, within shared memory
# (docs/compiled.md).
_AMPERE = Tile(128, 128, 32, warps=8, stages=4, group_v=8)
_HOPPER = Tile(128, 256, 64, warps=8, stages=3, group_v=8, parts=2, flatten=True)
_HOPPER_NARROW = Tile(128, 128, 64, warps=4, stages=3, group_v=8, parts=2, flatten=True, programs=2)
_HOPPER_GLUON = Tile(128, 256, 64, warps=8, stages=4, group_v=8, parts=4)
_HOPPER_POINTER = Tile(128, 128, 64, warps=4, stages=3, group_v=8, parts=2)
_HOPPER_POINTER_CAPPED = _HOPPER_POINTER._replace(warps=8, parts=8)
_BLACKWELL = Tile(128, 128, 64, warps=8, stages=4, group_v=8, parts=2)
_SMALL = Tile(16, 32, 16, group_v=2, parts=2)


def _pointer(tile: Tile, capped_parts: int) -> Config:
    return Config("pointer", tile, tile._replace(parts=capped_parts))


SIXTEEN_BIT: dict[str, Config] = {
    "sm_80": _pointer(_AMPERE, 4),
    "sm_86": _pointer(_AMPERE._replace(stages=3), 4),  # and 8.9, 12.x: 99 KiB of shared memory
    "sm_90": Config(
        "tma", _HOPPER_POINTER, _HOPPER_POINTER_CAPPED, _HOPPER, _HOPPER, _HOPPER_NARROW, _HOPPER_NARROW, _HOPPER_GLUON
    ),
    "sm_100": _pointer(_AMPERE._replace(stages=3), 4)._replace(form="tma", tma=_BLACKWELL, mapped=_MAPPED),
    "gfx942": _pointer(_AMPERE._replace(stages=2), 1),
    "interpreter": Config("tma", _SMALL, _SMALL, _SMALL, _SMALL._replace(parts=4)),  # small enough to interpret
}


def config(arch: str, dtype: torch.dtype) -> Config:
    """The shipped row for a chip and the dtype of hidden and weight."""
    row = SIXTEEN_BIT[arch]
    if dtype == torch.float32 and arch != "interpreter":
        return row._replace(form="library")
    if dtype == torch.float16:  # E is float32 then, and programs must still fit with what they store from
        tight = {name: getattr(row, name) for name in ("narrow", "narrow_capped", "gluon")}
        return row._replace(**{name: tile and tile._replace(parts=2 * tile.parts) for name, tile in tight.items()})
    return row


def arch_of(device: torch.device) -> str:
    """The row a device takes: its own, or that of the chip it resembles most."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86" if major > 8 else "none")
