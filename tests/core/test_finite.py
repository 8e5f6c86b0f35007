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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("size", [1.5e4, 3e4, 6e4])
def test_logits_so_large_that_their_rounding_is_many_nats(
    dtype: torch.dtype, workspace: int | None, size: float
) -> None:
    """A maximum that is itself a rounded product is no maximum: the torch backend, whose products round."""
    case = make(dtype, features=16, vocab=200, keep=1.0, bias=True)
    with torch.no_grad():
        case.hidden[..., 0] = 1.0
        case.weight[:, 0] = size + 1000 * torch.rand(200, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    case.backend = "torch"
    assert_finite(case, workspace_bytes=workspace)
    check(case, workspace_bytes=workspace)


def test_two_tokens_at_the_edge_of_bfloat16() -> None:
    hidden = torch.ones(2, 1, 2, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.tensor([[0.0, 0.0], [32768.0, 127.0]], dtype=torch.bfloat16, device=DEVICE)
    logps = linear_logprobs(hidden, weight, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), backend="torch")
    torch.testing.assert_close(logps, torch.full_like(logps, -32895.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("where", ["rejected answer", "prompt of the nll", "chosen answer"])
def test_masked_tokens(backend: str, workspace: int | None, where: str) -> None:
    """A bias of -inf masks its token; where a label is one, nothing else turns NaN.

    In a rejected answer it is the objective's best case: no odds to lower, no gradient. In the NLL alone, or in a
    chosen answer, the loss is truly infinite and every log-probability and gradient stays what it is.
    """
    case = make(torch.float32, vocab=200, keep=1.0, bias=True)
    masked = 190
    case.labels[case.labels >= masked] = 3
    nll_labels = case.labels.clone()
    with torch.no_grad():
        case.bias[masked:] = -torch.inf  # type: ignore[index]
        case.bias[masked - 2] = torch.finfo(torch.float32).min  # type: ignore[index]
        case.bias[masked - 1] = torch.finfo(torch.float32).min  # type: ignore[index]
    if where == "rejected answer":
        case.labels[2, 3] = masked
    elif where == "chosen answer":
        case.labels[0, 3] = masked
    else:
        nll_labels[0, 0], case.labels[0, 0] = masked, -100
    case.options["nll_labels"] = nll_labels
    case.backend = backend
    out, truth = case.ours(workspace_bytes=workspace), case.to(torch.float64).reference()
    for name in ("chosen_logps", "rejected_logps", "nll_loss", "odds_ratio_loss", "loss"):
        torch.testing.assert_close(getattr(out, name).double(), truth[name], rtol=1e-5, atol=1e-6)
    assert not any(torch.isnan(value).any() for value in out.metrics().values())
    grads = case.grads(out.loss)
    truth_case = case.to(torch.float64)
    expected = truth_case.grads(truth_case.reference()["loss"])
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        if where != "chosen answer":  # autograd of the plain formula is NaN where a mean is -inf
            assert relative(grad, expected[name]) < 1e-5, name


def test_a_mean_over_huge_biases_does_not_overflow() -> None:
    case = make(torch.float32, bias=True)
    with torch.no_grad():
        case.bias[7:9] = torch.finfo(torch.float32).min  # type: ignore[index]
    case.labels[(case.labels == 7) | (case.labels == 8)] = 3
    out = case.ours()
    assert torch.isfinite(out.chosen_logits_mean)
    torch.testing.assert_close(
        out.chosen_logits_mean.double(), case.to(torch.float64).reference()["chosen_logits_mean"]
    )
