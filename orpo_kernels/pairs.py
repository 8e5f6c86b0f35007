"""What an objective is: from the log-probabilities of pairs to a loss for each pair, and how one is called.

An objective is any callable on ``PairLogps`` that returns the losses ``[P]``, in ordinary torch: their derivatives come
from autograd on the ``[P]`` vectors. It may return ``PairTerms`` instead, with derivatives in closed form, where
autograd's would not be finite, and with figures to be averaged beside the loss. Pairs are computed in groups where
memory asks for it, so the loss of a pair must not depend on other pairs, unless ``couples_pairs = True`` says so.

Optional attributes of an objective:

    nll_weight       weight of the NLL where the caller names none; 0 without the attribute
    paired           False: sequences have no partners, all are chosen, and no pair has a loss: the NLL is what trains
    couples_pairs    True: a pair's loss depends on others, so all pairs are computed at once, those that count alone
    metric_names     names of the ``metrics`` of its terms; the output holds their means over the pairs that count
    rewards(pairs)   chosen and rejected rewards ``[P]``; without it the sums, less the reference's where there is one
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.settings import number


class PairLogps(NamedTuple):
    """What is known of P pairs: all ``[P]``, float32 (float64 for float64 inputs), log-probabilities in nats."""

    chosen_sum: Tensor  # over the answer's tokens
    rejected_sum: Tensor
    chosen_length: Tensor  # tokens of the answer
    rejected_length: Tensor
    reference_chosen: Tensor | None = None  # the reference model's sums
    reference_rejected: Tensor | None = None
    margins: Tensor | None = None

    @property
    def chosen_mean(self) -> Tensor:
        """``chosen_sum / chosen_length``, 0 for an answer without a token."""
        return self.chosen_sum / self.chosen_length.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        return self.rejected_sum / self.rejected_length.clamp(min=1)

    @property
    def valid(self) -> Tensor:
        """Whether both answers have a token."""
        return (self.chosen_length > 0) & (self.rejected_length > 0)

    def reference(self) -> tuple[Tensor, Tensor]:
        """The reference model's sums, chosen and rejected.

        Raises:
            ValueError: the caller gave none.
        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError(
                "this objective needs reference_logps, [2P] sums of the reference model's log-probabilities over the "
                "answers, chosen first: compute them without gradient with sequence_logprobs(...)"
            )
        return self.reference_chosen, self.reference_rejected

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """The sums less the reference model's, chosen and rejected.

        Raises:
            ValueError: the caller gave none of the reference model.
        """
        chosen, rejected = self.reference()
        return self.chosen_sum - chosen, self.rejected_sum - rejected


class PairTerms(NamedTuple):
    """Losses with their derivatives, all ``[P]``."""

    loss: Tensor
    d_chosen_sum: Tensor  # d loss / d chosen_sum
    d_rejected_sum: Tensor
    metrics: tuple[Tensor, ...] = ()  # [P] each, in the order of the objective's metric_names


Objective = Callable[[PairLogps], Tensor | PairTerms]


def metric_names(objective: Any) -> tuple[str, ...]:
    """What an objective reports beside its losses."""
    names: tuple[str, ...] = getattr(objective, "metric_names", ())
    return names


def check_objective(objective: Any) -> None:
    """A callable whose optional attributes are what they should be.

    Raises:
        TypeError, ValueError: it is not; the message names what.
    """
    if isinstance(objective, type) or not callable(objective):
        got = f"the class {objective.__name__}" if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            f"objective must be callable on PairLogps, as orpo_kernels.objectives.ORPO(beta=0.1) is, got {got}: pass "
            "an instance or a function"
        )
    names = metric_names(objective)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"objective.metric_names must be a tuple of names, got {names!r}")
    number("objective.nll_weight", getattr(objective, "nll_weight", 0.0))
    if not isinstance(getattr(objective, "paired", True), bool):
        raise TypeError(f"objective.paired must be True or False, got {objective.paired!r}")


def terms_of(objective: Objective, pairs: PairLogps, valid: Tensor, count: int, *, differentiate: bool) -> PairTerms:
    """``objective(pairs)`` with derivatives, 0 for the pairs that are not ``valid [P]``, and checked for its form.

    What the objective sees is its own to change. One that couples pairs sees the ``count`` valid ones alone: what the
    others hold would reach the loss through them, and no gradient back.

    Raises:
        TypeError: the objective returned neither losses nor terms.
        ValueError: losses, derivatives or metrics are not ``[P]``; metrics have no names; the losses do not depend on
            the log-probabilities, or depend on a tensor whose gradient would be lost.
    """
    if getattr(objective, "couples_pairs", False) and count < valid.numel():
        of = torch.nonzero_static(valid, size=count).view(-1)
        some = PairLogps(*(None if value is None else value[of] for value in pairs))  # type: ignore[arg-type]
        found = terms_of(objective, some, valid[of], count, differentiate=differentiate)
        everywhere = [torch.zeros_like(pairs.chosen_sum).index_copy_(0, of, v) for v in (*found[:3], *found.metrics)]
        return PairTerms(everywhere[0], everywhere[1], everywhere[2], tuple(everywhere[3:]))
    with torch.set_grad_enabled(differentiate):
        sums = [value.detach().requires_grad_(differentiate) for value in pairs[:2]]
        seen = PairLogps(*(None if v is None else v.clone() for v in (*sums, *pairs[2:])))  # type: ignore[arg-type]
        found = _as_terms(objective(seen), valid, sums, differentiate)
    names = metric_names(objective)
    if len(found.metrics) != len(names):
        raise ValueError(f"objective names {len(names)} metrics in metric_names but returned {len(found.metrics)}")
    for name, value in zip((*PairTerms._fields[:3], *names), (*found[:3], *found.metrics), strict=True):
        if not isinstance(value, Tensor) or value.shape != valid.shape or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"objective must return one floating-point number for each of the {valid.numel()} pairs, but its "
                f"{name} is {got}: do not take a mean over pairs"
            )

    def kept(value: Tensor) -> Tensor:
        """A pair without an answer has no term, whatever the objective makes of it."""
        return torch.where(valid, value.detach(), 0).to(pairs.chosen_sum.dtype)

    metrics = tuple(kept(value) for value in found.metrics)
    return PairTerms(kept(found.loss), kept(found.d_chosen_sum), kept(found.d_rejected_sum), metrics)


def _as_terms(found: Any, valid: Tensor, sums: list[Tensor], differentiate: bool) -> PairTerms:
    """What an objective returned, as terms; derivatives that it did not give come from autograd."""
    if isinstance(found, PairTerms):
        return found
    if not isinstance(found, Tensor):
        raise TypeError(f"objective must return a tensor of losses or PairTerms, got {type(found).__name__}")
    if not differentiate or found.shape != valid.shape or not found.is_floating_point():
        return PairTerms(found, torch.zeros_like(sums[0]), torch.zeros_like(sums[1]))
    total = torch.where(valid, found, 0).sum()
    reached = _leaves(total)
    if not any(leaf is value for leaf in reached for value in sums):
        raise ValueError(
            "the objective's losses do not depend on chosen_sum, rejected_sum or their means in a way that autograd "
            "follows: keep to torch operations, without detach"
        )
    if not all(any(leaf is value for value in sums) for leaf in reached):
        raise ValueError(
            "the objective's losses depend on a tensor that asks for a gradient of its own, which it would not get: "
            "pass a number, or form such a loss from linear_logprobs"
        )
    d_chosen, d_rejected = torch.autograd.grad(total, sums, materialize_grads=True)
    return PairTerms(found, d_chosen, d_rejected)


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors that autograd would accumulate a gradient in."""
    ahead, seen, found = [value.grad_fn], set(), []
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found
