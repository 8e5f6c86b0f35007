"""peft's adapters on a head, fused: losses and every gradient as the stock model has them; what is refused, and why."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
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
from benchmarks.harness.measure import flops
from orpo_kernels.integrations import adapters, fuse, fusion_report, unfuse
from orpo_kernels.integrations import fused as fusing
from orpo_kernels.integrations import trainer as patching
from orpo_kernels.integrations.hf_head import head_module
from orpo_kernels.loss import plan_of_head
from orpo_kernels.objectives import ORPO
from orpo_kernels.settings import Batch as Labels
from orpo_kernels.settings import Settings as CallSettings
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


def adapted(*configs: Any, base: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    """A peft model with these adapters, all active; weights of the base are exact in bfloat16.

    Adapters stay in float32 beside a base in bfloat16, as peft keeps them.
    """
    model = base()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    torch.manual_seed(seed)
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
    model.get_output_embeddings().base_layer.requires_grad_(True)  # alone: what is merged has no gradient
    return model


CASES: dict[str, Callable[..., Any]] = {
    "LoRA on the head": lambda **o: adapted(lora(), **o),
    "an odd rank": lambda **o: adapted(lora(r=3), **o),
    "rsLoRA on the head": lambda **o: adapted(lora(use_rslora=True), **o),
    "several LoRA on the head": lambda **o: adapted(lora(), lora(r=4, lora_alpha=3), lora(r=5), **o),
    "LoRA on a head with bias": lambda **o: adapted(lora(), base=phi, **o),
    "LoRA with biases": lambda **o: adapted(
        lora(lora_bias=True), lora(r=2, lora_alpha=2, lora_bias=True), base=phi, **o
    ),
    "LoRA on a trained head": trained_base,
    "LoRA on a tied head": lambda **o: adapted(lora(), base=tied, **o),
    "LoRA on a trained tied head": trained_tied,
    "merged LoRA on the head": merged,
    "modules_to_save head": lambda **o: adapted(
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), **o
    ),
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


def assert_as_accurate(
    make: Callable[..., Any],
    dtype: torch.dtype,
    ours: Callable[[Any], dict[str, Tensor]],
    stock: Callable[[Any], dict[str, Tensor]] = stock_of,
) -> None:
    """Every number as near to float64 as twice stock's, relative to its size, or as rounding alone.

    What stock's error is in 16 bits, six models say together: that of one number of one model is a matter of luck.
    """

    def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
        assert found.keys() == truth.keys()
        sizes = {name: true.norm().clamp(min=1.0 if name == "loss" else 1e-12) for name, true in truth.items()}
        return {name: float((found[name].double() - true).norm() / sizes[name]) for name, true in truth.items()}

    theirs: dict[str, float] = {}
    for seed in range(1, 7 if dtype == torch.bfloat16 else 2):
        truth, plain = (stock(make(dtype=of, seed=seed)) for of in (torch.float64, dtype))
        theirs = {name: max(theirs.get(name, 0.0), error) for name, error in errors(plain, truth).items()}
        if seed == 1:
            found, first = ours(make(dtype=dtype, seed=seed)), truth
            assert [value.dtype for value in found.values()][1:] == [value.dtype for value in plain.values()][1:]
    for name, error in errors(found, first).items():
        floor = VALUE_FLOOR[dtype] if name == "loss" else GRAD_FLOOR[dtype]
        assert error <= max(FACTOR * theirs[name], floor), f"{name}: {error:.2e}, stock {theirs[name]:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("case", marked(CASES, LAZY))
def test_lazy_logits(case: str, consumer: str, dtype: torch.dtype) -> None:
    consume = CONSUMERS[consumer]
    assert_as_accurate(CASES[case], dtype, partial(lazy_of, consume=consume), partial(stock_of, consume=consume))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", marked(CASES, PATCH))
def test_patch(case: str, dtype: torch.dtype) -> None:
    assert_as_accurate(CASES[case], dtype, patched_of)


def dropping(dtype: torch.dtype, train: bool = True) -> Any:
    model = adapted(lora(lora_dropout=0.4), lora(r=4, lora_dropout=0.2), dtype=dtype)
    return model.train(train)


@pytest.mark.works("LoRA on the head, dropout", by=LAZY)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lazy_dropout_is_the_stock_models(dtype: torch.dtype, train: bool) -> None:
    """The same numbers are drawn, so that a seed gives the same run."""
    found = []
    for run in (stock_of, lazy_of):
        torch.manual_seed(3)
        found.append({**run(dropping(dtype, train)), "next": torch.rand(3)})
    torch.testing.assert_close(*found, rtol=2e-4 if dtype == torch.float32 else 1e-10, atol=1e-7)


@pytest.mark.works("LoRA on the head, dropout", by=PATCH)
@pytest.mark.parametrize("train", [True, False])
def test_patched_dropout_is_the_stock_models(train: bool) -> None:
    """Of both batches: the first, which is checked, draws nothing more than a later one."""
    torch.manual_seed(3)
    model = dropping(torch.float64, train)
    stock = [stock_of(model), stock_of(model)][1]
    after = torch.rand(3)
    torch.manual_seed(3)
    ours = patched_of(dropping(torch.float64, train))
    torch.testing.assert_close(ours, stock, rtol=1e-8, atol=1e-9)
    assert torch.equal(torch.rand(3), after)


def states(model: Any) -> Any:
    """A model with two adapters, as a script switches them."""
    yield "both"
    with model.disable_adapter():
        yield "none"
    model.set_adapter("a1")
    yield "the second"
    model.merge_adapter(["a1"])
    yield "merged"
    with model.disable_adapter():
        yield "none, after the stock head has unmerged"
    model.set_adapter("a0")
    yield "the first"


@pytest.mark.works("switched and disabled adapters", by=LAZY)
@pytest.mark.works("switched and disabled adapters", by=PATCH)
@pytest.mark.parametrize("own", ["LoRA", "modules_to_save"])
@pytest.mark.parametrize("run", [lazy_of, patched_of])
def test_adapters_are_switched(run: Callable[[Any], dict[str, Tensor]], own: str) -> None:
    """What is active is asked in every call; ``modules_to_save`` is merged nowhere, so its states are fewer."""
    first = lora(target_modules=["q_proj"], modules_to_save=["lm_head"]) if own == "modules_to_save" else lora()
    pair = []
    for _ in range(2):
        model = adapted(first, lora(r=4, target_modules=["q_proj"] if own == "modules_to_save" else ["lm_head"]))
        pair.append(model.double())
    model, stock = pair
    if own == "modules_to_save":
        with torch.no_grad():
            for each in pair:
                each.base_model.model.lm_head.modules_to_save["a0"].weight.mul_(1.5)
                each.set_adapter("a0")
    seen = []
    for state, _ in zip(states(model), states(stock), strict=True):
        seen.append(state)
        for each in pair:
            each.requires_grad_(True)  # something has a gradient in every state
        if run is lazy_of:
            fusion_report(model).reset()
        torch.testing.assert_close(run(model), stock_of(stock), rtol=1e-7, atol=1e-9, msg=lambda m, s=state: s + m)
    assert len(seen) == 6


def test_the_products_of_lora() -> None:
    """Two products of the head's size and a thin one, where the head is frozen; three where E does not fit."""
    share = 8 / (32 + 8)
    for make, workspace, products in (
        (CASES["LoRA on the head"], None, 2 + share),
        (CASES["LoRA on the head"], 1, 3 + share),
        (CASES["LoRA on a trained head"], None, 3),
    ):
        model = fuse(make(), workspace_bytes=workspace)
        stock_of(model)
        report = fusion_report(model)
        scored = int((LABELS != -100).sum()) / LABELS.numel()  # rows without a label take no part
        assert report.products == pytest.approx(products * scored, abs=1e-9), report


def test_the_flops_of_a_patched_step() -> None:
    """Counted from outside, at a vocabulary beside which the rest of the model is small."""

    def wide() -> Any:
        return llama(vocab_size=4096)

    def flops_of(model: Any) -> int:
        trainer = FakeTrainer()
        site = patching.find_site(trainer, model)
        assert isinstance(site, patching.Site), site

        def step() -> None:
            fused = fusing.fused_loss(FakePatch(), trainer, model, site, DATA, ORPO(0.1))
            assert not isinstance(fused, str), fused
            fused[0].loss.backward()

        step()  # the first batch has checks
        return flops(step)

    frozen = flops_of(adapted(lora(target_modules=["q_proj"]), base=wide))
    head = flops_of(adapted(lora(), base=wide))
    targets = int(((LABELS != -100) | (F.pad(DATA.nll, (0, 0, 0, 2), value=-100) != -100)).sum())
    of_columns = 2 * targets * 4096 * 8
    one = 2 * targets * 4096 * 32
    assert head - frozen <= 3 * of_columns * 1.2 < one  # forward, hidden's gradient, B's: columns alone


def test_the_plan_says_that_the_weights_product_is_thin() -> None:
    model = adapted(lora())
    with torch.no_grad():
        hidden, head = adapters.linear_head(model.get_output_embeddings(), torch.randn(4, 9, 32))
    plan = plan_of_head(hidden, head, Labels(LABELS, DATA.nll), CallSettings(ORPO(0.1)))
    assert plan.name == "forward"
    hidden, head = adapters.linear_head(model.get_output_embeddings(), torch.randn(4, 9, 32))
    plan = plan_of_head(hidden, head, Labels(LABELS, DATA.nll), CallSettings(ORPO(0.1)))
    assert str(plan).endswith("; the weight's product has 8 of 40 columns")


class Odd(nn.Linear):
    """A layer that is no plain one."""


def ia3() -> Any:
    return peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA on the head": (lambda: adapted(lora(use_dora=True)), "DoraLinearVariant, which adds no product of rank r"),
    "LoHa on the head": (
        lambda: adapted(peft.LoHaConfig(target_modules=["lm_head"], r=2)),
        "its head is a peft.tuners.loha.layer.",
    ),
    "IA3 on the head": (lambda: adapted(ia3()), "an adapter that is no product of rank r added to a linear head"),
    "VeRA on the head": (
        lambda: adapted(peft.VeraConfig(target_modules=["lm_head"], r=2)),
        "an adapter that is no product of rank r added to a linear head",
    ),
    "AdaLoRA on the head": (
        lambda: adapted(peft.AdaLoraConfig(target_modules=["lm_head"], init_r=2, total_step=10)),
        "its head is a peft.tuners.adalora.layer.SVDLinear, an adapter",
    ),
}


@pytest.mark.parametrize("name", marked(REFUSED, PATCH, LAZY, outcome="refused"))
def test_adapters_that_are_refused(name: str) -> None:
    """With a reason, and stock numbers."""
    make, reason = REFUSED[name]
    model, stock = make(), make()
    assert reason in str(head_module(model.get_base_model()))
    with pytest.warns(UserWarning, match="is not fused, because"):
        fuse(model)
    assert reason in str(fusion_report(model).refusal)
    torch.testing.assert_close(stock_of(model), stock_of(stock), rtol=0, atol=0)


def test_an_adapter_that_is_added_later_is_refused_when_it_is_active() -> None:
    model = adapted(lora(), lora(use_dora=True, target_modules=["lm_head"]))
    model.set_adapter("a0")
    fuse(model)
    assert type(model(**DATA.inputs).logits) is not Tensor
    model.set_adapter("a1")
    with pytest.warns(UserWarning, match="DoraLinearVariant"):
        assert type(model(**DATA.inputs).logits) is Tensor
    assert "the logits are not lazy" in str(fusion_report(model))


@pytest.mark.works("LoRA on the head, adapter_names", by=LAZY, outcome="refused")
def test_a_batch_of_several_adapters_has_stock_logits() -> None:
    model = adapted(lora(), lora(r=4)).eval()
    names = ["a0", "a1", "__base__", "a0"]
    expected = model(**DATA.inputs, adapter_names=names).logits
    logits = fuse(model)(**DATA.inputs, adapter_names=names).logits
    assert type(logits) is Tensor
    assert torch.equal(logits, expected)


def test_parts_that_a_fused_head_would_pass_by() -> None:
    def changed(change: Callable[[Any], object]) -> str:
        model = adapted(lora())
        change(model.get_output_embeddings())
        return str(head_module(model.get_base_model()))

    hooked = "whose base layer has hooks or a forward of its own, which a fused loss would pass by"
    assert hooked in changed(lambda head: head.base_layer.register_forward_hook(lambda *_: None))
    assert "lora_B of 'a0' has hooks" in changed(lambda head: head.lora_B["a0"].register_forward_hook(lambda *_: None))
    assert "lora_B of 'a0' is a" in changed(lambda head: head.lora_B.update({"a0": Odd(8, VOCAB)}))
    assert "whose base layer is a" in changed(lambda head: setattr(head, "base_layer", Odd(32, VOCAB)))
    assert "forward hooks" in changed(lambda head: head.register_forward_hook(lambda *_: None))


def test_fused_before_peft_and_once_more_after() -> None:
    base = fuse(llama())
    model = get_peft_model(base, lora())
    assert fuse(model) is model
    assert "forward" not in vars(model.get_output_embeddings().base_layer)
    logits = model(**DATA.inputs).logits
    cross_entropy(logits).backward()
    assert fusion_report(model).materialised == []
    unfuse(model)
    assert type(model(**DATA.inputs).logits) is Tensor
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_copied_model_uses_its_own_adapters() -> None:
    model = adapted(lora(), dtype=torch.float64)
    other = copy.deepcopy(fuse(model))
    with torch.no_grad():
        other.get_output_embeddings().lora_B["a0"].weight.mul_(2)
    stock = adapted(lora(), dtype=torch.float64)
    with torch.no_grad():
        stock.get_output_embeddings().lora_B["a0"].weight.mul_(2)
    torch.testing.assert_close(stock_of(other), stock_of(stock), rtol=1e-9, atol=1e-10)


def tokens(base: Callable[[], Any], **options: Any) -> Any:
    indices = [5, 17, 40] if base is tied else {"lm_head": [5, 17, 40]}
    config = lora(target_modules=["q_proj"], trainable_token_indices=indices)
    model = adapted(config, base=base, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(1.5)
    return model


@pytest.mark.works("trainable token indices", by=LAZY)
@pytest.mark.works("trainable token indices", by=PATCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [lazy_of, patched_of])
@pytest.mark.parametrize("base", [tied, llama])
def test_trainable_tokens(base: Callable[[], Any], run: Callable[[Any], dict[str, Tensor]], dtype: Any) -> None:
    """Rows of the head are replaced; with a tied embedding they are its rows, and take both gradients once."""
    assert any("trainable_tokens_delta" in name for name in stock_of(tokens(base)))
    assert_as_accurate(partial(tokens, base), dtype, run)


def prompted(config: Callable[..., Any], **options: Any) -> Any:
    """Four virtual tokens before every sequence, as embeddings or as keys and values."""
    torch.manual_seed(1)
    dtype = options.pop("dtype", torch.float64)
    return get_peft_model(llama().to(dtype), config(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)).to(dtype)


PROMPTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "prefix tuning": (peft.PrefixTuningConfig, {}),
}


def of_prompted(model: Any) -> dict[str, Tensor]:
    """A loss of the script's own, which leaves out the virtual tokens' positions, and the model's own of labels."""
    logits = model(**DATA.inputs).logits
    own = model(**DATA.inputs, labels=IDS).loss
    return gradients(model, cross_entropy(logits[:, logits.shape[1] - IDS.shape[1] :]) + own)


@pytest.mark.parametrize("name", marked(PROMPTS, LAZY))
def test_lazy_logits_of_prompts(name: str) -> None:
    config, options = PROMPTS[name]
    model, stock = prompted(config, **options), prompted(config, **options)
    fuse(model)
    # transformers computes its own loss in float32.
    torch.testing.assert_close(of_prompted(model), of_prompted(stock), rtol=1e-6, atol=1e-7)
    assert (fusion_report(model).calls, fusion_report(model).materialised) == (2, [])


@pytest.mark.works("prefix tuning", by=PATCH)
def test_a_prefix_under_the_patch() -> None:
    """Keys and values before the sequence: every row of hidden states still stands at its label."""
    ours = patched_of(prompted(peft.PrefixTuningConfig))
    torch.testing.assert_close(ours, stock_of(prompted(peft.PrefixTuningConfig)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "name", marked([name for name in PROMPTS if name != "prefix tuning"], PATCH, outcome="refused")
)
def test_a_prompt_under_the_patch(name: str) -> None:
    """It adds positions that have no label; TRL's own path does not know them either."""
    config, options = PROMPTS[name]
    model, trainer = prompted(config, **options), FakeTrainer()
    site = patching.find_site(trainer, model)
    assert isinstance(site, patching.Site), site
    reason = fusing.fused_logprobs(FakePatch(), trainer, model, site, DATA)
    assert reason == "LlamaForCausalLM: its forward called its head on [4, 13] of [4, 9] positions"
    assert model(**DATA.inputs).logits.shape == (4, 13, VOCAB)


def quantised(kind: str, of: torch.dtype, *, head: bool, dtype: torch.dtype, seed: int) -> Any:
    """A frozen model with a head quantised from ``of``, and LoRA below it or on it too.

    In float64 the head is a plain one of the numbers that the quantised weight stands for.
    """
    library, _, form = kind.partition(" ")
    needed = pytest.importorskip(library, reason=f"{library} is not installed, whose layers these are")
    model = llama().to(of)
    if library == "torchao":
        config = getattr(importlib.import_module("torchao.quantization"), form)()
        needed.quantize_(model, config, filter_fn=lambda _, name: name == "lm_head")
    else:
        options: dict[str, Any] = {"has_fp16_weights": False} if form == "Linear8bitLt" else {"compute_dtype": of}
        packed = getattr(needed.nn, form)(32, VOCAB, bias=False, **options)
        packed.load_state_dict(model.lm_head.state_dict())
        model.lm_head = packed.to("cpu")
    if dtype == torch.float64:
        _, (weight, *_) = adapters.linear_head(model.lm_head, torch.zeros(1, 32, dtype=of))
        model.lm_head = nn.Linear(32, VOCAB, bias=False)
        model.lm_head.weight.data = weight.detach()
        model = model.double()
    torch.manual_seed(seed)
    return get_peft_model(model, lora(target_modules=["q_proj", "lm_head"] if head else ["q_proj"]))


QUANTISED = {
    "head of torchao, int8 weights": "torchao Int8WeightOnlyConfig",
    "head of torchao, float8 weights": "torchao Float8WeightOnlyConfig",
    "head of bitsandbytes, 4 bits": "bitsandbytes Linear4bit",
    "head of bitsandbytes, 8 bits": "bitsandbytes Linear8bitLt",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("run", [pytest.param(lazy_of, id="lazy"), pytest.param(patched_of, id="patched")])
@pytest.mark.parametrize("name", marked(QUANTISED, LAZY, PATCH))
def test_quantised_heads(name: str, run: Callable[[Any], dict[str, Tensor]], head: bool, dtype: torch.dtype) -> None:
    """The numbers that the packed weight stands for, as near to float64 as the layer's own forward is.

    bitsandbytes' 8 bits may round hidden states too, where its own forward does, on a GPU.
    """
    assert_as_accurate(partial(quantised, QUANTISED[name], dtype, head=head), dtype, run)


@pytest.mark.works("head with a plain float8 weight", by=PATCH, outcome="refused")
@pytest.mark.works("head with a plain float8 weight", by=LAZY, outcome="refused")
def test_a_plain_float8_weight_is_refused() -> None:
    """Nor does the layer's own forward know what scale its numbers have."""
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    reason = "its head's weight is torch.float8_e4m3fn, in which no loss is computed: dequantise it first"
    assert head_module(model) == reason
    with pytest.warns(UserWarning, match="float8_e4m3fn"):
        fuse(model)
    with pytest.raises(RuntimeError):
        model(**DATA.inputs)


def test_layers_of_other_libraries_are_refused_by_name() -> None:
    model = llama()
    model.lm_head = Odd(32, VOCAB)
    assert head_module(model) == "its head is a tests.integrations.test_adapters.Odd, not a plain nn.Linear"
