"""Products of 16-bit matrices that are added in float32, as far as torch has them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from orpo_kernels.backends import slices
from orpo_kernels.backends.torch_tiles import multiply

LIBRARY_TILE = 32 << 20  # bytes of a float32 tile between two steps, to stay in L2


def times_head(out: Tensor, exp_logits: Tensor, weight: Tensor, *, accumulate: bool) -> None:
    """``out (+)= E @ weight`` in float32; a float16 head is widened slice by slice to meet a float32 E."""
    if weight.dtype == exp_logits.dtype:
        product(out, exp_logits, weight, accumulate=accumulate)
        return
    for of in slices(weight.shape[0], max(LIBRARY_TILE // (4 * weight.shape[1]), 1)):
        product(out, exp_logits[:, of], weight[of].to(exp_logits.dtype), accumulate=accumulate or of.start > 0)


@cache
def _adds_wide(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to a float32 one: 2.9 wants all three of one dtype."""
    a, out = torch.zeros((16, 16), dtype=torch.bfloat16, device=device), torch.zeros((16, 16), device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


def product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out (+)= a @ b``, added in float32 within the product where ``out`` is float32, whatever a and b are."""
    wide = out.dtype == torch.float32 != a.dtype and out.device.type == "cuda" and torch.version.hip is None
    if not wide:  # of one dtype, or torch has no wider product here: one more rounding
        multiply(out, a, b, accumulate=accumulate)
    elif not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _adds_wide(out.device):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        for of in slices(out.shape[0], max(LIBRARY_TILE // (4 * out.shape[1]), 1)):
            out[of] += torch.mm(a[of], b, out_dtype=torch.float32)
