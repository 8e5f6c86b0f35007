"""The count of an epilogue's instructions, on listings whose count is known."""

from __future__ import annotations

import pytest

from benchmarks.lab import sass

# A loop of one product a step, whose last step exponentiates: 7 instructions from its branch on, of them 2 that only
# a tile with a label runs, and a barrier that may be tried twice.
FLAT = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000e620000000800 */
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;
        /*0020*/              @!P0 BRA 0xa0 ;
        /*0030*/                   FFMA R0, R24, R1, R2 ;
        /*0040*/              @!P1 BRA 0x70 ;
        /*0050*/                   ISETP.GE.AND P2, PT, R3, R4, PT ;
        /*0060*/                   FSEL R0, R0, -INF , P2 ;
        /*0070*/                   MUFU.EX2 R0, R0 ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR8], R5 ;
        /*0090*/              @!P3 BRA 0x80 ;
        /*00a0*/               @P4 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0 ;
"""


def test_a_branch_that_few_tiles_take_does_not_count() -> None:
    # FFMA, branch, MUFU, SYNCS, branch
    assert sass.epilogue(sass.parse(FLAT)) == 5


def test_an_epilogue_at_the_end_is_counted_to_the_end() -> None:
    code = sass.parse(FLAT.replace("@!P0 BRA 0xa0", "    NOP ").replace("@P4 BRA 0x10", "    NOP "))
    assert sass.epilogue(code) == 8  # with both NOPs and EXIT


@pytest.mark.parametrize("missing", ["HGMMA", "MUFU.EX2"])
def test_other_kernels_have_no_epilogue(missing: str) -> None:
    with pytest.raises(ValueError, match="no exponential lies behind a product"):
        sass.epilogue(sass.parse(FLAT.replace(missing, "NOP")))
