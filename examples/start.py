"""What a run of the examples starts from: a model with its tokenizer, and pairs as plain strings."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.data_utils import is_conversational, maybe_apply_chat_template, maybe_extract_prompt

if TYPE_CHECKING or __package__:
    from examples import corpus
else:
    import corpus  # beside a script that is run by its path


def named_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 and its tokenizer, from a folder or the Hugging Face hub.

    Raises:
        ValueError: there is neither under this name.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"--model: {name} is no folder with a model and its tokenizer, and the Hugging Face hub gave none of that "
            f"name: {str(error).splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def small_llama(
    texts: Iterable[str], *, hidden_size: int, layers: int, max_length: int, vocabulary: int = corpus.VOCABULARY
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An untrained Llama, and a tokenizer trained on ``texts``; ``hidden_size`` is a multiple of 64."""
    tokenizer = corpus.train_tokenizer(texts, vocabulary)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), vocabulary),  # the head keeps its size where the merges ran out early
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=max(max_length, 512),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def as_strings(pairs: list[corpus.Pair], tokenizer: PreTrainedTokenizerBase) -> list[corpus.Pair]:
    """Pairs as TRL would make them: a prompt both answers begin with taken out, conversations written down.

    Raises:
        ValueError: there are conversations, and the tokenizer cannot write them down.
    """
    if any(is_conversational(pair) for pair in pairs) and tokenizer.chat_template is None:
        raise ValueError("--data holds conversations, but the tokenizer of --model has no chat template")
    return [maybe_apply_chat_template(maybe_extract_prompt(pair), tokenizer) for pair in pairs]
