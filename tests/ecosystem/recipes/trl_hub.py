"""A cache of the hub with what TRL's own tests load from it, so that they run offline and nothing of them is changed.

usage: trl_hub.py SOURCE HOME      SOURCE: a checkout of TRL; HOME: what HF_HOME is when the tests run

The data sets are TRL's, written by the scripts of its checkout. The models and tokenizers stand for those of the hub:
same class and sizes, weights as TRL's scripts draw them, a vocabulary learned from the checkout's own README.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

ORGANIZATION = "trl-internal-testing"
REVISION = "0" * 40
DATA = ("zen", "harmony", "toolcall")  # zen-image and zen-multi-image are for models that see, which are not here
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
# What a family of models wants beside: entries of its configuration, and its tokenizer's special tokens.
MORE: dict[str, dict[str, Any]] = {
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Glm4Moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 2},
    "Cohere2": {"logit_scale": 1.0},
    "T5": {"d_model": 24, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "decoder_start_token_id": 0},
}
CHATML = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
LLAMA = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
TOKENS: dict[str, dict[str, str]] = {
    "Llama": LLAMA,
    "Mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GptOss": {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
    "GPTNeoX": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "Cohere": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"},
    "Gemma": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"},
    "Glm4Moe": {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "T5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
MARKERS = [
    *("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    *("<|call|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>", "<|START_OF_TURN_TOKEN|>", "[INST]"),
    *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "[/INST]", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
]
WITHOUT_TEMPLATE = ("GPTNeoX", "T5")
# TRL's own name of the template of each, where its version has one.
TEMPLATES = {
    "Qwen2": "qwen2_5",
    "Qwen3": "qwen3",
    "Llama": "llama3_2",
    "GptOss": "gptoss",
    "Cohere": "cohere",
    "Cohere2": "cohere2",
    "Gemma": "gemma",
    "Gemma2": "gemma",
    "Glm4Moe": "glm4moe",
}
PLAIN = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ (message['content'] or '') + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_data(source: Path, home: Path) -> None:
    """Run TRL's scripts, and keep what they push."""

    def keep(self: datasets.DatasetDict, repository: str, config_name: str = "default", **_: Any) -> None:
        name = repository.rpartition("/")[2]
        folder = home / "datasets" / f"{ORGANIZATION}___{name}" / config_name / "0.0.0" / REVISION
        folder.mkdir(parents=True, exist_ok=True)
        splits = datasets.splits.SplitDict(dataset_name=name)
        for split, rows in self.items():
            writer = ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=rows.features)
            for row in rows:
                writer.write(row)
            count, size = writer.finalize()
            splits.add(datasets.SplitInfo(split, size, count, dataset_name=name))
            features = rows.features
        datasets.DatasetInfo(
            features=features, builder_name="parquet", dataset_name=name, config_name=config_name, splits=splits
        ).write_to_directory(str(folder))

    datasets.DatasetDict.push_to_hub = keep
    for name in DATA:
        script = source / "scripts" / f"generate_{name}_dataset.py"
        spec = importlib.util.spec_from_file_location(script.stem, script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.main(0.1, True, f"{ORGANIZATION}/{name}")


def asked(source: Path) -> Iterator[tuple[str, str, str]]:
    """Name, class and family of each model of text that the tests name."""
    text = "".join(path.read_text() for path in sorted((source / "tests").rglob("*.py")))
    for name in sorted(set(re.findall(rf"{ORGANIZATION}/(tiny-\w+(?:-[\w.]*\w)?)", text))):
        found = re.fullmatch(r"tiny-((\w+?)For(CausalLM|SequenceClassification|ConditionalGeneration))(-.*)?", name)
        if found and hasattr(transformers, found[1]) and (found[3] != "ConditionalGeneration" or found[2] == "T5"):
            yield name, found[1], found[2]


def of_family(table: dict[str, Any], family: str, otherwise: Any) -> Any:
    """The entry of the longest name that the family's begins with."""
    return max(((key, value) for key, value in table.items() if family.startswith(key)), default=("", otherwise))[1]


def template(source: Path, family: str) -> str | None:
    if family in WITHOUT_TEMPLATE:
        return None
    file = source / "trl" / "chat_templates" / f"{of_family(TEMPLATES, family, 'none')}.jinja"
    return file.read_text() if file.exists() else PLAIN


def tokenizer(source: Path, family: str) -> transformers.PreTrainedTokenizerFast:
    special = of_family(TOKENS, family, CHATML)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(dict.fromkeys([*special.values(), *MARKERS])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train([str(source / "README.md"), str(source / "scripts" / "generate_zen_dataset.py")], trainer)
    first = [(special["bos_token"], words.token_to_id(special["bos_token"]))] if family in ("Llama", "Mistral") else []
    last = [(special["eos_token"], words.token_to_id(special["eos_token"]))] if family == "T5" else []
    if first or last:
        pattern = " ".join([*(token for token, _ in first), "$A", *(token for token, _ in last)])
        words.post_processor = processors.TemplateProcessing(single=pattern, pair=None, special_tokens=[*first, *last])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **special
    )
    found.chat_template = template(source, family)
    return found


def write_model(source: Path, home: Path, name: str, kind: str, family: str) -> None:
    folder = home / "hub" / f"models--{ORGANIZATION}--{name}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)
    words = tokenizer(source, family)
    words.save_pretrained(snapshot)
    torch.manual_seed(0)
    class_ = getattr(transformers, kind)
    sizes = (
        {} if family == "T5" else SIZES if kind.endswith("CausalLM") else {**SIZES, "hidden_size": 16, "num_labels": 1}
    )
    ids = {f"{which}_token_id": getattr(words, f"{which}_token_id") for which in ("bos", "eos", "pad")}
    config = class_.config_class(vocab_size=len(words), **sizes, **of_family(MORE, family, {}), **ids)
    model = class_(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    version = tuple(int(part) for part in (source / "VERSION").read_text().strip().split(".")[:2])
    model.to(torch.float32 if family == "T5" or version < (0, 29) else torch.bfloat16)  # as TRL's scripts of the time
    model.save_pretrained(snapshot)


def main() -> None:
    source, home = map(Path, sys.argv[1:])
    write_data(source, home)
    for name, kind, family in asked(source):
        write_model(source, home, name, kind, family)
        print(name, flush=True)


if __name__ == "__main__":
    main()
