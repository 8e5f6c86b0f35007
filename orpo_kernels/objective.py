"""Objectives: from length-normalised log-probabilities of a pair to its loss and that loss's derivatives.

A variant is a value: a frozen dataclass called on ``[P]`` chosen and rejected means. The engine knows only this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The gradient of the rejected side goes as 1 / (1 - p) and truly diverges as p -> 1, so l is held at or below -1e-6.
# The chosen side needs a bound only so that log(1 - p) stays finite when p rounds to 1.
REJECTED_BOUND = -1e-6
CHOSEN_BOUND = -torch.finfo(torch.float32).tiny


class PairTerms(NamedTuple):
    """Per pair, all ``[P]`` in the dtype of the inputs."""

    loss: Tensor
    log_odds: Tensor
    grad_chosen: Tensor  # d loss / d chosen
    grad_rejected: Tensor  # d loss / d rejected


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, by whichever form does not cancel (Maechler 2012).

    Each form sees only its own side of the switch, so that autograd's zero times infinity never arises.
    """
    switch = -0.6931
    near, far = x.clamp(min=switch), x.clamp(max=switch)
    return torch.where(x > switch, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


@dataclass(frozen=True)
class OddsRatio:
    """``beta * softplus(-log_odds)``, with ``log_odds = (l_w - l_l) - (log1mexp(l_w) - log1mexp(l_l))``.

    Source: ORPO, arXiv 2403.07691, equations 6 and 7. Derivatives in closed form, with p = exp(l) and o = p / (1 - p):

        d/dl_w = -beta * o_l / (o_l (1 - p_w) + p_w)         finite for every p_w
        d/dl_l =  beta * sigmoid(-log_odds) / (1 - p_l)      bounded by l_l <= -1e-6
    """

    beta: float

    def __call__(self, chosen: Tensor, rejected: Tensor) -> PairTerms:
        """Means in nats, ``[P]`` float32 or float64, to the terms of each pair."""
        chosen, rejected = chosen.clamp(max=CHOSEN_BOUND), rejected.clamp(max=REJECTED_BOUND)
        log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        p_chosen, p_rejected = chosen.exp(), rejected.exp()
        # o_l / (o_l (1 - p_w) + p_w) with both sides multiplied by 1 - p_l. Where both probabilities underflow the
        # limit is that of o_l / (o_l + o_w) = sigmoid(-log_odds), which needs neither.
        spread = p_rejected * -torch.expm1(chosen) + p_chosen * -torch.expm1(rejected)
        tiny = torch.finfo(spread.dtype).tiny
        share = torch.where(spread > 1e3 * tiny, p_rejected / spread.clamp(min=tiny), torch.sigmoid(-log_odds))
        return PairTerms(
            loss=self.beta * F.softplus(-log_odds),
            log_odds=log_odds,
            grad_chosen=-self.beta * share,
            grad_rejected=self.beta * torch.sigmoid(-log_odds) / -torch.expm1(rejected),
        )
