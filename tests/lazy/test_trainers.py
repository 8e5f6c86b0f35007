"""Stock trainers on a fused model: what they log and what they learn is what they would have without it."""

from __future__ import annotations

import copy
import importlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.accuracy import FACTOR, VALUE_FLOOR
from orpo_kernels.integrations import fuse, fusion_report
from tests.integrations.models import llama
from tests.integrations.stock_script import WORDS, pairs, tokenizer

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()

pytestmark = pytest.mark.slow  # whole trainers

STEPS = 3
Make = Callable[..., Any]  # of a model and a folder: the trainer


@pytest.fixture(autouse=True)
def _poison_is_for_kernels() -> None:
    """Trainers seed themselves, and poisoned memory is none of their business."""
    torch.use_deterministic_algorithms(False)


def arguments(cls: Any, folder: Path, **options: Any) -> Any:
    # Plain SGD: Adam turns the rounding of gradients that ought to be zero into steps of full size.
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.02}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": STEPS}
    size = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    return cls(output_dir=str(folder), **{**plain, **quiet, **size, **options})


# --- transformers ----------------------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> list[dict[str, list[int]]]:
    chance = random.Random(seed)
    return [{"input_ids": [chance.randrange(4, 64) for _ in range(chance.randint(5, 14))]} for _ in range(count)]


def plain(model: Any, folder: Path, cls: Any = transformers.Trainer, **options: Any) -> Any:
    """``transformers.Trainer`` on the model's own loss."""
    its_own = {name: options.pop(name) for name in tuple(options) if name in TRAINER}
    if its_own.get("compute_metrics") is Accuracy:
        its_own["compute_metrics"] = Accuracy()
    return cls(
        model=model,
        args=arguments(transformers.TrainingArguments, folder, **options),
        train_dataset=sentences(16, 0),
        eval_dataset=sentences(5, 1),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False, pad_to_multiple_of=16),
        **its_own,
    )


TRAINER = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}


def scaled_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` as scripts write it."""
    logits = outputs.logits.float()
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets, ignore_index=-100, reduction="none")
    return (losses * (-losses.detach()).exp()).sum() / (num_items_in_batch or 1)


def argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    found, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((found == labels)[labels != -100].mean())}


def mean_logit(prediction: Any) -> dict[str, float]:
    """Metrics of whole logits, which are a numpy array here."""
    assert isinstance(prediction.predictions, np.ndarray)
    return {"mean_logit": float(prediction.predictions[prediction.label_ids != -100].mean())}


class Accuracy:
    """Metrics that see each batch as it comes."""

    def __init__(self) -> None:
        self.hits: list[Tensor] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        found, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        self.hits.append((found == labels)[labels != -100].float())
        if not compute_result:
            return {}
        hits, self.hits = self.hits, []
        return {"accuracy": torch.cat(hits).mean().item()}


def adapted(make: Make, **options: Any) -> Make:
    """With LoRA, put on after the model was fused, as a script's own trainer does."""

    def build(model: Any, folder: Path, **more: Any) -> Any:
        torch.manual_seed(1)
        adapter = peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **options})
        dtype = model.dtype
        model = peft.get_peft_model(model.float(), adapter)  # random numbers of float64 are others
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zeros, and half of the gradients with them
                nn.init.normal_(weight, std=0.1)
        return make(model.to(dtype), folder, **more)

    return build


# --- a script's own trainer ------------------------------------------------------------------------------------------


def pairs_of_ids(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Chosen above rejected, padded to the longest."""
    rows = [feature[side] for side in ("chosen", "rejected") for feature in features]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def get_batch_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[:-1] != labels.shape:
        raise ValueError("logits and labels must have one shape but for the vocabulary")
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    scored = labels != -100
    labels[labels == -100] = 0
    per_token = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (per_token * scored).sum(-1), scored.sum(-1)


class PairTrainer(transformers.Trainer):
    """Preference losses as LLaMA-Factory has them: the logits in float32, and a mean of all of them as a metric."""

    def __init__(self, *args: Any, kind: str, reference: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kind, self.reference = kind, reference
        self.model_accepts_loss_kwargs = False

    def score(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        logits: Tensor = model(**asked, return_dict=True, use_cache=False).logits.to(torch.float32)
        return (*get_batch_logps(logits, inputs["labels"]), logits)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        logps, lengths, logits = self.score(model, inputs)
        half = len(logps) // 2
        chosen, rejected = logps.split(half)
        chosen_logits, rejected_logits = logits.split(half, dim=0)
        if self.kind == "dpo":
            with torch.no_grad():
                reference, *_rest = self.score(self.reference, inputs)
            margin = (logps - reference).split(half)
            loss = -F.logsigmoid(0.1 * (margin[0] - margin[1])).mean()
        elif self.kind == "simpo":
            chosen, rejected = (logps / lengths).split(half)
            loss = -F.logsigmoid(2.0 * (chosen - rejected) - 0.5).mean()
        else:
            chosen, rejected = (logps / lengths).split(half)
            odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
            loss = (-chosen - 0.1 * F.logsigmoid(odds)).mean()
        self.log(
            {
                "logps/chosen": chosen.mean().item(),
                "logps/rejected": rejected.mean().item(),
                "logits/chosen": chosen_logits.mean().item(),
                "logits/rejected": rejected_logits.mean().item(),
            }
        )
        return (loss, logits) if return_outputs else loss


def preference(kind: str) -> Make:
    def build(model: Any, folder: Path, **options: Any) -> Any:
        chance = random.Random(0)

        def words(prompt: list[int]) -> list[int]:
            return prompt + [chance.randrange(4, 64) for _ in range(chance.randint(2, 10))]

        prompts = [[chance.randrange(4, 64) for _ in range(3)] for _ in range(16)]
        return PairTrainer(
            model=model,
            kind=kind,
            reference=copy.deepcopy(model).eval().requires_grad_(False) if kind == "dpo" else None,
            args=arguments(transformers.TrainingArguments, folder, remove_unused_columns=False, **options),
            train_dataset=[{"chosen": words(prompt), "rejected": words(prompt)} for prompt in prompts],
            data_collator=pairs_of_ids,
        )

    return build


# --- TRL -------------------------------------------------------------------------------------------------------------


def of_trl(
    name: str, home: str = "trl", data: Callable[..., Any] = pairs, second: str | None = None, **fixed: Any
) -> Make:
    """A trainer of TRL; ``second`` is its argument for another model, which it would load from the Hub."""

    def build(model: Any, folder: Path, **options: Any) -> Any:
        module = importlib.import_module(home)
        options = {**fixed, **options}
        its_own = {key: options.pop(key) for key in tuple(options) if key in (*TRAINER, "reward_funcs", "peft_config")}
        if second:
            its_own[second] = copy.deepcopy(model)
            with torch.no_grad():  # another one, or a distillation has nothing to learn
                its_own[second].get_output_embeddings().weight.mul_(0.5)
        return getattr(module, f"{name}Trainer")(
            model=model,
            args=arguments(getattr(module, f"{name}Config"), folder, **options),
            processing_class=speaker() if data is talks else tokenizer(),
            train_dataset=data(16),
            **({"eval_dataset": data(5, 1)} if "eval_strategy" in options else {}),
            **its_own,
        )

    return build


def texts(count: int, seed: int = 0) -> datasets.Dataset:
    chance = random.Random(seed)
    return datasets.Dataset.from_list([{"text": " ".join(chance.choices(WORDS, k=9))} for _ in range(count)])


def speaker() -> Any:
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return words


def prompts(count: int) -> datasets.Dataset:
    return pairs(count).select_columns(["prompt"])


def triples(count: int) -> datasets.Dataset:
    data = pairs(count)
    return data.add_column("reference", data.select_columns(["chosen"])["chosen"][::-1])


def talks(count: int) -> datasets.Dataset:
    return texts(count).map(
        lambda row: {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": row["text"]}]},
        remove_columns=["text"],
    )


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


@dataclass(frozen=True)
class Scenario:
    """A trainer as its users build it, and what it does that needs the logits themselves."""

    make: Make
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    materialised: dict[str, str] = field(default_factory=dict)  # operation: why it is right that it is
    truth: dict[str, Any] = field(default_factory=dict)  # options for the run in float64 that say something else
    late: bool = False  # fused after the trainer was built, as after get_peft_model


SCENARIOS = {
    "Trainer": Scenario(plain, EVALUATES),
    "Trainer, tied": Scenario(plain, model={"tie_word_embeddings": True}),
    "Trainer, label smoothing": Scenario(plain, {"label_smoothing_factor": 0.1}),
    "Trainer, accumulation": Scenario(plain, {"gradient_accumulation_steps": 2}),
    "Trainer, bf16": Scenario(plain, {"bf16": True}, truth={"bf16": False}),
    "Trainer, bf16, label smoothing": Scenario(
        plain, {"bf16": True, "label_smoothing_factor": 0.1}, truth={"bf16": False}
    ),
    "Trainer, checkpointing": Scenario(plain, {"gradient_checkpointing": True}),
    "Trainer, compiled": Scenario(
        plain,
        {"torch_compile": True, "torch_compile_backend": "eager"},
        model={"num_hidden_layers": 1},
        truth={"torch_compile": False},
    ),
    "Trainer, loss function": Scenario(plain, {"compute_loss_func": scaled_loss}),
    "Trainer, metrics of argmax": Scenario(
        plain, {**EVALUATES, "compute_metrics": accuracy, "preprocess_logits_for_metrics": argmax}
    ),
    "Trainer, metrics of logits": Scenario(
        plain,
        {**EVALUATES, "compute_metrics": mean_logit},
        materialised={"atleast_1d": "the Trainer keeps the logits of every batch for the metrics"},
    ),
    "Trainer, metrics batch by batch": Scenario(
        plain, {**EVALUATES, "compute_metrics": Accuracy, "batch_eval_metrics": True}
    ),
    "Trainer, LoRA": Scenario(adapted(plain)),
    "Trainer, LoRA and a trained head": Scenario(adapted(plain, modules_to_save=["lm_head"])),
    "Trainer, LoRA, fused late": Scenario(adapted(plain), late=True),
    "Trainer, LoRA and a trained head, fused late": Scenario(adapted(plain, modules_to_save=["lm_head"]), late=True),
    "Trainer, LoRA on the head": Scenario(
        adapted(plain, target_modules=["q_proj", "lm_head"]),
        materialised={"add": "peft adds the adapter's own logits, which are plain"},
    ),
    "own DPO": Scenario(preference("dpo")),
    "own DPO, bf16": Scenario(preference("dpo"), {"bf16": True}, truth={"bf16": False}),
    "own DPO, LoRA": Scenario(adapted(preference("dpo"))),
    "own SimPO": Scenario(preference("simpo")),
    "own ORPO": Scenario(preference("orpo")),
    "TRL ORPO": Scenario(of_trl("ORPO", "trl.experimental.orpo", max_length=32), EVALUATES),
    "TRL ORPO, bf16": Scenario(
        of_trl("ORPO", "trl.experimental.orpo", max_length=32), {"bf16": True}, truth={"bf16": False}
    ),
    "TRL ORPO, LoRA": Scenario(adapted(of_trl("ORPO", "trl.experimental.orpo", max_length=32))),
    "TRL CPO": Scenario(of_trl("CPO", "trl.experimental.cpo", max_length=32)),
    "TRL SimPO": Scenario(of_trl("CPO", "trl.experimental.cpo", max_length=32, loss_type="simpo", cpo_alpha=0.0)),
    "TRL TPO": Scenario(of_trl("TPO", "trl.experimental.tpo", data=triples, max_length=32)),
    "TRL online DPO": Scenario(
        of_trl(
            "OnlineDPO",
            "trl.experimental.online_dpo",
            prompts,
            "ref_model",
            reward_funcs=length,
            max_new_tokens=6,
            max_length=32,
        )
    ),
    "TRL A2PO": Scenario(
        of_trl("A2PO", "trl.experimental.a2po", prompts, reward_funcs=length, max_completion_length=6)
    ),
    "TRL GKD": Scenario(
        of_trl("GKD", "trl.experimental.gkd", talks, "teacher_model", lmbda=0.0, max_length=32),
        materialised={"add": "log-probabilities of student and teacher over the whole vocabulary are mixed"},
    ),
    "TRL SFT, label smoothing": Scenario(of_trl("SFT", data=texts, label_smoothing_factor=0.1)),
    "TRL SFT, metrics of logits": Scenario(
        of_trl("SFT", data=texts, compute_metrics=mean_logit),
        EVALUATES,
        materialised={"atleast_1d": "the Trainer keeps the logits of every batch for the metrics"},
    ),
}


class Gradients(transformers.TrainerCallback):
    """Keeps what the optimiser is given."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                self.found[f"step {state.global_step}: {name}"] = weight.grad.double().clone()


def train(
    scenario: Scenario, folder: Path, dtype: torch.dtype, fused: bool, **options: Any
) -> tuple[dict[str, Tensor], Any]:
    """By name: everything logged but timings, and every gradient an optimiser got; and what the report says."""
    model = llama(**scenario.model).to(dtype)
    if fused and not scenario.late:
        assert fuse(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = scenario.make(model, folder, **{**scenario.options, **options})
        if fused and scenario.late:
            fuse(trainer.model)
        trainer.add_callback(gradients := Gradients())
        trainer.train()
    found: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if not any(word in name for word in ("runtime", "per_second", "flos", "epoch", "step", "rate")):
                found.setdefault(name, []).append(value)
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    return {**values, **gradients.found}, fusion_report(trainer.model) if fused else None


def needed(report: Any) -> set[str]:
    """The operations that needed the logits themselves, without what had been done to them before."""
    return {record.operation.split(" > ")[-1] for record in report.materialised}


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_changes(name: str, tmp_path: Path) -> None:
    """As near to float64 as stock is, in three steps."""
    scenario = SCENARIOS[name]
    truth, _ = train(scenario, tmp_path, torch.float64, False, **scenario.truth)
    stock, _ = train(scenario, tmp_path, torch.float32, False)
    ours, report = train(scenario, tmp_path, torch.float32, True)
    assert list(ours) == list(stock) == list(truth)
    # Three steps of a network lie between what rounds and what is read.
    floor = 5 * VALUE_FLOOR[torch.bfloat16 if scenario.options.get("bf16") else torch.float32]
    for what, expected in truth.items():
        error, theirs = ((values[what] - expected).norm().item() for values in (ours, stock))
        # What is logged may be a difference that nearly vanishes of terms that do not.
        size = expected.norm().item() if what.startswith("step") else max(expected.norm().item(), 1.0)
        assert error <= max(FACTOR * theirs, floor * size), what
    assert report.fused, report.refusal
    assert report.calls > 0
    assert needed(report) == set(scenario.materialised)


# TRL's own fused heads read the head's weight and never call it in training: there is nothing to be lazy about, and
# nothing may change by a bit.
BYPASS = {
    "SFT": Scenario(of_trl("SFT", data=texts)),
    "DPO": Scenario(of_trl("DPO", second="ref_model", max_length=32)),
    "KTO": Scenario(of_trl("KTO", second="ref_model", max_length=32)),
    "GRPO": Scenario(
        of_trl("GRPO", data=prompts, reward_funcs=length, num_generations=2, max_completion_length=6, beta=0.0)
    ),
    "RLOO": Scenario(
        of_trl("RLOO", data=prompts, reward_funcs=length, num_generations=2, max_completion_length=6, beta=0.0)
    ),
}


@pytest.mark.parametrize("name", BYPASS)
def test_a_trainer_with_a_fused_head_of_its_own_keeps_it(name: str, tmp_path: Path) -> None:
    stock, _ = train(BYPASS[name], tmp_path, torch.float32, False)
    ours, report = train(BYPASS[name], tmp_path, torch.float32, True)
    assert list(ours) == list(stock)
    for what, value in stock.items():
        assert torch.equal(ours[what], value), what
    assert report.materialised == []
    assert report.calls == 0
