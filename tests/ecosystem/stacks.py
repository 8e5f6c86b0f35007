"""Which stacks are tried, and how each is installed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """A stack that is installed and trained with."""

    title: str
    recipe: str  # in recipes/
    requires: tuple[str, ...]  # installed with what they need
    alone: tuple[str, ...] = ()  # installed without: packages whose servers, viewers and GPU builds no training needs
    empty: tuple[str, ...] = ()  # modules that the stack imports and these objectives never call, written as empty files
    fused_in_script: tuple[str, ...] = ()  # objectives also run with fuse(model), as the launcher patches their trainer


@dataclass(frozen=True)
class Absent:
    """A stack that is not trained with here, and why."""

    title: str
    reason: str
    instead: str


TRL = {"recipe": "trl_trainers.py", "fused_in_script": ("orpo",)}

STACKS = {
    "trl-0.16": Stack("TRL 0.16", requires=("trl==0.16.1", "transformers==4.51.3", "peft"), **TRL),
    "trl-0.24": Stack("TRL 0.24", requires=("trl==0.24.0", "transformers<5", "peft"), **TRL),
    "trl-0.29": Stack("TRL 0.29", requires=("trl==0.29.1", "transformers<5", "peft"), **TRL),
    "trl-1.9": Stack("TRL 1.9", requires=("trl==1.9.2", "peft"), **TRL),
    "trl-1.16": Stack("TRL 1.16", requires=("trl==1.16.0", "transformers==5.23.0", "peft"), **TRL),
    "llamafactory": Stack(
        "LLaMA-Factory",
        recipe="llamafactory_trainers.py",
        requires=(
            "trl==0.24.0",
            "transformers==5.6.0",
            "accelerate<=1.11.0",
            "datasets<=4.0.0",
            "peft<=0.18.1",
            "einops",
            "fire",
            "omegaconf",
            "pandas",
            "protobuf",
            "scipy",
            "sentencepiece",
            "tiktoken",
            "torchdata==0.11.0",
        ),
        alone=("llamafactory==0.9.5",),
        empty=("torchaudio",),
    ),
}

ABSENT: dict[str, Absent] = {}
