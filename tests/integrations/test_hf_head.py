"""What a model does to its logits is asked of it: every kind of head in transformers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from orpo_kernels.integrations import fused as fusing
from orpo_kernels.integrations import fusion_report
from orpo_kernels.integrations import trainer as patching
from orpo_kernels.integrations.detours import detour
from orpo_kernels.integrations.hf_head import Reading, head_module, probes, read
from orpo_kernels.integrations.lazy.heads import patch_transformers, unpatch_transformers
from orpo_kernels.settings import Head
from tests.integrations.models import ROWS, VOCAB, FakePatch, FakeTrainer, batch, build, llama


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    logps = torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return logps * (labels != -100)


def fused(model: Any, trainer: Any = None, data: Any = None) -> Any:
    trainer = trainer or FakeTrainer()
    site = patching.find_site(trainer, model)
    assert isinstance(site, patching.Site), site
    return fusing.fused_logprobs(FakePatch(), trainer, model, site, data or batch())


def reading_of(model: Any) -> Reading:
    ((_, reading),) = fusing._known[model].values()
    return reading


@pytest.mark.parametrize("name", ROWS)
def test_every_head_of_transformers(name: str) -> None:
    model, expected = build(name)
    model.eval()  # xlstm caps in place there, chunk by chunk
    for seed in range(2):  # the batch that is checked, and one that is not
        data = batch(seed=seed)
        logits = model(**data.inputs).logits
        theirs, ours = logps_of(logits, data.answer), fused(model, data=data)
        rounding = 4 * torch.finfo(torch.float32).eps * logits[logits > -1e30].abs().max().item()
        torch.testing.assert_close(ours[0].answer.double(), theirs, rtol=0, atol=rounding + 1e-6)
        torch.testing.assert_close(ours[0].nll.double(), logps_of(logits[:2], data.nll), rtol=0, atol=rounding + 1e-6)
    assert str(reading_of(model)) == expected


OFFSETS = torch.linspace(-3, 3, VOCAB)


def filled(logits: Tensor, value: float, columns: slice = slice(90, None)) -> Tensor:
    logits = logits.clone()
    logits[..., columns] = value
    return logits


def softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


READ: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nothing": (lambda z: z, "97 columns"),
    "a third": (lambda z: z / 3, "97 columns, scale 0.333333"),
    "large": (lambda z: z * 24, "97 columns, scale 24"),
    "small cap": (lambda z: softcap(z, 0.25), "97 columns, softcap 0.25"),
    "large cap": (lambda z: softcap(z, 1000.0), "97 columns, softcap 1000"),
    "cap, then scale": (lambda z: 0.5 * softcap(z, 20.0), "97 columns, scale 0.5, softcap 10"),
    "offsets": (lambda z: z + OFFSETS, "97 columns, an offset of each"),
    "offsets under a cap": (lambda z: softcap(0.3 * z + OFFSETS, 30.0), "scale 0.3, softcap 30, an offset of each"),
    "far off": (lambda z: 0.8 * z - 100, "97 columns, scale 0.8, all shifted by -100"),
    "slice": (lambda z: z[..., :50], "50 columns"),
    "finfo.min": (lambda z: filled(z, torch.finfo(z.dtype).min), "97 columns, 7 of them masked"),
    "-inf": (lambda z: filled(z, -torch.inf), "97 columns, 7 of them masked"),
    "-1e9 added": (lambda z: z + filled(torch.zeros(VOCAB), -1e9), "97 columns, 7 of them masked"),
    "mask, scale": (lambda z: filled(z, -torch.inf) * 0.3, "97 columns, scale 0.3, 7 of them masked"),
    "bfloat16": (lambda z: z.bfloat16(), "97 columns"),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str) -> None:
    """What is read gives what the map gives, for logits it has not seen."""
    map_, expected = READ[name]
    given = probes(VOCAB, torch.float32, torch.device("cpu"))
    reading = read(given, map_(given.clone()))
    assert isinstance(reading, Reading), reading
    assert str(reading).endswith(expected)
    head = nn.Linear(VOCAB, VOCAB)
    nn.init.eye_(head.weight)
    nn.init.normal_(head.bias)
    found = reading.head(Head(head.weight, head.bias))
    z = 5 * torch.randn(20, VOCAB)
    ours = found.cap(found.logit_scale * (z @ found.weight.T + found.bias)) + reading.shift
    theirs = map_(z + head.bias).float()
    kept = theirs > -1e4
    torch.testing.assert_close(ours[kept], theirs[kept], atol=1e-5, rtol=1e-2 if name == "bfloat16" else 1e-5)
    assert (ours[~kept] < -1e4).all()


def test_a_scale_that_was_rounded_is_read_from_many_numbers() -> None:
    given = probes(50_000, torch.float32, torch.device("cpu"))
    reading = read(given, (given / 3).bfloat16().float())  # as accelerate widens the output of a model in bfloat16
    assert isinstance(reading, Reading)
    assert reading.logit_scale == pytest.approx(1 / 3, rel=1e-4)


class Learned(nn.Module):
    scale = nn.Parameter(torch.tensor(2.0))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "log_softmax": (lambda z: torch.log_softmax(z, -1), "neither a positive scale nor a softcap"),
    "centred": (lambda z: z - z.mean(-1, keepdim=True), "neither a positive scale nor a softcap"),
    "by its neighbour": (lambda z: z - 0.01 * z.roll(1, -1), "no scale, softcap, offset or mask"),
    "clamped": (lambda z: z.clamp(-50, 50), "no scale, softcap, offset or mask of columns: it turns -?[0-9.]+ into"),
    "reversed": (lambda z: z.flip(-1), "no scale, softcap, offset or mask"),
    "two scales": (lambda z: z * (1 + (torch.arange(VOCAB) == 9)), "no scale, softcap, offset or mask"),
    "negative": (lambda z: -z, "expected a positive number|neither a positive scale nor a softcap"),
    "constant": (lambda z: torch.zeros_like(z), "neither a positive scale nor a softcap"),
    "some zeroed": (lambda z: filled(z, 0.0), "no scale, softcap, offset or mask"),
    "all masked": (lambda z: z - 1e6, "every one of its logits is below -5000"),
    "masked after a cap": (
        lambda z: filled(softcap(z, 30.0), -torch.inf),
        "masks columns of its logits after a softcap",
    ),
    "masked by value": (lambda z: torch.where(z[..., :1] == 0, filled(z, -1e9), z), "by the head's own output"),
    "NaN": (lambda z: z * torch.nan, "its logits are NaN"),
    "learned": (lambda z: z * Learned.scale, "by trained parameters"),
    "more columns": (lambda z: torch.cat([z, z], -1), "makes 194 logits of its head's 97"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_read_refuses(name: str) -> None:
    map_, sentence = REFUSED[name]
    given = probes(VOCAB, torch.float32, torch.device("cpu"))
    found = read(given, map_(given.clone()))
    assert isinstance(found, str)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(found)


def test_a_configuration_that_changes_is_read_again() -> None:
    model, _ = build("gemma2")
    for cap in (2.0, 1.0):
        model.config.final_logit_softcapping = cap
        data = batch()
        with torch.no_grad():
            theirs = logps_of(model(**data.inputs).logits, data.answer)
        torch.testing.assert_close(fused(model)[0].answer.double(), theirs, rtol=0, atol=1e-5)
        assert reading_of(model).softcap == cap


class Offset(transformers.LlamaForCausalLM):
    """As encoder-decoder models have it: a buffer that is added."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, VOCAB))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] + self.final_logits_bias
        return output


def test_a_buffer_that_changes_is_read_again() -> None:
    model = llama(Offset)
    for _ in range(2):
        data = batch()
        with torch.no_grad():
            theirs = logps_of(model(**data.inputs).logits, data.answer)
        torch.testing.assert_close(fused(model)[0].answer.double(), theirs, rtol=0, atol=1e-5)
        with torch.no_grad():
            model.final_logits_bias += torch.randn(VOCAB)


def test_heads_that_cannot_be_replaced() -> None:
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        model = llama()
        getattr(model.lm_head, name)(lambda *_: None)
        assert head_module(model) == "its head has forward hooks, which a fused loss would pass by"
    for name in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        model = llama()
        getattr(model.lm_head, name)(lambda *_: None)
        assert head_module(model) == "its head has backward hooks, which a fused loss would pass by"
    model = llama()
    nn.utils.parametrizations.spectral_norm(model.lm_head)
    assert "ParametrizedLinear, not a plain nn.Linear" in str(head_module(model))
    model = llama()
    model.lm_head.forward = lambda hidden: 2 * nn.Linear.forward(model.lm_head, hidden)
    assert (
        patching.find_site(FakeTrainer(), model) == "its head's forward was replaced, which a fused loss would pass by"
    )
    assert head_module(nn.Linear(2, 2)) == "Linear names no output embeddings"


def test_adapters_with_and_without_a_head_of_their_own() -> None:
    """peft calls the trained copy only while an adapter that has one is active and enabled."""
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    )
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)

    def compared() -> nn.Linear:
        data = batch()
        with torch.no_grad():
            theirs = logps_of(model(**data.inputs).logits, data.answer)
        trainer = FakeTrainer()
        site = patching.find_site(trainer, model)
        assert isinstance(site, patching.Site), site
        ours = fusing.fused_logprobs(FakePatch(), trainer, model, site, data)
        torch.testing.assert_close(ours[0].answer.double(), theirs, rtol=0, atol=1e-4)
        return site.head

    trained = compared()
    with model.disable_adapter():
        assert compared() is not trained
    model.set_adapter("plain")
    assert compared() is not trained
    model.set_adapter("default")
    assert compared() is trained


def test_a_model_first_called_in_a_detour_is_fused_beneath_it() -> None:
    """The launcher fuses a model at its first call, which a patched trainer makes with the head intercepted."""
    model, ids = llama(), torch.randint(3, 90, (2, 9))
    stock = model(ids).logits
    patch_transformers()
    try:
        with detour(model.lm_head, lambda hidden: hidden.new_full((1, 1, VOCAB), 7.0)):
            inside = model(ids).logits
        assert (inside.shape, fusion_report(model).calls) == ((1, 1, VOCAB), 0)
        outside = model(ids).logits
        assert fusion_report(model).calls == 1
        torch.testing.assert_close(outside.sum(-1), stock.sum(-1))
    finally:
        unpatch_transformers()
    assert "forward" not in vars(model.lm_head)


def test_a_script_that_replaces_the_call_of_a_class_for_a_while() -> None:
    """ms-swift does: what it reads from the class and gives back to it fuses the models that come after."""
    model, ids = llama(), torch.randint(3, 90, (2, 9))
    cls = type(model)
    patch_transformers()
    try:
        own = cls.__call__
        try:
            cls.__call__ = lambda *_, **__: "replaced"
            assert model(ids) == "replaced"
            cls.__call__ = own
            model(ids)
            assert fusion_report(model).calls == 1
            cls.__call__(model, ids)
            assert fusion_report(model).calls == 2
            unpatch_transformers()
            assert not fusion_report(model).fused
            model(ids)
            assert not fusion_report(model).fused
        finally:
            del cls.__call__
    finally:
        unpatch_transformers()
