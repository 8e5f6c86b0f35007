"""Errors of log-probabilities and gradients against float64, from hopeless to certain predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import orpo_kernels
from benchmarks.harness.record import AccuracyRow
from benchmarks.problems.cases import REGIMES, States
from benchmarks.problems.inputs import WEIGHT_STD, make_hidden
from orpo_kernels import reference

TARGETS, FEATURES, VOCAB = 256, 512, 32000
DTYPES = (torch.bfloat16, torch.float32)
QUANTITIES = ("logps", "grad_hidden", "grad_weight")

# Ours must be within twice the naive error, or below what the rounding of inputs and results alone amounts to. The
# tests compare with the same numbers.
FACTOR = 2.0
VALUE_FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRAD_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(
    device: str = "cpu",
    targets: int = TARGETS,
    features: int = FEATURES,
    vocab: int = VOCAB,
) -> list[AccuracyRow]:
    """Every regime in every dtype."""
    size = targets, features, vocab
    return [row for dtype in DTYPES for states in REGIMES for row in _regime(states, dtype, torch.device(device), size)]


def _regime(states: States, dtype: torch.dtype, device: torch.device, size: tuple[int, int, int]) -> list[AccuracyRow]:
    targets, features, vocab = size
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn((vocab, features), generator=generator, device=device).mul_(WEIGHT_STD).to(dtype)
    labels = torch.randint(vocab, (targets,), generator=generator, device=device)
    hidden = make_hidden(weight, labels, states, None, generator)
    true = _outputs(reference.linear_logprobs, hidden.double(), weight.double(), labels)
    naive = _outputs(reference.linear_logprobs, hidden, weight, labels)
    ours = _outputs(orpo_kernels.linear_logprobs, hidden, weight, labels)
    mean, name, rows = true[0].mean().item(), str(dtype).removeprefix("torch."), []
    for index, quantity in enumerate(QUANTITIES):
        yardstick, error = relative_error(naive[index], true[index]), relative_error(ours[index], true[index])
        allowed = max(FACTOR * yardstick, (VALUE_FLOOR if quantity == "logps" else GRAD_FLOOR)[dtype])
        rows.append(AccuracyRow(states.name, mean, name, quantity, yardstick, error, allowed))
    return rows


def _outputs(logprobs: Logprobs, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradients of their mean."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logps = logprobs(hidden, weight, labels)
    grad_hidden, grad_weight = torch.autograd.grad(logps.mean(), (hidden, weight))
    return logps.detach(), grad_hidden, grad_weight


def relative_error(value: Tensor, true: Tensor) -> float:
    """Of Frobenius norms, in float64."""
    return float(((value.double() - true).norm() / true.norm().clamp(min=1e-300)).item())
