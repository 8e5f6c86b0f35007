"""The two diversity measures, by hand and at their ends."""

import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.diversity import across_input_diversity, character_ngrams, per_input_diversity

DIRECTIONS = {
    "east": (1.0, 0.0),
    "north": (0.0, 2.0),
    "northeast": (3.0, 3.0),
    "west": (-1.0, 0.0),
    "nowhere": (0.0, 0.0),
}


def compass(texts: list[str]) -> Tensor:
    return torch.tensor([DIRECTIONS[text] for text in texts])


def test_identical_texts_are_alike_and_orthogonal_ones_are_not() -> None:
    assert per_input_diversity([["a b", "a b"], ["c", "c"]]) == pytest.approx(1, abs=1e-12)
    assert across_input_diversity([["a b"], ["a b"], ["a b"]]) == pytest.approx(1, abs=1e-12)
    assert per_input_diversity([["east", "north"]], compass) == pytest.approx(0, abs=1e-12)
    assert across_input_diversity([["east"], ["north"]], compass) == pytest.approx(0, abs=1e-12)
    assert per_input_diversity([["east", "west"]], compass) == pytest.approx(-1)
    assert per_input_diversity([["east", "nowhere"]], compass) == 0


def test_by_hand() -> None:
    """Three samples of one prompt: 0, 1/sqrt 2 and 1/sqrt 2; two of another: 1. Then the first ones of each."""
    samples = [["east", "north", "northeast"], ["northeast", "northeast"]]
    assert per_input_diversity(samples, compass) == pytest.approx((2 / math.sqrt(2) / 3 + 1) / 2)
    assert across_input_diversity(samples, compass) == pytest.approx(1 / math.sqrt(2))
    assert across_input_diversity([["east", "north"], ["west"], ["north"]], compass) == pytest.approx(-1 / 3)


def test_character_ngrams_need_no_words_and_are_the_same_in_every_process() -> None:
    vectors = character_ngrams(["ab", "", "ba", "\udcff"])
    assert vectors.shape == (4, 4096)
    # Of the marked text of four characters three pairs, two triples, one of four; of the marks alone one pair.
    assert vectors.sum(-1).tolist() == [6, 1, 6, 3]
    assert vectors[1].nonzero().flatten().tolist() == [zlib.crc32(b"\x02\x03") % 4096]
    assert not torch.equal(vectors[0], vectors[2])
    assert per_input_diversity([["", ""]]) == pytest.approx(1)


def test_likeness_of_spelling_orders_texts() -> None:
    near, far = [["the list is sorted", "the list was sorted"]], [["the list is sorted", "Öfen, über 40 °C"]]
    assert 0 < per_input_diversity(far) < 0.3 < per_input_diversity(near) < 1


@pytest.mark.parametrize("measure", [per_input_diversity, across_input_diversity])
@pytest.mark.parametrize(
    ("samples", "embed", "error", "message"),
    [
        ([], compass, ValueError, "samples is empty"),
        ("east", compass, TypeError, "got a single text"),
        (["east", "north"], compass, TypeError, "got a single text"),
        ([["east", "east"], []], compass, ValueError, r"samples\[1\] must have . or more texts, got 0"),
        ([["east"]], compass, ValueError, "or more"),
        ([["a", "b"], ["c", "d"]], lambda texts: [[1.0]] * len(texts), TypeError, "must return a tensor"),
        ([["a", "b"], ["c", "d"]], lambda texts: torch.ones(1, 3), ValueError, r"each of 2 texts.*\[1, 3\]"),
        ([["a", "b"], ["c", "d"]], lambda texts: torch.ones(2, dtype=torch.long), ValueError, "floating-point"),
        ([["a", "b"], ["c", "d"]], lambda texts: torch.full((2, 3), math.nan), ValueError, "not finite"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    measure: Any, samples: Any, embed: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(samples, embed)
