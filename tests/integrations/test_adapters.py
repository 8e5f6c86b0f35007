"""peft's adapters on a head: losses and every gradient as the stock model has them, fused; what cannot be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR
from orpo_kernels.integrations import adapters, fuse, fusion_report, unfuse
from orpo_kernels.integrations import fused as fusing
from orpo_kernels.integrations import trainer as patching
from orpo_kernels.integrations.hf_head import head_module
from tests.integrations.models import SHAPE, VOCAB, FakePatch, FakeTrainer, batch, llama

DATA = batch(pairs=2, length=9)
IDS, LABELS = DATA.inputs["input_ids"], DATA.answer
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
PATCH, LAZY = "ORPO patch", "lazy logits"


def lora(**options: Any) -> LoraConfig:
    """On the head and on a layer below it; B is not 0, as it would be before the first step."""
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    return LoraConfig(**{**settings, **options})


def phi() -> Any:
    """A model whose head has a bias."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.PhiConfig(**SHAPE))
    nn.init.normal_(model.lm_head.bias)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def adapted(*configs: Any, base: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32) -> Any:
    """A peft model with these adapters, all active; weights of the base are exact in bfloat16.

    Adapters stay in float32 beside a base in bfloat16, as peft keeps them.
    """
    model = base()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    torch.manual_seed(1)
    model = get_peft_model(model, configs[0], adapter_name="a0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", config)
    if len(configs) > 1:
        model.base_model.set_adapter([f"a{number}" for number in range(len(configs))])
    for name, parameter in model.named_parameters():
        if dtype != torch.bfloat16 or "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def trained_base(**options: Any) -> Any:
    model = adapted(lora(), **options)
    model.get_output_embeddings().base_layer.requires_grad_(True)
    return model


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def trained_tied(**options: Any) -> Any:
    """The gradient of the embedding and of the head meet in one weight."""
    model = adapted(lora(), base=tied, **options)
    weight = model.get_output_embeddings().base_layer.weight
    assert weight is model.get_input_embeddings().weight
    weight.requires_grad_(True)
    return model


def merged(**options: Any) -> Any:
    model = adapted(lora(), lora(r=4), **options)
    model.merge_adapter(["a0"])
    return model


CASES: dict[str, Callable[..., Any]] = {
    "LoRA on the head": lambda **o: adapted(lora(), **o),
    "an odd rank": lambda **o: adapted(lora(r=3), **o),
    "rsLoRA on the head": lambda **o: adapted(lora(use_rslora=True), **o),
    "several LoRA on the head": lambda **o: adapted(lora(), lora(r=4, lora_alpha=3), lora(r=5), **o),
    "LoRA on a head with bias": lambda **o: adapted(lora(), base=phi, **o),
    "LoRA with biases": lambda **o: adapted(lora(lora_bias=True), lora(r=2, lora_bias=True), base=phi, **o),
    "LoRA on a trained head": trained_base,
    "LoRA on a tied head": lambda **o: adapted(lora(), base=tied, **o),
    "LoRA on a trained tied head": trained_tied,
    "merged LoRA on the head": merged,
    "modules_to_save head": lambda **o: adapted(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), **o),
}


def marked(names: Any, *columns: str, outcome: str = "works") -> list[Any]:
    marks = {name: [pytest.mark.works(name, by=by, outcome=outcome) for by in columns] for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), LABELS.reshape(-1))


def entropy(logits: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1).mean()


def moments(logits: Tensor) -> Tensor:
    """A mean of logits, single ones, and two log-probabilities of each row."""
    single = logits.gather(-1, IDS[..., None]).mean() + logits.log_softmax(-1)[..., 3].mean()
    return logits.mean() + single + cross_entropy(logits)


CONSUMERS = {"cross entropy": cross_entropy, "entropy": entropy, "moments": moments}


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter, named as in the stock model."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def stock_of(model: Any, consume: Callable[[Tensor], Tensor] = cross_entropy) -> dict[str, Tensor]:
    return gradients(model, consume(model(**DATA.inputs).logits))


def lazy_of(model: Any, consume: Callable[[Tensor], Tensor] = cross_entropy) -> dict[str, Tensor]:
    fuse(model)
    assert fusion_report(model).fused, fusion_report(model)
    found = stock_of(model, consume)
    assert (fusion_report(model).calls, fusion_report(model).materialised) == (1, [])
    return found


def patched_of(model: Any) -> dict[str, Tensor]:
    """The cross-entropy from log-probabilities that the patch computes, of the first batch and of a later one."""
    trainer, found = FakeTrainer(), {}
    for _ in range(2):
        site = patching.find_site(trainer, model)
        assert isinstance(site, patching.Site), site
        fused = fusing.fused_logprobs(FakePatch(), trainer, model, site, DATA)
        assert not isinstance(fused, str), fused
        found = gradients(model, -fused[0].answer.sum() / fused[0].lengths.sum())
    return found


def assert_as_accurate(ours: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor], dtype: Any) -> None:
    """Every number as near to float64 as twice the worst of stock's, relative to its size, or as rounding alone."""
    assert ours.keys() == stock.keys() == truth.keys()

    def error(found: dict[str, Tensor], name: str) -> float:
        size = truth[name].norm().clamp(min=1e-6 if name == "loss" else 1e-12)
        return float((found[name].double() - truth[name]).norm() / size)

    for name in truth:
        assert ours[name].dtype == stock[name].dtype or name == "loss", name
        floor = VALUE_FLOOR[dtype] if name == "loss" else GRAD_FLOOR[dtype]
        theirs = error(stock, name)
        assert error(ours, name) <= max(FACTOR * theirs, floor), f"{name}: {error(ours, name):.2e}, stock {theirs:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("case", marked(CASES, LAZY))
def test_lazy_logits(case: str, consumer: str, dtype: torch.dtype) -> None:
    make, consume = CASES[case], CONSUMERS[consumer]
    truth, stock = stock_of(make(dtype=torch.float64), consume), stock_of(make(dtype=dtype), consume)
    assert_as_accurate(lazy_of(make(dtype=dtype), consume), stock, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", marked(CASES, PATCH))
def test_patch(case: str, dtype: torch.dtype) -> None:
    make = CASES[case]
    truth, stock = stock_of(make(dtype=torch.float64)), stock_of(make(dtype=dtype))
    assert_as_accurate(patched_of(make(dtype=dtype)), stock, truth, dtype)
