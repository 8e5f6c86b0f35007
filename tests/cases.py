"""Inputs, and the comparison that every accuracy test uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR
from benchmarks.accuracy import relative_error as relative
from orpo_kernels import OrpoOutput, orpo_loss, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Without a GPU the Triton kernels run in Triton's interpreter, which multiplies bfloat16 and float16 wrongly.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float32,)
RUNS = [("torch", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
RUNS += [("triton", dtype) for dtype in TRITON_DTYPES]
every_run = pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=lambda value: str(value).removeprefix("torch."))


def assert_as_accurate(name: str, ours: Tensor, naive: Tensor, truth: Tensor, floor: float) -> None:
    """Our error against float64 is within twice the naive implementation's own, or below the floor of the dtype."""
    assert torch.isfinite(ours).all(), name
    mine, theirs = relative(ours, truth), relative(naive, truth)
    assert mine <= max(FACTOR * theirs, floor), f"{name}: error {mine:.2e}, naive {theirs:.2e}, floor {floor:.0e}"


class LargestTensor(TorchDispatchMode):
    """The largest storage any operation returned, in bytes, and the next smaller size."""

    largest = second = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                if size > self.largest:
                    self.largest, self.second = size, self.largest
                elif size < self.largest:
                    self.second = max(self.second, size)
        return out


@dataclass
class Case:
    """One call of the loss; ``tensors`` are what autograd tracks."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, with gradients asked for as before."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        hidden, weight = cast(self.hidden), cast(self.weight)
        assert hidden is not None
        assert weight is not None
        return replace(self, hidden=hidden, weight=weight, bias=cast(self.bias))

    def ours(self, **options: Any) -> OrpoOutput:
        options = {"backend": self.backend, **self.options, **options}
        return orpo_loss(self.hidden, self.weight, self.labels, bias=self.bias, **options)

    def reference(self) -> dict[str, Tensor]:
        return reference.orpo_loss(self.hidden, self.weight, self.labels, bias=self.bias, **self.options)

    def grads(self, loss: Tensor, upstream: float = 1.0) -> dict[str, Tensor]:
        """Gradients of ``upstream * loss`` in the tracked tensors that ask for one."""
        wanted = {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}
        found = torch.autograd.grad(loss * upstream, list(wanted.values()))
        return dict(zip(wanted, found, strict=True))


def make(
    dtype: torch.dtype = torch.float32,
    *,
    pairs: int = 2,
    length: int = 9,
    features: int = 32,
    vocab: int = 500,
    bias: bool = False,
    confidence: float = 0.0,
    scale: float = 0.2,
    seed: int = 0,
    keep: float = 0.7,
    **options: Any,
) -> Case:
    """Random hidden states and head; ``confidence`` moves each row towards its label's weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(vocab, features) * scale
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=generator)
    hidden = normal(2 * pairs, length, features) + confidence * weight[labels] / scale
    labels[torch.rand(labels.shape, generator=generator) > keep] = -100
    labels[:, 0] = torch.randint(0, vocab, (2 * pairs,), generator=generator)
    return Case(
        hidden.to(DEVICE, dtype).requires_grad_(),
        weight.to(DEVICE, dtype).requires_grad_(),
        labels.to(DEVICE),
        normal(vocab).to(DEVICE, dtype).requires_grad_() if bias else None,
        options,
    )


def cancelling(case: Case, value: Callable[[Case], Tensor]) -> dict[str, float]:
    """How many times the head's gradients by sequence are larger than their sum, by norms. What cancels in a sum leaves
    the errors of its terms."""
    wanted = {name: tensor for name, tensor in case.to(torch.float64).tensors.items() if name != "hidden"}
    alone = {name: [tensor.detach().clone().requires_grad_() for _ in case.labels] for name, tensor in wanted.items()}
    real = reference.logits

    def by_sequence(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        heads = zip(alone["weight"], alone.get("bias", [None] * len(hidden)), strict=True)
        return torch.stack([real(rows, *head, **options) for rows, head in zip(hidden, heads, strict=True)])

    with mock.patch.object(reference, "logits", by_sequence):
        found = value(case.to(torch.float64))
    times = {}
    for name, tensors in alone.items():
        grads = torch.stack(torch.autograd.grad(found, tensors, retain_graph=True))
        parts, whole = sum(grad.norm().item() for grad in grads), grads.sum(0).norm().item()
        times[name] = parts / max(whole, 1e-300) if parts else 1.0
    return times


def check(case: Case, upstream: float = 1.0, times: Mapping[str, float] | None = None, **options: Any) -> None:
    """Every value and gradient of a case against float64, beside the naive implementation in the case's dtype. A
    gradient's floor is ``times`` as high where it is given."""
    dtype = case.hidden.dtype
    truth_case = case.to(torch.float64)
    truth, naive, out = truth_case.reference(), case.reference(), case.ours(**options)
    truth_grads = truth_case.grads(truth["loss"], upstream)
    naive_grads, grads = case.grads(naive["loss"], upstream), case.grads(out.loss, upstream)
    for name, expected in truth.items():
        if name == "skipped_pairs":
            assert int(out.skipped_pairs) == int(expected)
            continue
        # Differences of log-probabilities and means of signed terms can all but vanish: their error is measured beside
        # the size of what they are made of.
        size = VALUE_FLOOR[dtype] * max(1.0, truth["nll_loss"].item())
        if name in (
            "odds_ratio_loss",
            "log_odds_ratio",
            "log_odds_chosen",
            "chosen_logits_mean",
            "rejected_logits_mean",
        ):
            error = (getattr(out, name).double() - expected).abs().item()
            if name.endswith("logits_mean"):
                size = max(size, VALUE_FLOOR[dtype] * expected.abs().item())
            assert error <= max(2 * (naive[name].double() - expected).abs().item(), size), name
            assert error <= max(FACTOR * (naive[name].double() - expected).abs().item(), size), name
        else:
            assert_as_accurate(name, getattr(out, name), naive[name], expected, VALUE_FLOOR[dtype])
    for name, expected in truth_grads.items():
        assert grads[name].dtype == dtype
        floor = GRAD_FLOOR[dtype] * (times or {}).get(name, 1.0)
        assert_as_accurate(f"grad_{name}", grads[name], naive_grads[name], expected, floor)
