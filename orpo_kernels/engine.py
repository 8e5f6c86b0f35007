"""Runs a plan on a backend: the loop over groups of pairs, the closed-form coefficients, and the autograd Functions.

Gradients are formed while E is at hand, in forward; backward multiplies them by the upstream scalar.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_kernels.backends import Backend, Forward, acc_dtype
from orpo_kernels.objective import OddsRatio
from orpo_kernels.pairs import PairTable
from orpo_kernels.plan import Needs, Plan, room_of
from orpo_kernels.scores import Head, Scores


class Losses(NamedTuple):
    """What one run yields beside gradients: scalars and ``[P]`` vectors in the accumulation dtype."""

    loss: Tensor
    nll_loss: Tensor
    odds_ratio_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_ratio: Tensor
    log_odds_chosen: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor


class Grads(NamedTuple):
    """Gradients of the loss for an upstream gradient of 1; float16 inputs get theirs in float32."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Job:
    """One call of the loss, without the tensors that autograd tracks."""

    scores: Scores
    objective: OddsRatio
    nll_weight: float
    logit_scale: float
    softcap: float | None
    needs: Needs
    plan: Plan
    backend: Backend


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients underflow before a loss scale is applied, so they wait for it in float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def run_orpo(job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Losses, Grads]:
    """The loss over ``hidden [rows, H]``, its parts, and the gradients ``job.needs`` asks for."""
    head = Head(weight, bias, job.logit_scale, job.softcap)
    scores, plan, needs, backend = job.scores, job.plan, job.needs, job.backend
    # Without a softcap the mean over V moves inside the product: h . mean(W), no logits needed.
    centre = backend.column_mean(weight) if head.softcap is None else None
    several = len(plan.groups) > 1
    acc = acc_dtype(hidden.dtype) if several else None
    grads = Grads(
        _like_contiguous(hidden).zero_() if needs.hidden else None,
        _like_contiguous(weight, acc) if needs.weight else None,
        _like_contiguous(bias, acc) if needs.bias and bias is not None else None,
    )
    if plan.name == "stash" and scores.count:
        tables: list[PairTable] = []
        for group in plan.groups:
            part, pairs = slice(*group[2:]), slice(*group[:2])
            rows, targets = scores.rows[part], scores.targets[part]
            result = backend.forward(
                hidden, rows, targets, head, keep=True, unit=needs.hidden, logit_means=True, centre=centre,
                room=plan.room,
            )  # fmt: skip
            tables.append(_table(job, result, pairs, part))
            g = tables[-1].coefficients
            if grads.hidden is not None:
                backend.grad_hidden(
                    result, rows, targets, head, g, grads.hidden, shared=scores.shared_rows, room=plan.room
                )
            backend.grad_head(
                result, hidden, rows, targets, head, g, *grads[1:], accumulate=group.first_score > 0, room=plan.room
            )
            del result  # E, before the next group's is allocated
        if several:
            final = (None if g is None else g.to(grad_dtype(hidden.dtype)) for g in grads[1:])
            grads = Grads(grads.hidden, *final)
        table = PairTable(*(torch.cat(columns) for columns in zip(*tables, strict=True)))
        return _losses(job, head, table), grads

    # Without E, d logp / d hidden is formed before the coefficients are known, which needs every score of a pair. It
    # waits in the gradient itself, unless two scores share a row.
    unit, places = grads.hidden, scores.rows
    if unit is not None and scores.shared_rows:
        unit = unit.new_empty((scores.count, hidden.shape[1]))
        places = torch.arange(scores.count, device=unit.device)
    result = _stream(
        backend, hidden, scores.rows, scores.targets, head, unit=unit, places=places, logit_means=True, centre=centre,
        room=plan.room,
    )  # fmt: skip
    table = _table(job, result, slice(0, scores.pairs), slice(0, scores.count))
    g = table.coefficients
    if grads.hidden is not None and unit is not None:
        backend.scale_rows(unit, places, g)
        if unit is not grads.hidden:
            grads.hidden.index_add_(0, scores.rows, unit)  # two terms at most meet in a row: the order changes nothing
            del unit
    if needs.head:
        backend.grad_head(
            result, hidden, scores.rows, scores.targets, head, g, *grads[1:], accumulate=False, room=plan.room
        )
    return _losses(job, head, table), grads


def _like_contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a gradient, in the dtype it waits in unless told."""
    return torch.empty_like(tensor, dtype=dtype or grad_dtype(tensor.dtype), memory_format=torch.contiguous_format)


def _table(job: Job, result: Forward, pairs: slice, part: slice) -> PairTable:
    assert result.logit_means is not None  # asked for
    return job.backend.pair_table(
        result.logps, result.logit_means, job.scores, pairs, part, job.objective, job.nll_weight
    )


def _stream(
    backend: Backend, hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, *, unit: Tensor | None = None,
    places: Tensor | None = None, logit_means: bool = False, centre: Tensor | None = None, room: int,
) -> Forward:  # fmt: skip
    """``backend.forward`` over chunks of rows, without E; ``unit[places]`` becomes d logp / d hidden."""
    step = backend.rows_at_once(hidden.shape[1], room)
    parts: list[Forward] = []
    for start in range(0, max(rows.numel(), 1), step):
        of = slice(start, start + step)
        part = backend.forward(
            hidden, rows[of], targets[of], head, keep=False, unit=unit is not None, logit_means=logit_means,
            centre=centre, room=room,
        )  # fmt: skip
        if unit is not None and places is not None:
            backend.grad_hidden(part, places[of], targets[of], head, None, unit, shared=False, room=room)
        parts.append(part._replace(unit=None))
        del part  # and its unit, before the next chunk's is allocated
    return Forward(
        logps=torch.cat([part.logps for part in parts]),
        shift=torch.cat([part.shift for part in parts]),
        inverse=torch.cat([part.inverse for part in parts]),
        entry=torch.cat([part.entry for part in parts]),
        unit=None,
        exps=None,
        logit_means=torch.cat([part.logit_means for part in parts if part.logit_means is not None])
        if logit_means
        else None,
    )


def _losses(job: Job, head: Head, table: PairTable) -> Losses:
    sums = torch.stack(table[2:8]).sum(1)
    nll, odds, log_sigmoid, log_odds, *logits = sums.unbind()
    means = [total / max(count, 1) for total, count in zip(logits, job.scores.side_counts, strict=True)]
    if head.bias is not None and head.softcap is None:
        bias = head.logit_scale * head.bias.to(sums.dtype).mean()
        means = [mean + bias if count else mean for mean, count in zip(means, job.scores.side_counts, strict=True)]
    return Losses(
        loss=job.nll_weight * nll + odds,
        nll_loss=nll,
        odds_ratio_loss=odds,
        chosen_logps=table.chosen,
        rejected_logps=table.rejected,
        log_odds_ratio=log_sigmoid,
        log_odds_chosen=log_odds,
        chosen_logits_mean=means[0],
        rejected_logits_mean=means[1],
    )


@torch.no_grad()
def mean_logit(backend: Backend, hidden: Tensor, head: Head) -> Tensor:
    """Mean capped logit over ``hidden [n, H]`` and the vocabulary, a scalar; 0 for no rows."""
    if hidden.shape[0] == 0:
        return torch.zeros((), dtype=acc_dtype(hidden.dtype), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if head.softcap is None:
            mean = hidden.mean(0, dtype=acc_dtype(hidden.dtype))
            bias = 0.0 if head.bias is None else head.bias.to(mean.dtype).mean()
            uncapped: Tensor = head.logit_scale * (mean @ backend.column_mean(head.weight) + bias)
            return uncapped
        every = torch.arange(hidden.shape[0], device=hidden.device)
        room = room_of(None, backend)
        result = _stream(backend, hidden, every, torch.zeros_like(every), head, logit_means=True, room=room)
    assert result.logit_means is not None  # asked for
    return result.logit_means.mean()


class OrpoFunction(torch.autograd.Function):
    """``Losses`` of a job. Gradients are ready in forward; backward scales them by the upstream scalar, in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            losses, grads = run_orpo(job, hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        if job.plan.mm > 1:
            ctx.save_for_backward(hidden, weight, bias)
            ctx.job, ctx.grads = job, grads
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        # The first backward owns the buffers and hands them to autograd. A second one (retain_graph=True) finds none
        # and computes them again, rather than scaling what may already be somebody's .grad.
        inputs = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            with torch.autocast(grad_loss.device.type, enabled=False):
                hidden, weight, bias = inputs
                _, grads = run_orpo(ctx.job, hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        out = []
        for grad, like in zip(grads, inputs, strict=True):
            if grad is not None:
                ctx.job.backend.scale(grad, grad_loss)
            out.append(_like(grad, like))
        return *out, None


@dataclass(frozen=True)
class LogprobsJob:
    """One call of ``linear_logprobs``, without the tensors that autograd tracks."""

    rows: Tensor  # [N] int64
    targets: Tensor  # [N] int64
    positions: int
    logit_scale: float
    softcap: float | None
    needs: Needs
    backend: Backend
    room: int  # bytes of scratch


def run_logprobs(
    job: LogprobsJob, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Forward]:
    """Log-probabilities ``[positions]`` from ``hidden [positions, H]``, and what their backward needs.

    That is d logp / d hidden ``[N, H]`` and a ``Forward`` without E.
    """
    hidden = hidden.detach()
    head = Head(weight.detach(), None if bias is None else bias.detach(), job.logit_scale, job.softcap)
    unit = places = None
    if job.needs.hidden:
        unit = hidden.new_empty((job.rows.numel(), hidden.shape[1]), dtype=grad_dtype(hidden.dtype))
        places = torch.arange(job.rows.numel(), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        result = _stream(job.backend, hidden, job.rows, job.targets, head, unit=unit, places=places, room=job.room)
    return result.logps.new_zeros(job.positions).index_copy_(0, job.rows, result.logps), unit, result


def logprobs_grads(
    job: LogprobsJob, unit: Tensor | None, result: Forward, grad: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None,
) -> Grads:  # fmt: skip
    """Gradients for the upstream gradient ``grad [positions]``, in the dtypes of the inputs."""
    hidden, g = hidden.detach(), grad[job.rows]
    grads = Grads(
        None,
        _like_contiguous(weight) if job.needs.weight else None,
        _like_contiguous(bias) if job.needs.bias and bias is not None else None,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if unit is not None:
            of_hidden = _like_contiguous(hidden).zero_().index_copy_(0, job.rows, unit)
            job.backend.scale_rows(of_hidden, job.rows, g)
            grads = grads._replace(hidden=of_hidden)
        if job.needs.head:
            head = Head(weight.detach(), None if bias is None else bias.detach(), job.logit_scale, job.softcap)
            job.backend.grad_head(
                result, hidden, job.rows, job.targets, head, g, *grads[1:], accumulate=False, room=job.room
            )
    return Grads(*(_like(found, tensor) for found, tensor in zip(grads, (hidden, weight, bias), strict=True)))


def _like(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the dtype autograd expects."""
    return None if grad is None or tensor is None else grad.to(tensor.dtype)


class LogprobsFunction(torch.autograd.Function):
    """``[positions]`` log-probabilities, 0 where there is no score; any upstream gradient.

    ``d logp / d hidden`` does not depend on the upstream gradient, so it is formed in forward and backward scales its
    rows; the head's gradient does, so its tiles are computed again in backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LogprobsJob) -> Tensor:
        logps, unit, result = run_logprobs(job, hidden, weight, bias)
        ctx.job = job
        ctx.save_for_backward(hidden, weight, bias, unit, *result)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, unit, *result = ctx.saved_tensors
        return *logprobs_grads(ctx.job, unit, Forward(*result), grad, hidden, weight, bias), None


def warn_skipped(scores: Scores) -> None:
    """Say once per place that pairs with an empty answer leave the odds term."""
    skipped = scores.pairs - scores.valid_pairs
    if skipped:
        warnings.warn(
            f"{skipped} of {scores.pairs} pairs have an answer without a token (all labels ignored) and so no odds "
            "ratio: they leave the odds term, and their chosen tokens still count in the NLL. Truncation that keeps "
            "the prompt and drops the answer is the usual cause: raise the maximum length or filter such pairs",
            stacklevel=4,
        )
