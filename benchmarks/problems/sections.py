"""What one machine's record consists of, section by section, as rows to be answered."""

from collections.abc import Iterable, Sequence
from itertools import product

from benchmarks.harness.record import Row
from benchmarks.problems.cases import HEADS, LENGTHS, LENGTHS_CPU, LOGITS_TASKS, OBJECTIVE_TASKS
from benchmarks.problems.providers import FLOOR, LOGITS, RELEASED, default_names

# A process each and a compilation each: their place among the others is in the sections of all providers, and four
# lengths more would only repeat it. On a GPU compiling for every shape takes longer than all else, so they come last.
COMPILED = ("compiled", "liger")
GPU_CASES = ("llama3-8b", "qwen2.5-7b", "gemma2-2b", "qwen2.5-0.5b")
GPU_BATCHES = ("dense", "ultrafeedback")
BF16, F32, BOTH = ("bfloat16",), ("float32",), ("bfloat16", "float32")
LARGE, SMALL = ("qwen2.5-0.5b-cpu",), ("small-v32k-cpu",)
FULL, QUARTER = ("ragged-cpu",), ("ragged-small-cpu",)
TRAINABLE = HEADS[:1]


def rows(
    cases: Iterable[str],
    batches: Iterable[str],
    heads: Iterable[str],
    dtypes: Iterable[str],
    providers: Iterable[str],
    *,
    states: Iterable[str] = ("trained-like",),
    phases: Iterable[str] = ("full",),
    tasks: Iterable[str] = ("loss",),
) -> list[Row]:
    """Every combination; a group's providers run one after the other, and so see the same state of the machine."""
    combinations = list(product(cases, batches, states, heads, dtypes, phases, providers))
    return [Row(*combination, task=task) for task in tasks for combination in combinations]


def compared(device: str, *asked: Sequence[str] | None) -> list[Row]:
    """What two checkouts are compared on: the headline, float32 and small sizes, or what is ``asked`` for of cases,
    batches, heads and dtypes."""
    usual = (GPU_CASES, GPU_BATCHES, HEADS, BF16) if device == "cuda" else (LARGE, FULL, HEADS, BF16)
    if device == "cuda" or any(asked):
        cases, batches, heads, dtypes = (names or known for names, known in zip(asked, usual, strict=True))
        return rows(cases, batches, heads, dtypes, [""])
    return [
        *rows(LARGE, FULL, HEADS, BF16, [""]),
        *rows(LARGE, FULL, TRAINABLE, F32, [""]),
        *rows(SMALL, QUARTER, HEADS, BOTH, [""]),
    ]


def sections(device: str) -> dict[str, list[Row]]:
    """The race's sections: on a CPU full size where claims are made, elsewhere a quarter, so that one takes minutes."""
    everyone, logprobs = default_names(device), default_names(device, "logprobs")
    if device == "cuda":
        lengths = [f"length-{length}" for length in LENGTHS]
        return {
            **gpu_race(),
            "mistral": rows(["mistral-7b"], GPU_BATCHES, HEADS, BF16, everyone),
            "long": rows(["llama3-8b"], ["long"], HEADS, BF16, everyone),
            "lengths": rows(["llama3-8b"], lengths, TRAINABLE, BF16, _without_compiled(everyone)),
            "logprobs": rows(GPU_CASES, GPU_BATCHES, HEADS, BF16, logprobs, tasks=["logprobs"]),
            "lazy": [
                row
                for task in LOGITS_TASKS
                for row in rows(GPU_CASES, GPU_BATCHES, TRAINABLE, BF16, default_names(device, task), tasks=[task])
            ],
            "objectives": rows(GPU_CASES, GPU_BATCHES, TRAINABLE, BF16, RELEASED, tasks=OBJECTIVE_TASKS),
        }
    lengths = [f"length-{length}-cpu" for length in LENGTHS_CPU]
    return {
        "headline": rows(LARGE, FULL, TRAINABLE, BF16, everyone),
        # The claims in float32, at full size: naive takes most of a minute a call here, so they meet nobody else.
        "float32": rows([*LARGE, *SMALL], FULL, TRAINABLE, F32, [FLOOR, "naive", "ours"]),
        "large": [*rows(LARGE, QUARTER, ["frozen"], BF16, everyone), *rows(LARGE, QUARTER, HEADS, F32, everyone)],
        "small": rows(SMALL, QUARTER, HEADS, BOTH, everyone),
        "softcap": rows(["gemma-cpu"], QUARTER, TRAINABLE, BOTH, everyone),
        "lengths": rows(SMALL, lengths, TRAINABLE, BF16, _without_compiled(everyone)),
        "logprobs": rows(SMALL, QUARTER, HEADS, BOTH, logprobs, tasks=["logprobs"]),
        "lazy": [
            *rows(SMALL, QUARTER, TRAINABLE, BOTH, LOGITS, tasks=LOGITS_TASKS),
            # Where the products are nothing, what is left is what laziness costs a step.
            *rows(["tiny-cpu"], ["tiny-cpu"], TRAINABLE, F32, LOGITS[1:], tasks=LOGITS_TASKS),
        ],
        "objectives": rows(SMALL, QUARTER, TRAINABLE, BF16, RELEASED, tasks=OBJECTIVE_TASKS),
    }


def gpu_race() -> dict[str, list[Row]]:
    """The race that the promises are about: ourselves first, last who compiles, so that a budget cuts the least."""
    ourselves = ("ours", "ours_recompute", FLOOR)
    others = [name for name in _without_compiled(default_names("cuda")) if name not in (*ourselves, "ours_torch")]

    def race(providers: Sequence[str], evaluated: Sequence[str]) -> list[Row]:
        found = []
        for case in GPU_CASES:
            found += rows([case], GPU_BATCHES, HEADS, BF16, providers)
            found += rows([case], GPU_BATCHES, TRAINABLE, BF16, evaluated, phases=["forward"])
        return found

    return {
        "ours": race(ourselves, ("ours", FLOOR)),
        "others": race(others, ("naive",)),
        "compiled": race(COMPILED, ()),
    }


def _without_compiled(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in COMPILED]
