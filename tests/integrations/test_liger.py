"""Liger's ORPO loss under its own name, and Liger's other kernels in the same run as ours."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import liger_kernel.chunked_loss as chunked
import pytest
import torch
import transformers
from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss as Theirs
from torch import Tensor
from transformers.models.llama import modeling_llama

from orpo_kernels import reference
from orpo_kernels.integrations import fuse, fusion_report, patch_liger, unpatch_liger
from orpo_kernels.integrations import liger as drop_in
from orpo_kernels.integrations.liger import LigerFusedLinearORPOLoss as Ours
from orpo_kernels.integrations.trainer import Settings
from tests.cases import GRAD_FLOOR, VALUE_FLOOR, Case, assert_as_accurate, make
from tests.integrations import test_trl as orpo
from tests.integrations.test_trl import CONFIGS, model, said

STOCK_FORWARD = Theirs.forward
FIGURES = ("chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean", "nll_loss")
FIGURES += ("chosen_rewards", "rejected_rewards", "log_odds_ratio", "log_odds_chosen")


@pytest.fixture(autouse=True)
def _unpatched() -> Any:
    yield
    unpatch_liger()
    assert Theirs.forward is STOCK_FORWARD


def prompted(case: Case) -> Tensor:
    """Labels of the NLL over both sides, prompt and answer, as Liger's own trainer passes them."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, case.weight.shape[0], case.labels.shape, generator=generator)
    return torch.where(case.labels == -100, prompt, case.labels)


def called(loss: Any, case: Case, nll_target: Tensor | None) -> dict[str, Tensor]:
    value, figures = loss(case.weight, case.hidden, case.labels, case.bias, nll_target=nll_target)
    assert len(figures) == 9
    assert not any(figure.requires_grad for figure in figures)
    return {"loss": value, **dict(zip(FIGURES, figures, strict=True))}


def truth_of(case: Case, nll_target: Tensor | None, beta: float, nll: bool) -> dict[str, Tensor]:
    """By the specification, in float64, with means of logits over every position."""
    exact = case.to(torch.float64)
    nll_labels = None if nll_target is None else nll_target[: len(nll_target) // 2]
    options = {"nll_labels": nll_labels, "bias": exact.bias, "beta": beta, "nll_weight": float(nll)}
    found = reference.orpo_loss(exact.hidden, exact.weight, case.labels, **options)
    logits = torch.nn.functional.linear(exact.hidden, exact.weight, exact.bias).detach()
    found["chosen_logits_mean"], found["rejected_logits_mean"] = (side.mean() for side in logits.chunk(2))
    return {"grads": exact.grads(found["loss"]), **found}  # type: ignore[dict-item]


@pytest.mark.works("Liger's LigerFusedLinearORPOLoss as a drop-in", by="own loop")
@pytest.mark.parametrize("patched", [False, True], ids=["our class", "their class, patched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "bias": True}, {"nll": False}, {"prompt": True, "chunk": 2}])
def test_nine_outputs_and_gradients_are_ligers(options: dict[str, Any], dtype: torch.dtype, patched: bool) -> None:
    """No figure is farther from float64 than twice Liger's own."""
    given = {"pairs": 3, "bias": False, "prompt": False, "nll": True, "beta": 0.1, "chunk": 1, **options}
    case = make(dtype, pairs=given["pairs"], bias=given["bias"])
    nll_target = prompted(case) if given["prompt"] else None
    made = {"beta": given["beta"], "compute_nll_loss": given["nll"], "chunk_size": given["chunk"]}
    stock = Theirs(compiled=False, **made)
    naive = called(stock, case, nll_target)
    naive_grads = case.grads(naive["loss"])
    truth = truth_of(case, nll_target, given["beta"], given["nll"])
    if patched:
        patch_liger(backend="torch")
        mine = called(stock, case, nll_target)  # an instance made before the patch
    else:
        mine = called(Ours(**made), case, nll_target)
    for name, value in mine.items():
        assert value.shape == naive[name].shape, name
        if name == "nll_loss" and not given["nll"]:
            assert value == naive[name] == 0
            continue
        assert_as_accurate(name, value, naive[name], truth[name], VALUE_FLOOR[dtype])
    for name, grad in case.grads(mine["loss"]).items():
        assert grad.dtype == naive_grads[name].dtype
        assert_as_accurate(name, grad, naive_grads[name], truth["grads"][name], GRAD_FLOOR[dtype])


def test_the_constructor_and_the_call_are_ligers() -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    assert parameters(Ours.__init__) == parameters(Theirs.__init__)
    assert parameters(Ours.forward) == parameters(STOCK_FORWARD)
    patch_liger()
    assert parameters(Theirs.forward) == parameters(STOCK_FORWARD)
    assert vars(Ours(5, 0.2, False, False, 3)).items() >= {"ignore_index": 5, "beta": 0.2, "chunk_size": 3}.items()


def test_frozen_parts_and_an_upstream_factor() -> None:
    case = make(torch.float32)
    case.weight.requires_grad_(False)
    (theirs,) = torch.autograd.grad(3 * called(Theirs(compiled=False), case, None)["loss"], case.hidden)
    (mine,) = torch.autograd.grad(3 * called(Ours(), case, None)["loss"], case.hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not called(Ours(), case, None)["loss"].requires_grad


def test_an_answer_without_a_token_is_finite_here() -> None:
    """Liger divides by its length: the loss is NaN, and with it every gradient of the head."""
    case = make(torch.float32, pairs=3)
    case.labels[4] = -100
    stock = called(Theirs(compiled=False), case, None)["loss"]
    assert torch.isnan(stock)
    assert torch.isnan(case.grads(stock)["weight"]).all()
    with pytest.warns(UserWarning, match="1 of 3 pairs have an answer without a token"):
        mine = called(Ours(), case, None)
    assert all(torch.isfinite(value).all() for value in mine.values())
    assert all(torch.isfinite(grad).all() for grad in case.grads(mine["loss"]).values())


class Named(Theirs):  # type: ignore[misc]
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **options: Any) -> str:
        return "mine"


def test_patching_is_idempotent_and_reversible(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_liger(workspace_bytes=1_000_000)
    patch_liger(backend="torch")
    assert drop_in.PATCH.settings == Settings("torch")
    assert chunked.LigerFusedLinearORPOLoss is Theirs  # whoever imported it by name has what is patched
    assert Theirs.forward is not STOCK_FORWARD
    assert Named()() == "mine"
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        patch_liger(backend="cuda")
    unpatch_liger()
    unpatch_liger()
    assert Theirs.forward is STOCK_FORWARD


# RMSNorm and SwiGLU are Triton kernels that its interpreter cannot run; what is left of Liger on a CPU is the rotary
# embedding, and the forward of its fused cross-entropy, which calls no kernel where a trainer passes no labels.
ON_A_CPU = {"rope": True, "rms_norm": False, "swiglu": False}
ON_A_GPU = {"rope": True, "rms_norm": True, "swiglu": True}
AVAILABLE = ON_A_GPU if torch.cuda.is_available() else ON_A_CPU
ROTARY: list[Any] = []


@pytest.fixture
def _watched_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces what belongs to all models: it is put back, and counted."""
    import liger_kernel.transformers.monkey_patch as theirs

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    rotary = theirs.liger_rotary_pos_emb
    monkeypatch.setattr(theirs, "liger_rotary_pos_emb", lambda *args: ROTARY.append(args) or rotary(*args))
    ROTARY.clear()
    torch.use_deterministic_algorithms(False)  # trainers seed themselves


@pytest.mark.slow
@pytest.mark.usefixtures("_watched_rotary")
@pytest.mark.works("Liger's other kernels (use_liger_kernel)", by="ORPO patch")
@pytest.mark.parametrize("fused_cross_entropy", [False, True], ids=["its fused cross-entropy off", "left on"])
def test_ligers_other_kernels_with_the_orpo_patch(
    fused_cross_entropy: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ORPO passes the model no labels, so Liger's fused cross-entropy has nothing to do and is no hindrance."""
    caplog.set_level(logging.INFO, logger="orpo_kernels")
    kernels = {**AVAILABLE, "cross_entropy": False, "fused_linear_cross_entropy": fused_cross_entropy}
    orpo.assert_same(CONFIGS["llama"](), tmp_path, use_liger_kernel=True, liger_kernel_config=kernels)
    assert ROTARY
    (line,) = said(caplog)
    assert "fused the loss of this ORPOTrainer: plan" in line


@pytest.mark.slow
@pytest.mark.usefixtures("_watched_rotary")
@pytest.mark.works("Liger's other kernels (use_liger_kernel)", by="lazy logits")
def test_ligers_other_kernels_with_lazy_logits(tmp_path: Path) -> None:
    kernels = {**AVAILABLE, "cross_entropy": False, "fused_linear_cross_entropy": False}
    options = {"use_liger_kernel": True, "liger_kernel_config": kernels}
    stock, weights = orpo.train(model(CONFIGS["llama"]()), tmp_path, False, **options)
    lazy = fuse(model(CONFIGS["llama"]()))
    ours, our_weights = orpo.train(lazy, tmp_path, False, **options)
    assert ROTARY
    report = fusion_report(lazy)
    assert report.calls > 0
    assert not report.materialised
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_watched_rotary")
@pytest.mark.works("Liger's other kernels (apply_liger_kernel_to_llama)", by="own loop")
def test_ligers_other_kernels_in_a_loop() -> None:
    """The model's own cross-entropy over lazy logits, with and without Liger's kernels below it."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    losses, grads = [], []
    for ligers, ours in ((False, False), (True, False), (True, True)):
        of: transformers.LlamaForCausalLM = model(CONFIGS["llama"]())
        if ligers:
            apply_liger_kernel_to_llama(model=of, fused_linear_cross_entropy=False, **AVAILABLE)
        if ours:
            fuse(of)
        loss = of(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(of.lm_head.weight.grad)
    assert ROTARY
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-6)
