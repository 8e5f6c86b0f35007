"""Errors of log-probabilities and gradients against float64, from hopeless to certain predictions."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

import orpo_kernels
from benchmarks.harness.record import AccuracyRow
from benchmarks.problems.cases import REGIMES
from benchmarks.problems.inputs import WEIGHT_STD, make_hidden
from orpo_kernels import reference

DTYPES = (torch.bfloat16, torch.float32)
QUANTITIES = ("logps", "grad_hidden", "grad_weight")

# Ours must be within twice the naive error, or below what the rounding of inputs and results alone amounts to. The
# tests compare with the same numbers.
FACTOR = 2.0
VALUE_FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRAD_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def run(device: str = "cpu", targets: int = 256, features: int = 512, vocab: int = 32000) -> list[AccuracyRow]:
    """Every regime in every dtype."""
    rows = []
    for dtype, states in product(DTYPES, REGIMES):
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn((vocab, features), generator=generator, device=device).mul_(WEIGHT_STD).to(dtype)
        labels = torch.randint(vocab, (targets,), generator=generator, device=device)
        hidden = make_hidden(weight, labels, states, None, generator)
        true = _outputs(reference.linear_logprobs, hidden.double(), weight.double(), labels)
        naive = _outputs(reference.linear_logprobs, hidden, weight, labels)
        ours = _outputs(orpo_kernels.linear_logprobs, hidden, weight, labels)
        mean, name = true[0].mean().item(), str(dtype).removeprefix("torch.")
        for quantity, truth, yardstick, own in zip(QUANTITIES, true, naive, ours, strict=True):
            theirs, error = relative_error(yardstick, truth), relative_error(own, truth)
            allowed = max(FACTOR * theirs, (VALUE_FLOOR if quantity == "logps" else GRAD_FLOOR)[dtype])
            rows.append(AccuracyRow(states.name, mean, name, quantity, theirs, error, allowed))
    return rows


def _outputs(logprobs: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities, and the gradients of their mean."""
    inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logps = logprobs(*inputs, labels)
    return logps.detach(), *torch.autograd.grad(logps.mean(), inputs)


def relative_error(value: Tensor, true: Tensor) -> float:
    """Of Frobenius norms, in float64."""
    return float(((value.double() - true).norm() / true.norm().clamp(min=1e-300)).item())
