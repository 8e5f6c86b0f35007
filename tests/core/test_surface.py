"""What a caller may rely on beside the numbers: modules, autocast, backward twice, determinism, a light import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import orpo_kernels
from orpo_kernels import OrpoLoss, linear_logprobs, orpo_loss
from tests.cases import DEVICE, make, relative


def test_import_is_light() -> None:
    """Neither triton nor transformers, and nothing that takes time beside torch."""
    code = (
        "import time, sys; import torch; start = time.perf_counter(); before = set(sys.modules); import orpo_kernels; "
        "spent = time.perf_counter() - start; new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "heavy = new & {'triton', 'transformers', 'trl', 'accelerate', 'numpy'}; "
        "assert not heavy, heavy; assert spent < 0.5, spent; print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "light", done.stderr


def test_module_is_the_function() -> None:
    case = make(torch.float32, bias=True)
    options = {"beta": 0.3, "nll_weight": 0.5, "softcap": 4.0, "logit_scale": 0.7, "nll_reduction": "sequence"}
    module = OrpoLoss(**options)  # type: ignore[arg-type]
    for mine, theirs in zip(
        module(case.hidden, case.weight, case.labels, bias=case.bias), case.ours(**options), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert "beta=0.3" in repr(module)


def test_metrics_are_means_over_pairs_with_an_odds_ratio() -> None:
    case = make(torch.float32, pairs=3)
    case.labels[4] = -100  # the second pair's rejected answer
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        out = case.ours()
    metrics = out.metrics()
    kept = [0, 2]
    torch.testing.assert_close(metrics["logps/chosen"], out.chosen_logps[kept].mean())
    torch.testing.assert_close(metrics["rewards/margins"], 0.1 * (out.chosen_logps - out.rejected_logps)[kept].mean())
    torch.testing.assert_close(
        metrics["rewards/accuracies"], (out.chosen_logps > out.rejected_logps)[kept].float().mean()
    )
    assert out.chosen_logps[1] != 0
    assert out.rejected_logps[1] == 0


def test_only_the_loss_is_differentiable() -> None:
    out = make(torch.float32).ours()
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:])
    torch.testing.assert_close(out.loss, out.nll_loss + out.odds_ratio_loss)


def test_two_runs_give_the_same_bits() -> None:
    case = make(torch.bfloat16, pairs=4, vocab=9000, bias=True)
    first, second = case.ours(), case.ours()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    grads, again = case.grads(first.loss), case.grads(second.loss)
    assert all(torch.equal(grad, again[name]) for name, grad in grads.items())


def test_backward_twice() -> None:
    """The first backward scales its buffers in place; a second must not scale what is somebody's .grad by now."""
    case = make(torch.float32, bias=True)
    loss = case.ours().loss
    first = torch.autograd.grad(loss * 2, list(case.tensors.values()), retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss * 3, list(case.tensors.values()))
    for grad, copy, again in zip(first, kept, second, strict=True):
        assert torch.equal(grad, copy)
        torch.testing.assert_close(again, grad * 1.5)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate_over_calls() -> None:
    case = make(torch.float32)
    single = case.grads(case.ours().loss)["weight"]
    for _ in range(3):
        (case.ours().loss / 2).backward()
    torch.testing.assert_close(case.weight.grad, single * 1.5)


def test_tied_weights_and_views() -> None:
    """An embedding that is the head too, hidden states that are a slice, and a weight that is a view."""
    case = make(torch.float64, length=6, features=16, vocab=90)
    storage = torch.randn(100, 32, dtype=torch.float64, device=DEVICE, requires_grad=True)
    tokens = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(loss: object) -> torch.Tensor:
        weight = storage[5:95, ::2]
        hidden = torch.nn.functional.embedding(tokens, weight).transpose(0, 1)[1:].transpose(0, 1)
        out = loss(hidden, weight, case.labels)  # type: ignore[operator]
        return torch.autograd.grad(out["loss"] if isinstance(out, dict) else out.loss, storage)[0]

    torch.testing.assert_close(run(orpo_loss), run(orpo_kernels.reference.orpo_loss))


def test_autocast_casts_as_linear_does() -> None:
    case = make(torch.float32, bias=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = case.ours()
        logps = linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)
        assert torch.nn.functional.linear(case.hidden, case.weight).dtype == torch.bfloat16
    assert out.loss.dtype == logps.dtype == torch.float32
    low = case.to(torch.bfloat16)
    torch.testing.assert_close(out.loss, low.ours().loss, rtol=0, atol=0)
    grads, expected = case.grads(out.loss), low.grads(low.ours().loss)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected[name].float(), rtol=0, atol=0)


def test_labels_of_any_integer_type_and_another_ignore_index() -> None:
    case = make(torch.float32)
    other = torch.where(case.labels == -100, -1, case.labels).int()
    out = orpo_loss(case.hidden, case.weight, other, ignore_index=-1)
    assert torch.equal(out.loss, case.ours().loss)


def test_runs_under_gradient_checkpointing() -> None:
    case = make(torch.float32)
    expected = case.grads(case.ours().loss)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return orpo_loss(hidden, case.weight, case.labels).loss

    value = torch.utils.checkpoint.checkpoint(loss, case.hidden, use_reentrant=False)
    for name, grad in case.grads(value).items():
        assert relative(grad, expected[name].double()) < 1e-6
