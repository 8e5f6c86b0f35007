"""The entropy of rows that are nearly sure of a token, where a log-sum-exp less an expectation would cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import FACTOR
from orpo_kernels.integrations import fuse, fusion_report


def entropy_of(logits: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("loss_first", [False, True])  # a product of its own, and in passing
def test_entropy_of_sure_rows(loss_first: bool) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(32, 3000), torch.randn(24, 32)
    with torch.no_grad():
        hidden += 3 * head.weight[::125] * 32
    hidden.requires_grad_()
    truth = entropy_of(F.linear(hidden.double(), head.weight.double(), head.bias.double()))
    assert truth.max() < 1e-2
    stock = entropy_of(head(hidden))
    fuse(head, head)
    for _ in range(2):
        logits = head(hidden)
        if loss_first:
            F.cross_entropy(logits, torch.arange(0, 3000, 125)).backward()
        ours = entropy_of(logits)
        errors = [((found.double() - truth) / truth).abs().max() for found in (ours, stock)]
        assert errors[0] <= FACTOR * errors[1]
    assert not fusion_report(head).materialised
