"""Which stacks are tried, and how each is installed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """A stack that is installed and trained with."""

    title: str
    recipe: str  # in recipes/
    requires: tuple[str, ...]  # installed with what they need
    alone: tuple[str, ...] = ()  # installed without: packages whose servers, viewers and GPU builds no training needs
    # Packages that the stack imports and these objectives never call, with the names it takes from their modules.
    hollow: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fused_in_script: tuple[str, ...] = ()  # objectives also run without the launcher, fused as in_script says
    in_script: str = "fuse(model)"  # or "plugin", by one that the stack's own configuration names
    torch: str = ""  # where it is not that of constraints.txt


def trl(title: str, *requires: str, torch: str = "") -> Stack:
    return Stack(title, "trl_trainers.py", requires, fused_in_script=("orpo", "cpo", "simpo"), torch=torch)


# All as old as TRL 0.12 itself: later accelerate, datasets and peft ask for a later transformers.
OLDEST = "trl==0.12.2", "transformers==4.46.3", "accelerate==1.1.1", "datasets<4", "peft==0.13.2"

# The environments of `make matrix`, the oldest first. They span the versions that `doctor` calls tested. The index has
# torch 2.9 for Linux with CUDA alone, 7 GB installed, so one environment has it and CI runs the one after.
MATRIX = {
    "torch-2.9": trl("TRL 0.12, torch 2.9", *OLDEST, torch="torch==2.9.1"),
    "trl-0.12": trl("TRL 0.12", *OLDEST),
    "trl-0.16": trl("TRL 0.16", "trl==0.16.1", "transformers==4.51.3", "peft"),
    "trl-0.18": trl("TRL 0.18", "trl==0.18.2", "transformers==4.52.4", "peft"),
    "trl-0.24": trl("TRL 0.24", "trl==0.24.0", "transformers<5", "peft"),
    "trl-0.29": trl("TRL 0.29", "trl==0.29.1", "transformers<5", "peft"),
    "trl-1.0": trl("TRL 1.0", "trl==1.0.0", "transformers==5.3.0", "peft", "requests"),
    "trl-1.9": trl("TRL 1.9", "trl==1.9.2", "peft", "requests"),
    "trl-1.16": trl("TRL 1.16", "trl==1.16.0", "transformers==5.23.0", "peft", "requests"),
}

STACKS = {
    **MATRIX,
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
        hollow={"torchaudio": ()},
    ),
    "ms-swift": Stack(
        "ms-swift",
        recipe="swift_trainers.py",
        requires=(
            "trl==0.29.1",
            "transformers<5.20",
            "peft<0.21",
            "datasets<4.8.5",
            "addict",
            "aiohttp",
            "binpacking",
            "charset-normalizer",
            "dacite",
            "einops",
            "fastapi",
            "importlib-metadata",
            "json-repair",
            "matplotlib",
            "modelscope>=1.23",
            "nltk",
            "openai",
            "pandas",
            "pillow",
            "rouge",
            "scipy",
            "sentencepiece",
            "simplejson",
            "sortedcontainers",
            "tiktoken",
            "uvicorn",
            "zstandard",
        ),
        alone=("ms-swift==4.6.0",),
    ),
    "axolotl": Stack(
        "Axolotl",
        recipe="axolotl_trainers.py",
        requires=(
            "trl==1.9.0",
            "transformers==5.16.1",
            "peft==0.20.0",
            "accelerate==1.13.0",
            "datasets==4.8.4",
            "addict",
            "colorama",
            "einops",
            "fire",
            "numba",
            "pillow",
            "psutil",
            "pydantic",
            "python-dotenv",
            "requests",
            "schedulefree",
            "scipy",
            "sentencepiece",
        ),
        alone=("axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6"),
        fused_in_script=("orpo-own", "orpo-trl", "cpo-trl"),
        in_script="plugin",
    ),
    "openrlhf": Stack(
        "OpenRLHF",
        recipe="openrlhf_trainers.py",
        requires=("transformers==5.15.0", "accelerate", "peft", "einops", "pylatexenc", "tqdm"),
        alone=("openrlhf==0.11.2",),
        hollow={
            "deepspeed": (),
            "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
            "flash_attn.utils.distributed": ("all_gather",),
        },
    ),
}
