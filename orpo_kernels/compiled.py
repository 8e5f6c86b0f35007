"""The loss under ``torch.compile(fullgraph=True)``: operators that the compiler sees whole, with fake implementations.

Compacting the labels copies a few integers to the host, which no graph can hold, so a compiled call is one opaque
operator that runs the eager code. What differs from eager: gradients are scaled out of place, and ``linear_logprobs``
recomputes in backward what eager keeps (its size depends on the labels), five products instead of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.backends import acc_dtype
from orpo_kernels.engine import Losses, grad_dtype, logprobs_grads, run_logprobs, run_orpo, warn_skipped
from orpo_kernels.plan import Needs
from orpo_kernels.prepare import prepare_logprobs, prepare_orpo

LOSSES = len(Losses._fields)  # behind them come skipped_pairs and the three gradients


@torch.library.custom_op("orpo_kernels::orpo_loss", mutates_args=())
def orpo(
    hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor | None, bias: Tensor | None, beta: float,
    nll_weight: float, nll_reduction: str, logit_scale: float, softcap: float | None, ignore_index: int,
    cu_seqlens: Tensor | None, backend: str, workspace_bytes: int | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """``engine.Losses``, skipped pairs, and gradients for an upstream gradient of 1 (empty where not needed)."""
    job = prepare_orpo(
        hidden, weight, labels, nll_labels, bias, beta, nll_weight, nll_reduction, logit_scale, softcap, ignore_index,
        cu_seqlens, backend, workspace_bytes, Needs(*needs),
    )  # fmt: skip
    warn_skipped(job.scores)
    rows = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        losses, grads = run_orpo(job, rows, weight, bias)
    found = [rows.new_empty(0) if grad is None else grad for grad in grads]
    if grads.hidden is not None:
        found[0] = grads.hidden.view(hidden.shape)
    return [*(value.clone() for value in losses), job.scores.pairs - job.scores.pair_valid.sum(), *found]


@orpo.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor | None, bias: Tensor | None, beta: float,
    nll_weight: float, nll_reduction: str, logit_scale: float, softcap: float | None, ignore_index: int,
    cu_seqlens: Tensor | None, backend: str, workspace_bytes: int | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    pairs = hidden.shape[0] // 2 if cu_seqlens is None else (cu_seqlens.shape[0] - 1) // 2
    acc = acc_dtype(hidden.dtype)
    scalar, vector = hidden.new_empty((), dtype=acc), hidden.new_empty(pairs, dtype=acc)
    grads = [
        torch.empty_like(like, dtype=grad_dtype(like.dtype), memory_format=torch.contiguous_format)
        if wanted and like is not None
        else hidden.new_empty(0)
        for like, wanted in zip((hidden, weight, bias), needs, strict=True)
    ]
    # In the order of engine.Losses: three scalars, two vectors, four scalars.
    losses = [torch.empty_like(kind) for kind in (scalar,) * 3 + (vector,) * 2 + (scalar,) * 4]
    return [*losses, hidden.new_empty((), dtype=torch.int64), *grads]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[LOSSES + 1 :])
    ctx.dtypes = [None if t is None else t.dtype for t in (inputs[0], inputs[1], inputs[4])]
    ctx.needs = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])


def _scale(ctx: Any, grad_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    upstream = grad_outputs[0]
    hidden, weight, bias = (
        (grad * upstream).to(dtype) if needed and dtype is not None and upstream is not None else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    )
    return hidden, weight, None, None, bias, *[None] * 10


torch.library.register_autograd("orpo_kernels::orpo_loss", _scale, setup_context=_keep)


@torch.library.custom_op("orpo_kernels::linear_logprobs", mutates_args=())
def logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None,
    ignore_index: int, backend: str, workspace_bytes: int | None,
) -> Tensor:  # fmt: skip
    """``[...]`` log-probabilities of ``labels``."""
    needs = Needs(False, False, False)
    job = prepare_logprobs(
        hidden, weight, labels, bias, logit_scale, softcap, ignore_index, backend, workspace_bytes, needs
    )
    return run_logprobs(job, hidden.reshape(-1, hidden.shape[-1]), weight, bias)[0].view(labels.shape)


@logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None,
    ignore_index: int, backend: str, workspace_bytes: int | None,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(labels.shape, dtype=acc_dtype(hidden.dtype))


@torch.library.custom_op("orpo_kernels::linear_logprobs_backward", mutates_args=())
def logprobs_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float,
    softcap: float | None, ignore_index: int, backend: str, workspace_bytes: int | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in hidden, weight and bias, empty where not needed."""
    job = prepare_logprobs(
        hidden, weight, labels, bias, logit_scale, softcap, ignore_index, backend, workspace_bytes, Needs(*needs)
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    _, unit, result = run_logprobs(job, rows, weight, bias)
    grads = logprobs_grads(job, unit, result, grad.reshape(-1), rows, weight, bias)
    found = [hidden.new_empty(0) if g is None else g for g in grads]
    if grads.hidden is not None:
        found[0] = grads.hidden.view(hidden.shape)
    return found


@logprobs_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float,
    softcap: float | None, ignore_index: int, backend: str, workspace_bytes: int | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n and t is not None else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias), needs, strict=True)
    ]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, labels, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, labels, bias)


def _logprobs_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    found = logprobs_backward(grad, hidden, weight, labels, bias, *ctx.options, needs)
    of_hidden, of_weight, of_bias = (g if n else None for g, n in zip(found, needs, strict=True))
    return of_hidden, of_weight, None, of_bias, *[None] * 5


torch.library.register_autograd("orpo_kernels::linear_logprobs", _logprobs_vjp, setup_context=_keep_inputs)
