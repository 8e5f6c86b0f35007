"""What a caller may rely on beside the numbers: modules, autocast, backward twice, determinism, a light import."""

from __future__ import annotations

import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orpo_kernels
from orpo_kernels import OrpoLoss, explain, linear_logprobs, orpo_loss
from orpo_kernels.backends import torch_backend
from orpo_kernels.backends.torch_backend import release
from tests.cases import DEVICE, LargestTensor, make, relative


def test_import_is_light() -> None:
    """Neither triton nor transformers, nor anything else that takes time beside torch."""
    code = (
        "import sys, torch; before = set(sys.modules); import orpo_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "heavy = new & {'triton', 'transformers', 'trl', 'accelerate', 'numpy', 'typer', 'pandas'}; "
        "assert not heavy, heavy; print('light')"
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


@pytest.mark.parametrize("function", [orpo_loss, linear_logprobs])
def test_second_derivatives_are_refused(function: Any) -> None:
    case = make(torch.float64)
    out = function(case.hidden, case.weight, case.labels)
    loss = out.sum() if function is linear_logprobs else out.loss
    with pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph=True.*orpo_kernels\.reference"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


def test_upstream_gradients_of_another_forward_pass_do_not_mix() -> None:
    """Two calls wait for backward at once, in either order, and E of one is not the other's."""
    one, other = make(torch.bfloat16, seed=1), make(torch.bfloat16, seed=2)
    alone = [case.grads(linear_logprobs(case.hidden, case.weight, case.labels).sum()) for case in (one, other)]
    sums = [linear_logprobs(case.hidden, case.weight, case.labels).sum() for case in (one, other)]
    for place in (1, 0):
        for name, grad in (one, other)[place].grads(sums[place]).items():
            assert torch.equal(grad, alone[place][name])


def test_log_probabilities_differentiated_twice_in_a_row() -> None:
    case = make(torch.float64)
    for workspace in (None, 1):
        logps = linear_logprobs(case.hidden, case.weight, case.labels, workspace_bytes=workspace)
        upstream = torch.randn_like(logps)
        tensors = [case.hidden, case.weight]
        first = torch.autograd.grad(logps, tensors, upstream, retain_graph=True)
        second = torch.autograd.grad(logps, tensors, 3 * upstream)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(b, 3 * a)


def test_memory_kept_between_calls_is_of_use_to_every_call() -> None:
    """Neither what inference mode made nor a subclass of Tensor stays behind."""
    case = make(torch.float32)
    release()
    with torch.inference_mode():
        case.ours(backend="torch")
        linear_logprobs(case.hidden, case.weight, case.labels, backend="torch")

    class Tagged(torch.Tensor):
        pass

    tagged = case.hidden.detach().as_subclass(Tagged).requires_grad_()
    orpo_loss(tagged, case.weight, case.labels, backend="torch").loss.backward()
    assert all(type(kept) is torch.Tensor and not kept.is_inference() for kept in torch_backend._spare.values())
    case.grads(case.ours(backend="torch").loss)


def test_metrics_keep_their_dtype_whatever_the_default_is() -> None:
    out = make(torch.float64).ours()
    expected = out.metrics()
    torch.set_default_dtype(torch.float16)
    try:
        found = out.metrics()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in found.items():
        assert value.dtype == torch.float64, name
        assert torch.equal(value, expected[name]), name


def test_the_warning_points_at_the_caller() -> None:
    case = make(torch.float32)
    case.labels[0] = -100
    for call in (case.ours, lambda: OrpoLoss()(case.hidden, case.weight, case.labels)):
        with pytest.warns(UserWarning, match="1 of 2 pairs") as said:
            call()
        assert said[0].filename.endswith(("test_surface.py", "cases.py", "module.py")), said[0].filename


def test_scratch_on_a_cpu_is_what_the_plan_says() -> None:
    """Copies of hidden rows count: with little workspace few rows are copied at once."""
    case = make(torch.float32, pairs=2, length=2048, features=256, vocab=64, keep=1.0)
    case.hidden.requires_grad_()
    for needs in ("head", "frozen"):
        case.weight.requires_grad_(needs == "head")
        plan = explain(case.hidden, case.weight, case.labels, backend="torch", workspace_bytes=1)
        with LargestTensor() as seen:
            case.ours(backend="torch", workspace_bytes=1).loss.backward()
        whole = 8192 * 256 * 4
        assert plan.scratch_bytes == 1024 * 256 * 12
        assert seen.largest == whole  # the returned gradient, and nothing else as large
        assert seen.second <= plan.scratch_bytes


def test_overflowed_rows_take_what_scratch_there_is() -> None:
    """All rows overflow and are done again, in runs as large as scratch has room for."""
    case = make(torch.bfloat16, pairs=2, length=64, features=8, vocab=20_000, keep=1.0)
    with torch.no_grad():
        case.hidden.mul_(300)
    for more in (1 << 20, 64 << 20):
        plan = explain(case.hidden, case.weight, case.labels, backend="torch", workspace_bytes=1 << 40)
        workspace = plan.bytes + more
        with LargestTensor() as seen:
            out = case.ours(backend="torch", workspace_bytes=workspace)
        assert torch.isfinite(out.loss)
        one = 20_001 * 4  # of one row done again, in float32
        assert seen.second <= max(more + one, 8 * one, plan.scratch_bytes)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_any_real_number_is_a_number(value: Any) -> None:
    case = make(torch.float64)
    plain = case.ours(beta=0.5, logit_scale=0.5, softcap=0.5)
    assert torch.equal(case.ours(beta=value, logit_scale=value, softcap=value).loss, plain.loss)


def test_a_source_distribution_brings_what_its_tests_import() -> None:
    root = Path(__file__).parents[2]
    brought = {line.split()[1] for line in (root / "MANIFEST.in").read_text().splitlines() if line.startswith("graft")}
    imported = {
        name
        for path in (root / "tests").rglob("*.py")
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    }
    ours = {path.name for path in root.iterdir() if (path / "__init__.py").exists()} - {"orpo_kernels", "integrations"}
    assert imported & ours <= brought
    assert "tests" in brought
