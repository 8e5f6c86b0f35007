"""The ORPO paper's two measures of how varied a model's generations are, over any embedding of text.

Both are mean cosine similarities, so a higher value is less variety:

    per input      among the samples for one prompt, then the mean over prompts
    across inputs  among the first samples of different prompts: low where answers are specific to what was asked

The paper embeds with a language model. ``character_ngrams`` needs no download and sees spelling alone; pass
``embed=lambda texts: torch.tensor(model.encode(texts))`` of a sentence encoder for meaning.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Embed = Callable[[list[str]], Tensor]  # texts to [texts, D], in any floating-point dtype

ORDERS = (2, 3, 4)
BUCKETS = 4096


def character_ngrams(texts: list[str]) -> Tensor:
    """Counts of each text's character n-grams (2 to 4) in hashed buckets, ``[texts, 4096]`` float64.

    Each text has a mark at either end, so that an empty one has an n-gram too. The hash is CRC-32: the same buckets in
    every process.
    """
    counts = torch.zeros(len(texts), BUCKETS, dtype=torch.float64)
    for row, text in enumerate(texts):
        marked = f"\x02{text}\x03"
        for order in ORDERS:
            for start in range(len(marked) - order + 1):
                counts[row, zlib.crc32(marked[start : start + order].encode(errors="replace")) % BUCKETS] += 1
    return counts


def per_input_diversity(samples: Sequence[Sequence[str]], embed: Embed = character_ngrams) -> float:
    """Mean over prompts of the mean cosine similarity among the samples for one prompt.

    Args:
        samples: for each prompt its samples, two or more.
        embed: from texts to vectors.

    Returns:
        Between -1 and 1; 1 where all samples for a prompt point the same way.

    Raises:
        TypeError, ValueError: no prompt, a prompt with fewer than two samples, or an embedding that is no finite
            ``[texts, D]``.
    """
    _check(samples, least=2)
    return sum(_similarity(list(texts), embed) for texts in samples) / len(samples)


def across_input_diversity(samples: Sequence[Sequence[str]], embed: Embed = character_ngrams) -> float:
    """Mean cosine similarity among the first samples of different prompts.

    Args:
        samples: for each of two or more prompts its samples, one or more.
        embed: from texts to vectors.

    Returns:
        Between -1 and 1; 1 where the model answers every prompt alike.

    Raises:
        TypeError, ValueError: fewer than two prompts, a prompt without a sample, or an embedding that is no finite
            ``[texts, D]``.
    """
    _check(samples, least=1)
    if len(samples) < 2:
        raise ValueError(f"samples must be of two or more prompts, got {len(samples)}: there is nothing to compare")
    return _similarity([texts[0] for texts in samples], embed)


def _check(samples: Sequence[Sequence[str]], least: int) -> None:
    if isinstance(samples, str) or any(isinstance(texts, str) for texts in samples):
        raise TypeError("samples must be a list of texts for each prompt, got a single text: put it into a list")
    if not samples:
        raise ValueError("samples is empty: pass a list of texts for each prompt")
    for index, texts in enumerate(samples):
        if len(texts) < least:
            raise ValueError(f"samples[{index}] must have {least} or more texts, got {len(texts)}: sample more often")


def _similarity(texts: list[str], embed: Embed) -> float:
    """Mean cosine similarity over the pairs of different texts; 0 to a vector of zeros."""
    vectors = embed(texts)
    if not isinstance(vectors, Tensor):
        raise TypeError(f"embed must return a tensor [texts, D], got {type(vectors).__name__}: wrap it in torch.tensor")
    if vectors.dim() != 2 or len(vectors) != len(texts) or not vectors.is_floating_point():
        raise ValueError(
            f"embed must return a floating-point vector for each of {len(texts)} texts, [{len(texts)}, D], got "
            f"{vectors.dtype} {list(vectors.shape)}"
        )
    if not vectors.isfinite().all():
        raise ValueError("embed returned vectors that are not finite: check the embedding model's output")
    unit = F.normalize(vectors.double(), dim=-1)
    count = len(texts)
    return ((unit @ unit.T).sum() - (unit * unit).sum()).item() / (count * (count - 1))
