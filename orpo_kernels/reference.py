"""The specification: full logits, plain autograd, any dtype.

Run in float64 this is the truth that tests and benchmarks measure against; run in bfloat16 or float32 it is the naive
implementation (logits in the dtype of the inputs, softmax in float32, as Hugging Face models and TRL compute it) whose
own error is the yardstick. What computes them faster is measured against this: ORPO's closed form in ``objectives``,
and the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.objectives import CHOSEN_BOUND, REJECTED_BOUND, PairLogps, log_odds
from orpo_kernels.settings import Batch


def logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [..., V], the dtype of the inputs
    """``cap(logit_scale * (hidden @ weight.T + bias))``, ``cap(z) = softcap * tanh(z / softcap)``."""
    z = F.linear(hidden, weight, bias)
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """``logp_t = z_{t, y_t} - logsumexp_v z_tv`` in the shape of labels, at least float32, 0 where ignored.

    In float64 the same number is formed as ``logsigmoid(z_y - logsumexp_{v != y} z_v)``, which does not cancel as
    p -> 1: a truth must hold in that regime too. Other dtypes take the log-softmax, as those who are measured do.
    """
    z = logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap)
    if z.dtype != torch.float64:
        z = torch.log_softmax(z.float(), -1)
    return _pick(z, labels, ignore_index)


def _pick(z: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Log-probabilities of labels from float64 logits or from a float32 log-softmax, 0 where ignored."""
    kept = labels != ignore_index
    places = torch.where(kept, labels, 0)[..., None]
    logps = z.gather(-1, places)
    if z.dtype == torch.float64:
        logps = F.logsigmoid(logps - z.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True))
    return torch.where(kept, logps.squeeze(-1), 0.0)


def odds_ratio(beta: float = 0.1) -> Callable[[PairLogps], Tensor]:
    """ORPO's objective as ordinary torch: ``beta * softplus(-log_odds)``, differentiated by autograd."""

    def bounded(value: Tensor, bound: float) -> Tensor:
        """The bound moves the value and leaves the derivative there, so a confident model still feels the loss."""
        return torch.where(value > bound, bound + value - value.detach(), value)

    def losses(pairs: PairLogps) -> Tensor:
        odds = log_odds(bounded(pairs.chosen_mean, CHOSEN_BOUND), bounded(pairs.rejected_mean, REJECTED_BOUND))
        return beta * F.softplus(-odds)

    return losses


def preference_loss(
    hidden: Tensor,  # [2P, T, H], chosen first
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T]
    objective: Callable[[PairLogps], Tensor],
    *,
    nll_labels: Tensor | None = None,
    reference_logps: Tensor | None = None,
    margins: Tensor | None = None,
    answer_weights: Tensor | None = None,
    bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_reduction: str = "token",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """The fields of ``orpo_kernels.PreferenceOutput`` that are no objective's own, as plain differentiable torch.

    ``L = nll_weight * NLL + mean_p objective(pair p)`` from padded input, see ``orpo_kernels.preference_loss``.
    """
    pairs = hidden.shape[0] // 2

    z = logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap)
    logit_means = z.detach().mean(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    if z.dtype != torch.float64:
        z = torch.log_softmax(z.float(), -1)

    in_answer = labels != ignore_index
    picked = _pick(z, labels, ignore_index)
    if answer_weights is not None:
        picked = torch.where(answer_weights == 0, 0, picked * answer_weights.to(picked.dtype))
    sums = picked.sum(-1)
    lengths = in_answer.sum(-1).to(sums.dtype)
    given = Batch(labels, reference_logps=reference_logps, margins=margins).of_pairs(sums.dtype)
    known = PairLogps(sums[:pairs], sums[pairs:], lengths[:pairs], lengths[pairs:], *given)

    nll_targets = (labels if nll_labels is None else nll_labels)[:pairs]
    nll_logps = _pick(z[:pairs], nll_targets, ignore_index)
    nll_counts = (nll_targets != ignore_index).sum(-1)
    if nll_reduction == "token":
        nll = -nll_logps.sum() / nll_counts.sum().clamp(min=1)
    else:
        nll = -(nll_logps.sum(-1) / nll_counts.clamp(min=1)).sum() / (nll_counts > 0).sum().clamp(min=1)

    valid = known.valid
    if getattr(objective, "couples_pairs", False):  # it sees the pairs that count alone
        known_to_it = PairLogps(*(None if value is None else value[valid] for value in known))  # type: ignore[arg-type]
        mean = objective(known_to_it).sum() / valid.sum().clamp(min=1)
    else:
        mean = torch.where(valid, objective(known), 0.0).sum() / valid.sum().clamp(min=1)
    targets = in_answer.long()  # of each position: two where the NLL names another token than the answer
    targets[:pairs] += (nll_targets != ignore_index) & ~(in_answer[:pairs] & (nll_targets == labels[:pairs]))

    def side_mean(side: slice) -> Tensor:
        there = torch.where(targets[side] > 0, logit_means[side] * targets[side], 0)
        return there.sum() / targets[side].sum().clamp(min=1)

    return {
        "loss": nll_weight * nll + mean,
        "nll_loss": nll,
        "objective_loss": mean,
        "pairs": known,
        "chosen_logits_mean": side_mean(slice(0, pairs)),
        "rejected_logits_mean": side_mean(slice(pairs, None)),
        "valid": valid,
    }


def orpo_loss(
    hidden: Tensor,  # [2P, T, H], chosen first
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T]
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """The fields of ``orpo_kernels.OrpoOutput``, from padded input, as plain differentiable torch.

    ``L = nll_weight * NLL + beta * mean_p softplus(-log_odds_p)``; ``options`` are those of ``preference_loss``.
    """
    out = preference_loss(hidden, weight, labels, odds_ratio(beta), nll_weight=nll_weight, **options)
    known, valid = out["pairs"], out["valid"]
    odds = log_odds(known.chosen_mean.clamp(max=CHOSEN_BOUND), known.rejected_mean.clamp(max=REJECTED_BOUND))

    def mean(per_pair: Tensor) -> Tensor:
        total: Tensor = torch.where(valid, per_pair, 0.0).sum() / valid.sum().clamp(min=1)
        return total

    return {
        "loss": out["loss"],
        "nll_loss": out["nll_loss"],
        "odds_ratio_loss": out["objective_loss"],
        "chosen_logps": known.chosen_mean,
        "rejected_logps": known.rejected_mean,
        "chosen_rewards": beta * known.chosen_mean,
        "rejected_rewards": beta * known.rejected_mean,
        "log_odds_ratio": mean(F.logsigmoid(odds)),
        "log_odds_chosen": mean(odds),
        "chosen_logits_mean": out["chosen_logits_mean"],
        "rejected_logits_mean": out["rejected_logits_mean"],
        "skipped_pairs": (~valid).sum(),
    }
