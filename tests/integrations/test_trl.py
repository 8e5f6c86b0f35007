"""Real TRL trainers on tiny random models: the patch changes no loss, no gradient and no metric."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, PretrainedConfig

from orpo_kernels.integrations import TRL_ORPO, patch_trl, patched_trl, unpatch_trl
from orpo_kernels.integrations.trainer import Settings
from orpo_kernels.integrations.trl_orpo import PATCH, ORPOTrainer
from tests.integrations.models import GPT, SHAPE
from tests.integrations.stock_script import pairs, tokenizer

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()

pytestmark = pytest.mark.slow  # whole trainers

ORPOConfig = importlib.import_module("trl.experimental.orpo").ORPOConfig
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2 tied": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gemma2 softcap": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0),
    "granite divides": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere multiplies": lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "phi bias": lambda: transformers.PhiConfig(**SHAPE),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "mixtral router": lambda: transformers.MixtralConfig(
        **SHAPE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.05
    ),
}

# What each shows, in the words of the table of what works with what.
ROWS = {
    "llama": "plain head",
    "qwen2 tied": "tied embeddings",
    "gemma2 softcap": "softcap on the logits",
    "granite divides": "scaled logits",
    "phi bias": "bias on the head",
    "mixtral router": "mixture of experts with its auxiliary loss",
}


@pytest.fixture(autouse=True)
def _settings() -> Any:
    """Trainers seed themselves, and poisoned memory is none of their business."""
    torch.use_deterministic_algorithms(False)
    assert not PATCH.applied
    yield
    unpatch_trl()


def model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def trainer(
    of: Any,
    folder: Path,
    cls: Any = ORPOTrainer,
    config_class: Any = ORPOConfig,
    data: Any = None,
    peft_config: Any = None,
    **options: Any,
) -> Any:
    # Plain SGD: Adam turns the rounding of gradients that ought to be zero (a key's bias) into steps of full size.
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    size = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 32}
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.1}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    settings: dict[str, Any] = {**evaluation, **size, **plain, **quiet, "beta": 0.5, **options}
    return cls(
        model=of,
        args=config_class(output_dir=str(folder), **settings),
        processing_class=tokenizer(),
        train_dataset=data or pairs(16),
        eval_dataset=pairs(5, seed=1),
        peft_config=peft_config,
    )


def train(of: Any, folder: Path, patched: bool, **options: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Logged metrics without timings, and the trained parameters."""
    if patched:
        patch_trl()
    try:
        run = trainer(of, folder, **options)
        run.train()
    finally:
        unpatch_trl()
    timings = ("runtime", "per_second", "flos")
    logs = [
        {name: value for name, value in entry.items() if not any(word in name for word in timings)}
        for entry in run.state.log_history
    ]
    return logs, dict(run.model.named_parameters())


def assert_same(
    config: PretrainedConfig,
    folder: Path,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    logged: str = "log_odds_ratio",
    **options: Any,
) -> None:
    stock, weights = train(model(config), folder, False, **options)
    ours, our_weights = train(model(config), folder, True, **options)
    assert len(stock) == len(ours) > 2
    assert any(f"eval_{logged}" in entry for entry in ours)
    for theirs, mine in zip(stock, ours, strict=True):
        assert list(theirs) == list(mine)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=rtol, abs=atol), name
    for name, weight in weights.items():
        torch.testing.assert_close(
            our_weights[name], weight, rtol=10 * rtol, atol=10 * atol, msg=lambda m, n=name: n + m
        )


def shown(name: str) -> Any:
    """A configuration as a parameter, with the row of the table that it is."""
    return pytest.param(name, marks=[pytest.mark.works(ROWS[name], by="ORPO patch")] if name in ROWS else [])


@pytest.mark.parametrize("name", [shown(name) for name in CONFIGS])
def test_nothing_changes(name: str, tmp_path: Path) -> None:
    assert_same(CONFIGS[name](), tmp_path)


@pytest.mark.works("bf16 autocast", by="ORPO patch")
@pytest.mark.parametrize("name", ["llama", "gemma2 softcap"])
def test_nothing_changes_in_mixed_precision(name: str, tmp_path: Path) -> None:
    """TRL's default is bfloat16 autocast, where both round; the bound is what bfloat16 logits of this size do."""
    assert_same(CONFIGS[name](), tmp_path, rtol=2e-2, atol=2e-2, bf16=True)


@pytest.mark.works("gradient checkpointing", by="ORPO patch")
@pytest.mark.works("gradient accumulation", by="ORPO patch")
def test_nothing_changes_with_checkpointing(tmp_path: Path) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, gradient_checkpointing=True)


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(None, marks=pytest.mark.works("LoRA beside the head", by="ORPO patch")),
        pytest.param(["lm_head"], marks=pytest.mark.works("LoRA, head in modules_to_save", by="ORPO patch")),
    ],
)
def test_nothing_changes_under_lora(kept: list[str] | None, tmp_path: Path) -> None:
    """A frozen head, and peft's trained copy of one."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=kept)
    assert_same(CONFIGS["llama"](), tmp_path, peft_config=adapter)


HEADS = {
    "LoRA on the head, TRL": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "LoRA on the head, dropout, TRL": LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "lm_head"]),
    "modules_to_save head, TRL": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trainable token indices, TRL": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "prefix tuning, TRL": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.works(name, by="ORPO patch")) for name in HEADS])
def test_nothing_changes_with_adapters_on_the_head(name: str, tmp_path: Path, log: Any) -> None:
    """The seed gives the same dropout, since the head's is drawn in the same order."""
    config = CONFIGS["qwen2 tied" if "token" in name else "llama"]()
    assert_same(config, tmp_path, peft_config=HEADS[name])
    assert "fused the loss of this ORPOTrainer" in log.text
    assert "does not fuse" not in log.text


@pytest.mark.works("LoRA on the head, bfloat16 autocast, TRL", by="ORPO patch")
def test_nothing_changes_with_lora_on_the_head_in_mixed_precision(tmp_path: Path) -> None:
    adapter = HEADS["LoRA on the head, TRL"]
    assert_same(CONFIGS["llama"](), tmp_path, rtol=2e-2, atol=2e-2, bf16=True, peft_config=adapter)


@pytest.mark.works("prompt tuning, TRL", by="ORPO patch", outcome="refused")
def test_prompt_tuning_fails_as_it_does_in_stock_trl(tmp_path: Path, log: Any) -> None:
    """Its positions have no label, which TRL's own loss does not know either."""
    found, adapter = [], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for patched in (False, True):
        with pytest.raises(ValueError, match="match target batch_size") as error:
            train(model(CONFIGS["llama"]()), tmp_path, patched, peft_config=adapter)
        found.append(str(error.value))
    assert found[0] == found[1]
    assert "its forward called its head on" in log.text


class OwnMetrics(ORPOTrainer):  # type: ignore[misc]
    """A subclass with its own loss over the log-probabilities, as Axolotl's has."""

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        chosen, rejected, *_, nll = self.concatenated_forward(model, batch)
        losses, *_ = self.odds_ratio_loss(chosen, rejected)
        loss = 2 * nll - losses.mean()
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}mine": chosen.mean().item(), f"{prefix}log_odds_ratio": losses.mean().item()}


class OwnOdds(ORPOTrainer):  # type: ignore[misc]
    """A subclass with another penalty."""

    def odds_ratio_loss(self, chosen: Any, rejected: Any) -> Any:
        losses, *rest = super().odds_ratio_loss(chosen, rejected)
        return 3 * losses, *rest


@pytest.mark.works("subclass with its own loss", by="ORPO patch")
@pytest.mark.parametrize("cls", [OwnMetrics, OwnOdds])
def test_subclasses_keep_what_they_override(cls: Any, tmp_path: Path) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, cls=cls)


@pytest.mark.works("evaluation", by="ORPO patch")
def test_subclasses_are_patched(tmp_path: Path) -> None:
    class Plain(ORPOTrainer):  # type: ignore[misc]
        pass

    with patched_trl():
        assert Plain.get_batch_loss_metrics.__module__ == "orpo_kernels.integrations.trl"
        assert_no_logits(trainer(model(CONFIGS["llama"]()), tmp_path, cls=Plain))


def assert_no_logits(run: Any) -> None:
    """A run in which the head itself multiplies but the few rows of the checks, in training and in evaluation."""
    rows: list[int] = []
    own = torch.nn.Linear.forward

    def counting(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self.weight.shape[0] == 97:
            rows.append(hidden[..., 0].numel())
        return own(self, hidden)

    torch.nn.Linear.forward = counting  # type: ignore[method-assign]
    try:
        run.train()
    finally:
        torch.nn.Linear.forward = own  # type: ignore[method-assign]
    assert rows == [8, 8]


def test_patching_is_idempotent_and_reversible(tmp_path: Path) -> None:
    stock = {name: ORPOTrainer.__dict__[name] for name in ("get_batch_loss_metrics", "concatenated_forward")}
    existing = trainer(model(CONFIGS["llama"]()), tmp_path)
    patch_trl()
    patch_trl()
    with patched_trl():
        assert PATCH.applied
    assert PATCH.applied  # it was before the block
    assert_no_logits(existing)  # a trainer built before the patch
    unpatch_trl()
    unpatch_trl()
    assert {name: ORPOTrainer.__dict__[name] for name in stock} == stock
    with pytest.raises(KeyError), patched_trl():
        raise KeyError
    assert not PATCH.applied


@pytest.mark.works("answer truncated to nothing", by="ORPO patch")
def test_an_answer_truncated_to_nothing_does_not_kill_the_run(tmp_path: Path) -> None:
    """Stock TRL divides by zero here: a NaN gradient in step 1 and NaN weights from then on."""
    words = " ".join(f"w{index}" for index in range(40))
    broken = datasets.Dataset.from_list([{"prompt": words, "chosen": " w1 w2", "rejected": " w3"}])
    data = datasets.concatenate_datasets([broken, pairs(15)])
    _, ruined = train(model(CONFIGS["llama"]()), tmp_path, False, data=data)
    assert not all(torch.isfinite(weight).all() for weight in ruined.values())
    with pytest.warns(UserWarning, match="have an answer without a token"):
        logs, weights = train(model(CONFIGS["llama"]()), tmp_path, True, data=data)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(value == value for entry in logs for value in entry.values())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="orpo_kernels")
    return caplog


def said(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "orpo_kernels"]


@pytest.mark.works("DoRA on the head", by="ORPO patch", outcome="refused")
def test_dora_on_the_head_keeps_trls_path(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True)
    assert_same(CONFIGS["llama"](), tmp_path, peft_config=adapter)
    (message,) = said(log)
    assert "does not fuse the loss of this ORPOTrainer: the adapter 'default' on its head is Dora" in message


@pytest.mark.works("encoder-decoder models", by="ORPO patch", outcome="refused")
def test_encoder_decoder_keeps_trls_path(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    patch_trl()
    trainer(transformers.T5ForConditionalGeneration(config), tmp_path, max_completion_length=16).train()
    (message,) = said(log)
    assert "does not fuse the loss of this ORPOTrainer: encoder-decoder models are not supported" in message


class Scaled(transformers.LlamaForCausalLM):
    """A model that no table of model types would know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        logits = output["logits"] * 1.5 - 7
        logits[..., 90:] = torch.finfo(logits.dtype).min
        output["logits"] = logits
        return output


class Centred(transformers.LlamaForCausalLM):
    """A model that mixes its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] - output["logits"].mean(-1, keepdim=True)
        return output


def of_class(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: PretrainedConfig) -> Any:
        torch.manual_seed(0)
        return cls(config)

    monkeypatch.setattr("tests.integrations.test_trl.model", build)


@pytest.mark.works("model class of one's own", by="ORPO patch")
def test_nothing_changes_for_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    of_class(Scaled, monkeypatch)
    config = CONFIGS["llama"]()
    stock, weights = train(model(config), tmp_path, False)
    ours, our_weights = train(model(config), tmp_path, True)
    (line,) = said(log)
    assert line.startswith("orpo_kernels: fused the loss of this ORPOTrainer: plan ")
    assert "read as 97 columns, scale 1.5, 7 of them masked, all shifted by -7, agree on the first batch" in line
    for theirs, mine in zip(stock, ours, strict=True):
        for name, value in theirs.items():
            if "logits/" not in name:  # the mean of what is masked with the lowest number there is
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_model_that_mixes_its_logits_keeps_trls_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    of_class(Centred, monkeypatch)
    assert_same(CONFIGS["llama"](), tmp_path)
    (line,) = said(log)
    assert "does not fuse the loss of this ORPOTrainer: Centred: it turns 1e+18 into" in line


def doubled(self: Any, chosen: Any, rejected: Any) -> Any:
    losses, *rest = STOCK_ODDS(self, chosen, rejected)
    return 2 * losses, *rest


STOCK_ODDS = ORPOTrainer.odds_ratio_loss


class Replaced(ORPOTrainer):  # type: ignore[misc]
    """As a script does that replaces a method on the trainer it has built."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.odds_ratio_loss = doubled.__get__(self)


def test_a_method_replaced_on_a_trainer_is_called(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, cls=Replaced)
    (line,) = said(log)
    assert "fused the loss of this Replaced: log-probabilities, plan store on backend torch" in line


@pytest.mark.parametrize("first", [True, False])
def test_a_method_replaced_on_the_class_is_called(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Before the patch or after it."""
    if not first:
        patch_trl()
    monkeypatch.setattr(ORPOTrainer, "odds_ratio_loss", doubled)
    patch_trl()
    trainer(model(CONFIGS["llama"]()), tmp_path, max_steps=1).train()
    (line,) = said(log)
    assert "fused the loss of this ORPOTrainer: log-probabilities, plan store on backend torch" in line


def own_logps(*args: Any, **options: Any) -> Any:
    return 2 * ORPOTrainer.get_batch_logps(*args, **options)


class OwnLogps(ORPOTrainer):  # type: ignore[misc]
    """As a script does that replaces a method on the trainer it has built, whose work is the head's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.get_batch_logps = own_logps


def test_a_method_of_logits_keeps_trls_path(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert_same(CONFIGS["llama"](), tmp_path, cls=OwnLogps)
    (line,) = said(log)
    assert line.endswith("OwnLogps had its get_batch_logps replaced, which a fused loss would pass by")


def test_settings_of_the_patch() -> None:
    patch_trl(backend="torch", workspace_bytes=1_000_000)
    assert PATCH.settings == Settings("torch", 1_000_000)
    with patched_trl():
        assert PATCH.settings == Settings()
    assert PATCH.settings == Settings("torch", 1_000_000)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        patch_trl(backend="cuda")
    assert PATCH.settings == Settings("torch", 1_000_000)


def test_a_trl_that_cannot_be_used_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = dataclasses.replace(TRL_ORPO, homes=("trl.no_such_home",))
    with pytest.raises(ImportError, match=r"trl \S+ gave no ORPOTrainer .* from 0.12 on: pip install --upgrade trl"):
        nowhere.find_class()
    with pytest.raises(ImportError, match="no-such-library is not installed: pip install no-such-library"):
        dataclasses.replace(nowhere, library="no-such-library").find_class()
