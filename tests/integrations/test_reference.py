"""A reference model's sums: as full logits give them, the base model's under LoRA, nothing left changed, and in TRL."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import orpo_kernels.integrations as integrations
from orpo_kernels import preference_loss
from orpo_kernels.integrations import add_reference_logps, fuse, precompute
from orpo_kernels.integrations.reference import COLUMNS
from orpo_kernels.objectives import DPO
from tests.cases import LargestTensor
from tests.integrations.models import SHAPE, VOCAB, build, llama
from tests.integrations.stock_script import pairs, tokenizer

datasets.disable_progress_bars()


def batches(sizes: tuple[int, ...] = (4, 3, 1), length: int = 9) -> list[dict[str, Tensor]]:
    """Padded on the right, a prompt of three tokens; the first sequence of each batch has no answer."""
    chance = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        ids = torch.randint(3, 90, (size, length), generator=chance)
        mask = (torch.arange(length) < torch.randint(5, length + 1, (size, 1), generator=chance)).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        labels[0] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@torch.no_grad()
def naive(model: Any, given: list[dict[str, Tensor]]) -> Tensor:
    sums = []
    for batch in given:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        logps = torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        sums.append(torch.where(labels != -100, logps, 0).sum(-1))
    return torch.cat(sums)


def lora(**options: Any) -> LoraConfig:
    """B is not 0, as it would be before the first step."""
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "lora_dropout": 0.5}
    return LoraConfig(**{**settings, **options})


def state(model: nn.Module) -> dict[str, Any]:
    """What a training would notice a change of."""
    found: dict[str, Any] = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        found[f"{name} mode"] = module.training
        found[f"{name} hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)
        disabled = getattr(module, "disable_adapters", None)
        found[f"{name} disabled"] = disabled if isinstance(disabled, bool) else None
    return found


@pytest.mark.works("reference log-probabilities ahead of training", by="own loop")
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi has a bias", "chameleon masks"])
def test_as_full_logits_give_them(name: str) -> None:
    model, _ = build(name)
    given = batches()
    found = precompute(model.double(), given, progress=False)
    assert found.dtype == torch.float64
    assert found.shape == (8,)
    assert not found.requires_grad
    assert (found[[0, 4, 7]] == 0).all()
    # What a model does to its logits in float32, it does in float32.
    torch.testing.assert_close(found, naive(model, given), rtol=1e-6, atol=1e-6)
    assert model.training


@pytest.mark.works("reference log-probabilities: the base of a model with LoRA", by="own loop")
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters_are_disabled(modules_to_save: Any) -> None:
    given, base = batches(), naive(llama().double(), batches())
    options = {} if modules_to_save is None else {"target_modules": ["q_proj"], "modules_to_save": modules_to_save}
    model = get_peft_model(llama(), lora(**options)).double().train()
    model.base_model.model.model.layers[0].eval()  # a part that a script keeps in evaluation mode
    if modules_to_save is not None:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before = state(model)
    torch.testing.assert_close(precompute(model, given, progress=False), base, rtol=1e-9, atol=1e-9)
    assert state(model) == before
    model.eval()
    adapted = naive(model, given)
    assert (adapted - base).abs().max() > 0.1
    found = precompute(model, given, progress=False, keep_adapters=True)
    torch.testing.assert_close(found, adapted, rtol=1e-9, atol=1e-9)


def test_adapters_that_were_disabled_stay_so() -> None:
    model = get_peft_model(llama(), lora())
    with model.disable_adapter():
        before = state(model)
        precompute(model, batches(), progress=False)
        assert state(model) == before


def test_adapters_of_transformers_own() -> None:
    """``model.add_adapter`` puts layers on a model that peft has no class around."""
    model, given = llama().double(), batches()
    base = naive(model, given)
    model.add_adapter(lora(lora_dropout=0.0))
    model.double()
    before = state(model)
    torch.testing.assert_close(precompute(model, given, progress=False), base, rtol=1e-9, atol=1e-9)
    assert state(model) == before
    assert (naive(model, given) - base).abs().max() > 0.1


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_prompts_are_adapters(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    given = batches()
    base = naive(llama().double(), given)

    def build() -> Any:
        torch.manual_seed(1)
        return get_peft_model(llama().double(), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).double()

    model = build()
    torch.testing.assert_close(precompute(model, given, progress=False), base, rtol=1e-9, atol=1e-9)
    if config is peft.PromptTuningConfig:  # with its positions the head is called on more rows than there are labels
        model = build()
        prompted = precompute(model, given, progress=False, keep_adapters=True)
        embedded = model.get_prompt(1).detach()
        inner = model.get_base_model()
        rows = [F.pad(batch["input_ids"], (4, 0)) for batch in given]
        for row, batch, found in zip(rows, given, prompted.split([4, 3, 1]), strict=True):
            inputs = inner.get_input_embeddings()(row)
            inputs[:, :4] = embedded
            mask = F.pad(batch["attention_mask"], (4, 0), value=1)
            logits = inner(inputs_embeds=inputs, attention_mask=mask).logits[:, 4:-1].detach()
            labels = batch["labels"][:, 1:]
            logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            torch.testing.assert_close(found, torch.where(labels != -100, logps, 0).sum(-1), rtol=1e-6, atol=1e-6)
        assert "full logits: LlamaForCausalLM: its forward called its head on [4, 13] of [4, 9]" in caplog.text


def test_after_an_error_everything_is_as_it_was() -> None:
    model = get_peft_model(llama(), lora()).train()
    before = state(model)

    def failing() -> Any:
        yield batches()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        precompute(model, failing(), progress=False)
    assert state(model) == before
    assert torch.is_grad_enabled()


def test_a_fused_model_and_one_that_is_compiled() -> None:
    given = batches()
    base = naive(llama().double(), given)
    model = fuse(llama().double())
    torch.testing.assert_close(precompute(model, given, progress=False), base, rtol=1e-9, atol=1e-9)
    compiled = torch.compile(llama().double(), backend="eager")
    torch.testing.assert_close(precompute(compiled, given, progress=False), base, rtol=1e-9, atol=1e-9)


def test_a_head_that_cannot_be_fused_gives_its_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    model, given = llama(), batches()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        found = precompute(model, given, progress=False)
    torch.testing.assert_close(found.double(), naive(model, given), rtol=1e-5, atol=1e-5)
    assert (
        caplog.text.count("takes the reference's log-probabilities from full logits: its head has forward hooks") == 1
    )


def test_no_full_logits() -> None:
    torch.manual_seed(0)
    vocab = 20_000
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "vocab_size": vocab}))
    given = batches((16,), 24)
    logits = 16 * 24 * vocab * 4
    with LargestTensor() as tensors:
        precompute(model, given, progress=False, workspace_bytes=1 << 20)
    assert tensors.largest < logits / 8


def test_a_bar_of_batches(capsys: pytest.CaptureFixture[str]) -> None:
    precompute(llama(), batches())
    assert "Reference log-probabilities: 100%" in (bar := capsys.readouterr().err)
    assert "3/3" in bar
    precompute(llama(), batches(), progress=False)
    assert capsys.readouterr().err == ""


def test_it_is_what_a_loss_takes_as_its_reference() -> None:
    model, [batch] = llama().double().eval(), batches((4,))
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    labels[0] = labels[1]  # here an answer after all
    batch["labels"] = F.pad(labels[:, :-1], (1, 0), value=-100)
    given = precompute(model, [batch], progress=False)
    out = preference_loss(hidden, model.lm_head.weight, labels, DPO(0.3), reference_logps=given)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, 2).log())


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no labels": ([{"input_ids": torch.ones(2, 4).long()}], ValueError, r"labels or completion_mask.*\['input_ids'\]"),
    "tuples": ([(1, 2)], TypeError, "batches must yield dicts, got tuple"),
    "lists": ([{"input_ids": [[1]], "labels": [[1]]}], TypeError, r"must be tensors \[S, T\], got list"),
    "shifted": (
        [{"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 3).long()}],
        ValueError,
        r"labels must have the shape of input_ids \[2, 4\], got \[2, 3\]",
    ),
    "a used iterator": (iter(()), ValueError, "batches has no batch"),
    "a token of no row": (
        [{"input_ids": torch.ones(2, 4).long(), "labels": torch.full((2, 4), VOCAB)}],
        ValueError,
        str(VOCAB),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches(name: str) -> None:
    given, error, message = BAD[name]
    with pytest.raises(error, match=message):
        precompute(llama(), given, progress=False)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        precompute(llama(), batches(), backend="fast")


# --- data sets -------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt_ids": [3, 4, number + 5], "chosen_ids": [7] * (number % 3 + 1), "rejected_ids": [9, number + 10]}
    for number in range(5)
]
COLLATE = DataCollatorForPreference(pad_token_id=0)


def labelled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def test_columns_of_a_data_set() -> None:
    model, dataset = llama().double(), datasets.Dataset.from_list(ROWS)
    found = add_reference_logps(dataset, model, COLLATE, batch_size=2, progress=False)
    assert found.column_names == [*dataset.column_names, *COLUMNS]
    expected = naive(model, [labelled(COLLATE([row])) for row in ROWS]).view(-1, 2)
    for place, column in enumerate(COLUMNS):
        torch.testing.assert_close(torch.tensor(found[column]).double(), expected[:, place], rtol=1e-6, atol=1e-6)
    again = add_reference_logps(found, model, COLLATE, batch_size=5, progress=False)  # columns are replaced
    assert again.column_names == found.column_names
    batch = COLLATE(list(again))
    torch.testing.assert_close(batch[COLUMNS[1]].double(), expected[:, 1], rtol=1e-6, atol=1e-6)


def test_what_is_no_data_set_of_pairs() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="two sequences of each row, chosen first, got 2 of 2 rows"):
        add_reference_logps(dataset, llama(), lambda rows: COLLATE(rows[:1]), batch_size=2, progress=False)
    for wrong in (datasets.DatasetDict(train=dataset), dataset.to_iterable_dataset(), ROWS):
        with pytest.raises(TypeError, match=r"must be a datasets\.Dataset, got"):
            add_reference_logps(wrong, llama(), COLLATE)


def dpo(folder: Path, **options: Any) -> DPOTrainer:
    # Learning nothing, each step's loss is of the model that it began with.
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 2}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 0.0}
    args = DPOConfig(output_dir=str(folder), **{**quiet, **plain, **options})
    return DPOTrainer(model=llama(), ref_model=llama(), args=args, train_dataset=pairs(6), processing_class=tokenizer())


@pytest.mark.slow
@pytest.mark.works("TRL DPOTrainer with reference log-probabilities from here", by="own loop")
def test_as_trl_computes_them_and_reads_them(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)  # trainers seed themselves
    theirs = dpo(tmp_path / "theirs", precompute_ref_log_probs=True).train_dataset
    trainer = dpo(tmp_path / "ours")
    ours = add_reference_logps(trainer.train_dataset, trainer.model, trainer.data_collator, progress=False)
    for column in COLUMNS:
        torch.testing.assert_close(torch.tensor(ours[column]), torch.tensor(theirs[column]), rtol=1e-5, atol=1e-5)
    trainer.train_dataset, trainer.precompute_ref_logps, trainer.ref_model = ours, True, None
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.6931] * 2, abs=1e-4)


def test_names_are_there() -> None:
    assert {"add_reference_logps", "precompute"} <= set(integrations.__all__)
