"""What every chain of the catalogue is made of: the batch, the result, the register, and the formulas they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH, LENGTH, VOCAB, PROMPT, KEEP = 4, 12, 64, 4, 7
IGNORE = -100
TEMPERATURE = 0.75


@dataclass(frozen=True)
class Batch:
    """Chosen sequences first, then rejected ones. Floats are exact in bfloat16: every dtype sees the same numbers."""

    ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], -100 at the prompt and at padding
    attention: Tensor  # [B, T], 0 at padding
    advantages: Tensor  # [B]
    reference_logps: Tensor  # [B, T-1]
    reference_logits: Tensor  # [B, T, V], of another model, plain
    token_temperature: Tensor  # [B, T]
    desirable: Tensor  # bool [B]

    @property
    def pairs(self) -> int:
        return self.ids.shape[0] // 2

    @property
    def mask(self) -> Tensor:
        """bool [B, T]: positions whose own token is an answer's."""
        return self.labels != IGNORE

    def to(self, dtype: torch.dtype) -> Batch:
        floats = {name: value.to(dtype) for name, value in vars(self).items() if value.is_floating_point()}
        return replace(self, **floats)


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    ids = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, -2:] = 0
    attention[2, -1:] = 0
    labels = ids.masked_fill(attention == 0, IGNORE)
    labels[:, :PROMPT] = IGNORE
    labels[3, PROMPT + 2] = IGNORE
    return Batch(
        ids,
        labels,
        attention,
        normal(BATCH),
        (normal(BATCH, LENGTH - 1) / 4 - 4).bfloat16().double(),
        normal(BATCH, LENGTH, VOCAB),
        (torch.rand(BATCH, LENGTH, generator=generator) / 2 + 0.75).bfloat16().double(),
        torch.tensor([True, False, True, False]),
    )


class Result(NamedTuple):
    """``loss`` is differentiated, or None where the chain has no gradient; ``values`` are compared."""

    loss: Tensor | None
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Chain:
    """One consumer of logits.

    ``lazy``: no operation of it needs the full logits. ``logprobs``: its gradient comes through log-probabilities of
    targets alone, for which a frozen head keeps what the forward found. ``in_place``: it changes the logits it gets.
    ``passes``: products its forward takes; the best k, and the same rows at a second temperature, are passes of their
    own. ``unless``: kinds of models (``tiny.KINDS``) with which it needs the full logits after all.
    """

    name: str
    stack: str
    run: Callable[[Tensor, Batch], Result]
    lazy: bool = True
    logprobs: bool = False
    in_place: bool = False
    passes: int = 1
    unless: tuple[str, ...] = ()


CHAINS: dict[str, Chain] = {}


def chain(
    stack: str,
    *,
    lazy: bool = True,
    logprobs: bool = False,
    in_place: bool = False,
    passes: int = 1,
    unless: tuple[str, ...] = (),
) -> Callable[[Callable[[Tensor, Batch], Result]], Callable[[Tensor, Batch], Result]]:
    """Enter a function into ``CHAINS`` under its own name."""

    def register(function: Callable[[Tensor, Batch], Result]) -> Callable[[Tensor, Batch], Result]:
        assert function.__name__ not in CHAINS, function.__name__
        CHAINS[function.__name__] = Chain(function.__name__, stack, function, lazy, logprobs, in_place, passes, unless)
        return function

    return register


# ---- What consumers do to logits, shared by several stacks


def upcast(logits: Tensor) -> Tensor:
    """``logits.float()``, but float64 stays: rounding it to float32 would leave no truth to compare with."""
    return logits if logits.dtype == torch.float64 else logits.float()


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """TRL's: logsumexp row by row where it is accurate, log_softmax row by row in 16 bits."""
    if logits.dtype in (torch.float32, torch.float64):
        selected = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = []
    for row, labels in zip(logits, index, strict=True):
        rows.append(F.log_softmax(row, dim=-1).gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows)


def entropy_from_logits(logits: Tensor, rows: int = 16) -> Tensor:
    """TRL's, some rows at a time."""
    entropies = []
    for part in logits.reshape(-1, logits.shape[-1]).split(rows, dim=0):
        logps = F.log_softmax(part, dim=-1)
        entropies.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(entropies).reshape(logits.shape[:-1])


def gathered(logits: Tensor, index: Tensor) -> Tensor:
    """log_softmax, then the label's entry."""
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def batch_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``get_batch_logps`` of TRL 0.8 and LLaMA-Factory: token 0 is gathered where a label is ignored, and masked after.

    Sums and lengths, [B] each.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batch and sequence length dim) and labels must have the same shape.")
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    mask = labels != IGNORE
    labels[labels == IGNORE] = 0
    logps = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (logps * mask).sum(-1), mask.sum(-1)


def shifted_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The old loss inside a model: shift, flatten, CrossEntropyLoss."""
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    vocab = shift_logits.shape[-1]
    return torch.nn.CrossEntropyLoss()(shift_logits.view(-1, vocab), shift_labels.view(-1).to(shift_logits.device))


# ---- What is done with log-probabilities: plain tensors from here on


def answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels with 0 where ignored, and the mask, both for shifted positions."""
    mask = batch.mask[:, 1:]
    return batch.labels[:, 1:].masked_fill(~mask, 0), mask


def dpo(logps: Tensor, batch: Batch, beta: float = 0.5) -> Tensor:
    """Of sequence sums [B]."""
    ratio = logps - (batch.reference_logps * batch.mask[:, 1:]).sum(-1)
    return -F.logsigmoid(beta * (ratio[: batch.pairs] - ratio[batch.pairs :])).mean()


def simpo(means: Tensor, pairs: int, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    return -F.logsigmoid(beta * (means[:pairs] - means[pairs:]) - gamma).mean()


def odds_ratio(means: Tensor, pairs: int) -> Tensor:
    chosen, rejected = means[:pairs], means[pairs:]
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -F.logsigmoid(log_odds).mean()


def kto(logps: Tensor, batch: Batch, beta: float = 0.25) -> Tensor:
    ratio = logps - (batch.reference_logps * batch.mask[:, 1:]).sum(-1)
    sign = torch.where(batch.desirable, 1.0, -1.0).to(ratio.dtype)
    return (1 - torch.sigmoid(beta * sign * ratio)).mean()


def policy_gradient(logps: Tensor, mask: Tensor, batch: Batch, keep: int) -> Tensor:
    """The clipped surrogate on its first iteration, with the estimator of KL that GRPO takes."""
    ratio = torch.exp(logps - logps.detach())
    advantages = batch.advantages.unsqueeze(1)
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    apart = batch.reference_logps[:, -keep:] - logps
    per_token = -surrogate + 0.05 * (torch.exp(apart) - apart - 1)
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
