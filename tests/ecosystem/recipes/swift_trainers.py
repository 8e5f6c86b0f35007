"""ms-swift's whole training commands, ``swift sft`` and ``swift rlhf``, on a model and data from files on disk.

usage: swift_trainers.py OUTPUT.json [{sft | dpo | orpo | cpo | simpo | kto} ...]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tiny
from swift.pipelines import rlhf_main, sft_main

OBJECTIVES = {
    "sft": {},
    "dpo": {},
    "orpo": {},
    "cpo": {},
    "simpo": {"cpo_alpha": 0.0},
    "kto": {},
}


def write_data(path: Path, objective: str) -> None:
    def messages(row: dict[str, str], answer: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": row["prompt"].strip()},
            {"role": "assistant", "content": row[answer].strip()},
        ]

    lines: list[dict[str, Any]] = []
    for index, row in enumerate(tiny.pairs()):
        if objective == "kto":
            lines.append({"messages": messages(row, "chosen" if index % 2 else "rejected"), "label": bool(index % 2)})
        elif objective == "sft":
            lines.append({"messages": messages(row, "chosen")})
        else:
            lines.append({"messages": messages(row, "chosen"), "rejected_response": row["rejected"].strip()})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(objective: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.model().save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        write_data(folder / "data.jsonl", objective)
        arguments = {
            "model": str(folder / "model"),
            "model_type": "llama",
            "template": "default",
            "tuner_type": "full",
            "torch_dtype": "float32",
            "dataset": str(folder / "data.jsonl"),
            "split_dataset_ratio": 0,
            "output_dir": str(folder / "output"),
            "max_length": 64,
            "max_steps": tiny.STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "true",
            "gradient_checkpointing": "false",
            "dataloader_num_workers": 0,
            "use_hf": "true",
            "add_version": "false",
            **({} if objective == "sft" else {"rlhf_type": objective}),
            **OBJECTIVES[objective],
        }
        line = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
        found = (sft_main if objective == "sft" else rlhf_main)(line)
    history: list[dict[str, Any]] = found["log_history"]
    return history


if __name__ == "__main__":
    tiny.main(OBJECTIVES, train, "ms-swift", "trl", "accelerate")
