"""What CONTRIBUTING says of a new objective, backend and provider, done from outside and counted."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels import preference_loss, reference
from orpo_kernels.backends import Backend, Cost, Found, Grads, Part, acc_dtype
from orpo_kernels.objectives import PairLogps
from tests.cases import check, make

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class IPO:
    """``(d - 1 / (2 beta))^2`` of the mean log-ratios, arXiv 2310.12036, equation 17."""

    beta: float = 0.1

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.reference()
        a = (pairs.chosen_sum - chosen) / pairs.chosen_length
        b = (pairs.rejected_sum - rejected) / pairs.rejected_length
        return (a - b - 1 / (2 * self.beta)) ** 2


class FullLogits(Backend):
    """Full logits in the accumulation dtype: slow, large, and right."""

    name = "full"
    tuned_for = "nothing"

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def cost(self, n: int, vocab: int, features: int, dtype: torch.dtype, budget: int, *, store: bool) -> Cost:
        return Cost(n * vocab * 4 if store else 0, n * vocab * 8, budget)

    def forward(self, part: Part, into: Grads, *, store: bool) -> Found:
        logits = self._logits(part)
        logps = logits.log_softmax(-1).gather(1, part.ids[:, None]).squeeze(1)
        means = logits.mean(-1)
        if part.head.bias is not None and part.head.softcap is None:
            means = means - part.head.logit_scale * part.head.bias.to(means.dtype).mean()
        return Found(logps, means, logits if store else None)

    def backward(self, part: Part, found: Found, g: Tensor, into: Grads, *, accumulate: bool) -> None:
        logits = self._logits(part) if found.state is None else found.state
        grad = F.one_hot(part.ids, part.head.vocab) - logits.softmax(-1)
        grad = g[:, None] * grad * part.head.slope_of_capped(logits) * part.head.logit_scale
        if into.hidden is not None:
            into.hidden.index_add_(0, part.rows, (grad @ part.head.weight.to(grad.dtype)).to(into.hidden.dtype))
        ones = torch.ones_like(part.hidden[:, :1])
        for out, right in ((into.weight, part.hidden), (into.bias, ones)):
            if out is not None:
                total = (grad.T @ right[part.rows].to(grad.dtype)).view(out.shape)
                out.copy_(total + out if accumulate else total)

    def _logits(self, part: Part) -> Tensor:
        head, acc = part.head, acc_dtype(part.hidden.dtype)
        logits = part.hidden[part.rows].to(acc) @ head.weight.T.to(acc)
        return head.cap(head.logit_scale * (logits if head.bias is None else logits + head.bias.to(acc)))


def lines_promised(what: str) -> int:
    """The number of lines that CONTRIBUTING's table gives for a new thing."""
    row = re.search(rf"^\| {what} \|.*?(\d+) lines", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert row is not None, what
    return int(row[1])


def lines_of(thing: Any) -> int:
    return len([line for line in inspect.getsource(thing).splitlines() if line.strip()])


def test_an_objective_from_outside() -> None:
    assert lines_of(IPO) <= lines_promised("objective")
    case = make(torch.float64)
    sums = -10 * torch.rand(4, dtype=torch.float64, device=case.hidden.device)
    inputs = (case.hidden, case.weight, case.labels, IPO(0.2))
    ours = preference_loss(*inputs, reference_logps=sums).loss
    truth = reference.preference_loss(*inputs, reference_logps=sums)["loss"]
    torch.testing.assert_close(ours, truth)
    expected = case.grads(truth)
    for name, grad in case.grads(ours).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 3.0, "logit_scale": 0.7, "bias": True}], ids=str)
@pytest.mark.parametrize("workspace", [None, 40_000, 1])
def test_a_backend_from_outside(options: dict[str, Any], workspace: int | None) -> None:
    assert lines_of(FullLogits) <= lines_promised("backend")
    check(make(torch.float32, pairs=4, vocab=200, **options), backend=FullLogits(), workspace_bytes=workspace)
