"""Finite inputs give finite results, also where others give NaN."""

from __future__ import annotations

import warnings

import pytest
import torch

from orpo_kernels import linear_logprobs, orpo_loss, reference
from tests.cases import DEVICE, Case, check, every_run, make, relative


def assert_finite(case: Case, **options: object) -> None:
    out = case.ours(**options)
    for name, value in {**out._asdict(), **out.metrics()}.items():
        assert torch.isfinite(value).all(), name
    for name, grad in case.grads(out.loss).items():
        assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("empty", [[0], [3], [0, 3], [1, 3], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("prompt", [False, True])
def test_answers_truncated_to_nothing(empty: list[int], prompt: bool) -> None:
    case = make(torch.float32, pairs=3)
    if prompt:
        case.options["nll_labels"] = torch.where(case.labels == -100, 7, case.labels)
    case.labels[empty] = -100
    lost = len({index % 3 for index in empty})
    with pytest.warns(UserWarning, match=f"{lost} of 3 pairs have an answer without a token.*filter such pairs"):
        out = case.ours()
    assert int(out.skipped_pairs) == lost
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(case)
        assert_finite(case)


def test_all_ignored_keeps_the_graph() -> None:
    case = make(torch.bfloat16, bias=True)
    case.labels.fill_(-100)
    with pytest.warns(UserWarning, match="2 of 2 pairs"):
        out = case.ours()
    assert out.loss.requires_grad
    assert out.loss.item() == 0
    for grad in case.grads(out.loss).values():
        assert (grad == 0).all()
    logps = linear_logprobs(case.hidden, case.weight, case.labels)
    assert logps.requires_grad
    logps.sum().backward()
    assert (case.weight.grad == 0).all()


def test_single_tokens() -> None:
    check(make(torch.float32, pairs=1, length=1))


@every_run
@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("gap", [10.0, 30.0, 100.0])
def test_probability_one(backend: str, dtype: torch.dtype, side: str, gap: float) -> None:
    """The label's logit ``gap`` nats above all others, on either side."""
    case = make(torch.float32, features=8, vocab=50, keep=1.0)
    weight = torch.randn(50, 8) * 0.01
    weight[:, 0] = 0
    weight[7, 0] = gap
    case.labels[case.labels == 7] = 8
    sure = {"chosen": slice(0, 2), "rejected": slice(2, 4), "both": slice(0, 4)}[side]
    case.labels[sure] = 7
    hidden = case.hidden.detach().clone()
    hidden[..., 0] = 1.0
    case = Case(hidden.to(dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_(), case.labels)
    case.backend = backend
    assert_finite(case)
    assert case.ours().valid.all()
    if gap > 80:
        return  # 1 - p is below the smallest float32 here; being finite is all that can be asked
    truth_case = case.to(torch.float64)
    truth = truth_case.reference()
    assert relative(case.ours().loss.detach(), truth["loss"].detach()) < 5e-3
    for name, expected in truth_case.grads(truth["loss"]).items():
        assert torch.isfinite(expected).all()
        if dtype != torch.float16:
            assert relative(case.grads(case.ours().loss)[name], expected) < 1e-2, name


@every_run
@pytest.mark.parametrize("below", [70.0, 85.0, 120.0, 400.0])
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_labels_far_below_the_best_logit(
    backend: str, dtype: torch.dtype, below: float, workspace: int | None, rows: str
) -> None:
    case = make(dtype, features=64, vocab=300, keep=1.0, bias=True)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    direction = torch.nn.functional.normalize(direction, dim=0)
    with torch.no_grad():
        hidden = case.hidden.float()
        hidden -= (hidden @ direction)[..., None] * direction
        hidden[(...,) if rows == "all" else (1, 2)] += direction
        case.hidden.copy_(hidden)
        case.weight[7] = below * direction
        case.labels[case.labels == 7] = 8
    case.backend = backend
    assert_finite(case, workspace_bytes=workspace)
    check(case, workspace_bytes=workspace)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_far_below_under_a_softcap(backend: str) -> None:
    case = make(torch.float32, features=8, vocab=300, keep=1.0, softcap=50.0)
    case.backend = backend
    with torch.no_grad():
        case.weight[7, 0] = 300.0
        case.weight[8, 0] = -300.0
        case.hidden[..., 0] = 1.0
        case.labels.fill_(8)
    assert_finite(case)
    check(case)


def test_rejected_gradient_is_bounded_not_cut() -> None:
    """Past the bound the odds term still pushes: its gradient in the logits stays of order beta."""
    weight = torch.zeros(4, 2, dtype=torch.float64)
    weight[1, 0] = 1.0
    labels = torch.tensor([[2], [1]])
    sizes = []
    for gap in (10.0, 14.5, 17.0, 20.0):
        hidden = torch.zeros(2, 1, 2, dtype=torch.float64)
        hidden[1, 0, 0] = gap
        hidden.requires_grad_()
        loss = orpo_loss(hidden, weight, labels, nll_weight=0.0, beta=1.0).loss
        sizes.append(float(torch.autograd.grad(loss, hidden)[0][1].norm()))
    assert sizes[0] == pytest.approx(1.0, rel=0.1)
    assert sizes[1] == pytest.approx(1.0, rel=0.1)
    assert 1.0 > sizes[2] > sizes[3] > 0


def test_reference_is_finite_too() -> None:
    """The judge must not fall into the trap it judges."""
    logits = torch.tensor([[[800.0, 0.0]], [[800.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    out = reference.orpo_loss(logits, torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64))
    (grad,) = torch.autograd.grad(out["loss"], logits)
    assert torch.isfinite(out["loss"])
    assert torch.isfinite(grad).all()
