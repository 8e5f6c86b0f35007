"""LLaMA-Factory's whole training command, from files on disk, as ``llamafactory-cli train`` runs it.

usage: llamafactory_trainers.py OUTPUT.json [{sft | dft | dpo | orpo | simpo | kto} ...]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tiny
from llamafactory.train.tuner import run_exp

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft"},
    "dft": {"stage": "sft", "use_dft_loss": True},
    "dpo": {"stage": "dpo", "pref_loss": "sigmoid"},
    "orpo": {"stage": "dpo", "pref_loss": "orpo"},
    "simpo": {"stage": "dpo", "pref_loss": "simpo"},
    "kto": {"stage": "kto"},
}


def write_data(folder: Path) -> None:
    rows = tiny.pairs()
    written = {
        "sft": [{"instruction": row["prompt"], "output": row["chosen"]} for row in rows],
        "dpo": [{"instruction": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows],
        "kto": [
            {
                "instruction": row["prompt"],
                "output": row["chosen" if index % 2 else "rejected"],
                "good": bool(index % 2),
            }
            for index, row in enumerate(rows)
        ],
    }
    columns: dict[str, dict[str, str]] = {
        "sft": {"prompt": "instruction", "response": "output"},
        "dpo": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        "kto": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
    }
    described = {}
    for stage, entries in written.items():
        (folder / f"{stage}.json").write_text(json.dumps(entries))
        described[stage] = {"file_name": f"{stage}.json", "columns": columns[stage], "ranking": stage == "dpo"}
    (folder / "dataset_info.json").write_text(json.dumps(described))


def train(objective: str) -> list[dict[str, Any]]:
    options = OBJECTIVES[objective]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.model().save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        write_data(folder)
        run_exp(
            {
                "model_name_or_path": str(folder / "model"),
                "dataset": options["stage"],
                "dataset_dir": str(folder),
                "output_dir": str(folder / "output"),
                "template": "default",
                "finetuning_type": "full",
                "do_train": True,
                "cutoff_len": 64,
                "per_device_train_batch_size": 4,
                "max_steps": tiny.STEPS,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_gradient_checkpointing": True,
                "preprocessing_num_workers": 1,
                "overwrite_cache": True,
                **options,
            }
        )
        found: list[dict[str, Any]] = json.loads((folder / "output" / "trainer_state.json").read_text())["log_history"]
    return found


if __name__ == "__main__":
    tiny.main(OBJECTIVES, train, "llamafactory", "trl", "accelerate")
