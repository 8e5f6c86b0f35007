"""What every recipe trains: a tiny Llama, a tokenizer of sixty words, made-up data; and how it says what it found.

These files run in the environment of the stack they are for, by themselves or through the launcher, which they know
nothing of: only ``main`` looks whether it is there, and where FUSE asks for it ``model`` calls ``fuse``, or a recipe
loads a plugin as its stack does.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import random
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 3
VOCAB = 97  # no other layer is as wide
FUSE = "ECOSYSTEM_FUSE"  # how a script fuses without the launcher: "fuse(model)", or "plugin" where a stack has them
WORDS = [f"w{index}" for index in range(60)]
CHAT = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' + eos_token + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = CHAT
    found.model_input_names = ["input_ids", "attention_mask"]  # generate refuses what a Llama does not take
    return found


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found = LlamaForCausalLM(LlamaConfig(**shape, **tokens, num_key_value_heads=2))
    if os.environ.get(FUSE) == "fuse(model)":
        from orpo_kernels.integrations import fuse

        fuse(found)
    return found


def moved(trained: torch.nn.Module) -> list[float]:
    """How far training has moved each weight of ``model()``."""
    before = dict(model().named_parameters())
    return torch.cat([(after - before[name]).flatten() for name, after in trained.named_parameters()]).tolist()


def pairs(count: int = 16, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(seed)

    def sentence(longest: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(2, longest)))

    return [{"prompt": sentence(8), "chosen": " " + sentence(13), "rejected": " " + sentence(13)} for _ in range(count)]


class _Said(logging.Handler):
    """What a patched trainer says of the loss that it computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(objectives: Collection[str], train: Callable[[str], list[dict[str, Any]]], *packages: str) -> None:
    """Train each objective that the command line names after OUTPUT.json, and write what was logged and found."""
    output, *asked = sys.argv[1:]
    runs: dict[str, dict[str, Any]] = {}
    said, heads_called = _Said(), 0

    def count(module: torch.nn.Module, _: Any) -> None:
        nonlocal heads_called
        heads_called += getattr(module, "out_features", None) == VOCAB

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    logging.getLogger("orpo_kernels").addHandler(said)
    for objective in asked or objectives:
        heads = sys.modules.get("orpo_kernels.integrations.lazy.heads")
        before = len(heads.reports()) if heads else 0
        said.lines.clear()
        heads_called = 0
        try:
            runs[objective] = {"history": train(objective)}
        except Exception as error:  # the others are still worth their run, and the driver shows this one
            traceback.print_exc()
            runs[objective] = {"error": f"{type(error).__name__}: {error}"}
        heads = sys.modules.get("orpo_kernels.integrations.lazy.heads")
        runs[objective]["models"] = [_model(*found) for found in heads.reports()[before:]] if heads else []
        runs[objective]["head_calls"] = heads_called
        runs[objective]["fused_by_trainer"] = any("fused the loss of this" in line for line in said.lines)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    with open(output, "w") as file:
        json.dump({"versions": versions, "runs": runs}, file)


def _model(name: str, report: Any) -> dict[str, Any]:
    """What became of the lazy logits of one model."""
    full = [
        {"operation": each.operation, "where": each.where.split("site-packages/")[-1], "count": each.count}
        for each in report.materialised
    ]
    return {
        "model": name,
        "refusal": report.refusal,
        "calls": report.calls,
        "products": report.products,
        "chains": dict(report.chains),
        "materialised": full,
    }
