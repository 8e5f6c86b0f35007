"""The family: losses over pairs, each one class over ``PairLogps``. ``pairs`` says what an objective is.

In the formulas w and l are the sums of the log-probabilities of the chosen and the rejected answer, w' and l' their
means, a = w - w_ref and b = l - l_ref the log-ratios to a reference model, whose sums are ``reference_logps``,
d = a - b, LS = logsigmoid and s = sigmoid. Every loss is that of one pair; what trains is its mean over pairs, beside
``nll_weight`` times the NLL of the chosen side.

docs/objectives.md is made of the docstrings here: first the formula, then a paragraph "When:", last one "Source:".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.pairs import Objective, PairLogps, PairTerms
from orpo_kernels.settings import number

__all__ = [
    "APO",
    "ASFT",
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "MMPO",
    "NCA",
    "ORPO",
    "SFT",
    "SPPO",
    "AlphaPO",
    "CrossEntropy",
    "Objective",
    "PairLogps",
    "PairTerms",
    "ProbabilityRatio",
    "SLiC",
    "SimPO",
    "length_desensitised",
]

# The gradient of the rejected side goes as 1 / (1 - p) and truly diverges as p -> 1, so l is held at or below -1e-6.
# The chosen side needs a bound only so that log(1 - p) stays finite when p rounds to 1.
REJECTED_BOUND = -1e-6
CHOSEN_BOUND = -torch.finfo(torch.float32).tiny

# AlphaPO's reward grows as exp(-alpha l), which overflows for answers that a model finds very unlikely.
STEEPEST = 40.0


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


class _Checked:
    """Fields that are finite numbers, not negative unless the class says so; a compiled graph's operator asks."""

    SIGNED: ClassVar[tuple[str, ...]] = ()
    POSITIVE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        for name, kind in ((field.name, field.type) for field in fields(self)):  # type: ignore[arg-type]
            if kind == "float":
                value = number(name, getattr(self, name), signed=name in self.SIGNED, positive=name in self.POSITIVE)
                object.__setattr__(self, name, value)


class _OfMeans(_Checked):
    """Rewards of the losses over mean log-probabilities."""

    beta: float

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta w'`` and ``beta l'``."""
        return self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean


class _AgainstReference(_Checked):
    """Rewards of the losses against a reference model, which need ``reference_logps``."""

    beta: float

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta a`` and ``beta b``.

        Raises:
            ValueError: the caller gave no reference_logps.
        """
        chosen, rejected = pairs.log_ratios()
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True)
class ORPO(_OfMeans):
    """``-beta LS(o_w - o_l)`` with the log odds ``o = x' - log(1 - exp(x'))`` of the means, beside the NLL.

    When: one run takes a base model to the answers and to the preference at once, without a reference model.

    Derivatives in closed form, with p = exp(x'), q = p / (1 - p), and l' at or below -1e-6:

        d/dw' = -beta q_l / (q_l (1 - p_w) + p_w)     finite for every p_w
        d/dl' =  beta s(o_l - o_w) / (1 - p_l)        bounded, since l' is

    Source: arXiv 2403.07691, equations 6 and 7, where beta is lambda.
    """

    beta: float = 0.1
    nll_weight: ClassVar[float] = 1.0
    metric_names: ClassVar[tuple[str, ...]] = ("log_odds_ratio", "log_odds_chosen")  # logsigmoid(log_odds), log_odds

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


@dataclass(frozen=True)
class ProbabilityRatio(_OfMeans):
    """``-beta LS(w' - l')``, beside the NLL: ORPO with the ratio of probabilities in place of their odds'.

    When: the paper's ablation is to be repeated; it presses harder on the rejected side than ORPO.

    Source: arXiv 2403.07691, section 7.
    """

    beta: float = 0.1
    nll_weight: ClassVar[float] = 1.0

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        return -self.beta * F.logsigmoid(pairs.chosen_mean - pairs.rejected_mean)


@dataclass(frozen=True)
class SimPO(_OfMeans):
    """``-LS(beta (w' - l') - gamma)``, without a reference model.

    When: a tuned model is to rank answers of different lengths fairly, at the memory of one model.

    No NLL holds the model: give an ``nll_weight`` where it drifts.

    Source: arXiv 2405.14734, equation 6; gamma is the target margin itself, not its ratio to beta.
    """

    beta: float = 2.0
    gamma: float = 0.5

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        return -F.logsigmoid(self.beta * (pairs.chosen_mean - pairs.rejected_mean) - self.gamma)


@dataclass(frozen=True)
class AlphaPO(_Checked):
    """``-LS(beta (r_w - r_l) - gamma)`` with ``r = (1 - exp(-alpha x')) / alpha`` of the mean log-probabilities x'.

    When: SimPO fits, but lowers the chosen answers too; a positive alpha makes unlikely answers count more than likely
    ones, a negative one less. ``alpha = 0`` is SimPO.

    Where ``-alpha x'`` passes 40 the reward goes on along its tangent, which stays finite.

    Source: arXiv 2501.03884; gamma is the target margin itself, not its ratio to beta.
    """

    alpha: float
    beta: float = 2.0
    gamma: float = 0.5
    SIGNED: ClassVar[tuple[str, ...]] = ("alpha",)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.beta * _bent(pairs.chosen_mean, self.alpha), self.beta * _bent(pairs.rejected_mean, self.alpha)


@dataclass(frozen=True)
class DPO(_AgainstReference):
    """``-(1 - e) LS(beta d) - e LS(-beta d)``, with e the label smoothing; needs ``reference_logps``.

    When: a tuned model is at hand as the reference and is not to be left far behind: the usual choice against one.

    ``robust`` divides the same with a minus before its second term by ``1 - 2 e``, an unbiased estimate where the share
    e of the labels is flipped. An ``nll_weight`` is RPO's, whose paper takes ``nll_reduction="sequence"``.
    ``weighting`` multiplies by WPO's ``exp(w' + l')``, without its gradient and without the alignment to what the model
    would say itself. LD-DPO is ``answer_weights=length_desensitised(...)``, in the reference's sums as well.

    Source: arXiv 2305.18290, equation 7; label smoothing as in its conservative form,
    https://ericmitchell.ai/cdpo.pdf, equation 3; robust: arXiv 2403.00409; RPO: arXiv 2404.19733; WPO: arXiv
    2406.11827; LD-DPO: arXiv 2409.06411.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    robust: bool = False
    nll_weight: float = 0.0
    weighting: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be below 0.5, got {self.label_smoothing}")
        for name in ("robust", "weighting"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair.

        Raises:
            ValueError: the caller gave no reference_logps.
        """
        chosen, rejected = self.rewards(pairs)
        margin, flipped = chosen - rejected, self.label_smoothing
        if not self.robust or flipped == 0:
            loss = _logistic(margin, flipped)
        else:
            loss = (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)
        return loss * (pairs.chosen_mean + pairs.rejected_mean).detach().exp() if self.weighting else loss


@dataclass(frozen=True)
class IPO(_AgainstReference):
    """``(a / n_w - b / n_l - 1 / (2 beta))^2``, n the tokens of an answer; needs ``reference_logps``.

    When: labels are clean and DPO overfits them: the margin has a goal, and more than that is punished.

    Source: arXiv 2310.12036, equation 17, where beta is tau; per token, as TRL has it in agreement with its authors.
    """

    beta: float = 0.1
    POSITIVE: ClassVar[tuple[str, ...]] = ("beta",)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = pairs.log_ratios()
        chosen, rejected = chosen / pairs.chosen_length.clamp(min=1), rejected / pairs.rejected_length.clamp(min=1)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class SLiC(_AgainstReference):
    """``relu(1 - beta d)``, the hinge of SLiC on DPO's margin; needs ``reference_logps``.

    When: a pair that is apart already is to train nothing any more.

    Source: arXiv 2305.10425 by way of arXiv 2309.06657, which normalises it by a reference.
    """

    beta: float = 0.1

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self.rewards(pairs)
        return F.relu(1 - (chosen - rejected))


@dataclass(frozen=True)
class NCA(_AgainstReference):
    """``-LS(beta a) - 0.5 LS(-beta a) - 0.5 LS(-beta b)``; needs ``reference_logps``.

    When: the chosen answer's own probability is to stay, which DPO lets fall as long as the rejected one's falls more.

    Source: arXiv 2402.05369, for two answers, of which one has the reward 1.
    """

    beta: float = 0.1

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPO(_AgainstReference):
    """``0.5 [(a - (P - 0.5) / beta)^2 + (b - (0.5 - P) / beta)^2]``; needs ``reference_logps``.

    When: a preference model says how likely an answer is to win, as in rounds of self-play.

    P is the probability that the chosen answer wins, from ``margins``; without them the label is believed, P = 1. Twice
    this is TRL's ``sppo_hard``.

    Source: arXiv 2405.00675, equation 4.7, where 1 / beta is eta, 1000 there.
    """

    beta: float = 0.001
    POSITIVE: ClassVar[tuple[str, ...]] = ("beta",)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = pairs.log_ratios()
        wins = 1.0 if pairs.margins is None else pairs.margins
        target = (wins - 0.5) / self.beta
        return 0.5 * ((chosen - target) ** 2 + (rejected + target) ** 2)


@dataclass(frozen=True)
class APO(_AgainstReference):
    """Anchored losses, which move each answer by its own probability; needs ``reference_logps``.

    When: it is known whether the chosen answers are better than the model's own ("zero") or worse ("down").

        "zero"  1 - s(beta a) + s(beta b)   raises the chosen, lowers the rejected answer
        "down"  s(beta a) + 1 - s(beta d)   lowers both, the rejected one more: where the model is better than its data

    Source: arXiv 2408.06266, equations 7 and 8.
    """

    beta: float = 0.1
    kind: str = "zero"

    KINDS: ClassVar[tuple[str, ...]] = ("zero", "down")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind must be one of {self.KINDS}, got {self.kind!r}")
        super().__post_init__()

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self.rewards(pairs)
        if self.kind == "zero":
            return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class MMPO(_AgainstReference):
    """``-p LS(beta d) - (1 - p) LS(-beta d)`` with ``p = s(gamma m)``; needs ``reference_logps`` and ``margins``.

    When: answers have scores, so that it is known how much better the chosen one is.

    m is the chosen answer's score less the rejected one's, in ``margins``.

    Source: arXiv 2410.03145, "Margin Matching Preference Optimization".
    """

    beta: float = 0.1
    gamma: float = 1.0

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair.

        Raises:
            ValueError: the caller gave no reference_logps or no margins.
        """
        if pairs.margins is None:
            raise ValueError("this objective needs margins, [P] scores of the chosen answers less the rejected ones'")
        chosen, rejected = self.rewards(pairs)
        margin, quality = chosen - rejected, self.gamma * pairs.margins
        return -torch.sigmoid(quality) * F.logsigmoid(margin) - torch.sigmoid(-quality) * F.logsigmoid(-margin)


@dataclass(frozen=True)
class KTO(_AgainstReference):
    """A gain for each desirable answer and a loss for each undesirable one, against a baseline that has no gradient.

    When: answers are marked good or bad and have no partner.

        desirable     desirable_weight   * (1 - s(beta (a - z)))
        undesirable   undesirable_weight * (1 - s(beta (z - b)))         z = max(0, mean log-ratio of other answers)

    On pairs (as an objective; needs ``reference_logps``) the baseline of one side is estimated from the answers of the
    other, so pairs are coupled, and the loss of a pair is the mean of its two answers'. On answers without a partner
    call ``of_answers`` with their log-probabilities, as ``sequence_logprobs`` has them.

    Source: arXiv 2402.01306, equation 7.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    couples_pairs: ClassVar[bool] = True

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = pairs.log_ratios()
        desired = self.desirable_weight * torch.sigmoid(-self.beta * (chosen - self.baseline(rejected)))
        undesired = self.undesirable_weight * torch.sigmoid(-self.beta * (self.baseline(chosen) - rejected))
        return 0.5 * (desired + undesired)

    def of_answers(self, logps: Tensor, reference_logps: Tensor, desirable: Tensor, baseline: Tensor | float) -> Tensor:
        """The loss of each answer ``[S]``, whose mean trains.

        Args:
            logps: summed log-probabilities of the answers ``[S]``, with their graph.
            reference_logps: the reference model's ``[S]``.
            desirable: whether an answer is desirable ``[S]``, booleans.
            baseline: z, of ``baseline`` over prompts with answers of others; 0 for none.

        Raises:
            TypeError, ValueError: desirable is not boolean, or the three differ in shape.
        """
        if desirable.dtype != torch.bool:
            raise TypeError(f"desirable must be boolean, got {desirable.dtype}: compare your labels with the good one")
        if not logps.shape == reference_logps.shape == desirable.shape:
            shapes = [list(of.shape) for of in (logps, reference_logps, desirable)]
            raise ValueError(f"logps, reference_logps and desirable must have one shape, got {shapes}")
        sign = torch.where(desirable, 1.0, -1.0).to(logps.dtype)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(logps.dtype)
        return weight * torch.sigmoid(-self.beta * sign * (logps - reference_logps - baseline))

    @staticmethod
    def baseline(log_ratios: Tensor) -> Tensor:
        """``max(0, mean)`` of log-ratios to the reference, without gradient; 0 for none of them."""
        return (log_ratios.detach().sum() / max(1, log_ratios.numel())).clamp(min=0)


@dataclass(frozen=True)
class ASFT(_Checked):
    """``weight [-LS(o_w) - LS(-o_l)]`` with the log odds ``o = x' - log(1 - exp(x'))`` of the means, beside the NLL.

    When: as ORPO, in one run without a reference, with each answer moved by its own odds and not by the pair's.

    The sigmoid of log odds is the probability itself, so this is ``weight [-w' - log(1 - exp(l'))]``, in which nothing
    cancels; l' is held at or below -1e-6 as in ``ORPO``, with the derivative of the bound beyond it.

    Source: arXiv 2409.10571.
    """

    weight: float = 1.0
    nll_weight: ClassVar[float] = 1.0

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of each pair."""
        rejected = pairs.rejected_mean
        held = torch.where(rejected > REJECTED_BOUND, REJECTED_BOUND + rejected - rejected.detach(), rejected)
        return self.weight * (-pairs.chosen_mean - log1mexp(held))

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.weight * pairs.chosen_mean, self.weight * pairs.rejected_mean


@dataclass(frozen=True)
class SFT:
    """``0``, beside the NLL of the chosen side; the rejected answers are measured, and train nothing.

    When: a baseline on the same pairs, whose rejected answers are to be watched.

    Source: the cross-entropy of the chosen answers.
    """

    nll_weight: ClassVar[float] = 1.0

    def __call__(self, pairs: PairLogps) -> PairTerms:
        """Nothing for each pair."""
        nothing = torch.zeros_like(pairs.chosen_sum)
        return PairTerms(nothing, nothing.clone(), nothing.clone())


@dataclass(frozen=True)
class CrossEntropy(SFT):
    """``0``, beside the NLL of all sequences, which have no partners: ``hidden [S, T, H]`` and any number of them.

    When: plain fine-tuning, without a pair.

    Source: the cross-entropy of the answers.
    """

    paired: ClassVar[bool] = False


@dataclass(frozen=True)
class CPO(_Checked):
    """``-(1 - e) LS(beta (w - l)) - e LS(beta (l - w))``, beside the NLL of the answers; e is the label smoothing.

    When: a tuned model learns from answers of close quality at the memory of one model, and the NLL holds it.

    ``loss_type`` names all of TRL's losses over pairs without a reference model. With l the log-probability of an
    answer, r = l or, under an ``alpha`` that is not 0 (AlphaPO, arXiv 2501.03884), r = (1 - exp(-alpha l)) / alpha, and
    d = r_w - r_l:

        "sigmoid"  l is the sum     -(1 - e) LS(beta d) - e LS(-beta d)    arXiv 2401.08417, equation 3
        "simpo"    l is the mean    the same of beta d - gamma             arXiv 2405.14734, equation 6
        "hinge"    l is the sum     relu(1 - beta d)                       arXiv 2305.10425
        "ipo"      l is the mean    (d - 1 / (2 beta))^2                   arXiv 2310.12036, equation 17

    ``gamma`` is TRL's ``simpo_gamma`` and is read by "simpo" alone, ``label_smoothing`` by "sigmoid" and "simpo", and
    ``nll_weight`` is TRL's ``cpo_alpha``.

    Source: arXiv 2401.08417; those of the other forms stand beside them.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma: float = 0.5
    alpha: float = 0.0
    nll_weight: float = 1.0

    SIGNED: ClassVar[tuple[str, ...]] = ("gamma", "alpha")
    LOSS_TYPES: ClassVar[tuple[str, ...]] = ("sigmoid", "hinge", "ipo", "simpo")

    def __post_init__(self) -> None:
        if self.loss_type not in self.LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {self.LOSS_TYPES}, got {self.loss_type!r}")
        super().__post_init__()
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
        return _bent(chosen, self.alpha), _bent(rejected, self.alpha)


def _bent(x: Tensor, alpha: float) -> Tensor:
    """``(1 - exp(-alpha x)) / alpha``, and x for an alpha of 0; a tangent where the exponential is too steep."""
    if alpha == 0:
        return x
    steep = -alpha * x
    beyond = math.exp(STEEPEST) * F.relu(steep - STEEPEST)
    return -(torch.expm1(steep.clamp(max=STEEPEST)) + beyond) / alpha


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    """``-logsigmoid`` of the margin, with the share ``smoothing`` of its opposite."""
    if smoothing == 0:  # an infinite margin has no second term
        return -F.logsigmoid(margin)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def length_desensitised(labels: Tensor, alpha: float, ignore_index: int = -100) -> Tensor:
    """LD-DPO's weights of answer tokens, for ``answer_weights`` of ``preference_loss``.

    1 for as many tokens of an answer as the shorter one of its pair has, ``alpha`` for those after them. A reference
    model's sums take the same weights; ``reference=`` does so by itself.

    Args:
        labels: ``[2P, T]``, chosen first, ``ignore_index`` outside the answers.
        alpha: between 0, where what is longer counts for nothing, and 1, which is DPO.

    Returns:
        ``[2P, T]`` float32.

    Source: arXiv 2409.06411.
    """
    if not 0 <= number("alpha", alpha) <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if labels.dim() != 2 or labels.shape[0] % 2:
        raise ValueError(f"labels must be [2P, T], chosen first, got shape {list(labels.shape)}")
    counts = labels != ignore_index
    shorter = counts.sum(1).view(2, -1).amin(0).repeat(2)
    return torch.where(counts.cumsum(1) <= shorter[:, None], 1.0, float(alpha))
