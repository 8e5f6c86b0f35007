"""Input errors, raised before any work: each names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def shape(tensor: Tensor) -> str:
    """``[2, 3]``, as the messages and docstrings write shapes."""
    return str(list(tensor.shape))


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> None:
    """Hidden states and head: types, dtypes, shapes, devices, and weights that hold no data here.

    Raises:
        TypeError: an argument is no tensor or has a dtype that cannot be used.
        ValueError: shapes or devices do not fit, the weight is sharded or empty, or a scalar is out of range.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}: dequantise it first"
            )
    if hasattr(weight, "full_tensor"):  # DTensor, without importing torch.distributed
        raise ValueError(
            "weight is a sharded DTensor: run the loss inside the wrapped forward, where FSDP2 has gathered it, or "
            "pass weight.full_tensor(grad_placements=[Partial('avg')])"
        )
    if weight.is_meta:
        raise ValueError("weight is on the meta device and holds no data: load or gather it before the loss")
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty (shape {shape(weight)}): DeepSpeed ZeRO-3 keeps parameters partitioned; call the loss "
            "under deepspeed.zero.GatheredParameters(weight)"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"weight must be [V, H], got shape {shape(weight)}: pass the head's own weight, as nn.Linear has it"
        )
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be [2P, T, H] or packed [N, H], got shape {shape(hidden)}")
    if hidden.shape[-1] != weight.shape[1]:
        transposed = hidden.shape[-1] == weight.shape[0]
        hint = (
            ": weight looks transposed; pass weight.T" if transposed else ": pass the head that belongs to this model"
        )
        raise ValueError(f"hidden has {hidden.shape[-1]} features but weight has {weight.shape[1]} columns{hint}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one entry a row of weight, got shape {shape(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} but hidden is on {hidden.device}: move one to the other's device"
            )
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but hidden is {hidden.dtype}: cast one, or run under torch.autocast"
            )
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(f"logit_scale must be finite and positive, got {logit_scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and positive, or None for no softcap, got {softcap}")


def check_labels(name: str, labels: Tensor, hidden: Tensor, *, expected: torch.Size) -> None:
    """Type, dtype, device and shape of labels; their values are checked on the device, with the compaction.

    Raises:
        TypeError: not an integer tensor.
        ValueError: the shape is not the positions' shape, or another device.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        raise TypeError(
            f"{name} must hold integers (int64), got {labels.dtype}: token ids, not one-hot or probabilities"
        )
    if labels.device != hidden.device:
        raise ValueError(
            f"{name} is on {labels.device} but hidden is on {hidden.device}: move one to the other's device"
        )
    if labels.shape == expected:
        return
    if labels.dim() == 2 == len(expected) and labels.shape[0] == expected[0] and labels.shape[1] == expected[1] + 1:
        raise ValueError(
            f"{name} has {labels.shape[1]} columns but hidden has {expected[1]}: labels must be shifted; pass "
            f"{name}[:, 1:] with hidden[:, :-1]"
        )
    raise ValueError(f"{name} must be {list(expected)}, one for each position of hidden, got shape {shape(labels)}")


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    """Packed offsets ``[2P + 1]``: from 0 to N, never falling, for an even number of sequences.

    Raises:
        TypeError: not an integer tensor.
        ValueError: any of the above does not hold.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in INTEGERS:
        raise TypeError("cu_seqlens must be an integer tensor of offsets, as torch.int32 or torch.int64")
    if hidden.dim() != 2:
        raise ValueError(
            f"with cu_seqlens hidden must be packed [N, H], got shape {shape(hidden)}: drop one of the two"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 3 or cu_seqlens.numel() % 2 == 0:
        raise ValueError(
            f"cu_seqlens must be [2P + 1], offsets of an even number of sequences, chosen first, got shape "
            f"{shape(cu_seqlens)}: give every chosen sequence its rejected one"
        )
    if cu_seqlens.device != hidden.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} but hidden is on {hidden.device}: move one to the other's device"
        )
    offsets: list[int] = cu_seqlens.tolist()  # a few integers; the packed form's second and last host copy
    if offsets[0] != 0 or offsets[-1] != hidden.shape[0] or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {hidden.shape[0]} rows of hidden, got {offsets[:4]}...{offsets[-1]}"
        )


def check_scalar(name: str, value: float) -> None:
    """A finite, non-negative number.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite or NaN.
    """
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def padded_offsets(hidden: Tensor) -> Tensor:
    """Offsets ``[2P + 1]`` of padded sequences.

    Raises:
        ValueError: hidden is not ``[2P, T, H]`` with at least one pair.
    """
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden must be [2P, T, H] without cu_seqlens, got shape {shape(hidden)}: pass cu_seqlens for packed input"
        )
    sequences, length = hidden.shape[:2]
    if sequences == 0 or sequences % 2:
        raise ValueError(
            f"hidden has {sequences} sequences but pairs need an even number of at least 2: stack the chosen sequences "
            "first, then their rejected ones"
        )
    return torch.arange(sequences + 1, device=hidden.device) * length


def flat_nll_labels(nll_labels: Tensor, hidden: Tensor, ignore_index: int) -> Tensor:
    """NLL labels for every position, flattened, from ``[P, T]`` or the shape of labels.

    Raises:
        TypeError, ValueError: as ``check_labels``.
    """
    positions = hidden.shape[:-1]
    if isinstance(nll_labels, Tensor) and hidden.dim() == 3 and nll_labels.dim() == 2:
        pairs = hidden.shape[0] // 2
        if nll_labels.shape[0] == pairs and nll_labels.shape[0] != positions[0]:
            check_labels("nll_labels", nll_labels, hidden, expected=torch.Size([pairs, positions[1]]))
            rejected = torch.full_like(nll_labels, ignore_index, dtype=torch.int64)
            return torch.cat([nll_labels.long(), rejected]).reshape(-1)
    check_labels("nll_labels", nll_labels, hidden, expected=positions)
    return nll_labels.long().reshape(-1).contiguous()
