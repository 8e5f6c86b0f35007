"""TRL's trainers, of whichever version is installed.

usage: trl_trainers.py OUTPUT.json [{sft | sft-nll | dpo | orpo | cpo | simpo | kto | grpo} ...]
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import tempfile
from typing import Any

import tiny
from datasets import Dataset

# Trainer, configuration, where some versions keep them beside trl itself, and what the objective wants.
OBJECTIVES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("SFT", "", {}),
    "sft-nll": ("SFT", "", {"loss_type": "nll"}),  # where the default has become a loss that calls no head
    "dpo": ("DPO", "", {}),
    "orpo": ("ORPO", "orpo", {}),
    "cpo": ("CPO", "cpo", {}),
    "simpo": ("CPO", "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "kto": ("KTO", "kto", {}),
    "grpo": ("GRPO", "", {"num_generations": 2, "max_completion_length": 8, "temperature": 0.7}),
}


def find(name: str, experimental: str) -> Any:
    """A class of trl, or of the place to which versions moved it."""
    for home in ("trl", f"trl.experimental.{experimental}", f"trl.trainer.{experimental}_trainer"):
        try:
            found = getattr(importlib.import_module(home), name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    raise ImportError(f"this trl has no {name}")


def data(objective: str) -> Dataset:
    rows: list[dict[str, Any]] = list(tiny.pairs())
    if objective.startswith("sft"):
        rows = [{"text": row["prompt"] + row["chosen"]} for row in rows]
    elif objective == "grpo":
        rows = [{"prompt": row["prompt"]} for row in rows]
    elif objective == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": bool(good)}
            for index, row in enumerate(rows)
            for good in [index % 2]
        ]
    return Dataset.from_list(rows)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def train(objective: str) -> list[dict[str, Any]]:
    name, experimental, options = OBJECTIVES[objective]
    trainer_class, config_class = (find(f"{name}{what}", experimental) for what in ("Trainer", "Config"))
    known = {field.name for field in dataclasses.fields(config_class)}
    if objective == "sft-nll" and getattr(config_class, "loss_type", "nll") == "nll":
        raise LookupError("sft is that already, so this is not to be recorded")
    settings = {
        "max_steps": tiny.STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 32,
        "max_prompt_length": 16,
        "remove_unused_columns": objective.startswith("sft"),
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(output_dir=folder, **{key: value for key, value in settings.items() if key in known})
        takes = inspect.signature(trainer_class.__init__).parameters
        tokenizer = {"tokenizer" if "tokenizer" in takes else "processing_class": tiny.tokenizer()}
        more: dict[str, Any] = {"reward_funcs": reward} if objective == "grpo" else {}
        if objective in ("dpo", "kto"):
            more["ref_model"] = tiny.model(seed=1)
        trainer = trainer_class(model=tiny.model(), args=arguments, train_dataset=data(objective), **tokenizer, **more)
        trainer.train()
    return [*trainer.state.log_history, {"weights": tiny.moved(trainer.accelerator.unwrap_model(trainer.model))}]


if __name__ == "__main__":
    tiny.main(OBJECTIVES, train, "trl", "accelerate")
