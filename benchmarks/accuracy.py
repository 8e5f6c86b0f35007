"""Errors of log-probabilities and gradients against float64, from hopeless to certain predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

import orpo_kernels
from benchmarks.cases import REGIMES, DTypeName, States
from benchmarks.inputs import WEIGHT_STD, make_hidden
from benchmarks.rows import AccuracyRow
from orpo_kernels import reference

SCORES, FEATURES, VOCAB = 256, 512, 32000
DTYPES: tuple[DTypeName, ...] = ("bfloat16", "float32")
QUANTITIES = ("logps", "grad_hidden", "grad_weight")

# Ours must be within twice the naive error, or below what the rounding of inputs and results alone amounts to.
FACTOR = 2.0
FLOORS = {
    ("bfloat16", "logps"): 4e-3,
    ("bfloat16", "grad_hidden"): 4e-3,
    ("bfloat16", "grad_weight"): 4e-3,
    ("float32", "logps"): 2e-6,
    ("float32", "grad_hidden"): 1e-4,
    ("float32", "grad_weight"): 1e-4,
}
assert {dtype for dtype, _ in FLOORS} <= set(get_args(DTypeName))

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``reference.linear_logprobs`` in the form that keeps its relative precision as p -> 1.

    ``-log(1 + sum_{v != y} exp(z_v - z_y))``. Taken as ``z_y - logsumexp(z)``, even float64 has nothing left of a
    log-probability of -4e-16, which is two of its units in the last place of 1.
    """
    z = reference.logits(hidden, weight)
    label = z.gather(-1, labels[:, None])
    others = z.scatter(-1, labels[:, None], -torch.inf).logsumexp(-1)
    excess = others - label.squeeze(-1)
    return -torch.logaddexp(torch.zeros_like(excess), excess)


def run(
    device: str = "cpu",
    scores: int = SCORES,
    features: int = FEATURES,
    vocab: int = VOCAB,
) -> list[AccuracyRow]:
    """Every regime in every dtype."""
    place = torch.device(device)
    return [
        row
        for dtype in DTYPES
        for states in REGIMES
        for row in _regime(states, dtype, place, (scores, features, vocab))
    ]


def _regime(states: States, dtype: DTypeName, device: torch.device, size: tuple[int, int, int]) -> list[AccuracyRow]:
    scores, features, vocab = size
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn((vocab, features), generator=generator, device=device).mul_(WEIGHT_STD)
    weight = weight.to(getattr(torch, dtype))
    labels = torch.randint(vocab, (scores,), generator=generator, device=device)
    hidden = make_hidden(weight, labels, states, None, generator)
    true = _outputs(truth, hidden.double(), weight.double(), labels)
    naive = _outputs(reference.linear_logprobs, hidden, weight, labels)
    ours = _outputs(orpo_kernels.linear_logprobs, hidden, weight, labels)
    rows = []
    for index, quantity in enumerate(QUANTITIES):
        yardstick, error = relative_error(naive[index], true[index]), relative_error(ours[index], true[index])
        allowed = max(FACTOR * yardstick, FLOORS[dtype, quantity])
        rows.append(AccuracyRow(states.name, true[0].mean().item(), dtype, quantity, yardstick, error, allowed))
    return rows


def _outputs(logprobs: Logprobs, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradients of their mean."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logps = logprobs(hidden, weight, labels)
    grad_hidden, grad_weight = torch.autograd.grad(logps.mean(), (hidden, weight))
    return logps.detach(), grad_hidden, grad_weight


def relative_error(value: Tensor, true: Tensor) -> float:
    """Of Frobenius norms, in float64."""
    return float((value.double() - true).norm() / true.norm())
