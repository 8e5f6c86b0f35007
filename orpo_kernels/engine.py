"""Runs a plan on a backend: ``forward -> g -> backward``, group by group, in one autograd Function.

``g = d loss / d logp`` of each target. A loss over pairs knows it as soon as a group's log-probabilities are known, so
its gradients are formed in forward and backward multiplies them by the upstream scalar. Log-probabilities alone get
theirs from autograd: what backward needs waits until then.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import (
    PAIR_ROWS,
    Backend,
    Found,
    GivenPairs,
    Grads,
    PairTable,
    Part,
    acc_dtype,
    grad_dtype,
    select,
    uncast,
)
from orpo_kernels.plan import DEFAULT_WORKSPACE, Plan
from orpo_kernels.settings import Head, Needs
from orpo_kernels.targets import Targets


class Losses(NamedTuple):
    """What a loss over pairs yields beside gradients, in the accumulation dtype."""

    loss: Tensor  # []
    means: Tensor  # [4 + metrics]: NLL, mean logits of the chosen and of the rejected side, objective, metrics
    values: Tensor  # [rows, P], the rows of PairTable


@dataclass(frozen=True)
class Call:
    """One call, without the tensors that autograd tracks."""

    targets: Targets
    given: GivenPairs | None  # None for log-probabilities alone, whose g comes late
    needs: Needs
    plan: Plan
    backend: Backend
    mean_weight: Tensor | None = None  # [H], the head's mean row, where mean logits are made of it


def run(call: Call, hidden: Tensor, head: Head, expected: Tensor | None = None) -> tuple[Any, Grads]:
    """The plan, as far as it goes without an upstream gradient, for ``hidden [rows, H]``.

    That is ``Losses`` and their gradients for the upstream gradient ``expected``, or 1; or for log-probabilities
    ``Found``, and what of their gradients waits already.
    """
    plan, backend, targets, given = call.plan, call.backend, call.targets, call.given
    store = plan.name == "store"
    several = len(plan.groups) > 1
    grads = _room(call, hidden, head, several)
    tables: list[PairTable] = []
    for group in plan.groups:
        of = slice(group.first, group.last)
        part = _part(call, hidden, head, of)._replace(logit_means=given is not None, mean_weight=call.mean_weight)
        if group.first == group.last:
            nothing = torch.zeros(0, dtype=acc_dtype(hidden.dtype), device=hidden.device)
            found = Found(nothing, nothing, None)
        else:
            found = backend.forward(part, grads, store=store)
            if found.logit_means is not None and head.shard is not None:
                found = found._replace(logit_means=head.shard.mean(found.logit_means))
        if given is None:
            return found, grads
        tables.append(backend.pair_terms(found, targets.pairs(*group), given))
        g = tables[-1].g if expected is None else tables[-1].g * expected
        backward(call, part, found, g, grads, accumulate=group.first > 0)
        del found  # and E with it, before the next group's is allocated
    if several:
        final = (
            None if grad is None or like is None else grad.to(grad_dtype(like.dtype))
            for grad, like in zip(grads[1:], (head.trained, head.bias), strict=True)
        )
        grads = Grads(grads.hidden, *final)
    return _losses(call, head, tables), grads


def _part(call: Call, hidden: Tensor, head: Head, of: slice) -> Part:
    targets = call.targets
    return Part(hidden, targets.rows[of], targets.ids[of], head, call.plan.scratch_budget, targets.sizes.shared_rows)


def backward(call: Call, part: Part, found: Found, g: Tensor, grads: Grads, *, accumulate: bool) -> None:
    """``backend.backward`` where there is a target and a gradient is asked for."""
    if part.rows.numel():
        if call.plan.passes > 1:
            call.backend.backward(part, found, g, grads, accumulate=accumulate)
    elif not accumulate:
        for grad in grads[1:]:
            if grad is not None:
                grad.zero_()


def _room(call: Call, hidden: Tensor, head: Head, several: bool) -> Grads:
    """Gradients to be written; the head's in the accumulation dtype where several groups add to them.

    The head's of log-probabilities are left to ``late_grads``.
    """
    grads = Grads(_empty(hidden).zero_() if call.needs.hidden else None, None, None)
    return grads if call.given is None else _with_heads(call, head, grads, acc_dtype(hidden.dtype) if several else None)


def _with_heads(call: Call, head: Head, grads: Grads, dtype: torch.dtype | None) -> Grads:
    needs, bias = call.needs, head.bias
    return grads._replace(
        weight=_empty(head.trained, dtype) if needs.weight else None,
        bias=_empty(bias, dtype) if needs.bias and bias is not None else None,
    )


def late_grads(call: Call, hidden: Tensor, head: Head, found: Found, grads: Grads, upstream: Tensor) -> Grads:
    """Gradients of log-probabilities for the upstream gradient ``[positions]``."""
    grads = _with_heads(call, head, grads, None)
    g = upstream[call.targets.rows].to(found.logps.dtype)
    backward(call, _part(call, hidden, head, slice(None)), found, g, grads, accumulate=False)
    return grads


def logps_of(call: Call, found: Found) -> Tensor:
    """``[positions]``, 0 where there is no target."""
    return found.logps.new_zeros(call.targets.sizes.positions).index_copy_(0, call.targets.rows, found.logps)


def _empty(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a gradient, in the dtype it waits in unless told."""
    return torch.empty_like(tensor, dtype=dtype or grad_dtype(tensor.dtype), memory_format=torch.contiguous_format)


def _losses(call: Call, head: Head, tables: list[PairTable]) -> Losses:
    values = torch.cat([table.values for table in tables], 1) if len(tables) > 1 else tables[0].values
    means = values[PAIR_ROWS.index("nll") :].sum(1)
    if head.bias is not None and head.softcap is None:
        # The mean over V moved inside the product: what the bias adds to a mean logit stands apart.
        mean = _mean(head.bias, means.dtype)
        of_bias = head.logit_scale * (mean if head.shard is None else head.shard.mean(mean))
        for row, count in enumerate(call.targets.sizes.sides, 1):
            if count:
                means[row] += of_bias
    assert call.given is not None  # a loss over pairs
    return Losses(call.given.nll_weight * means[0] + means[3], means, values)


def _mean(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of a vector whose sum may overflow ``dtype``."""
    return values.mean(dtype=torch.float64).to(dtype)


@torch.no_grad()
def mean_logit(hidden: Tensor, head: Head, backend: str = "auto") -> Tensor:
    """Mean capped logit over ``hidden [n, H]`` and the vocabulary, a scalar; 0 for no rows."""
    if hidden.shape[0] == 0:
        return torch.zeros((), dtype=acc_dtype(hidden.dtype), device=hidden.device)
    chosen = select(backend, hidden.device, hidden.dtype)
    with uncast(hidden.device):
        if head.softcap is None:
            mean = hidden.mean(0, dtype=acc_dtype(hidden.dtype))
            bias = 0.0 if head.bias is None else _mean(head.bias, mean.dtype)
            uncapped: Tensor = head.logit_scale * (mean @ chosen.mean_weight(head.weight) + bias)
            return uncapped
        every = torch.arange(hidden.shape[0], device=hidden.device)
        part = Part(hidden, every, torch.zeros_like(every), head, DEFAULT_WORKSPACE, logit_means=True)
        found = chosen.forward(part, Grads(None, None, None), store=False)
    assert found.logit_means is not None  # asked for
    return found.logit_means.mean()


def fused(hidden: Tensor, head: Head, call: Call) -> Any:
    """What ``Fused`` returns for ``hidden [..., H]``."""
    return Fused.apply(hidden.reshape(-1, head.features), head.weight, head.bias, head.tail, head, call)


class Fused(torch.autograd.Function):
    """``Losses`` or log-probabilities ``[positions]`` of a call. The first backward owns what forward prepared."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, head: Head, call: Call
    ) -> Any:
        with uncast(hidden.device):
            ctx.expected = _expected.get(_lane(hidden))
            result, grads = run(call, hidden.detach(), head.detached(), ctx.expected)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.numbers = call, head[2:5]
        late = call.given is None
        if call.plan.passes > 1:
            ctx.save_for_backward(hidden, weight, bias, tail)
            ctx.ready = result if late else None, grads
        if late:
            return logps_of(call, result)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if upstream is None:
            return None, None, None, None, None, None
        call = ctx.call
        hidden, weight, bias, tail = ctx.saved_tensors
        hidden, head = hidden.detach(), Head(weight, bias, *ctx.numbers)._replace(tail=tail).detached()
        with uncast(upstream.device):
            # A second backward (retain_graph=True) finds nothing and computes again, rather than scaling what may
            # already be somebody's .grad.
            (found, grads), ctx.ready = ctx.ready or run(call, hidden, head, ctx.expected), None
            if call.given is None:
                grads = late_grads(call, hidden, head, found, grads, upstream)
            else:
                left = upstream if ctx.expected is None else upstream / ctx.expected
                for grad in grads:
                    if grad is not None:
                        call.backend.scale(grad, left)
                _expect(upstream)
        if head.shard is not None:
            head.shard.finish(grads.hidden)
        inputs = hidden, head.trained, bias
        of = Grads(*(None if g is None else g.to(like.dtype) for g, like in zip(grads, inputs, strict=True)))
        if tail is None:
            return *of, None, None, None
        return of.hidden, None, of.bias, of.weight, None, None


# The last upstream gradient of a device, or of its stream, rounded to a power of two. A trainer divides every loss by
# the steps it accumulates, or multiplies it by a loss scale: with that in ``g`` from the start, backward finds
# nothing left to scale, and need not read and write the head's gradient. A power of two rounds nothing, so no bit of
# a result depends on what was expected.
_expected: dict[Any, Tensor] = {}
EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}
EXPECTED = 2.0**-8, 2.0**24  # coefficients of overflowed rows reach down to e^-60, and shall not leave float32


def _expect(upstream: Tensor) -> None:
    integer, bits = EXPONENT[upstream.dtype]
    _expected[_lane(upstream)] = (upstream.view(integer) & bits).view(upstream.dtype).clamp(*EXPECTED)


def _lane(tensor: Tensor) -> Any:
    """Where what one call leaves is there for the next without waiting for it."""
    return torch.cuda.current_stream(tensor.device) if tensor.device.type == "cuda" else tensor.device


def refuse_second_derivatives() -> None:
    """A backward that builds a graph of itself would leave ours out of it without a word.

    Raises:
        RuntimeError: backward runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "orpo_kernels has first derivatives only, and backward was called with create_graph=True: compute the "
            "term that needs second derivatives from orpo_kernels.reference, or drop create_graph"
        )


def warn_skipped(targets: Targets) -> None:
    """Say once per place that pairs with an empty answer leave the mean over pairs."""
    pairs = len(targets.sizes.pairs)
    skipped = pairs - targets.sizes.valid
    if skipped:
        warnings.warn(
            f"{skipped} of {pairs} pairs have an answer without a token (all labels ignored): they leave the mean over "
            "pairs, and their chosen tokens still count in the NLL. Truncation that keeps the prompt and drops the "
            "answer is the usual cause: raise the maximum length or filter such pairs",
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """``stacklevel`` of the first frame outside this package and torch, as seen from ``warn_skipped``."""
    ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level
