"""What is measured, as data: heads, batches and regimes of hidden states. Nothing here computes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

DTYPES = ("bfloat16", "float16", "float32")
HEADS = ("trainable", "frozen")
PHASES = ("forward", "full")
LOGITS_TASKS = ("sft", "dpo", "grpo", "kto", "factory-orpo")  # losses that read logits, see chains.py
# Losses over pairs, or over answers, that Liger and TRL released too, see objectives.py.
OBJECTIVE_TASKS = ("objective-orpo", "objective-cpo", "objective-simpo", "objective-dpo", "objective-kto")
# The ORPO loss, log-probabilities under a random upstream gradient, and those two families.
TASKS = ("loss", "logprobs", *LOGITS_TASKS, *OBJECTIVE_TASKS)

BETA = 0.1
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """A language model's head."""

    name: str
    features: int
    vocab: int
    softcap: float | None = None


class Pair(NamedTuple):
    """Lengths in tokens. Nothing predicts the first token of a prompt, so p prompt tokens give p - 1 targets."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Batch:
    """Pairs, right-padded to ``positions``. NLL over prompt and chosen answer, as in TRL; odds ratio over answers."""

    name: str
    pairs: tuple[Pair, ...]
    positions: int  # T of hidden [2P, T, H]

    @property
    def targets(self) -> int:
        return sum(pair.prompt - 1 + pair.chosen + pair.rejected for pair in self.pairs)


@dataclass(frozen=True)
class States:
    """A regime of hidden states: ``hidden = noise + a multiple of the label's row of the head``, per target position.

    The noise gives the logits of all tokens a standard deviation of ``noise`` nats. The multiple lifts the label's
    logit ``margin`` nats above the log-sum-exp of the others, plus ``spread`` nats of normal deviation between tokens;
    None lifts nothing, so that labels are random tokens to the head.
    """

    name: str
    noise: float
    margin: float | None
    spread: float = 0.0


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("llama3-8b", 4096, 128256),
        Case("qwen2.5-7b", 3584, 152064),
        Case("gemma2-2b", 2304, 256000, softcap=30.0),
        Case("mistral-7b", 4096, 32768),
        Case("qwen2.5-0.5b", 896, 151936),
        # Sizes for a few CPU cores.
        Case("qwen2.5-0.5b-cpu", 896, 128256),
        Case("small-v32k-cpu", 896, 32000),
        Case("gemma-cpu", 512, 32000, softcap=30.0),
        Case("tiny-cpu", 64, 1000),  # small enough to interpret
    )
}


def _dense(name: str, pairs: int, positions: int) -> Batch:
    """Every position of both sides is scored: a prompt of one token, which nothing predicts."""
    return Batch(name, (Pair(1, positions, positions),) * pairs, positions)


def fitting(known: Iterable[str], device: str) -> list[str]:
    """Names of what is sized for such a device: for a few CPU cores, or for a GPU."""
    return [name for name in known if name.endswith("-cpu") == (device == "cpu")]


# A series over sequence length, for the plot of growth.
LENGTHS_CPU = (128, 256, 512, 1024)
LENGTHS = (1024, 2048, 4096, 8192, 16384)

# Prompts, chosen and rejected answers, drawn once from log-normals of the shape that UltraFeedback's binarised pairs
# have (medians about 90, 280 and 230 tokens, prompts cut at 512), and kept: 38 % of the positions are targets.
ULTRAFEEDBACK = (
    (65, 22, 42, 48, 126, 146, 407, 148),
    (331, 120, 319, 95, 295, 176, 150, 197),
    (246, 136, 421, 91, 118, 212, 293, 101),
)
BATCHES: dict[str, Batch] = {
    batch.name: batch
    for batch in (
        _dense("dense", 8, 1024),
        Batch("ultrafeedback", tuple(map(Pair, *ULTRAFEEDBACK)), 700),
        _dense("long", 1, 16384),
        *(_dense(f"length-{length}", 1, length) for length in LENGTHS),
        # Sizes for a few CPU cores: prompts of 64-192 tokens, sequences of 300-512; a quarter of that in small.
        Batch("ragged-cpu", (Pair(137, 371, 324), Pair(123, 240, 311), Pair(149, 193, 246), Pair(162, 253, 192)), 512),
        Batch("ragged-small-cpu", (Pair(48, 150, 99), Pair(80, 121, 170)), 256),
        _dense("dense-cpu", 2, 512),
        _dense("tiny-cpu", 1, 8),
        *(_dense(f"length-{length}-cpu", 1, length) for length in LENGTHS_CPU),
    )
}

# A trained model's tokens: half of them nearly certain, a tail of surprises, -1.5 nats on average. The margin is what
# a spread of 3.5 nats needs for that mean: E[softplus(-x)] = 1.5 for x normal with this mean and deviation.
STATES = {"trained-like": States("trained-like", 2.0, margin=0.141, spread=3.5), "random": States("random", 2.0, None)}

# The table of the numerics: a mean log-probability from hopeless to certain.
REGIMES = (
    States("-11", noise=1.1, margin=None),
    States("-33", noise=7.7, margin=None),
    States("-0.4", noise=2.0, margin=0.71),
    States("-2e-7", noise=2.0, margin=15.4),
    States("-4e-16", noise=2.0, margin=35.5),
)
