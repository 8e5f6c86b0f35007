"""A model small enough to run hundreds of times, and the judgement of a fused run beside a stock one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR
from orpo_kernels.integrations import fuse, fusion_report
from tests.lazy.catalogue import VOCAB, Batch, Result

FEATURES = 16
# What the models of this field do around their head: a bias, gemma's cap, cohere's multiplier.
KINDS = ("bias", "softcap", "scale")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Tiny(nn.Module):
    """Embedding, one layer, head. Weights are exact in bfloat16, so that a model is the same one in every dtype."""

    def __init__(self, kind: str, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.lm_head = nn.Linear(FEATURES, VOCAB, bias=kind == "bias")
        size = 4.0 if kind == "scale" else 1.0  # the multiplier of 1/4 leaves logits of the same size
        scales = {"embedding": 1.0, "layer": FEATURES**-0.5, "lm_head": 2 * size * FEATURES**-0.5}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                values = torch.randn(parameter.shape, generator=generator) * scales[name.split(".")[0]]
                parameter.copy_(values.bfloat16())
        self.to(dtype)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        logits = self.lm_head(torch.tanh(self.layer(self.embedding(ids))))
        if self.kind == "softcap":
            logits = torch.tanh(logits / 5.0) * 5.0
        elif self.kind == "scale":
            logits = logits * 0.25
        return SimpleNamespace(logits=logits)


def fused(model: Tiny) -> Tiny:
    return fuse(model, head=model.lm_head)


@dataclass
class Outcome:
    """Every number one step gives: the loss and the chain's values, and the gradient of every parameter."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return self.values | {f"gradient of {name}": grad for name, grad in self.grads.items()}


def step(model: Tiny, consume: Callable[[Tensor, Batch], Result], batch: Batch) -> Outcome:
    """One forward, one backward where the consumer has a loss; gradients are taken away from the parameters."""
    result = consume(model(batch.ids).logits, batch.to(model.lm_head.weight.dtype))
    values = dict(result.values)
    if result.loss is not None:
        values["loss"] = result.loss
        result.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome(values, grads)


def errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """Of each number: the norm of its difference to the truth; of token ids, how many are others."""
    assert found.values.keys() == truth.values.keys()
    assert found.grads.keys() == truth.grads.keys()
    return {name: _distance(found.named()[name], true) for name, true in truth.named().items()}


def _distance(value: Tensor, true: Tensor) -> float:
    if true.is_floating_point():
        return _norm(value.double() - true)
    return float((value != true).sum())


def _norm(value: Tensor) -> float:
    return float(value.detach().double().norm())


def _floor(name: str, true: Tensor, dtype: torch.dtype) -> float:
    if not true.is_floating_point():  # 16 bits make one of two logits, and which of them is best is nobody's error
        return float(dtype.itemsize == 2)
    if name.startswith("gradient"):
        return GRAD_FLOOR[dtype] * _norm(true)
    # Means of signed terms can all but vanish: entries are measured beside 1, the size of what they are made of.
    return VALUE_FLOOR[dtype] * max(_norm(true), true.numel() ** 0.5)


def compare(
    consume: Callable[[Tensor, Batch], Result],
    batch: Batch,
    kind: str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    frozen: bool = False,
) -> Tiny:
    """A fused step is as near to float64 as twice stock's, or as the rounding of the dtype alone; the fused model.

    What stock's error is in 16 bits, six models say together: that of one number of one model is a matter of luck. In
    float64 stock is the truth itself. What a chain makes of rounding is known all the same: stock in float32 shows it,
    and float64 rounds 2**-29 times as coarsely.
    """

    def made(dtype: torch.dtype, seed: int = seed) -> Tiny:
        model = Tiny(kind, dtype, seed)
        model.lm_head.requires_grad_(not frozen)
        return model

    coarse = torch.float32 if dtype == torch.float64 else dtype
    scale = 2.0**-29 if dtype == torch.float64 else 1.0
    theirs: dict[str, float] = {}
    for each in range(seed, seed + (6 if dtype.itemsize == 2 else 1)):
        truth = step(made(torch.float64, each), consume, batch)
        found = errors(step(made(coarse, each), consume, batch), truth)
        theirs = {name: max(theirs.get(name, 0.0), error * scale) for name, error in found.items()}
    model = fused(made(dtype))
    ours, stock, truth = (step(each, consume, batch) for each in (model, made(dtype), made(torch.float64)))
    for name, value in ours.named().items():
        plain, true = stock.named()[name], truth.named()[name]
        assert type(value) is Tensor, f"{name} is {type(value)}"
        assert (value.dtype, value.shape) == (plain.dtype, plain.shape), name
        assert value.requires_grad == plain.requires_grad, name
        assert torch.isfinite(value).all(), name
        error, floor = _distance(value, true), _floor(name, true, dtype)
        assert error <= max(FACTOR * theirs[name], floor), f"{name}: {error:.2e}, stock {theirs[name]:.2e}, {floor:.0e}"
    return model


def second_step(model: Tiny, consume: Callable[[Tensor, Batch], Result], batch: Batch) -> tuple[float, float]:
    """The products that its forward took, and those of the whole step."""
    report = fusion_report(model)
    forward = 0.0

    def counted(logits: Tensor, batch: Batch) -> Result:
        nonlocal forward
        result = consume(logits, batch)
        forward = report.products
        return result

    step(model, consume, batch)
    report.reset()
    step(model, counted, batch)
    return forward, report.products
