"""Every class of transformers that can be built tiny is fused or refused, and never wrong."""

from __future__ import annotations

import pytest
import transformers

from tests.lazy import models
from tests.lazy.model_zoo import NAMES

VERSIONS, OUTCOMES = models.load()
RECORDED = {each.name: each for each in OUTCOMES}
SAME_VERSION = transformers.__version__ == VERSIONS["transformers"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_class(name: str) -> None:
    """Right, and with the version that is recorded also what the record says of it."""
    found = models.examine(name)
    if SAME_VERSION and RECORDED[name].status != "not built":  # which may be for want of a package
        assert found == RECORDED[name], "record again: python -m tests.lazy.models"


# Of each kind of head: a buffer in float32 that is added, a loss of the bfloat16 logits, a cap, a multiplier.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "BartForConditionalGeneration",
        "T5ForConditionalGeneration",
        "Gemma2ForCausalLM",
        "CohereForCausalLM",
    ],
)
def test_class_in_mixed_precision(name: str) -> None:
    assert models.examine(name, autocast=True).status == "fused"


def test_the_record_holds_every_class() -> None:
    if not SAME_VERSION:
        pytest.skip(f"recorded with transformers {VERSIONS['transformers']}, not {transformers.__version__}")
    assert tuple(each.name for each in OUTCOMES) == NAMES


def test_at_least_150_classes_are_built() -> None:
    assert sum(each.status != "not built" for each in OUTCOMES) >= 150


def test_the_table_says_what_was_recorded() -> None:
    document = models.TABLE.read_text()
    assert models.rendered(document) == document, "run: python -m tests.lazy.models --render"
    assert len(models.MARKED.findall(document)) == 1
