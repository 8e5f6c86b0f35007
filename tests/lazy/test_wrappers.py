"""What else happens to a model between its head and its optimiser: copies, wrappers, hooks, other optimisers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from orpo_kernels.integrations import fuse, fusion_report, unfuse
from orpo_kernels.integrations.detours import detour
from tests.integrations.models import VOCAB, batch, llama

IDS = batch().inputs["input_ids"]


def logits_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), IDS[:, 1:].reshape(-1))


def assert_stock(model: Any, stock: Any) -> None:
    """The loss and the gradient of the head, and that no logits were needed for them."""
    calls = fusion_report(model).calls
    for each in (model, stock):
        each.zero_grad()
        loss_of(logits_of(each)).backward()
    torch.testing.assert_close(loss_of(logits_of(model)), loss_of(logits_of(stock)), rtol=1e-6, atol=0)
    ours, theirs = model.get_output_embeddings().weight.grad, stock.get_output_embeddings().weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert fusion_report(model).calls == calls + 2
    assert fusion_report(model).materialised == []


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_a_copy_is_fused_and_uses_its_own_head(how: Callable[[Any], Any]) -> None:
    model, stock = fuse(llama()), llama()
    logits_of(model)
    other = how(model)
    assert fusion_report(other).fused
    assert fusion_report(other).calls == (0 if how is copy.deepcopy else 1)
    for each in (other, stock):
        with torch.no_grad():
            each.lm_head.weight.mul_(0.5)
    assert fuse(other) is other  # once more is no second wrapper
    assert_stock(other, stock)
    assert fusion_report(model).calls == 1
    assert not fusion_report(unfuse(other)).fused
    assert type(logits_of(other)) is Tensor
    assert fusion_report(model).fused


def test_an_average_of_weights_is_fused() -> None:
    model, stock = fuse(llama()), llama()
    averages = [torch.optim.swa_utils.AveragedModel(each) for each in (model, stock)]
    for each, average in zip((model, stock), averages, strict=True):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(2):
            loss_of(logits_of(each)).backward()
            optimiser.step()
            average.update_parameters(each)
    assert_stock(averages[0].module, averages[1].module)


def test_peft_around_a_fused_model() -> None:
    """The report is that of the base model, whichever of both is asked."""
    base = fuse(llama())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    logits_of(model)
    assert fusion_report(model).calls == 1
    assert fuse(model) is model
    assert fusion_report(base) is fusion_report(model)
    unfuse(model)
    assert type(logits_of(model)) is Tensor
    assert not fusion_report(base).fused


def test_offloaded_weights() -> None:
    """accelerate's hooks take a head's weight away after its forward."""
    model = cpu_offload(fuse(llama()), torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        assert loss_of(logits_of(model)).item() == pytest.approx(loss_of(logits_of(llama())).item(), rel=1e-6)
    assert fusion_report(model).fused
    assert fusion_report(model).calls == 1
    unfuse(model)
    assert type(logits_of(model)) is Tensor
    remove_hook_from_submodules(model)
    assert type(logits_of(model)) is Tensor


def test_a_replica_of_data_parallel_has_the_stock_head() -> None:
    """``nn.DataParallel`` copies the module's dictionary to every device, and gathers what comes out."""
    head = fuse(llama()).get_output_embeddings()
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(VOCAB, 32), None
    out = replica(torch.ones(2, 3, 32))
    assert type(out) is Tensor
    assert out.abs().max() == 0


def test_a_model_fused_inside_a_patched_trainers_forward() -> None:
    """As the first call of a model is where all models of transformers are fused and ORPOTrainer is patched as well."""
    model, stock = llama(), llama()
    head = model.get_output_embeddings()
    with detour(head, lambda hidden: hidden.new_zeros(*hidden.shape[:-1], VOCAB)):
        fuse(model)
        assert fusion_report(model).fused
        assert logits_of(model).abs().max() == 0
    assert_stock(model, stock)
    assert type(logits_of(unfuse(model))) is Tensor


def test_a_head_with_a_forward_of_its_own_gets_it_back() -> None:
    head = nn.Linear(8, VOCAB)
    own = head.forward = lambda hidden: F.linear(hidden, head.weight) * 2  # type: ignore[method-assign]
    model = nn.Sequential(head)
    fuse(model, head=head)
    unfuse(model)
    assert head.forward is own


def test_functional_call_uses_the_weights_it_is_given() -> None:
    model, stock = fuse(llama()), llama()
    other = {name: weight.detach() * 0.5 for name, weight in stock.named_parameters()}
    found, expected = (
        loss_of(torch.func.functional_call(each, other, kwargs={"input_ids": IDS}).logits) for each in (model, stock)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_an_optimiser_ends_what_was_not_computed(options: dict[str, bool]) -> None:
    """AdamW's fused form changes weights without a trace in their versions."""
    model = fuse(llama())
    late, early = logits_of(model), logits_of(model)
    means = early.mean(-1)
    loss = loss_of(early)
    loss.backward()
    optimiser = torch.optim.AdamW(model.parameters(), **options)
    optimiser.step()
    assert torch.equal(loss_of(early), loss)  # known by then
    assert means.shape == IDS.shape
    for use in (loss_of, lambda logits: logits.sort(-1)):
        with pytest.raises(RuntimeError, match="their head's weight has changed since the forward"):
            use(late)


def test_another_models_optimiser_ends_nothing() -> None:
    model, critic = fuse(llama()), fuse(llama())
    logits = logits_of(model)
    loss_of(logits_of(critic)).backward()
    torch.optim.AdamW(critic.parameters()).step()
    assert loss_of(logits).item() == pytest.approx(loss_of(logits_of(llama())).item(), rel=1e-6)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": lambda z: z.__setitem__((..., slice(90, None)), -1e4),
    "masked_fill_": lambda z: z.masked_fill_(torch.arange(VOCAB) > 90, -1e4),
    "clamp_": lambda z: z.clamp_(-1, 1),
    "relu(inplace=True)": lambda z: F.relu(z, inplace=True),
    "_foreach_clamp_max_": lambda z: torch._foreach_clamp_max_([z], 1.0),
    "out=": lambda z: torch.abs(z.detach(), out=z),
}


@pytest.mark.parametrize(
    ("name", "grad"),
    [(name, grad) for name in CHANGES for grad in (True, False) if not (grad and name == "out=")],  # which has none
)
def test_changes_in_place_are_seen(name: str, grad: bool) -> None:
    losses, grads = [], []
    for model in (fuse(llama()), llama()):
        with torch.set_grad_enabled(grad):
            logits = logits_of(model)
            CHANGES[name](logits)
            losses.append(loss_of(logits))
        if grad:
            losses[-1].backward()
            grads.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    if grad:
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
