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
from orpo_kernels.objective import CHOSEN_BOUND, OddsRatio, PairTerms
from orpo_kernels.plan import Needs, Plan
from orpo_kernels.scores import Head, Scores

# Rows of one forward chunk where E is not kept. Each chunk reads the whole head, so not too few; the float32 [H, n] sum
# of the hidden states' product grows with them, so not too many.
STREAM_ROWS = 4096


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


def _pair_terms(job: Job, logps: Tensor, lengths: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, PairTerms]:
    """Means per sequence from log-probabilities per score, and the objective on them."""
    means = torch.segment_reduce(logps * weights, "sum", lengths=lengths, initial=0).view(-1, 2)
    chosen, rejected = means.unbind(1)
    return chosen, rejected, job.objective(chosen, rejected)


def _coefficients(job: Job, logps: Tensor, pairs: slice, scores: slice) -> Tensor:
    """``g = d loss / d logp`` of each score of a run of whole pairs."""
    of = job.scores
    lengths = of.segment_lengths[2 * pairs.start : 2 * pairs.stop]
    weights = of.answer_weight[scores]
    _, _, terms = _pair_terms(job, logps, lengths, weights)
    share = of.pair_valid[pairs].to(logps.dtype) / max(of.valid_pairs, 1)
    per_sequence = (torch.stack([terms.grad_chosen, terms.grad_rejected], 1) * share[:, None]).view(-1)
    per_score = torch.repeat_interleave(per_sequence, lengths, output_size=logps.numel())
    return per_score * weights - job.nll_weight * of.nll_weight[scores]


def run_orpo(job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Losses, Grads]:
    """The loss over ``hidden [rows, H]``, its parts, and the gradients ``job.needs`` asks for."""
    head = Head(weight, bias, job.logit_scale, job.softcap)
    scores, plan, needs, backend = job.scores, job.plan, job.needs, job.backend
    acc = acc_dtype(hidden.dtype)
    logps = torch.empty(scores.count, dtype=acc, device=hidden.device)
    logit_sums = torch.empty_like(logps) if head.softcap is not None else None

    def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
        return torch.zeros_like(like, dtype=grad_dtype(like.dtype)) if wanted and like is not None else None

    grads = Grads(zeros(hidden, needs.hidden), None, None)
    if plan.name == "stash" and scores.count:
        several = len(plan.groups) > 1
        sums = [
            _head_gradient(weight if needs.weight else None, acc if several else None),
            _head_gradient(bias if needs.bias else None, acc if several else None),
        ]
        for group in plan.groups:
            part, pairs = slice(*group[2:]), slice(*group[:2])
            rows, targets = scores.rows[part], scores.targets[part]
            some = hidden[rows]
            result = backend.forward(
                some, targets, head, keep=True, unit=needs.hidden, logit_sum=logit_sums is not None
            )
            logps[part] = result.logps
            if logit_sums is not None:
                assert result.logit_sum is not None  # asked for, and there is a softcap
                logit_sums[part] = result.logit_sum
            g = _coefficients(job, result.logps, pairs, part)
            if grads.hidden is not None and result.unit is not None:
                _scatter(grads.hidden, rows, result.unit.mul_(g[:, None]), scores.shared_rows)
            backend.grad_head(result, some, targets, head, g, *sums, accumulate=group.first_score > 0)
            del result  # E, before the next group's is allocated
        grads = grads._replace(
            weight=None if sums[0] is None else sums[0].to(grad_dtype(weight.dtype)),
            bias=None if sums[1] is None or bias is None else sums[1].to(grad_dtype(bias.dtype)),
        )
    else:
        some = hidden[scores.rows]
        result = _stream(backend, some, scores.targets, head, unit=needs.hidden, logit_sum=logit_sums is not None)
        logps = result.logps
        logit_sums = result.logit_sum
        if needs.hidden or needs.head:
            g = _coefficients(job, logps, slice(0, scores.pairs), slice(0, scores.count))
            if grads.hidden is not None and result.unit is not None:
                _scatter(grads.hidden, scores.rows, result.unit.mul_(g[:, None]), scores.shared_rows)
            if needs.head:
                grad_weight = _head_gradient(weight if needs.weight else None, None)
                grad_bias = _head_gradient(bias if needs.bias else None, None)
                backend.grad_head(result, some, scores.targets, head, g, grad_weight, grad_bias, accumulate=False)
                grads = grads._replace(weight=grad_weight, bias=grad_bias)
    return _losses(job, head, hidden, logps, logit_sums), grads


def _head_gradient(like: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Room that ``grad_head`` writes whole."""
    return None if like is None else torch.empty_like(like, dtype=dtype or grad_dtype(like.dtype))


def _scatter(out: Tensor, rows: Tensor, values: Tensor, shared: bool) -> None:
    """``out[rows] += values`` into zeros. Two terms at most meet in a row, so their order cannot change the sum."""
    values = values.to(out.dtype)
    if shared:
        out.index_add_(0, rows, values)
    else:
        out.index_copy_(0, rows, values)


def _stream(backend: Backend, hidden: Tensor, targets: Tensor, head: Head, *, unit: bool, logit_sum: bool) -> Forward:
    """``backend.forward`` over chunks of rows without a kept E; ``unit`` comes in the dtype of hidden's gradient."""
    units = torch.empty_like(hidden, dtype=grad_dtype(hidden.dtype)) if unit else None
    parts: list[Forward] = []
    for start in range(0, max(hidden.shape[0], 1), STREAM_ROWS):
        rows = slice(start, start + STREAM_ROWS)
        part = backend.forward(hidden[rows], targets[rows], head, keep=False, unit=unit, logit_sum=logit_sum)
        if units is not None and part.unit is not None:
            units[rows] = part.unit
        parts.append(part._replace(unit=None))
    sums = [part.logit_sum for part in parts if part.logit_sum is not None]
    return Forward(
        logps=torch.cat([part.logps for part in parts]),
        shift=torch.cat([part.shift for part in parts]),
        inverse=torch.cat([part.inverse for part in parts]),
        entry=torch.cat([part.entry for part in parts]),
        unit=units,
        exps=None,
        logit_sum=torch.cat(sums) if sums else None,
    )


def _losses(job: Job, head: Head, hidden: Tensor, logps: Tensor, logit_sums: Tensor | None) -> Losses:
    scores = job.scores
    chosen, rejected, terms = _pair_terms(job, logps, scores.segment_lengths, scores.answer_weight)
    share = scores.pair_valid.to(logps.dtype) / max(scores.valid_pairs, 1)
    # A mean that rounds to 0 is moved off it, so that 0 says "no token" and nothing else.
    chosen, rejected = (torch.where(scores.pair_valid, m.clamp(max=CHOSEN_BOUND), m) for m in (chosen, rejected))
    nll = -(logps * scores.nll_weight).sum()
    odds = (terms.loss * share).sum()
    means = _logit_means(job, head, hidden, logit_sums)
    return Losses(
        loss=job.nll_weight * nll + odds,
        nll_loss=nll,
        odds_ratio_loss=odds,
        chosen_logps=chosen,
        rejected_logps=rejected,
        log_odds_ratio=(torch.nn.functional.logsigmoid(terms.log_odds) * share).sum(),
        log_odds_chosen=(terms.log_odds * share).sum(),
        chosen_logits_mean=means[0],
        rejected_logits_mean=means[1],
    )


def _logit_means(job: Job, head: Head, hidden: Tensor, logit_sums: Tensor | None) -> Tensor:
    """Mean capped logit over each side's scores and the vocabulary, ``[2]``.

    Without a softcap the mean over V moves inside the product: ``h . mean(W)``. Under one the sums come from the tiles.
    """
    scores = job.scores
    acc = acc_dtype(hidden.dtype)
    sides = torch.arange(2, device=hidden.device).repeat(scores.pairs)
    side = torch.repeat_interleave(sides, scores.segment_lengths, output_size=scores.count)
    member = torch.nn.functional.one_hot(side, 2).T.to(acc)  # [2, N]
    counts = member.sum(1).clamp(min=1)
    if logit_sums is not None:
        return member @ logit_sums / (counts * head.vocab)
    rows = torch.zeros((2, hidden.shape[1]), dtype=acc, device=hidden.device)
    for start in range(0, scores.count, STREAM_ROWS):
        part = slice(start, start + STREAM_ROWS)
        rows += member[:, part] @ hidden[scores.rows[part]].to(acc)
    return _centre_logit(job.backend, rows / counts[:, None], head) * (member.sum(1) > 0)


def _centre_logit(backend: Backend, rows: Tensor, head: Head) -> Tensor:
    """Mean over V of the uncapped logits of ``rows [k, H]`` without a logit: ``scale (h . mean(W) + mean(b))``."""
    mean_bias = 0.0 if head.bias is None else head.bias.to(rows.dtype).mean()
    mean: Tensor = head.logit_scale * (rows @ backend.column_mean(head.weight) + mean_bias)
    return mean


@torch.no_grad()
def mean_logit(backend: Backend, hidden: Tensor, head: Head) -> Tensor:
    """Mean capped logit over ``hidden [n, H]`` and the vocabulary, a scalar; 0 for no rows."""
    if hidden.shape[0] == 0:
        return torch.zeros((), dtype=acc_dtype(hidden.dtype), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if head.softcap is None:
            return _centre_logit(backend, hidden.mean(0, keepdim=True, dtype=acc_dtype(hidden.dtype)), head)[0]
        anything = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        result = _stream(backend, hidden, anything, head, unit=False, logit_sum=True)
    assert result.logit_sum is not None  # asked for, and there is a softcap
    return result.logit_sum.mean() / head.vocab


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
        untouched = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0  # a host read costs nothing here
        out = []
        for grad, like in zip(grads, inputs, strict=True):
            if grad is not None and not untouched:
                grad.mul_(grad_loss)
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


def run_logprobs(job: LogprobsJob, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Forward]:
    """Log-probabilities ``[positions]`` from ``hidden [positions, H]``, and what their backward needs."""
    head = Head(weight.detach(), None if bias is None else bias.detach(), job.logit_scale, job.softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        result = _stream(
            job.backend, hidden.detach()[job.rows], job.targets, head, unit=job.needs.hidden, logit_sum=False
        )
    return result.logps.new_zeros(job.positions).index_copy_(0, job.rows, result.logps), result


def logprobs_grads(
    job: LogprobsJob, result: Forward, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Grads:
    """Gradients for the upstream gradient ``grad [positions]``, in the dtypes of the inputs."""
    g = grad[job.rows]
    grads = Grads(
        None,
        _head_gradient(weight if job.needs.weight else None, None),
        _head_gradient(bias if job.needs.bias else None, None),
    )
    if result.unit is not None:
        scaled = (g[:, None] * result.unit).to(hidden.dtype)
        grads = grads._replace(hidden=torch.zeros_like(hidden).index_copy_(0, job.rows, scaled))
    if job.needs.head:
        head = Head(weight.detach(), None if bias is None else bias.detach(), job.logit_scale, job.softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            job.backend.grad_head(
                result, hidden.detach()[job.rows], job.targets, head, g, grads.weight, grads.bias, accumulate=False
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
        logps, result = run_logprobs(job, hidden, weight, bias)
        ctx.job = job
        # The gathered rows are not kept: hidden is alive in the graph anyway, and gathering again is cheap.
        ctx.save_for_backward(hidden, weight, bias, *result)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *result = ctx.saved_tensors
        return *logprobs_grads(ctx.job, Forward(*result), grad, hidden, weight, bias), None


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
