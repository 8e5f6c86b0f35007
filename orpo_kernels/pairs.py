"""From log-probabilities per score to what each pair adds to the loss, and back to a coefficient per score."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.objective import CHOSEN_BOUND, PairTerms
from orpo_kernels.scores import Scores


class PairTable(NamedTuple):
    """What a run of whole pairs comes to, in the accumulation dtype.

    All but the last are ``[P]``; ``loss``, ``log_sigmoid`` and ``log_odds`` carry the pair's share of the mean over the
    pairs that have an odds ratio, so that a sum over pairs is the batch's value.
    """

    chosen: Tensor  # mean log-probability of the answer in nats; 0 says that it has no token, and nothing else
    rejected: Tensor
    nll: Tensor
    loss: Tensor  # of the objective
    log_sigmoid: Tensor  # logsigmoid(log odds)
    log_odds: Tensor
    chosen_logits: Tensor  # sum over the chosen side's scores of their mean logits
    rejected_logits: Tensor
    coefficients: Tensor  # [n], g = d loss / d logp of each score


def pair_table(
    logps: Tensor,
    logit_means: Tensor,
    scores: Scores,
    pairs: slice,
    part: slice,
    objective: Callable[[Tensor, Tensor], PairTerms],
    nll_weight: float,
) -> PairTable:
    """The table of ``pairs``, whose scores are ``part`` with ``logps [n]`` and mean logits over V ``[n]``."""
    offsets = scores.offsets[2 * pairs.start : 2 * pairs.stop + 1] - part.start
    answer, nll = scores.answer_weight[part], scores.nll_weight[part]

    def per_sequence(values: Tensor) -> Tensor:
        sums: Tensor = torch.segment_reduce(values, "sum", offsets=offsets, initial=0)
        return sums.view(-1, 2)

    chosen, rejected = per_sequence(logps * answer).unbind(1)
    terms = objective(chosen, rejected)
    share = scores.pair_valid[pairs].to(logps.dtype) / max(scores.valid_pairs, 1)
    gradient = (torch.stack([terms.grad_chosen, terms.grad_rejected], 1) * share[:, None]).view(-1)
    gradient = torch.repeat_interleave(gradient, offsets.diff(), output_size=logps.numel())
    valid = scores.pair_valid[pairs]
    chosen_logits, rejected_logits = per_sequence(logit_means).unbind(1)
    return PairTable(
        # A mean that rounds to 0 is moved off it.
        chosen=torch.where(valid, chosen.clamp(max=CHOSEN_BOUND), chosen),
        rejected=torch.where(valid, rejected.clamp(max=CHOSEN_BOUND), rejected),
        nll=-per_sequence(logps * nll).sum(1),
        loss=terms.loss * share,
        log_sigmoid=F.logsigmoid(terms.log_odds) * share,
        log_odds=terms.log_odds * share,
        chosen_logits=chosen_logits,
        rejected_logits=rejected_logits,
        coefficients=gradient * answer - nll_weight * nll,
    )
