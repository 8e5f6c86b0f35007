"""A stock TRL script on a tiny random model, as a user might have it: it knows nothing of this package.

usage: stock_script.py OUTPUT.json [--steps N] [--any-device]
"""

import argparse
import json
import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

WORDS = [f"w{index}" for index in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pairs(count: int, seed: int = 0) -> Dataset:
    chance = random.Random(seed)

    def sentence(longest: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, longest)))

    return Dataset.from_list(
        [{"prompt": sentence(8), "chosen": " " + sentence(13), "rejected": " " + sentence(13)} for _ in range(count)]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--any-device", action="store_true", help="what accelerate finds, not the CPU")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **tokens, num_key_value_heads=2))
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        size = {"max_steps": options.steps, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1e-2}
        arguments = ORPOConfig(output_dir=folder, use_cpu=not options.any_device, bf16=False, **quiet, **size)
        trainer = ORPOTrainer(model=model, args=arguments, processing_class=tokenizer(), train_dataset=pairs(16))
        trainer.train()
    if trainer.accelerator.is_main_process:
        with open(options.output, "w") as file:
            json.dump([*trainer.state.log_history, {"processes": trainer.accelerator.num_processes}], file)


if __name__ == "__main__":
    main()
