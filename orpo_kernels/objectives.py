"""Objectives: from the log-probabilities of pairs to a loss for each pair.

An objective is any callable on ``PairLogps`` that returns the losses ``[P]``, in ordinary torch: their derivatives come
from autograd on the ``[P]`` vectors. It may return ``PairTerms`` instead, with derivatives in closed form, where
autograd's would not be finite, and with figures to be averaged beside the loss. Pairs are computed in groups where
memory asks for it, so the loss of a pair must not depend on other pairs, unless ``couples_pairs = True`` says so.

Optional attributes of an objective:

    nll_weight       weight of the NLL where the caller names none; 0 without the attribute
    couples_pairs    True: a pair's loss depends on others, so all pairs are computed at once, those that count alone
    metric_names     names of the ``metrics`` of its terms; the output holds their means over the pairs that count
    rewards(pairs)   chosen and rejected rewards ``[P]``; without it the sums, less the reference's where there is one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.settings import number

# The gradient of the rejected side goes as 1 / (1 - p) and truly diverges as p -> 1, so l is held at or below -1e-6.
# The chosen side needs a bound only so that log(1 - p) stays finite when p rounds to 1.
REJECTED_BOUND = -1e-6
CHOSEN_BOUND = -torch.finfo(torch.float32).tiny


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
                "answers, chosen first: compute them without gradient with linear_logprobs(...).sum(-1)"
            )
        return self.reference_chosen, self.reference_rejected


class PairTerms(NamedTuple):
    """Losses with their derivatives, all ``[P]``."""

    loss: Tensor
    d_chosen_sum: Tensor  # d loss / d chosen_sum
    d_rejected_sum: Tensor
    metrics: tuple[Tensor, ...] = ()  # [P] each, in the order of the objective's metric_names


Objective = Callable[[PairLogps], Tensor | PairTerms]


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, by whichever form does not cancel (Maechler 2012).

    Each form sees only its own side of the switch, so that autograd's zero times infinity never arises.
    """
    switch = -0.6931
    near, far = x.clamp(min=switch), x.clamp(max=switch)
    return torch.where(x > switch, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``(l_w - l_l) - (log1mexp(l_w) - log1mexp(l_l))`` of mean log-probabilities below 0."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


@dataclass(frozen=True)
class ORPO:
    """``beta * softplus(-log_odds)`` of the mean log-probabilities, beside the NLL.

    Source: arXiv 2403.07691, equations 6 and 7 (beta is its lambda). Derivatives in closed form, with p = exp(l) and
    o = p / (1 - p):

        d/dl_w = -beta * o_l / (o_l (1 - p_w) + p_w)         finite for every p_w
        d/dl_l =  beta * sigmoid(-log_odds) / (1 - p_l)      bounded by l_l <= -1e-6
    """

    beta: float = 0.1
    nll_weight: ClassVar[float] = 1.0
    metric_names: ClassVar[tuple[str, ...]] = ("log_odds_ratio", "log_odds_chosen")  # logsigmoid(log_odds), log_odds

    def __post_init__(self) -> None:
        _check_numbers(self)

    def __call__(self, pairs: PairLogps) -> PairTerms:
        """The terms of each pair."""
        chosen = pairs.chosen_mean.clamp(max=CHOSEN_BOUND)
        rejected = pairs.rejected_mean.clamp(max=REJECTED_BOUND)
        odds = log_odds(chosen, rejected)
        p_chosen, p_rejected = chosen.exp(), rejected.exp()
        # o_l / (o_l (1 - p_w) + p_w) with both sides multiplied by 1 - p_l. Where both probabilities underflow the
        # limit is that of o_l / (o_l + o_w) = sigmoid(-log_odds), which needs neither.
        spread = p_rejected * -torch.expm1(chosen) + p_chosen * -torch.expm1(rejected)
        tiny = torch.finfo(spread.dtype).tiny
        toward = torch.where(spread > 1e3 * tiny, p_rejected / spread.clamp(min=tiny), torch.sigmoid(-odds))
        return PairTerms(
            loss=self.beta * F.softplus(-odds),
            d_chosen_sum=-self.beta * toward / pairs.chosen_length.clamp(min=1),
            d_rejected_sum=self.beta
            * torch.sigmoid(-odds)
            / -torch.expm1(rejected)
            / pairs.rejected_length.clamp(min=1),
            metrics=(F.logsigmoid(odds), odds),
        )

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean


@dataclass(frozen=True)
class SimPO:
    """``-logsigmoid(beta * (l_w - l_l) - gamma)`` of the mean log-probabilities, without a reference model.

    Source: arXiv 2405.14734, equation 6; gamma is the target margin itself, not its ratio to beta.
    """

    beta: float = 2.0
    gamma: float = 0.5

    def __post_init__(self) -> None:
        _check_numbers(self)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        return -F.logsigmoid(self.beta * (pairs.chosen_mean - pairs.rejected_mean) - self.gamma)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean


@dataclass(frozen=True)
class DPO:
    """``-(1 - s) logsigmoid(beta d) - s logsigmoid(-beta d)``, with s the label smoothing.

    ``d = (chosen_sum - reference_chosen) - (rejected_sum - reference_rejected)``; needs ``reference_logps``.

    Source: arXiv 2305.18290, equation 7; label smoothing (s < 0.5) as in its conservative form,
    https://ericmitchell.ai/cdpo.pdf, equation 3.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be below 0.5, got {self.label_smoothing}")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair.

        Raises:
            ValueError: the caller gave no reference_logps.
        """
        chosen, rejected = self.rewards(pairs)
        return _logistic(chosen - rejected, self.label_smoothing)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.reference()
        return self.beta * (pairs.chosen_sum - chosen), self.beta * (pairs.rejected_sum - rejected)


@dataclass(frozen=True)
class CPO:
    """TRL's losses over pairs without a reference model, beside the NLL of the answers, under its names.

    With l the log-probability of an answer, r = l or, under an ``alpha`` that is not 0 (AlphaPO, arXiv 2501.03884),
    r = (1 - exp(-alpha l)) / alpha, s the label smoothing and d = r_w - r_l:

        "sigmoid"  l is the sum     -(1 - s) logsigmoid(beta d) - s logsigmoid(-beta d)   arXiv 2401.08417, equation 3
        "simpo"    l is the mean    the same of beta d - gamma                            arXiv 2405.14734, equation 6
        "hinge"    l is the sum     relu(1 - beta d)                                      arXiv 2305.10425
        "ipo"      l is the mean    (d - 1 / (2 beta))^2                                  arXiv 2310.12036, equation 17

    ``gamma`` is TRL's ``simpo_gamma`` and is read by "simpo" alone, ``label_smoothing`` by "sigmoid" and "simpo", and
    ``nll_weight`` is TRL's ``cpo_alpha``.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma: float = 0.5
    alpha: float = 0.0
    nll_weight: float = 1.0

    LOSS_TYPES: ClassVar[tuple[str, ...]] = ("sigmoid", "hinge", "ipo", "simpo")

    def __post_init__(self) -> None:
        if self.loss_type not in self.LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {self.LOSS_TYPES}, got {self.loss_type!r}")
        _check_numbers(self, signed=("gamma", "alpha"), text=("loss_type",))
        if not torch.compiler.is_compiling():
            number("beta", self.beta, positive=self.loss_type == "ipo")
            if self.label_smoothing > 1:
                raise ValueError(f"label_smoothing must be at most 1, got {self.label_smoothing}")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self._shaped(pairs)
        difference = chosen - rejected
        if self.loss_type == "hinge":
            return F.relu(1 - self.beta * difference)
        if self.loss_type == "ipo":
            return (difference - 1 / (2 * self.beta)) ** 2
        return _logistic(
            self.beta * difference - (self.gamma if self.loss_type == "simpo" else 0), self.label_smoothing
        )

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._shaped(pairs)
        return self.beta * chosen, self.beta * rejected

    def _shaped(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The rewards of the answers before beta, chosen and rejected."""
        means = self.loss_type in ("ipo", "simpo")
        chosen, rejected = (pairs.chosen_mean, pairs.rejected_mean) if means else pairs[:2]
        if self.alpha == 0:
            return chosen, rejected
        return -torch.expm1(-self.alpha * chosen) / self.alpha, -torch.expm1(-self.alpha * rejected) / self.alpha


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    """``-logsigmoid`` of the margin, with the share ``smoothing`` of its opposite."""
    if smoothing == 0:  # an infinite margin has no second term
        return -F.logsigmoid(margin)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _check_numbers(objective: Any, *, signed: tuple[str, ...] = (), text: tuple[str, ...] = ()) -> None:
    """Every field but ``text`` a finite float, not negative unless ``signed``; a compiled graph's operator asks."""
    if not torch.compiler.is_compiling():
        for name in (field.name for field in fields(objective) if field.name not in text):
            value = number(name, getattr(objective, name), signed=name in signed)
            object.__setattr__(objective, name, value)


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
