"""What a head is where peft has put adapters on it: one linear head with everything they add; or why it is none.

LoRA adds ``sum_a s_a (dropout_a(h) A_a^T) B_a^T`` to ``h W^T + b``. With ``u_a = s_a dropout_a(h) A_a^T`` that is the
linear head ``[W, B_1, B_2, ...]`` of the hidden states ``[h, u_1, u_2, ...]``, exactly, for which nothing below has to
know of adapters. Gradients reach ``h`` and ``A_a`` through ``u_a``, by autograd. Where W is frozen, the product of the
weight's gradient takes the last columns alone (``Head.tail``).

The wide weight is written anew in every call, since nothing tells of all ways in which peft changes a weight (merging
writes through ``.data``). That is memory of one head more, from forward to backward, and a read and a write of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.checks import FLOATS
from orpo_kernels.settings import Head

LORA = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
)
TOKENS = (("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer"),)
# Linear layers whose packed weight can be read back.
BITSANDBYTES = (("bitsandbytes.nn.modules", "Linear4bit"), ("bitsandbytes.nn.modules", "Linear8bitLt"))
# Rows of the wide weight begin at multiples of 16 bytes in 16 bits, as TMA and fast products ask: columns of zeros.
COLUMNS = 8


def callees(head: Any) -> list[nn.Module]:
    """The modules that make a head's logits, first the one that would now.

    That is the head itself, but for peft's wrappers: around a head and its trained copies, or around trained tokens.
    """
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        # The copy is called while its adapter is active and enabled.
        every = [head.original_module, *head.modules_to_save.values()]
        active = head.active_adapters if hasattr(head, "active_adapters") else [head.active_adapter]  # peft before 0.15
        trained = active and not head.disable_adapters and all(name in head.modules_to_save for name in active)
        now = head.modules_to_save[active[0]] if trained else head.original_module
        return sorted(every, key=lambda module: module is not now)
    return [head.token_adapter] if hasattr(head, "token_adapter") else [head]


def refusal(module: Any) -> str | None:
    """Why the logits of a head's module are no linear head's, as its adapters are now; or None."""
    if _is_linear(module):
        return _of_weight(module)
    what = f"its head is a {_name(module)}"
    if _kind(module) not in (*LORA, *TOKENS):
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            return f"{what}, an adapter that is no product of rank r added to a linear head, as LoRA is"
        return f"{what}, not a plain nn.Linear"
    inner = {"base layer": module.base_layer}
    for name in _active(module) if _kind(module) in LORA else ():
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is None and getattr(module, "use_dora", {}).get(name):
            variant = "DoRA"  # peft before 0.16 has no variants
        if variant is not None:
            called = variant if isinstance(variant, str) else type(variant).__name__
            return f"the adapter {name!r} on its head is {called}, which adds no product of rank r as plain LoRA does"
        inner[f"lora_B of {name!r}"] = module.lora_B[name]
    for called, part in inner.items():
        if not _is_linear(part):
            return f"{what} whose {called} is a {_name(part)}, not a plain nn.Linear"
        replaced = not getattr(vars(part).get("forward"), "ours", "forward" not in vars(part))
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        if replaced or any(hooks):
            return f"{what} whose {called} has hooks or a forward of its own, which a fused loss would pass by"
        if (why := _of_weight(part)) is not None:
            return why
    if _kind(module) in TOKENS and _packed(module.base_layer):
        return f"{what} on a quantised weight"
    return None


def linear_head(module: Any, input: Tensor) -> tuple[Tensor, Head]:
    """Hidden states and the head whose logits ``module(input)`` is, for a module without a ``refusal``.

    A call draws dropout as the module's own forward does. With adapters both are in autocast's dtype.
    """
    base = getattr(module, "base_layer", module)
    if module is not base and module.disable_adapters and module.merged:
        module.unmerge()  # as its own forward does
    weight, bias = base.weight if not _packed(base) else _unpacked(base, input), base.bias
    active = [] if module is base else _active(module)
    if not active:
        return input, Head(weight, bias)
    if hasattr(module, "trainable_tokens_delta"):
        module._check_overlapping_tokens(active)
        return input, Head(module.get_merged_weights(active))  # peft leaves a bias out, too
    x, lows, tails = input, [], []
    for name in active:
        low, high, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        if getattr(module, "cast_input_dtype_enabled", True):
            x = x.to(low.weight.dtype)
        lows.append(low(module.lora_dropout[name](x)) * scaling)
        tails.append(high.weight)
        if high.bias is not None:
            lows.append(torch.ones_like(lows[-1][..., :1]))
            tails.append(high.bias[:, None] * scaling)
    dtype, of_weight = input.dtype, weight.dtype
    if torch.is_autocast_enabled(input.device.type) and torch.float64 not in (dtype, of_weight):
        dtype = of_weight = torch.get_autocast_dtype(input.device.type)
    hidden, tail = torch.cat([input.to(dtype), _padded(lows).to(dtype)], -1), _padded(tails)
    bias = None if bias is None else bias.to(of_weight)
    if weight.requires_grad and torch.is_grad_enabled():
        return hidden, Head(torch.cat([weight.to(of_weight), tail.to(of_weight)], 1), bias)
    # The copy in the wide weight is rounded, where adapters are wider than their head; their gradients are not.
    tail = tail.to(torch.promote_types(of_weight, tail.dtype))
    wide = weight.new_empty((weight.shape[0], hidden.shape[-1]), dtype=of_weight)
    with torch.no_grad():
        wide[:, : weight.shape[1]] = weight
        wide[:, weight.shape[1] :] = tail
    return hidden, Head(wide, bias, tail=tail)


def stock_logits(module: Any, input: Tensor) -> tuple[Tensor, Tensor, Head]:
    """A module's own logits of a few rows, and what ``linear_head`` makes of these rows under the same dropout.

    Chance is left as it was.
    """
    if _is_linear(module):
        return type(module).forward(module, input), *linear_head(module, input)
    devices: Any = [] if input.device.type == "cpu" else [input.device]
    with torch.random.fork_rng(devices, device_type=input.device.type):
        own: Tensor = type(module).forward(module, input)
    with torch.random.fork_rng(devices, device_type=input.device.type):
        return own, *linear_head(module, input)


def _active(module: Any) -> list[str]:
    """The adapters whose part a forward would compute now."""
    if module.disable_adapters or module.merged:
        return []
    of = module.lora_A if hasattr(module, "lora_A") else module.trainable_tokens_delta
    return [name for name in module.active_adapters if name in of]


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Side by side, and columns of zeros up to a multiple of COLUMNS."""
    joined = torch.cat([*parts], -1)
    return F.pad(joined, (0, -joined.shape[-1] % COLUMNS))


def _kind(of: object) -> tuple[str, str]:
    return type(of).__module__, type(of).__name__


def _is_plain(head: nn.Module) -> bool:
    """Whether it is a plain ``nn.Linear``, or the class that FSDP2 derives from it to add methods."""
    cls = type(head)
    return cls is nn.Linear or (cls.__bases__[1:] == (nn.Linear,) and is_of_a_wrapper(cls.__bases__[0]))


def is_of_a_wrapper(what: Any) -> bool:
    """Whether a hook or class gathers weights and moves tensors, and so has its work done around any forward."""
    home = str(getattr(getattr(what, "func", what), "__module__", ""))
    return home.startswith(("torch.distributed.", "deepspeed.", "orpo_kernels."))


def _is_linear(module: Any) -> bool:
    return _is_plain(module) or _kind(module) in BITSANDBYTES


def _packed(module: Any) -> bool:
    """Whether a linear layer's weight is quantised, in a form that can be read back."""
    return _kind(module) in BITSANDBYTES or _kind(module.weight)[0].partition(".")[0] == "torchao"


def _unpacked(module: Any, input: Tensor) -> Tensor:
    """The numbers that a quantised weight stands for, ``[V, H]``: memory of one head, from forward to backward."""
    weight: Any = module.weight
    with torch.no_grad():
        if _kind(module) not in BITSANDBYTES:
            plain: Tensor = weight.dequantize()
            return plain
        if _kind(module)[1] == "Linear4bit":
            functional = importlib.import_module("bitsandbytes.functional")
            plain = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:  # int8 by the largest of each row; the layer's own forward may round hidden states to int8, too
            largest = module.state.SCB if weight.SCB is None else weight.SCB
            plain = weight.data * (largest[:, None] / 127)
        return plain.to(input.dtype)


def _of_weight(module: Any) -> str | None:
    weight: Any = module.weight
    if _packed(module):
        if weight.requires_grad:
            return f"its head's weight is a {_name(weight)} that is trained"
        if _kind(module)[1] == "Linear8bitLt" and module.state.has_fp16_weights:
            return "its head is a Linear8bitLt that keeps its weight in 16 bits and rounds it in every call"
        unread = _kind(module)[1] == "Linear4bit" and getattr(weight, "quant_state", None) is None
        return "its head's weight is not quantised yet" if unread else None
    if weight.dtype not in FLOATS:
        return f"its head's weight is {weight.dtype}, in which no loss is computed: dequantise it first"
    if type(weight) not in (nn.Parameter, Tensor) and not hasattr(weight, "full_tensor"):
        return f"its head's weight is a {_name(weight)}, not a plain parameter"
    return None


def _name(of: object) -> str:
    return ".".join(_kind(of))
