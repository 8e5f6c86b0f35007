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


def judge(ours: Outcome, stock: Outcome, coarse: Outcome, truth: Outcome, dtype: torch.dtype) -> None:
    """``ours`` is as near to ``truth`` as twice ``stock`` is, or as the rounding of the dtype alone amounts to.

    In float64 stock is the truth itself. What the chain makes of rounding is known all the same: ``coarse``, stock's
    run in float32, shows it, and float64 rounds 2**-29 times as coarsely.
    """
    assert ours.values.keys() == truth.values.keys()
    assert ours.grads.keys() == truth.grads.keys()
    for name, true in truth.values.items():
        value, plain = ours.values[name], stock.values[name]
        assert type(value) is Tensor, f"{name} is {type(value)}"
        assert (value.dtype, value.shape) == (plain.dtype, plain.shape), name
        assert value.requires_grad == plain.requires_grad, name
        if not true.is_floating_point():
            # The best of two logits that 16 bits round to one is the first for stock, the better one for us.
            assert ((value == plain) | (value == true)).all(), name
            continue
        # Means of signed terms can all but vanish: entries are measured beside 1, the size of what they are made of.
        size = max(_norm(true), true.numel() ** 0.5)
        _near(name, value, plain, coarse.values[name], true, dtype, VALUE_FLOOR[dtype] * size)
    for name, true in truth.grads.items():
        value, floor = ours.grads[name], GRAD_FLOOR[dtype] * _norm(true)
        assert value.dtype == dtype
        _near(f"gradient of {name}", value, stock.grads[name], coarse.grads[name], true, dtype, floor)


def _near(
    name: str,
    value: Tensor,
    stock: Tensor,
    coarse: Tensor,
    true: Tensor,
    dtype: torch.dtype,
    floor: float,
) -> None:
    assert torch.isfinite(value).all(), name
    error = _norm(value.double() - true)
    theirs = _norm(stock.double() - true) if dtype != torch.float64 else _norm(coarse.double() - true) * 2.0**-29
    assert error <= max(FACTOR * theirs, floor), f"{name}: error {error:.2e}, stock {theirs:.2e}, floor {floor:.0e}"


def _norm(value: Tensor) -> float:
    return float(value.detach().double().norm())


def compare(
    consume: Callable[[Tensor, Batch], Result],
    batch: Batch,
    kind: str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    frozen: bool = False,
) -> tuple[Tiny, float]:
    """A fused step judged beside stock ones: the fused model, and the products its forward took."""

    def made(dtype: torch.dtype) -> Tiny:
        model = Tiny(kind, dtype, seed)
        model.lm_head.requires_grad_(not frozen)
        return model

    forward = 0.0
    model = fused(made(dtype))

    def counted(logits: Tensor, batch: Batch) -> Result:
        nonlocal forward
        result = consume(logits, batch)
        forward = fusion_report(model).products
        return result

    truth, coarse, stock = (step(made(each), consume, batch) for each in (torch.float64, torch.float32, dtype))
    judge(step(model, counted, batch), stock, coarse, truth, dtype)
    return model, forward
