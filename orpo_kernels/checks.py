"""Errors of tensors, raised before any work: each names the argument, what was expected, what came, and the remedy.

What is no tensor is checked in ``settings.py``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.settings import Head

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def shape(tensor: Tensor) -> str:
    """``[2, 3]``, as the messages and docstrings write shapes."""
    return str(list(tensor.shape))


def check_tensors(hidden: Tensor, head: Head, *, least: int) -> None:
    """Hidden states and head: types, dtypes, layouts, shapes, devices, and weights that hold no data here.

    Raises:
        TypeError: an argument is no tensor, or has a dtype or layout that cannot be used.
        ValueError: shapes or devices do not fit, hidden has fewer than ``least`` dimensions, or the weight is sharded
            or empty.
    """
    weight, bias = head.weight, head.bias
    named = [("hidden", hidden), ("weight", weight), *([] if bias is None else [("bias", bias)])]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            hint = "pass its .weight" if hasattr(tensor, "weight") else "pass the tensor itself"
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}: {hint}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}: dequantise or cast it first"
            )
        if tensor.is_nested:
            raise TypeError(f"{name} is a nested tensor: pass the packed form, with cu_seqlens")
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{name} must be a dense, strided tensor, got layout {tensor.layout}: call .to_dense() first"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no data: load or gather it before the loss")
    refuse_sharded(weight)
    if weight.dim() != 2:
        raise ValueError(
            f"weight must be [V, H], got shape {shape(weight)}: pass the head's own weight, as nn.Linear has it"
        )
    if head.shard is not None and weight.shape[0] != head.shard.rows:
        raise ValueError(
            f"weight has {weight.shape[0]} rows, but shard gives this rank {head.shard.rows} of {head.shard.vocab} "
            f"tokens (offsets {head.shard.offsets}): pass this rank's rows, and the offsets that they were cut at"
        )
    if hidden.dim() < least:
        expected = "[2P, T, H] or packed [N, H]" if least > 1 else "[..., H]"
        raise ValueError(f"hidden must be {expected}, got shape {shape(hidden)}: pass the model's last hidden states")
    if hidden.shape[-1] != weight.shape[1]:
        transposed = hidden.shape[-1] == weight.shape[0]
        hint = "weight looks transposed; pass weight.T" if transposed else "pass the head that belongs to this model"
        raise ValueError(f"hidden has {hidden.shape[-1]} features but weight has {weight.shape[1]} columns: {hint}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [{weight.shape[0]}], one entry a row of weight, got shape {shape(bias)}: pass its own"
        )
    for name, tensor in named[1:]:
        _same_device(name, tensor, hidden)
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but hidden is {hidden.dtype}: cast one, or run under torch.autocast"
            )


def refuse_sharded(weight: Tensor) -> None:
    """A weight of which this rank holds a part, or nothing any more.

    Whoever shards a weight gathers it around the forward of the module that owns it and reduces its gradient there, so
    a loss of it anywhere else has no weight, or a gradient that no other rank hears of.

    Raises:
        ValueError: it is one.
    """
    inside = (
        "compute the loss in the forward of the module that owns the weight: a head derived from nn.Linear whose "
        "forward returns orpo_loss(hidden, self.weight, ...)"
    )
    if hasattr(weight, "full_tensor"):  # DTensor, without importing torch.distributed
        raise ValueError(
            f"weight is a sharded DTensor, which FSDP2 gathers for the forward of its own module alone: {inside}; or "
            "pass weight.full_tensor(grad_placements=[Partial('avg')]); where it is split by rows over ranks that hold "
            "the same hidden states (tensor parallelism), pass shard=Shard.of(weight)"
        )
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty (shape {shape(weight)}): DeepSpeed ZeRO-3 and FSDP keep parameters partitioned outside "
            f"the forward of their own module; {inside}"
        )
    if weight.dim() == 1:
        raise ValueError(
            f"weight must be [V, H], got shape {shape(weight)}, which is this rank's part of it if FSDP has sharded "
            f"it: {inside}"
        )
    if weight.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling() and _freed(weight):
        raise ValueError(f"weight has no memory any more, as FSDP takes it back after a forward: {inside}")


def _freed(weight: Tensor) -> bool:
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.untyped_storage().nbytes() == 0


def _same_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name} is on {tensor.device} but hidden is on {hidden.device}: move one to the other's device"
        )


def check_answer_weights(weights: Tensor | None, labels: Tensor) -> None:
    """A floating-point number for each label without a gradient, on its device; None is no number.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or device, or a tensor that asks for a gradient.
    """
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"answer_weights must be a floating-point tensor, got {kind}: call .float() on it")
    if weights.shape != labels.shape:
        raise ValueError(f"answer_weights must be {shape(labels)}, one for each label, got shape {shape(weights)}")
    if weights.requires_grad:
        raise ValueError("answer_weights asks for a gradient, which the loss does not give: detach it")
    if weights.device != labels.device:
        raise ValueError(f"answer_weights is on {weights.device} but labels is on {labels.device}: move one of them")


def check_pair_numbers(name: str, values: Tensor | None, hidden: Tensor, expected: int, what: str) -> None:
    """``[expected]`` floating-point numbers without a gradient, on the device of hidden; None is no number.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or device, or a tensor that asks for a gradient.
    """
    if values is None:
        return
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}: call .float() on it")
    if values.shape != (expected,):
        raise ValueError(f"{name} must be [{expected}], {what}, got shape {shape(values)}")
    if values.requires_grad:
        raise ValueError(f"{name} asks for a gradient, which the loss does not give: compute it under torch.no_grad()")
    _same_device(name, values, hidden)


def check_labels(name: str, labels: Tensor, hidden: Tensor, *, expected: torch.Size) -> None:
    """Type, dtype, device and shape of labels; their values are checked on the device, with the compaction.

    Raises:
        TypeError: not an integer tensor.
        ValueError: the shape is not the positions' shape, or another device.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}: pass token ids as a tensor")
    if labels.dtype not in INTEGERS:
        raise TypeError(
            f"{name} must hold integers (int64), got {labels.dtype}: token ids, not one-hot or probabilities"
        )
    _same_device(name, labels, hidden)
    if labels.shape == expected:
        return
    if labels.dim() == 2 == len(expected) and labels.shape[0] == expected[0] and labels.shape[1] == expected[1] + 1:
        raise ValueError(
            f"{name} has {labels.shape[1]} columns but hidden has {expected[1]}: labels must be shifted; pass "
            f"{name}[:, 1:] with hidden[:, :-1]"
        )
    raise ValueError(f"{name} must be {list(expected)}, one for each position of hidden, got shape {shape(labels)}")


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor, *, pairs: bool = True) -> None:
    """Packed offsets ``[S + 1]``: from 0 to N, never falling; for ``pairs`` of an even number of sequences.

    Inside ``torch.compile`` their values, which no graph can read, are taken as they are.

    Raises:
        TypeError: not an integer tensor.
        ValueError: any of the above does not hold.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in INTEGERS:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an integer tensor of offsets, as torch.int32 or torch.int64, got {got}")
    if hidden.dim() != 2:
        raise ValueError(
            f"with cu_seqlens hidden must be packed [N, H], got shape {shape(hidden)}: drop one of the two"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be [S + 1], offsets of S sequences, the first of them 0, got shape {shape(cu_seqlens)}: "
            "pass torch.cat([zero, lengths.cumsum(0)])"
        )
    if pairs and cu_seqlens.numel() % 2 == 0:
        raise ValueError(
            f"cu_seqlens must be [2P + 1], offsets of an even number of sequences, chosen first, got shape "
            f"{shape(cu_seqlens)}: give every chosen sequence its rejected one"
        )
    _same_device("cu_seqlens", cu_seqlens, hidden)
    if torch.compiler.is_compiling():
        return
    offsets: list[int] = cu_seqlens.tolist()  # a few integers; the packed form's second and last host copy
    if offsets[0] != 0 or offsets[-1] != hidden.shape[0] or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {hidden.shape[0]} rows of hidden, got {offsets[:4]}...{offsets[-1]}"
        )


def padded_offsets(hidden: Tensor, *, pairs: bool) -> Tensor:
    """Offsets ``[S + 1]`` of padded sequences.

    Raises:
        ValueError: hidden is not ``[S, T, H]`` with at least one sequence, or for ``pairs`` with an odd number.
    """
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden must be [{'2P' if pairs else 'S'}, T, H] without cu_seqlens, got shape {shape(hidden)}: pass "
            "cu_seqlens for packed input"
        )
    sequences, length = hidden.shape[:2]
    if not pairs and sequences == 0:
        raise ValueError("hidden has no sequence: leave out batches without one")
    if pairs and (sequences == 0 or sequences % 2):
        raise ValueError(
            f"hidden has {sequences} sequences but pairs need an even number of at least 2: stack the chosen sequences "
            "first, then their rejected ones"
        )
    return torch.arange(sequences + 1, device=hidden.device) * length


def flat_nll_labels(nll_labels: Tensor, hidden: Tensor, ignore_index: int, *, pairs: bool) -> Tensor:
    """NLL labels for every position, flattened, from the shape of labels, or for ``pairs`` from ``[P, T]``.

    Raises:
        TypeError, ValueError: as ``check_labels``.
    """
    expected = hidden.shape[:-1]
    if pairs and isinstance(nll_labels, Tensor) and nll_labels.dim() == 2 == len(expected):
        half, length = expected[0] // 2, expected[1]
        if nll_labels.shape[0] == half:
            check_labels("nll_labels", nll_labels, hidden, expected=torch.Size([half, length]))
            nll_labels = F.pad(nll_labels.long(), (0, 0, 0, half), value=ignore_index)
    check_labels("nll_labels", nll_labels, hidden, expected=expected)
    return nll_labels.long().reshape(-1).contiguous()
