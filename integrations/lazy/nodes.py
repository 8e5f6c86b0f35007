"""The nodes between stand-ins on the autograd graph, from the head to the numbers that a loss is made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.engine import refuse_second_derivatives
from orpo_kernels.integrations.lazy.rows import Root
from orpo_kernels.integrations.lazy.stand_in import LazyGrad, LazyLogits, terms_of
from orpo_kernels.integrations.lazy.symbols import Terms, View


class HeadNode(torch.autograd.Function):
    """From hidden and head to logits that are not there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, view: View
    ) -> LazyLogits:
        ctx.save_for_backward(hidden, weight, bias)
        view.root.node, ctx.unpacked = weakref.ref(ctx), None
        ctx.set_materialize_grads(False)
        ctx.tailed = tail is not None
        ctx.view, ctx.hidden_shape, ctx.hidden_dtype = view, hidden.shape, hidden.dtype
        return LazyLogits(view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if grad is None:
            return None, None, None, None, None
        inputs = ctx.view.root.unpacked(ctx)
        bias, of_weight, of_tail = inputs.bias, None, None
        grads = ctx.view.root.backward(list(terms_of(grad, ctx.view).values()), inputs)
        hidden = None if grads.hidden is None else grads.hidden.to(ctx.hidden_dtype).view(ctx.hidden_shape)
        if grads.weight is not None:
            found = grads.weight.to(ctx.view.root.trained_dtype)
            of_weight, of_tail = (None, found) if ctx.tailed else (found, None)
        of_bias = None if grads.bias is None or bias is None else grads.bias.to(bias.dtype)
        return hidden, of_weight, of_bias, of_tail, None


class ViewNode(torch.autograd.Function):
    """From a stand-in to another; a gradient only changes its shape."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, view: View) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.before, ctx.after = x.view_of, view
        return LazyLogits(view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivatives()
        if grad is None:
            return None, None
        return LazyGrad(ctx.before, terms_of(grad, ctx.after)), None


class InPlaceNode(ViewNode):
    """A stand-in that stands for another view from now on."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, view: View) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(x)
        ctx.before, ctx.after = x.view_of, view
        x.view_of = view
        return x


class ChangedNode(torch.autograd.Function):
    """A stand-in whose values were changed: from now on its gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, own: Tensor) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        refuse_second_derivatives()
        return None, grad


class DenseNode(torch.autograd.Function):
    """From a stand-in to its values."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, own: Tensor | None = None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.view = x.view_of
        return x.view_of.dense() if own is None else own.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivatives()
        return None if grad is None else LazyGrad(ctx.view, ctx.view.terms_of_dense(grad)), None


class ReduceNode(torch.autograd.Function):
    """From a stand-in to numbers that were computed; ``terms`` makes their gradient a gradient of logits."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, value: Tensor, terms: Callable[[Tensor], Terms]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.view, ctx.terms = x.view_of, terms
        return value.clone()  # an input returned as it is would be a view, which nobody may change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        refuse_second_derivatives()
        return None if grad is None else LazyGrad(ctx.view, ctx.terms(grad)), None, None


def lazy_logits(
    root: Root, hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, dtype: torch.dtype
) -> LazyLogits:
    """The logits of a call of a head on ``hidden [..., H]``."""
    rows = root.rows.view(hidden.shape[:-1])
    view = View(root, rows, root.identity, dtype, graph=object())
    out: LazyLogits = HeadNode.apply(hidden, weight, bias, tail, view)
    return out
