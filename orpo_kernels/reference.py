"""The specification: full logits, plain autograd, any dtype.

Run in float64 this is the truth that tests and benchmarks measure against; run in bfloat16 or float32 it is the naive
implementation (logits in the dtype of the inputs, softmax in float32, as Hugging Face models and TRL compute it) whose
own error is the yardstick. Nothing else writes these formulas down again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.objective import CHOSEN_BOUND, REJECTED_BOUND, log1mexp


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


def orpo_loss(
    hidden: Tensor,  # [2P, T, H], chosen first
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T]
    *,
    nll_labels: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll_reduction: str = "token",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """The fields of ``orpo_kernels.OrpoOutput`` under their names, from padded input, as plain differentiable torch.

    ``L = nll_weight * NLL + beta * mean_p softplus(-log_odds_p)``, see ``orpo_kernels.orpo_loss``.
    """
    pairs = hidden.shape[0] // 2

    z = logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap)
    logit_means = z.detach().mean(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    if z.dtype != torch.float64:
        z = torch.log_softmax(z.float(), -1)

    in_answer = labels != ignore_index
    logps = _pick(z, labels, ignore_index)
    counts = in_answer.sum(-1)
    means = logps.sum(-1) / counts.clamp(min=1)
    chosen, rejected = means[:pairs], means[pairs:]

    nll_targets = (labels if nll_labels is None else nll_labels)[:pairs]
    nll_logps = _pick(z[:pairs], nll_targets, ignore_index)
    nll_counts = (nll_targets != ignore_index).sum(-1)
    if nll_reduction == "token":
        nll = -nll_logps.sum() / nll_counts.sum().clamp(min=1)
    else:
        nll = -(nll_logps.sum(-1) / nll_counts.clamp(min=1)).sum() / (nll_counts > 0).sum().clamp(min=1)

    def bounded(value: Tensor, bound: float) -> Tensor:
        """The bound moves the value and leaves the derivative there, so a confident model still feels the loss."""
        return value + (value.clamp(max=bound) - value).detach()

    l_w, l_l = bounded(chosen, CHOSEN_BOUND), bounded(rejected, REJECTED_BOUND)
    log_odds = (l_w - l_l) - (log1mexp(l_w) - log1mexp(l_l))
    valid = (counts[:pairs] > 0) & (counts[pairs:] > 0)
    n_valid = valid.sum().clamp(min=1)

    def mean(per_pair: Tensor) -> Tensor:
        return torch.where(valid, per_pair, 0.0).sum() / n_valid

    odds_loss = beta * mean(F.softplus(-log_odds))
    scored = in_answer.long()  # scores of each position: two where the NLL names another target than the answer
    scored[:pairs] += (nll_targets != ignore_index) & ~(in_answer[:pairs] & (nll_targets == labels[:pairs]))

    def side_mean(side: slice) -> Tensor:
        return (logit_means[side] * scored[side]).sum() / scored[side].sum().clamp(min=1)

    return {
        "loss": nll_weight * nll + odds_loss,
        "nll_loss": nll,
        "odds_ratio_loss": odds_loss,
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_rewards": beta * chosen,
        "rejected_rewards": beta * rejected,
        "log_odds_ratio": mean(F.logsigmoid(log_odds)),
        "log_odds_chosen": mean(log_odds),
        "chosen_logits_mean": side_mean(slice(0, pairs)),
        "rejected_logits_mean": side_mean(slice(pairs, None)),
        "skipped_pairs": pairs - valid.sum(),
    }
