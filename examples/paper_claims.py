"""What the ORPO paper claims, each as a number of one seed and the least that it must be to count as seen.

The verdict is a rule, so that no sentence of the page can say what its record does not: a claim reproduces where the
number reaches its least at every seed, does not where it does at none, and otherwise the seeds disagree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from examples.paper_record import Record, Seed
from examples.training import Run

NATS = 0.05  # a difference of log-probabilities a token below this is none
ALIKE = 0.01  # and of cosine similarities
DEARER = 1.05  # a quotient of costs

REPRODUCES, DOES_NOT, DISAGREE = "reproduces", "does not reproduce", "the seeds disagree"


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper in our words, and how it is asked of a record."""

    says: str  # ``{beta}`` and the like are filled from the settings, here and in ``asked``
    asked: str  # what the number is
    value: Callable[[Seed, Record], float]
    least: float
    form: str = "{:+.2f} nats"
    applies: Callable[[Record], bool] = lambda _: True  # whether the record has what it is about
    reason: Callable[[Record], str] = lambda _: ""  # what else the record says of it where it is not reproduced


def gap(run: Run) -> float:
    """By how much the chosen side is likelier in the end, nats a token."""
    return run.chosen[-1] - run.rejected[-1]


def main_beta(record: Record) -> float:
    return float(record.settings["beta"])


def of_beta(seed: Seed, record: Record) -> Run:
    """ORPO at the weight at which it is compared with the others."""
    return seed.run("orpo", main_beta(record))


def per_step(run: Run, record: Record) -> float:
    """Sequences a training step sends through a model, for each pair of the batch."""
    return run.sequences / (int(record.settings["steps"]) * int(record.settings["batch_size"]))


def seconds(seed: Seed, record: Record, *methods: str) -> float:
    """Of these trainings one after another, by the steps that were timed in turn."""
    return sum(seed.step_seconds[method] for method in methods) * int(record.settings["steps"])


def _rise_under_sft(seed: Seed, _: Record) -> float:
    run = seed.run("sft")
    return run.rejected[-1] - run.rejected[0]


def _wider_gap(seed: Seed, record: Record) -> float:
    return gap(of_beta(seed, record)) - gap(seed.run("sft"))


def _fall_under_orpo(seed: Seed, record: Record) -> float:
    run = of_beta(seed, record)
    return run.rejected[0] - run.rejected[-1]


def _chosen_kept(seed: Seed, record: Record) -> float:
    return of_beta(seed, record).chosen[-1] - seed.run("sft").chosen[-1]


def _odds(seed: Seed, record: Record) -> float:
    run = of_beta(seed, record)
    return run.log_odds[-1] - run.log_odds[0]


def _suppressed(seed: Seed, record: Record) -> float:
    return of_beta(seed, record).rejected[-1] - seed.run("probability_ratio").rejected[-1]


def _suppressed_by_heart(seed: Seed, _: Record) -> float:
    odds, probability = seed.by_heart
    return odds.rejected[-1] - probability.rejected[-1]


def _least_widening(seed: Seed, record: Record) -> float:
    gaps = [gap(seed.run("orpo", beta)) for beta in record.settings["betas"]]
    return min(after - before for before, after in pairwise(gaps))


def _where_it_falls(record: Record) -> str:
    """Beside the rejected side's rise under ORPO: that under fine-tuning, and the weights at which it falls."""
    said = f"Under SFT it rises by {spread([_rise_under_sft(seed, record) for seed in record.seeds], '{:.2f}')} nats."
    falls = [
        f"{beta:g}"
        for beta in record.settings["betas"]
        if all(run.rejected[0] - run.rejected[-1] >= NATS for run in (seed.run("orpo", beta) for seed in record.seeds))
    ]
    weights = f"at beta {' and '.join(falls)}, at every seed" if falls else "at none of the weights tried"
    return f"{said} Under ORPO it falls {weights}."


def _nearly_the_same(record: Record) -> str:
    """What the difference of the two ratios hangs on."""
    probability = max(math.exp(of_beta(seed, record).chosen[-1]) for seed in record.seeds)
    said = (
        "The derivatives of the two differ by factors of 1 - p, p the exponential of an answer's mean log-probability. "
        f"Here p of the chosen side ended at {probability:.2g} or less"
    )
    return f"{said}{', so they are nearly the same loss' if probability < 0.1 else ''}."


def _size_of_the_copy(record: Record) -> str:
    """What DPO's reference holds, against what its training takes in all."""
    copied, peaks = record.parameters * 4 / 2**20, [seed.run("dpo").peak_mib for seed in record.seeds]
    all_of_it = spread(peaks, "{:,.0f} MiB")
    return f"The reference's copy of the weights is {copied:,.0f} MiB, where DPO takes {all_of_it} in all."


CLAIMS = (
    Claim(
        "Fine-tuning on the chosen answers alone raises the log-probability of the rejected ones too (section 3, "
        "Figure 3).",
        "the rejected side's rise under SFT",
        _rise_under_sft,
        NATS,
    ),
    Claim(
        "ORPO parts the two sides more than fine-tuning does.",
        "the gap of chosen and rejected under ORPO, less that under SFT",
        _wider_gap,
        NATS,
    ),
    Claim(
        "Under ORPO the rejected side's log-probability falls.",
        "the rejected side's fall under ORPO from where it began",
        _fall_under_orpo,
        NATS,
        reason=_where_it_falls,
    ),
    Claim(
        "ORPO keeps the chosen side's gain from fine-tuning.",
        "the chosen side under ORPO, less that under SFT",
        _chosen_kept,
        -2 * NATS,
    ),
    Claim("The log odds ratio grows in training with ORPO.", "its growth", _odds, NATS),
    Claim(
        "In place of the odds ratio, the probability ratio suppresses the rejected side too much (the paper's "
        "ablation).",
        "the rejected side under the odds ratio, less that under the probability ratio, at beta {beta:g}",
        _suppressed,
        NATS,
        "{:+.4f} nats",
        reason=_nearly_the_same,
    ),
    Claim(
        "The ablation once more, on {few} pairs that are seen again and again: as the chosen answers become certain, "
        "the odds ratio ceases to press on the rejected ones, and the probability ratio goes on.",
        "the rejected side of these {few} pairs under the odds ratio, less that under the probability ratio",
        _suppressed_by_heart,
        NATS,
        applies=lambda record: all(seed.by_heart for seed in record.seeds),
    ),
    Claim(
        "A batch of DPO sends twice as many sequences through a model as one of ORPO, since its reference reads them "
        "too.",
        "the sequences of a DPO step over those of an ORPO step, counted by hooks",
        lambda seed, record: per_step(seed.run("dpo"), record) / per_step(of_beta(seed, record), record),
        2.0,
        "{:.2f}",
    ),
    Claim(
        "ORPO takes less time than fine-tuning followed by DPO.",
        "the time of SFT and DPO, {steps} steps each, over that of {steps} steps of ORPO",
        lambda seed, record: seconds(seed, record, "sft", "dpo") / seconds(seed, record, "orpo"),
        DEARER,
        "{:.2f}",
    ),
    Claim(
        "ORPO takes less memory than DPO, which holds a reference model.",
        "the peak memory of DPO over that of ORPO",
        lambda seed, record: seed.run("dpo").peak_mib / of_beta(seed, record).peak_mib,
        DEARER,
        "{:.2f}",
        reason=_size_of_the_copy,
    ),
    Claim(
        "A larger weight of the odds-ratio term parts the two sides further.",
        "the least widening of the gap from one of the weights {weights} to the next",
        _least_widening,
        0.01,
        "{:+.3f} nats",
        applies=lambda record: len(record.settings["betas"]) > 1,
    ),
    Claim(
        "For one prompt, answers of ORPO are more alike than those of SFT followed by DPO (the section on lexical "
        "diversity).",
        "the per-input similarity under ORPO, less that under SFT and DPO",
        lambda seed, _: seed.diversity["orpo"].per_input - seed.diversity["dpo"].per_input,
        ALIKE,
        "{:+.3f}",
    ),
    Claim(
        "Between prompts, answers of ORPO are less alike than those of SFT followed by DPO (the section on lexical "
        "diversity).",
        "the across-input similarity under SFT and DPO, less that under ORPO",
        lambda seed, _: seed.diversity["dpo"].across_input - seed.diversity["orpo"].across_input,
        ALIKE,
        "{:+.3f}",
    ),
)


def asked_of(record: Record) -> list[Claim]:
    """The claims that a record can answer."""
    return [claim for claim in CLAIMS if claim.applies(record)]


def values(claim: Claim, record: Record) -> list[float]:
    """The claim's number for each seed."""
    return [claim.value(seed, record) for seed in record.seeds]


def verdict(found: Sequence[float], least: float) -> str:
    """Whether the claim reproduces, by its numbers over the seeds alone."""
    reached = [value >= least for value in found]
    if all(reached):
        return REPRODUCES
    return DISAGREE if any(reached) else DOES_NOT


def spread(found: Sequence[float], form: str) -> str:
    """Mean over the seeds and, where they differ, the least and the most."""
    middle = found[0] if min(found) == max(found) else sum(found) / len(found)
    number, _, unit = form.partition(" ")
    mean, low, high = (number.format(value) for value in (middle, min(found), max(found)))
    ends = "" if low == high else f" ({low} to {high})"
    return f"{mean}{ends} {unit}".rstrip()
