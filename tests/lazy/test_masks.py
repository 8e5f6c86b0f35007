"""Losses that gather some token where they mask afterwards: such rows need no way back, once the token is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from orpo_kernels.integrations import fuse, fusion_report
from orpo_kernels.integrations.lazy.heads import _LazyForward
from tests.lazy.catalogue import Batch, Result, batch_logps, make_batch
from tests.lazy.tiny import Tiny, errors, fused, second_step, step

BATCH = make_batch()


def late(logits: Tensor, batch: Batch) -> Result:
    """As the ``get_batch_logps`` family: token 0 is gathered where there is no label."""
    logps, _ = batch_logps(logits, batch.labels)
    return Result(-logps.mean(), {"logps": logps})


def filler(model: Tiny) -> int | None:
    forward = model.lm_head.forward
    assert isinstance(forward, _LazyForward)
    return forward.site.filler


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_products_of_rows_that_are_masked_late(frozen: bool) -> None:
    """One product for all, and two (one with the head frozen) for those that the loss keeps."""
    model = fused(Tiny("bias", torch.float64))
    model.lm_head.requires_grad_(not frozen)
    positions = BATCH.labels[:, 1:].numel()
    kept = (BATCH.labels[:, 1:] != -100).sum().item() / (positions + len(BATCH.labels))
    forward, both = second_step(model, late, BATCH)
    assert filler(model) == 0
    assert both == pytest.approx(positions / (positions + len(BATCH.labels)) + (1 if frozen else 2) * kept, abs=1e-6)
    assert forward <= both


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("workspace", [None, 4096], ids=["fits", "recomputed"])
def test_a_label_that_was_only_a_filler_before(frozen: bool, workspace: int | None) -> None:
    """Every step's numbers are stock's, whatever was learned from the steps before."""
    usual = BATCH
    labels = usual.labels.clone()
    labels[0, 4:] = 0
    unusual = replace(usual, labels=labels)
    models = [Tiny("bias", torch.float64), Tiny("bias", torch.float64)]
    ours = fuse(models[0], head=models[0].lm_head, workspace_bytes=workspace)
    for model in models:
        model.lm_head.requires_grad_(not frozen)
    for batch in (usual, usual, unusual, usual):
        found = errors(step(ours, late, batch), step(models[1], late, batch))
        assert max(found.values()) < 1e-12, found
    assert filler(ours) == 0


def test_a_token_that_is_a_label_too_is_no_filler() -> None:
    """A padding token that also ends answers."""
    end = 7

    def padded(logits: Tensor, batch: Batch) -> Result:
        index = batch.ids[:, 1:].clone()
        index[:, -3:] = end
        mask = torch.ones_like(index)
        mask[:, -2:] = 0
        logps = logits[:, :-1].log_softmax(-1).gather(-1, index[..., None])[..., 0]
        return Result(-(logps * mask).sum(), {"logps": logps})

    model = fused(Tiny("bias", torch.float64))
    for _ in range(3):
        step(model, padded, BATCH)
    assert filler(model) is None


def test_statistics_beside_masked_rows() -> None:
    """An entropy of all rows and the log-probabilities of some, with their gradients, after the filler is known."""

    def several(logits: Tensor, batch: Batch) -> Result:
        logps, _ = batch_logps(logits, batch.labels)
        log_probs = logits[:, :-1].log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return Result(-logps.mean() + 0.1 * entropy.mean(), {"logps": logps, "entropy": entropy})

    ours, stock = fused(Tiny("scale", torch.float64)), Tiny("scale", torch.float64)
    for consume in (late, several, late, several):
        found = errors(step(ours, consume, BATCH), step(stock, consume, BATCH))
        assert max(found.values()) < 1e-12, found
    assert filler(ours) == 0
    assert fusion_report(ours).materialised == []
