"""Values and gradients against float64, beside the naive implementation's own error."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_kernels import engine, explain, linear_logprobs, orpo_loss, reference
from orpo_kernels.backends import select, torch_backend, torch_tiles
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.loss import preference_of_head
from orpo_kernels.objectives import ORPO
from orpo_kernels.settings import Batch, Head, Settings
from tests.cases import DEVICE, GRAD_FLOOR, VALUE_FLOOR, Case, assert_as_accurate, check, every_run, make, relative

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "everything": {"bias": True, "softcap": 5.0, "logit_scale": 1.7, "beta": 0.5, "nll_weight": 0.25},
    "sequence": {"nll_reduction": "sequence"},
    "odds only": {"nll_weight": 0.0, "beta": 2.0},
    "nll only": {"beta": 0.0},
}


@every_run
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(variant: str, backend: str, dtype: torch.dtype) -> None:
    check(make(dtype, **VARIANTS[variant]), backend=backend)


@every_run
@pytest.mark.parametrize("confidence", [-1.0, 0.0, 0.4, 0.8, 2.0])
def test_every_regime_of_confidence(backend: str, dtype: torch.dtype, confidence: float) -> None:
    check(make(dtype, features=64, vocab=3000, confidence=confidence, nll_weight=1.0), backend=backend)


@every_run
@pytest.mark.slow
def test_separate_nll_labels(backend: str, dtype: torch.dtype) -> None:
    """Prompt and answer as TRL has it, other targets on the same rows, and the chosen half alone."""
    case = make(dtype, pairs=3)
    generator = torch.Generator().manual_seed(1)
    prompt_too = torch.randint(0, 500, case.labels.shape, generator=generator).to(DEVICE)
    agreeing = torch.where(case.labels == -100, prompt_too, case.labels)
    for nll_labels in (agreeing, prompt_too, agreeing[:3]):
        for workspace in (None, 1):
            case.options["nll_labels"] = nll_labels
            check(case, backend=backend, workspace_bytes=workspace)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.integers(1, 4),
    length=st.integers(1, 12),
    features=st.integers(1, 40),
    vocab=st.integers(2, 700),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
    workspace=st.sampled_from([None, 1, 20_000, 60_000]),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*an answer without a token")
def test_any_shape_and_any_chunking(
    pairs: int,
    length: int,
    features: int,
    vocab: int,
    keep: float,
    seed: int,
    workspace: int | None,
    softcap: float | None,
    bias: bool,
) -> None:
    case = make(
        torch.float64,
        pairs=pairs,
        length=length,
        features=features,
        vocab=vocab,
        keep=keep,
        seed=seed,
        softcap=softcap,
        bias=bias,
    )
    # Small tiles and chunks, so that small inputs have many of each.
    with (
        mock.patch.object(torch_tiles, "TILE_ROWS", (64, 64)),
        mock.patch.object(torch_backend, "CHUNK_ROWS", (7, 7)),
    ):
        check(case, backend="torch", workspace_bytes=workspace)


@every_run
@pytest.mark.slow
def test_every_plan_gives_the_same_result(backend: str, dtype: torch.dtype) -> None:
    case = make(dtype, pairs=6, vocab=3000, features=16, bias=True)
    plans = {}
    column = 3000 * (2 if dtype == torch.bfloat16 else 4 if dtype != torch.float64 else 8)
    with mock.patch.object(TritonBackend, "least_scratch", 0):
        for workspace in (None, 4 * 3000 * 16 + 20 * column, 1):
            options = {"workspace_bytes": workspace, "backend": backend}
            plan = explain(case.hidden, case.weight, case.labels, bias=case.bias, **options)
            plans[plan.name, len(plan.groups) > 1] = None
            check(case, **options)
    assert set(plans) == {("store", False), ("store", True), ("recompute", False)}


def test_packed_is_padded() -> None:
    case = make(torch.float64, pairs=3, length=8, bias=True)
    lengths = torch.tensor([5, 8, 1, 0, 7, 3], device=DEVICE)
    for sequence, length in enumerate(lengths):
        case.labels[sequence, length:] = -100
    kept = torch.arange(8, device=DEVICE) < lengths[:, None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed = Case(case.hidden[kept], case.weight, case.labels[kept], case.bias, {"cu_seqlens": offsets.int()})
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        a, b = case.ours(), packed.ours()
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-13, atol=0)
    grads = case.grads(b.loss)  # through the packing, which autograd undoes
    for name, grad in case.grads(a.loss).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-11, atol=1e-15)


def test_gradcheck() -> None:
    case = make(torch.float64, pairs=1, length=3, features=3, vocab=7, bias=True, softcap=2.0, logit_scale=0.7)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return orpo_loss(hidden, weight, case.labels, bias=bias, **case.options).loss

    def logps(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(hidden, weight, case.labels, bias=bias, **case.options)

    assert torch.autograd.gradcheck(loss, tuple(case.tensors.values()))
    assert torch.autograd.gradcheck(logps, tuple(case.tensors.values()))


@every_run
@pytest.mark.parametrize("variant", ["plain", "bias", "softcap", "scale"])
def test_linear_logprobs_with_any_upstream_gradient(variant: str, backend: str, dtype: torch.dtype) -> None:
    case = make(dtype, **VARIANTS[variant])
    upstream = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def run(of: Case, function: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = function(of.hidden, of.weight, of.labels, bias=of.bias, **of.options, **options)
        return logps, of.grads((logps * upstream.to(logps.dtype)).sum())

    truth, truth_grads = run(case.to(torch.float64), reference.linear_logprobs)
    naive, naive_grads = run(case, reference.linear_logprobs)
    ours, grads = run(case, linear_logprobs, backend=backend)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (ours[case.labels == -100] == 0).all()
    assert_as_accurate("logps", ours, naive, truth, VALUE_FLOOR[dtype])
    for name, expected in truth_grads.items():
        assert_as_accurate(name, grads[name], naive_grads[name], expected, GRAD_FLOOR[dtype])


def test_confident_model_keeps_its_precision() -> None:
    """Where naive bfloat16 logits lose the answer's probability altogether, the shifted product does not."""
    case = make(torch.bfloat16, features=256, vocab=4000, scale=0.06, confidence=1.2, keep=1.0, length=32)
    case.labels[:, 0] = -100
    truth = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.labels)
    assert -1e-2 < truth.median() < -1e-9  # the regime this test is about
    ours = linear_logprobs(case.hidden, case.weight, case.labels)
    naive = reference.linear_logprobs(case.hidden, case.weight, case.labels)
    assert relative(ours, truth) < 0.2 * relative(naive, truth)


@every_run
@pytest.mark.parametrize("upstream", [0.25, 1.0, 3.0])
def test_upstream_scale(backend: str, dtype: torch.dtype, upstream: float) -> None:
    check(make(dtype, bias=True), upstream, backend=backend)


@every_run
def test_no_bit_depends_on_the_upstream_gradient_before(backend: str, dtype: torch.dtype) -> None:
    case = make(dtype, bias=True)
    case.backend = backend
    engine._expected.clear()
    known = case.grads(case.ours().loss, 0.375)
    for before in (1 / 3, -(2.0**16), 1e-30, float("nan")):
        case.grads(case.ours().loss, before)
        for name, grad in case.grads(case.ours().loss, 0.375).items():
            assert torch.equal(grad, known[name]), (before, name)


@every_run
def test_a_power_of_two_upstream_leaves_nothing_to_scale(backend: str, dtype: torch.dtype) -> None:
    """Backward multiplies by 1, which no backend touches a gradient for, from the second step on."""
    case = make(dtype)
    case.backend = backend
    kind = type(select(backend, case.hidden.device, dtype))
    found = []
    for _ in range(3):
        with mock.patch.object(kind, "scale", autospec=True, side_effect=kind.scale) as scale:
            case.grads(case.ours().loss, 0.125)
        found.append({float(call.args[2]) for call in scale.call_args_list})
    assert found == [{0.125}, {1.0}, {1.0}]


def test_float16_gradients_wait_for_the_loss_scale() -> None:
    """Gradients near 1e-9 underflow in float16 unless the upstream scale meets them in float32."""
    case = make(torch.float16, vocab=3000, scale=0.01, keep=1.0)
    case.options = {"nll_weight": 1e-6, "beta": 0.0}
    scale = 2.0**20
    grads = case.grads(case.ours().loss, scale)
    truth_case = case.to(torch.float64)
    truth = truth_case.grads(truth_case.reference()["loss"], scale)
    for name, expected in truth.items():
        assert relative(grads[name], expected) < 5e-3, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("matters", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_only_the_gradients_asked_for(matters: tuple[str, ...], backend: str) -> None:
    case = make(torch.float32, bias=True)
    for name, tensor in case.tensors.items():
        tensor.requires_grad_(name in matters)
    plan = explain(case.hidden, case.weight, case.labels, bias=case.bias)
    assert plan.name == {(): "forward", ("hidden",): "frozen"}.get(matters, "store")
    if matters:
        check(case, backend=backend)
    else:
        assert not case.ours(backend=backend).loss.requires_grad
        torch.testing.assert_close(case.ours(backend=backend).loss, case.reference()["loss"])


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_last_columns_of_a_weight(backend: str, workspace: int | None) -> None:
    """Where the others are frozen, the gradient is that of the last columns, in every plan."""
    case = make(torch.float32, features=24, vocab=300, bias=True)
    options = Settings(ORPO(0.1), backend=backend, workspace_bytes=workspace)
    batch, tail = Batch(case.labels), case.weight[:, 16:].detach().requires_grad_()
    head = Head(case.weight, case.bias)
    whole = preference_of_head(case.hidden, head, batch, options).loss
    part = preference_of_head(case.hidden, head._replace(weight=case.weight.detach(), tail=tail), batch, options).loss
    assert torch.equal(part, whole)
    of_hidden, of_weight, of_bias = torch.autograd.grad(whole, (case.hidden, case.weight, case.bias))
    found = torch.autograd.grad(part, (case.hidden, tail, case.bias))
    for ours, expected in zip(found, (of_hidden, of_weight[:, 16:], of_bias), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)
