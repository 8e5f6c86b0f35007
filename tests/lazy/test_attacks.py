"""What may go silently wrong in a training step with a fused head: each case beside the same step of the stock head."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orpo_kernels.integrations import fuse, fusion_report, unfuse
from orpo_kernels.integrations.lazy import rows

V, H = 13, 6
TOKENS = torch.arange(V, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:orpo_kernels.*needed the full logits")


class Tiny(nn.Module):
    """Token ids ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=bias)
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


Step = Callable[[Tiny, Tensor, Tensor], Any]


def logps(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def ids() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, V, (3, 5), generator=generator) for _ in range(2))


def run(step: Step, model: Tiny) -> tuple[list[Tensor], list[Tensor | None]]:
    """What a step returns, and the gradients it leaves."""
    out = torch.utils._pytree.tree_leaves(step(model, *ids()))
    return [x.detach() + 0 for x in out], [None if p.grad is None else p.grad + 0 for p in model.parameters()]


def assert_as_stock(step: Step, *, bias: bool = False) -> None:
    torch.manual_seed(0)
    model = Tiny(bias)
    stock, fused = run(step, copy.deepcopy(model)), run(step, fuse(copy.deepcopy(model)))
    for expected, got in zip(stock, fused, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


STEPS: list[Any] = []


def step(of: Step) -> Step:
    STEPS.append(pytest.param(of, id=of.__name__))
    return of


# Changes in place, of logits, of their views, and past autograd.


@step
def scaled_past_autograd(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    with torch.no_grad():
        logits.div_(2.0)
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def changed_past_autograd(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    with torch.no_grad():
        logits.add_(TOKENS)
    loss = -logps(logits, y).mean() + model.body.weight.sum()
    loss.backward()
    return loss


@step
def tanh_past_autograd(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    with torch.no_grad():
        logits.tanh_()
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def scaled_through_data(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits.data.div_(2.0)
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def scaled_through_a_detached_view(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits.detach()[:, :-1].mul_(3.0)
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def detached_in_place(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits.detach_()
    loss = -logps(logits, y).mean() + model.body.weight.pow(2).sum()
    loss.backward()
    return loss


@step
def first_tokens_scaled(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits[..., :7].div_(2.0)
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def nested_views_scaled(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    some, others = logits[:, :-1][1:], logits[:2]
    some.div_(2.0)
    others.mul_(3.0)
    some.mul_(0.7)
    loss = -logps(logits, y).mean() + logps(some, y[1:, :-1]).sum() + logps(others, y[:2]).sum()
    loss.backward()
    return loss


@step
def a_view_scaled_row_by_row(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits[:, :-1].div_(TOKENS[1:].view(3, 4, 1))
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def tokens_filled_through_a_view(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits[..., 5:9].fill_(-5.0)
    logits.select(-1, 2).mul_(2.0)
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def masked_and_assigned(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits.masked_fill_(TOKENS > 11, -5.0)
    logits[..., 3] = -9.0
    logits[:, 0, :] = 1.0
    logits += logits
    loss = -logps(logits, y).mean()
    loss.backward()
    return loss


@step
def results_changed_in_place(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    answers = logps(logits, y)
    answers[:, :2] = 0
    answers *= 2
    losses = nn.functional.cross_entropy(logits.view(-1, V), y.view(-1), reduction="none")
    losses /= 3
    (answers.sum() + losses.sum()).backward()
    return answers


@step
def a_log_sum_exp_changed_in_place(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
        lse = logits.logsumexp(-1, keepdim=True)
        lse.mul_(1.5)
        return (logits - lse).exp().sum(-1)


@step
def written_through_out(model: Tiny, x: Tensor, y: Tensor) -> list[Tensor]:
    with torch.no_grad():
        logits = model(x)
        torch.mul(logits, 2.0, out=logits)
        return [logits.sum(), logits.logsumexp(-1)]


def test_a_view_scaled_under_a_biased_head_is_as_stock() -> None:
    assert_as_stock(scaled_through_a_detached_view, bias=True)
    assert_as_stock(first_tokens_scaled, bias=True)


def test_a_single_tokens_logits_changed_in_place_are_known() -> None:
    model = Tiny()
    stock = model(ids()[0])
    stock[..., 3].fill_(-5.0)
    lazy = fuse(model)(ids()[0])
    lazy[..., 3].fill_(-5.0)
    torch.testing.assert_close(lazy.log_softmax(-1)[0, :, :4].sum(-1), stock.log_softmax(-1)[0, :, :4].sum(-1))


# What is left after a step.


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the garbage collector: a step's tensors must go with their last name."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def calls_alive() -> int:
    """Calls of a head that something still refers to."""
    return len(rows._roots)


def leaf_step(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    leaf = logits.detach().requires_grad_()
    loss = leaf.sort(-1).values[..., -3:].pow(2).sum() + logps(leaf, y).sum()
    loss.backward()
    logits.backward(leaf.grad)
    return loss.detach()


step(leaf_step)


def plain_step(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    loss = logps(model(x), y).mean()
    loss.backward()
    return loss


def evaluation(model: Tiny, x: Tensor, y: Tensor) -> list[Tensor]:
    with torch.no_grad():
        logits = model(x)
        return [logits.logsumexp(-1, keepdim=True), logps(logits, y), logits.argmax(-1)]


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("of", [plain_step, evaluation, leaf_step, masked_and_assigned, nested_views_scaled])
def test_nothing_of_a_step_is_left(of: Step) -> None:
    model, before = fuse(Tiny()), calls_alive()
    kept = []
    for _ in range(3):
        kept += [x.detach() for x in torch.utils._pytree.tree_leaves(of(model, *ids()))]
    assert calls_alive() == before


@pytest.mark.usefixtures("uncollected")
def test_a_loss_kept_with_its_graph_keeps_no_hidden_states() -> None:
    model = fuse(Tiny())
    total: Any = 0
    for _ in range(3):
        total = total + plain_step(model, *ids())
    assert all(root._inputs() is None for root in rows._roots.values() if root.site is model.head.forward.site)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


# Logits used after what they are made of has changed.


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_logits_of_before_an_optimisers_step_are_refused(gradient: bool, fused: bool) -> None:
    model = fuse(Tiny())
    optimiser = torch.optim.AdamW(model.parameters(), fused=fused)
    x, y = ids()
    with torch.set_grad_enabled(gradient):
        old = model(x)
    logps(model(x), y).mean().backward()
    optimiser.step()
    with pytest.raises(RuntimeError, match="an optimiser's step"):
        old.logsumexp(-1)


def test_another_models_optimiser_leaves_logits_alone() -> None:
    model, other = fuse(Tiny()), fuse(Tiny())
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1)
    x, y = ids()
    logits = model(x)
    logps(other(x), y).mean().backward()
    optimiser.step()
    logps(logits, y).mean().backward()
    assert model.head.weight.grad is not None


def test_logits_of_hidden_states_that_were_changed_in_place_are_refused() -> None:
    model = fuse(Tiny())
    with torch.no_grad():
        hidden = model.hidden(ids()[0])
        logits = model.head(hidden)
        hidden.zero_()
        with pytest.raises(RuntimeError, match="hidden states"):
            logits.logsumexp(-1)


def test_metrics_between_backward_and_the_optimisers_step_are_as_stock() -> None:
    @assert_as_stock
    def metrics(model: Tiny, x: Tensor, y: Tensor) -> list[Tensor]:
        logits = model(x)
        logps(logits, y).mean().backward()
        return [logits.argmax(-1), logits.logsumexp(-1)]


def test_an_optimiser_of_a_plain_module_leaves_logits_alone() -> None:
    @assert_as_stock
    def adversary(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
        judge = nn.Linear(H, 1, dtype=torch.float64)
        optimiser = torch.optim.SGD(judge.parameters(), lr=0.1)
        logits = model(x)
        judge(model.hidden(x).detach()).sum().backward()
        optimiser.step()
        loss = logps(logits, y).mean()
        loss.backward()
        return loss


# Autograd: hooks, transforms, modes, functions of others.


@step
def a_hook_changes_a_gradient_in_place(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    def halved_but_for_the_first(grad: Tensor) -> None:
        grad.mul_(0.5)
        grad[0] = 0

    logits = model(x)
    logits.register_hook(halved_but_for_the_first)
    loss = logps(logits[:, :-1], y[:, :-1]).mean()
    loss.backward()
    return loss


@step
def a_hook_under_checkpoint(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    def of_hidden(hidden: Tensor) -> Tensor:
        logits = model.head(hidden)
        logits.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return logps(logits, y).mean()

    loss = checkpoint(of_hidden, model.hidden(x), use_reentrant=False)
    loss.backward()
    return loss


@step
def the_gradient_of_logits(model: Tiny, x: Tensor, y: Tensor) -> list[Tensor]:
    logits = model(x)
    loss = logps(logits, y).mean()
    (grad,) = torch.autograd.grad(loss, [logits], retain_graph=True)
    loss.backward()
    return [grad, grad.norm()]


@step
def anomalies_detected(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = logps(model(x), y).mean()
        loss.backward()
    return loss


@step
def metrics_in_inference_mode(model: Tiny, x: Tensor, y: Tensor) -> list[Tensor]:
    logits = model(x)
    with torch.inference_mode():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        metrics = [entropy, logits.argmax(-1), logits.sort(-1).values]
    loss = logps(logits, y).mean()
    loss.backward()
    return [loss, *metrics]


@step
def per_sample_gradients(model: Tiny, x: Tensor, y: Tensor) -> Any:
    def loss(parameters: Any, ids: Tensor, labels: Tensor) -> Tensor:
        return logps(torch.func.functional_call(model, parameters, (ids[None],)), labels[None]).mean()

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)


@step
def a_forward_mode_derivative(model: Tiny, x: Tensor, y: Tensor) -> Any:
    hidden = model.hidden(x).detach()
    return torch.func.jvp(lambda hidden: logps(model.head(hidden), y), (hidden,), (torch.ones_like(hidden),))


@step
def the_whole_model_under_reentrant_checkpoint(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    loss = logps(checkpoint(model.head, model.hidden(x), use_reentrant=True), y).mean()
    loss.backward()
    return loss


class OwnLoss(torch.autograd.Function):
    """Cross-entropy whose gradient overwrites the logits, as some libraries have it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids)
        return -logps(logits, ids).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, ids = ctx.saved_tensors
        for i in range(logits.shape[0]):
            logits[i] = logits[i].softmax(-1) * grad
        return logits - nn.functional.one_hot(ids, V) * grad, None


@step
def a_function_of_others_on_a_scaled_view(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    some = logits[:, :-1]
    logits.div_(2.0)
    loss = OwnLoss.apply(some, y[:, :-1])
    loss.backward()
    return loss


@step
def a_function_of_others_on_changed_logits(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    logits.mul_(TOKENS)
    loss = OwnLoss.apply(logits, y)
    loss.backward()
    return loss


@pytest.mark.parametrize("of", STEPS)
def test_a_step_is_as_stock(of: Step) -> None:
    assert_as_stock(of)


def test_second_derivatives_of_logits_are_refused() -> None:
    x, y = ids()
    logits = fuse(Tiny())(x)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(logps(logits, y).mean(), [logits], create_graph=True)


@pytest.mark.parametrize("label", [V, -1, -100])
def test_labels_out_of_range_are_refused_as_stock(label: int) -> None:
    x, y = ids()
    y[1, 2] = label
    for model in (Tiny(), fuse(Tiny())):
        with pytest.raises(RuntimeError, match=f"index {label} is out of bounds for dimension 2 with size {V}"):
            logps(model(x), y)


def test_a_compiled_loss_keeps_its_gradient() -> None:
    x, _ = ids()
    model = fuse(Tiny())
    purity = torch.compile(lambda logits: logits.softmax(-1).pow(2).sum(-1) + logits.logsumexp(-1), backend="eager")
    purity(model(x)).sum().backward()
    stock = Tiny()
    stock.load_state_dict(model.state_dict())
    logits = stock(x)
    (logits.softmax(-1).pow(2).sum(-1) + logits.logsumexp(-1)).sum().backward()
    torch.testing.assert_close(model.head.weight.grad, stock.head.weight.grad)


# What becomes of a model after fuse.


def test_a_head_that_took_anothers_place_is_fused_by_fuse() -> None:
    model = fuse(Tiny())
    model.head = nn.Linear(H, V, bias=False, dtype=torch.float64)
    assert type(model(ids()[0])) is Tensor
    assert type(fuse(model)(ids()[0])) is not Tensor


def test_a_copy_of_a_fused_model_reports_and_is_unfused_by_itself() -> None:
    model = fuse(Tiny())
    twin = copy.deepcopy(model)
    twin(ids()[0])
    assert fusion_report(twin).fused
    assert (fusion_report(twin).calls, fusion_report(model).calls) == (1, 0)
    assert type(unfuse(twin)(ids()[0])) is Tensor
    assert type(model(ids()[0])) is not Tensor


def test_models_that_share_a_head_share_its_report() -> None:
    model, other = fuse(Tiny()), Tiny()
    other.head = model.head
    fuse(other)(ids()[0])
    assert fusion_report(model).calls == 1
    assert type(unfuse(other)(ids()[0])) is Tensor
    assert not fusion_report(model).fused


def test_a_loss_under_autocast_has_the_dtype_of_stock() -> None:
    x, y = ids()
    for model in (Tiny(dtype=torch.float32), fuse(Tiny(dtype=torch.float32))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
            assert logits.dtype == logits.logsumexp(-1).dtype == torch.bfloat16
            assert nn.functional.cross_entropy(logits.view(-1, V), y.view(-1)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fuse(Tiny())(x).dtype == torch.float64  # which autocast leaves alone
