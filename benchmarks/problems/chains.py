"""What training losses make of logits: the five chains of operations that most scripts have, from logits to a scalar.

Each is written as its library has it, for padded sequences whose first half is chosen. Logits ``[2P, T, V]`` are those
of ``problem.targets``, so nothing is shifted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems.cases import BETA, IGNORE, LOGITS_TASKS
from benchmarks.problems.inputs import Problem

Chain = Callable[[Tensor, Problem], Tensor]
TEMPERATURE = 0.9


def float32(logits: Tensor) -> Tensor:
    """As every one of these libraries casts them; the truth stays in float64."""
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def _batch_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over answers, and their lengths: token 0 is gathered where nothing counts, and the mask comes after."""
    mask = labels != IGNORE
    logps = torch.gather(logits.log_softmax(-1), 2, labels.where(mask, 0).unsqueeze(2)).squeeze(2)
    return (logps * mask).sum(-1), mask.sum(-1)


def _selected(logits: Tensor, index: Tensor) -> Tensor:
    """TRL's selective_log_softmax, in its form for the dtype."""
    if logits.dtype in (torch.float32, torch.float64):
        picked = torch.gather(logits, -1, index.unsqueeze(-1)).squeeze(-1)
        return picked - torch.stack([torch.logsumexp(row, -1) for row in logits])
    rows = zip(logits, index, strict=True)
    return torch.stack([F.log_softmax(row, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for row, ids in rows])


def sft(logits: Tensor, problem: Problem) -> Tensor:
    """transformers' causal loss, and the accuracy that trainers log."""
    logits = float32(logits)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), problem.targets.view(-1), ignore_index=IGNORE)
    with torch.no_grad():
        (logits.argmax(-1) == problem.targets).float().mean()
    return loss


def dpo(logits: Tensor, problem: Problem) -> Tensor:
    """DPO of TRL up to 0.15 and of LLaMA-Factory, with a reference that is 0, and its means of logits."""
    logits = float32(logits)
    chosen, rejected = _batch_logps(logits, problem.labels)[0].chunk(2)
    for side in logits.detach().chunk(2):
        side.mean()
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def grpo(logits: Tensor, problem: Problem) -> Tensor:
    """TRL's GRPO: a temperature in place, one log-probability a position, and the entropy without gradient."""
    logits = logits[:, :, :]
    logits.div_(TEMPERATURE)
    mask = problem.labels != IGNORE
    logps = _selected(logits, problem.labels.where(mask, 0))
    with torch.no_grad():
        for part in logits.reshape(-1, logits.size(-1)).split(128):
            every = F.log_softmax(part, -1)
            -(torch.exp(every) * every).sum(-1)
    advantages = torch.linspace(-1, 1, len(logps), device=logps.device)[:, None]
    return -((torch.exp(logps - logps.detach()) * advantages * mask).sum(-1) / mask.sum(-1)).mean()


def kto(logits: Tensor, problem: Problem) -> Tensor:
    """KTO with a reference and a KL estimate of 0, and its sums of logits."""
    logits = float32(logits)
    chosen, rejected = _batch_logps(logits, problem.labels)[0].chunk(2)
    for side in logits.detach().chunk(2):
        side.nansum()
    return torch.cat([1 - torch.sigmoid(BETA * chosen), 1 - torch.sigmoid(-BETA * rejected)]).mean()


def factory_orpo(logits: Tensor, problem: Problem) -> Tensor:
    """LLaMA-Factory's ORPO: means of answers alone, and means of logits with their gradient."""
    logits = float32(logits)
    sums, lengths = _batch_logps(logits, problem.labels)
    chosen, rejected = (sums / lengths).chunk(2)
    for side in logits.split(len(chosen)):
        side.mean().item()
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return (-chosen - BETA * F.logsigmoid(log_odds)).mean()


CHAINS: dict[str, Chain] = dict(zip(LOGITS_TASKS, (sft, dpo, grpo, kto, factory_orpo), strict=True))
