"""Models that ``torch.compile`` has compiled: the loss is fused, and the graph breaks at the head alone, once compiled.

Backends here run what dynamo has traced as it is, so that graphs can be counted and numbers be compared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from torch import Tensor, nn
from torch._dynamo.utils import counters

from orpo_kernels.integrations import fuse, fusion_report, patch_transformers, unfuse, unpatch_transformers
from orpo_kernels.integrations.detours import is_compiled, leave_nothing
from orpo_kernels.integrations.fused import Batch, fused_loss
from orpo_kernels.integrations.trainer import find_site
from orpo_kernels.objectives import ORPO
from tests.integrations import test_trl
from tests.integrations.models import FakePatch, FakeTrainer, batch, build, llama
from tests.integrations.test_trainer import stock_loss

pytestmark = pytest.mark.slow  # dynamo traces whole models

ROW = "torch.compile around the model"
STEPS = 5
# A break within the model's forward breaks the decorators around it, too: two for each graph that is compiled.
BREAKS_OF_A_GRAPH = 2
HOWS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile()": lambda model, backend: model.compile(backend=backend) or model,  # type: ignore[func-returns-value]
    "regions": lambda model, backend: compile_regions(model, backend=backend),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)  # poisoned memory is no business of compiled models
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Run:
    """Losses, gradients and graphs of a few steps on batches of changing lengths."""

    def __init__(self, step: Callable[[Any, Batch], Tensor], model: Any, called: Any, start: int = 0) -> None:
        self.losses: list[float] = []
        self.graphs: list[int] = []  # compiled until the end of each step
        self.gradients: list[dict[str, Tensor]] = []
        for seed in range(start, start + STEPS):
            data = batch(2, 7 + seed, seed=seed)
            loss = step(called, data._replace(inputs={**data.inputs, "use_cache": False}))
            loss.backward()
            self.losses.append(loss.item())
            self.gradients.append({name: weight.grad for name, weight in model.named_parameters()})
            model.zero_grad(set_to_none=True)
            self.graphs.append(counters["stats"]["unique_graphs"])
        self.breaks = sum(counters["graph_break"].values())
        counters.clear()

    def assert_same(self, other: Run) -> None:
        torch.testing.assert_close(self.losses, other.losses, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(self.gradients, other.gradients, strict=True):
            for (name, mine), stock in zip(ours.items(), theirs.values(), strict=True):
                torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def dpo(model: Any, data: Batch) -> Tensor:
    """A loop of one's own, over logits."""
    logits, ids = model(**data.inputs).logits, data.inputs["input_ids"]
    of_tokens = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = of_tokens.mean(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def own_loss(model: Any, data: Batch) -> Tensor:
    """The model's own, which it computes of its logits behind the head: within what is compiled."""
    loss: Tensor = model(**data.inputs, labels=data.inputs["input_ids"]).loss
    return loss


class Patched:
    """Steps of a patched trainer."""

    def __init__(self) -> None:
        self.trainer, self.patch = FakeTrainer(), FakePatch()

    def __call__(self, model: Any, data: Batch) -> Tensor:
        site = find_site(self.trainer, model)
        assert not isinstance(site, str), site
        fused = fused_loss(self.patch, self.trainer, model, site, data, ORPO(0.5))  # type: ignore[arg-type]
        assert not isinstance(fused, str), fused
        return fused[0].loss


def eager(model: nn.Module, _: Any) -> nn.Module:
    return model


def ran(step: Callable[[Any, Batch], Tensor], how: Callable[[nn.Module, Any], Any], name: str, fused: bool) -> Run:
    torch._dynamo.reset()  # layers of one model are compiled for those of another
    model, _ = build(name)
    model = fuse(model) if fused else model
    run = Run(step, model, how(model, "eager"))
    assert not fused or fusion_report(model).calls == STEPS
    return run


@pytest.mark.parametrize(
    ("step", "lazy"),
    [
        pytest.param(stock_loss, False, marks=pytest.mark.works(ROW, by="ORPO patch"), id="ORPO patch"),
        pytest.param(dpo, True, marks=pytest.mark.works(ROW, by="lazy logits"), id="lazy logits"),
    ],
)
@pytest.mark.parametrize("how", HOWS)
def test_a_compiled_model_is_fused_and_compiled_as_often_as_without(how: str, step: Any, lazy: bool) -> None:
    plain = ran(step, eager, "llama", False)
    stock = ran(step, HOWS[how], "llama", False)
    ours = ran(step if lazy else Patched(), HOWS[how], "llama", lazy)
    stock.assert_same(plain)
    ours.assert_same(plain)
    assert stock.graphs[-1] > 0
    assert ours.graphs[-1] <= stock.graphs[-1]
    assert ours.graphs[1:] == ours.graphs[1:2] * (STEPS - 1)  # the second length makes it a variable
    assert stock.breaks == 0
    if not (lazy and how == "regions"):  # there the head is a region, and what stands in its forward is never traced
        assert 0 < ours.breaks <= BREAKS_OF_A_GRAPH * ours.graphs[-1]
    else:
        assert ours.breaks == 0


@pytest.mark.parametrize("step", [dpo, own_loss])
def test_what_a_compiled_model_does_to_its_logits_may_meet_lazy_ones(step: Any) -> None:
    """A softcap and a loss behind the head."""
    plain, stock = (ran(step, how, "gemma2", False) for how in (eager, HOWS["torch.compile(model)"]))
    ours = ran(step, HOWS["torch.compile(model)"], "gemma2", True)
    ours.assert_same(plain)
    assert ours.graphs[1:] == ours.graphs[1:2] * (STEPS - 1)
    assert ours.graphs[-1] <= 3 * stock.graphs[-1]  # behind the head the softcap and the loss are graphs of their own


@pytest.mark.works("softcap behind the head of a compiled model", by="ORPO patch")
def test_what_a_compiled_model_does_to_its_logits_is_read() -> None:
    plain = ran(stock_loss, eager, "gemma2", False)
    ours = ran(Patched(), HOWS["torch.compile(model)"], "gemma2", False)
    ours.assert_same(plain)
    assert ours.graphs[1:] == ours.graphs[1:2] * (STEPS - 1)


def test_a_compiled_model_may_be_fused_late_and_unfused() -> None:
    model = llama()
    called = torch.compile(model, backend="eager")
    plain = Run(dpo, stock := llama(), stock)
    for change, calls in ((None, 0), (fuse, STEPS), (unfuse, STEPS)):
        if change is not None:
            change(called)
        Run(dpo, model, called).assert_same(plain)
        assert fusion_report(model).calls == calls


def test_a_patched_trainer_and_lazy_logits_meet_in_one_compiled_model() -> None:
    """The detour that stays keeps what it stands for."""
    model = llama()
    plain = copy.deepcopy(model)
    called, patched = torch.compile(model, backend="eager"), Patched()
    of_patch, of_logits = Run(stock_loss, plain, plain), Run(dpo, plain, plain)
    Run(patched, model, called).assert_same(of_patch)
    fuse(model)
    Run(dpo, model, called).assert_same(of_logits)
    assert fusion_report(model).calls == STEPS
    Run(patched, model, called).assert_same(of_patch)
    assert fusion_report(model).calls == STEPS
    twin = copy.deepcopy(model)
    Run(dpo, twin, twin).assert_same(of_logits)
    assert fusion_report(twin).calls == STEPS
    unfuse(model)
    Run(dpo, model, called).assert_same(of_logits)
    assert not fusion_report(model).fused
    leave_nothing()
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks
    assert not model.lm_head._forward_hooks


def test_nothing_stays_in_a_model_that_is_not_compiled() -> None:
    model = llama()
    assert not is_compiled(model)
    Run(Patched(), model, model)
    assert "forward" not in vars(model.lm_head)
    assert not model._forward_hooks
    assert not model.lm_head._forward_hooks


@pytest.mark.works("torch.compile with fullgraph=True", by="ORPO patch", outcome="refused")
def test_a_model_that_must_be_one_graph_keeps_its_own_path() -> None:
    model = llama()
    called = torch.compile(model, backend="eager", fullgraph=True)
    trainer, data = FakeTrainer(), batch()
    for _ in range(2):
        site = find_site(trainer, called)
        why = fused_loss(FakePatch(), trainer, called, site, data, ORPO(0.5))  # type: ignore[arg-type]
        assert "compiled with fullgraph=True" in str(why)
    Run(dpo, model, called)


@pytest.mark.works("torch.compile with fullgraph=True", by="lazy logits", outcome="refused")
def test_a_model_that_must_be_one_graph_says_that_a_lazy_head_breaks_it() -> None:
    called = torch.compile(fuse(llama()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile with fullgraph=False"):
        called(**batch().inputs)


@pytest.mark.parametrize("how", HOWS)
def test_patch_transformers_fuses_what_is_compiled(how: str) -> None:
    model = llama()
    patch_transformers()
    try:
        run = Run(dpo, model, HOWS[how](model, "eager"))
        assert fusion_report(model).calls == STEPS
    finally:
        unpatch_transformers()
    run.assert_same(Run(dpo, plain := llama(), plain))
    assert run.graphs[1:] == run.graphs[1:2] * (STEPS - 1)


TRAINED = {"torch_compile": True, "max_steps": 4, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.works("torch_compile=True", by="ORPO patch")), "aot_eager"]
)
def test_orpo_trainer_compiles_and_fuses(backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logged metrics and weights are those of the stock trainer, compiled as often, with a break at the head."""
    config, options = test_trl.CONFIGS["llama"](), {**TRAINED, "torch_compile_backend": backend}
    graphs: dict[bool, int] = {}
    weights: dict[bool, dict[str, Tensor]] = {}
    logs: dict[bool, list[dict[str, float]]] = {}
    for patched in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with caplog.at_level(logging.INFO, "orpo_kernels"):
            logs[patched], weights[patched] = test_trl.train(test_trl.model(config), tmp_path, patched, **options)
        graphs[patched] = counters["stats"]["unique_graphs"]
    assert "fused the loss of this ORPOTrainer" in caplog.text
    assert 0 < graphs[True] <= graphs[False]
    for theirs, ours in zip(logs[False], logs[True], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in weights[False].items():
        torch.testing.assert_close(weights[True][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
