"""Axolotl's trainers: its own, with its own ORPO and with the model's loss, and its form of TRL's.

usage: axolotl_trainers.py OUTPUT.json [{sft | orpo-own | orpo-trl | cpo-trl} ...]
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import tiny
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.trl import AxolotlCPOTrainer, AxolotlORPOTrainer
from axolotl.core.training_args import AxolotlCPOConfig, AxolotlORPOConfig, AxolotlTrainingArguments
from axolotl.integrations.base import PluginManager
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

OBJECTIVES = {
    "sft": (AxolotlTrainer, AxolotlTrainingArguments, {}),
    "orpo-own": (AxolotlTrainer, AxolotlTrainingArguments, {"orpo_alpha": 0.1}),
    "orpo-trl": (AxolotlORPOTrainer, AxolotlORPOConfig, {"max_length": 32}),
    "cpo-trl": (AxolotlCPOTrainer, AxolotlCPOConfig, {"max_length": 32}),
}


def tokenized(tokenizer: Any) -> list[dict[str, list[int]]]:
    """Pairs as Axolotl's ORPO prompt strategy leaves them."""
    rows = []
    for pair in tiny.pairs():
        prompt, chosen, rejected = (tokenizer(pair[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
        hidden = [-100] * len(prompt)
        rows.append(
            {
                "input_ids": prompt + chosen,
                "labels": hidden + chosen,
                "attention_mask": [1] * len(prompt + chosen),
                "rejected_ids": prompt + rejected,
                "rejected_labels": hidden + rejected,
                "rejected_attention_mask": [1] * len(prompt + rejected),
                "prompt_attention_mask": [1] * len(prompt),
            }
        )
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {
        name: pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=-100 if "labels" in name else 0
        )
        for name in rows[0]
    }


def train(objective: str) -> list[dict[str, Any]]:
    trainer_class, config_class, options = OBJECTIVES[objective]
    tokenizer = tiny.tokenizer()
    if objective.endswith("trl"):
        data: dict[str, Any] = {"train_dataset": Dataset.from_list(tiny.pairs())}
    else:
        rows = tokenized(tokenizer)
        if objective == "sft":
            rows = [{name: row[name] for name in ("input_ids", "labels", "attention_mask")} for row in rows]
        data = {"train_dataset": Dataset.from_list(rows), "data_collator": collate}
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(
            output_dir=folder,
            max_steps=tiny.STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            **options,
        )
        trainer = trainer_class(model=tiny.model(), args=arguments, processing_class=tokenizer, **data)
        if objective == "orpo-own":
            trainer.tokenizer = tokenizer  # its orpo_compute_loss asks for what this transformers no longer sets
        trainer.train()
    found: list[dict[str, Any]] = trainer.state.log_history
    return found


if __name__ == "__main__":
    if os.environ.get(tiny.FUSE) == "plugin":  # as Axolotl loads what ``plugins:`` names, and then its model
        manager = PluginManager.get_instance()
        manager.register("orpo_kernels.integrations.axolotl.OrpoKernelsPlugin")
        manager.pre_model_load({})
    tiny.main(OBJECTIVES, train, "axolotl", "trl", "accelerate")
