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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Pair = dict[str, str]  # prompt, chosen, rejected
FIELDS = ("prompt", "chosen", "rejected")

VOCABULARY = 32_768
PROMPT_WORDS = 16
ANSWER_WORDS = 48


def preference_pairs(seed: int = 0) -> list[Pair]:
    """Pairs from passages of the documentation: a passage's opening, its true continuation, another topic's text.

    Half of the topics give prompts and chosen answers, the other half gives only rejected ones. Were every text chosen
    in one pair and rejected in the next, the two terms of the loss would pull at the same tokens, and only a model
    large enough to read the prompt could tell the sides apart. Topics quote each other at length ("compound" holds all
    of "while"), so a rejected text leaves out the paragraphs that the chosen half has too.

    Args:
        seed: Decides the halves, the partners and the order of the pairs.

    Returns:
        Some hundreds of pairs, shuffled.
    """
    rng = random.Random(seed)
    names = sorted(topics)
    rng.shuffle(names)
    right = [topics[name] for name in names[0::2]]
    shared = {paragraph for text in right for paragraph in text.split("\n\n")}
    wrong = ["\n\n".join(p for p in topics[name].split("\n\n") if p not in shared) for name in names[1::2]]

    passages = [passage for text in right for passage in _passages(text)]
    strangers = [passage for text in wrong for passage in _passages(text)]
    rng.shuffle(passages)
    return [
        {
            "prompt": "".join(words[:PROMPT_WORDS]),
            "chosen": "".join(words[PROMPT_WORDS:]),
            "rejected": "".join(rng.choice(strangers)[PROMPT_WORDS:]),
        }
        for words in passages
    ]


def load_pairs(path: Path) -> list[Pair]:
    """Read pairs from a JSONL file whose lines hold the strings prompt, chosen and rejected; other fields are dropped.

    Raises:
        ValueError: A line is no such object, a field is empty, or the file has no line; the message names the line.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
        for name in FIELDS:
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name]:
                raise ValueError(
                    f"{path}, line {number}: expected an object with the non-empty strings {', '.join(FIELDS)}, "
                    f"but {name} is missing, empty or no string"
                )
        pairs.append({name: row[name] for name in FIELDS})
    if not pairs:
        raise ValueError(f"{path} holds no pairs; expected one JSON object a line with {', '.join(FIELDS)}")
    return pairs


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts` and the standard library's source: seconds, and the same merges every time.

    Any text can be encoded, because the alphabet holds every byte. Where little of the library is installed as source
    the merges run out early and the vocabulary stays smaller than `VOCABULARY`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    bpe.train_from_iterator([*texts, *topics.values(), *source], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _passages(text: str) -> list[list[str]]:
    """Cut a text into runs of PROMPT_WORDS + ANSWER_WORDS words; what is left over at its end is dropped.

    A word carries the whitespace before it, not after it: so a prompt never ends in a space that the tokenizer would
    join to the answer's first word.
    """
    words = re.findall(r"\s*\S+", text)
    length = PROMPT_WORDS + ANSWER_WORDS
    return [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
