"""Preference pairs and a tokenizer from text that every Python installation carries.

Real text without a download: the language's own documentation (`pydoc_data.topics`) gives the pairs, and the standard
library's source gives a byte-level BPE enough text to fill a vocabulary of 32,768, at which the head is the largest
part of a small model, as it is in real ones.
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Pair = dict[str, Any]  # prompt, chosen, rejected: strings, or in a file conversations
FIELDS = ("prompt", "chosen", "rejected")

VOCABULARY = 32_768
# How the small tokenizer writes a conversation down; a named model's has its own way.
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PROMPT_WORDS = 16
ANSWER_WORDS = 48


def preference_pairs(seed: int = 0) -> list[Pair]:
    """Pairs from passages of the documentation: a passage's opening, its true continuation, the same words shuffled.

    The two answers of a pair hold the same words, so what tells them apart is order alone, and a small model begins to
    learn order within a hundred steps. Shuffled sentences, or another topic's text, differ by what only a model that
    reads further can see.

    Args:
        seed: Decides the shuffled answers and the order of the pairs.

    Returns:
        Some hundreds of pairs.
    """
    rng = random.Random(seed)
    passages = [passage for name in sorted(topics) for passage in _passages(topics[name])]
    rng.shuffle(passages)
    pairs = []
    for words in passages:
        prompt, answer = words[:PROMPT_WORDS], words[PROMPT_WORDS:]
        corrupted = rng.sample(answer, len(answer))
        pairs.append({"prompt": "".join(prompt), "chosen": "".join(answer), "rejected": "".join(corrupted)})
    return pairs


def load_pairs(path: Path) -> list[Pair]:
    """Read pairs from a JSONL file, in the forms that TRL takes; other fields are dropped.

    A line holds chosen and rejected, and prompt unless that is how both of them begin. They are strings, or
    conversations: lists of messages with a role and a content.

    Raises:
        ValueError: A line is no such object, a field is empty, or the file has no line; the message names the line.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        pair = {name: row[name] for name in FIELDS if name in row}
        for name in FIELDS[1:] if "prompt" not in row else FIELDS:
            if not _is_text(pair.get(name)):
                raise ValueError(
                    f"{path}, line {number}: {name} is missing, empty or neither a string nor a list of messages with "
                    "a role and a content; expected an object with chosen, rejected and, unless both begin with it, "
                    "prompt"
                )
        if len({type(text) for text in pair.values()}) > 1:
            raise ValueError(
                f"{path}, line {number}: some fields are strings and some conversations; expected one kind"
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} holds no pairs; expected one JSON object a line with {', '.join(FIELDS)}")
    return pairs


def _is_text(text: object) -> bool:
    if isinstance(text, list):
        return bool(text) and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in text
        )
    return isinstance(text, str) and bool(text)


def texts(pairs: Iterable[Pair]) -> list[str]:
    """Every text of these pairs, for a tokenizer to learn from."""
    fields = [text for pair in pairs for text in pair.values()]
    return [part for text in fields for part in ([text] if isinstance(text, str) else [m["content"] for m in text])]


def library_source() -> list[str]:
    """The modules at the top of the standard library, as far as they are installed as source."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in library]


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts` and the standard library's source: seconds, and the same merges every time.

    Any text can be encoded, because the alphabet holds every byte. Where little of the library is installed as source
    the merges run out early and the vocabulary stays smaller than `vocabulary`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *topics.values(), *library_source()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    return tokenizer


def _passages(text: str) -> list[list[str]]:
    """Cut a text into runs of PROMPT_WORDS + ANSWER_WORDS words; what is left over at its end is dropped.

    A word carries the whitespace before it, not after it: so a prompt never ends in a space that the tokenizer would
    join to the answer's first word.
    """
    words = re.findall(r"\s*\S+", text)
    length = PROMPT_WORDS + ANSWER_WORDS
    return [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
