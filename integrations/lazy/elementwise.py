"""Elementwise operations on lazy logits that are maps of them (``symbols.Map``) or distributions over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy.memory import scale, sharing
from orpo_kernels.integrations.lazy.registry import HANDLERS, copied, fresh, handles, in_place, is_vocab, made
from orpo_kernels.integrations.lazy.stand_in import LazyLogits
from orpo_kernels.integrations.lazy.symbols import View


def _scaled(x: LazyLogits, factor: Any) -> View | None:
    """The view times a number, or a number for each of its rows."""
    view = x.view_of
    if isinstance(factor, Tensor) and (factor.requires_grad or isinstance(factor, LazyLogits)):
        return None
    if isinstance(factor, Tensor) and factor.numel() == 1 and factor.dim() <= x.dim():
        factor = factor.item()
    if isinstance(factor, int | float) and not isinstance(factor, bool):
        if view.kind != "logits":
            return view.after("scale", factor=view.factor * factor)
        mapping = view.mapping.times(float(factor))
        return None if mapping is None else view.after("scale", mapping=mapping)
    if not isinstance(factor, Tensor) or view.kind != "logits" or view.vocab_dim != -1 or factor.dim() != x.dim():
        return None
    if factor.shape[-1] != 1 or any(f not in (1, s) for f, s in zip(factor.shape[:-1], view.rows.shape, strict=True)):
        return None
    each = factor.squeeze(-1).expand(view.rows.shape).to(view.root.acc)
    if not (each > 0).all():
        return None
    every = torch.ones(view.root.rows.shape, dtype=view.root.acc, device=x.device)
    every[view.rows.reshape(-1)] = each.reshape(-1)
    if not torch.equal(every[view.rows], each):  # a row that is there twice, under two numbers
        return None
    mapping = view.mapping.times_rows(every)
    return None if mapping is None else view.after("scale", mapping=mapping)


def _widened(x: LazyLogits, factor: Any) -> bool:
    """Whether a product of both would have another dtype than x."""
    return isinstance(factor, Tensor) and torch.result_type(torch.empty(0, dtype=x.dtype), factor) != x.dtype


@handles("mul", "__mul__", "__rmul__", "multiply")
def _mul(a: Any, b: Any) -> Any:
    if not isinstance(a, LazyLogits):
        a, b = b, a
    if isinstance(b, LazyLogits):
        return _product(a, b)
    view = None if _widened(a, b) else _scaled(a, b)
    return NotImplemented if view is None else made(a, fresh(view))


def _product(a: LazyLogits, b: LazyLogits) -> Any:
    """p log p and p z, whose sums are an entropy and an expectation."""
    a, b = (a, b) if a.view_of.kind == "probs" else (b, a)
    kind = {"log_probs": "probs_log_probs", "logits": "probs_logits"}.get(b.view_of.kind)
    p, other = a.view_of, b.view_of
    if p.kind != "probs" or kind is None or p.vocab_dim != -1 or other.vocab_dim != -1 or not p.same_rows(other):
        return NotImplemented
    if (torch.is_grad_enabled() and a.requires_grad != b.requires_grad) or a.dtype != b.dtype:
        return NotImplemented
    return made(a, fresh(p.after("mul", kind=kind, factor=p.factor * other.factor)))


@handles("div", "__truediv__", "true_divide", "divide")
def _div(a: Any, b: Any, *, rounding_mode: Any = None) -> Any:
    if not isinstance(a, LazyLogits) or rounding_mode is not None or isinstance(b, LazyLogits) or _widened(a, b):
        return NotImplemented
    if isinstance(b, int | float) and b == 0:
        return NotImplemented
    view = _scaled(a, _inverse(a, b))
    return NotImplemented if view is None else made(a, fresh(view))


def _inverse(x: LazyLogits, by: Any) -> Any:
    """What a division multiplies by, no less exact than the logits."""
    return 1 / (by.to(x.view_of.root.acc) if isinstance(by, Tensor) else by)


@handles("mul_", "__imul__", "multiply_")
def _mul_(x: Any, factor: Any) -> Any:
    return _scale_in_place(x, factor)


@handles("div_", "__itruediv__", "true_divide_", "divide_")
def _div_(x: Any, by: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None or isinstance(by, LazyLogits) or (isinstance(by, int | float) and by == 0):
        return NotImplemented
    return _scale_in_place(x, _inverse(x, by)) if isinstance(x, LazyLogits) else NotImplemented


def _scale_in_place(x: Any, factor: Any) -> Any:
    view = _scaled(x, factor) if isinstance(x, LazyLogits) else None
    if view is None or (x.requires_grad and not torch.is_grad_enabled()):
        return NotImplemented
    return scale(x, view, factor if isinstance(factor, Tensor) and factor.numel() > 1 else float(factor))


@handles("neg", "__neg__", "negative")
def _neg(x: LazyLogits) -> Any:
    return NotImplemented if x.view_of.kind == "logits" else made(x, fresh(_scaled(x, -1)))  # type: ignore[arg-type]


@handles("tanh")
def _tanh(x: LazyLogits) -> Any:
    mapping = x.view_of.mapping.tanh() if x.view_of.kind == "logits" else None
    return NotImplemented if mapping is None else copied(x, "tanh", mapping=mapping)


@handles("tanh_")
def _tanh_(x: LazyLogits) -> Any:
    if x.requires_grad and not torch.is_grad_enabled():
        return NotImplemented
    mapping = (
        x.view_of.mapping.tanh() if x.view_of.kind == "logits" and not (sharing(x) or x.view_of.root.columns) else None
    )
    return NotImplemented if mapping is None else in_place(x, x.view_of.after("tanh", mapping=mapping))


@handles("add", "__add__", "__radd__")
def _add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    x, bias = (a, b) if isinstance(a, LazyLogits) else (b, a)
    view = x.view_of
    if not isinstance(bias, Tensor) or isinstance(bias, LazyLogits) or bias.requires_grad or alpha != 1:
        return NotImplemented
    whole = bias.shape[-1:] == (view.mapping.vocab,) and bias.numel() == view.mapping.vocab and bias.dim() <= x.dim()
    if not whole or view.kind != "logits" or view.vocab_dim != -1:
        return NotImplemented
    if _widened(x, bias):  # bfloat16 logits of autocast, and a buffer in float32
        return x.to(torch.result_type(torch.empty(0, dtype=x.dtype), bias)) + bias
    mapping = view.mapping.plus(bias.detach().reshape(-1).to(view.root.acc))
    return NotImplemented if mapping is None else copied(x, "add", mapping=mapping)


@handles("sub", "__sub__", "subtract")
def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    """Logits less their own log-sum-exp are log-probabilities."""
    if not isinstance(a, LazyLogits) or isinstance(b, LazyLogits) or not isinstance(b, Tensor) or alpha != 1:
        return NotImplemented
    root, rows, mapping, version = getattr(b, "_orpo_lse_of", (lambda: None, None, None, 0))
    view = a.view_of
    if root() is not view.root or b._version != version or view.kind != "logits" or b.dim() != a.dim():
        return NotImplemented
    if not view.same_rows(view._replace(rows=rows, mapping=mapping)):
        return NotImplemented
    if (torch.is_grad_enabled() and a.requires_grad != b.requires_grad) or a.dtype != b.dtype:
        return NotImplemented
    return copied(a, "sub", kind="log_probs")


@handles("clamp", "clamp_min", "clip")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    """Not below the lowest number there is: nothing."""
    if not isinstance(x, LazyLogits) or max is not None or not isinstance(min, float):
        return NotImplemented
    below = min <= torch.finfo(x.dtype).min and x.view_of.mapping.bias is None
    return copied(x, "clamp") if below else NotImplemented


def _self_compared(a: Any, b: Any) -> Any:
    """A check for NaN, of logits that are finite where hidden and weight are."""
    same = a is b and isinstance(a, LazyLogits)
    return torch.ones((), dtype=torch.bool, device=a.device).expand(a.shape) if same else NotImplemented


HANDLERS["eq"] = HANDLERS["__eq__"] = _self_compared


# Distributions: stand-ins for log p and p.


@handles("log_softmax")
def _log_softmax(x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _distribution(
        x, "log_softmax", dim, dtype or (_stacklevel if isinstance(_stacklevel, torch.dtype) else None)
    )


@handles("softmax")
def _softmax(x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _distribution(x, "softmax", dim, dtype or (_stacklevel if isinstance(_stacklevel, torch.dtype) else None))


def _distribution(x: LazyLogits, name: str, dim: Any, dtype: torch.dtype | None) -> Any:
    view = x.view_of
    plain = view.kind == "logits" or (view.kind == "log_probs" and view.factor == 1)
    if view.vocab_dim != -1 or not is_vocab(x, dim) or not plain:
        return NotImplemented
    return copied(x, name, kind="log_probs" if name == "log_softmax" else "probs", dtype=dtype or x.dtype)


@handles("exp")
def _exp(x: LazyLogits) -> Any:
    ok = x.view_of.kind == "log_probs" and x.view_of.factor == 1
    return copied(x, "exp", kind="probs") if ok else NotImplemented


@handles("log")
def _log(x: LazyLogits) -> Any:
    ok = x.view_of.kind == "probs" and x.view_of.factor == 1
    return copied(x, "log", kind="log_probs") if ok else NotImplemented
