"""The page of a record of `python -m examples.paper`: every figure and every verdict on it comes from the record."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from examples.paper_claims import (
    DISAGREE,
    DOES_NOT,
    REPRODUCES,
    Claim,
    asked_of,
    main_beta,
    seconds,
    spread,
    values,
    verdict,
)
from examples.paper_figure import SHORT, drawn
from examples.paper_record import Record, Seed
from examples.training import BY_HEART, Run

FIGURE = Path("images", "paper.png")  # beside the page
HEADINGS = {
    REPRODUCES: "What reproduces",
    DOES_NOT: "What does not reproduce",
    DISAGREE: "Where the seeds disagree",
}

LLAMA = """a Llama with {layers} layers of width {hidden_size} and {tokens:,} tokens ({millions:.1f} M
parameters), first trained for {pretraining} steps on the source of Python's standard library"""
OWN_DOCS = """pairs from Python's documentation: the opening of a passage, its true continuation, and the same
words shuffled. What is preferred is word order, which is not what people prefer of an answer"""
INTRODUCTION = """
Written by `python -m examples.paper` from its record, [paper.json](paper.json): every figure is the record's, and
every verdict a rule over it. The paper is Hong, Lee, Thorne, "ORPO: Monolithic Preference Optimization without
Reference Model", arXiv 2403.07691.

The model is {model}, and trains on {pairs:,} {data}. Every method sees the same batches, {steps} steps of
{batch_size} pairs, and all but DPO, which goes on from SFT, start from the same weights. {held_out} pairs are held
out, and all log-probabilities are theirs unless it is said otherwise: the mean over an answer's tokens, in nats, then
the mean over answers.

Figures are means over {seeds}, with the least and the most in brackets where they differ; the bands in the picture
have the same ends. A seed decides the split, the order and the samples. A claim reproduces where every seed shows it,
and does not where none does.{caution}"""
RESIDENT_PEAK = "the rise of the process's resident size, once what earlier trainings left was given back"
CUDA_PEAK = "CUDA's count of allocated bytes beyond what was held before"
FEW = """ The comparison on {few} pairs has {rate:g} times that rate and is measured on those pairs; it was added once
the one on held-out pairs had shown no difference."""
METHOD = """
- {record.date}, commit {record.commit}, {record.device}, threads {record.threads}, torch {record.versions[torch]},
transformers {record.versions[transformers]}, {precision}. Learning rate {learning_rate:g}, DPO's {dpo_rate:g} of it,
its beta {dpo_beta:g}; warm-up, then a linear fall.{about_few} {max_length} tokens of prompt and answer at most.
- The losses are this package's: `linear_logprobs` for SFT, which does not run the rejected answers, `preference_loss`
with `ORPO`, `ProbabilityRatio` and `DPO`, and `sequence_logprobs` for the reference.
- Forward passes, and the sequences in them, are those of training, counted by hooks on the model and on DPO's
reference, a frozen copy in memory. Where a data set is gone through several times, `precompute` saves most of the
reference's passes and the copy.
- Peak memory is {memory}: the model's copies, gradients, the optimiser's state and activations.
- Time is a quotient of medians of steps that the three methods took in turn on the same batches, in one process.
Other work on the machine met all three alike.
- Similarities are of {samples} samples of up to {new_tokens} tokens at temperature {temperature:g} for each of
{prompts} held-out prompts, embedded as counts of character n-grams (`examples/diversity.py`), which see spelling and
no meaning; the paper embeds with a language model. Higher is less diverse.

The first sample of each model for the first prompt of seed {first}:

{shown}"""

OWN = """
`python -m examples.paper --model facebook/opt-350m --data pairs.jsonl --bf16 --steps 2000 --beta 0.1 --output out`
writes this page for another model, from the hub or a folder, and for pairs in a JSONL file of prompt, chosen and
rejected, strings or conversations; its first panel shows what the paper's Figure 3 does, beside ORPO. It takes a GPU
if there is one. Weights, gradients, Adam's two moments and DPO's reference are float32, 20 bytes a parameter in all,
and activations come on top; `--batch-size` and `--max-length` bound those."""


def write(record: Record, folder: Path) -> tuple[Path, Path]:
    """Page and figure into ``folder``; their paths."""
    page, picture = folder / "paper.md", folder / FIGURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(record), encoding="utf-8")
    drawn(record).savefig(picture, dpi=110, metadata={"Software": None})
    return page, picture


def summary(record: Record) -> str:
    """A verdict a line."""
    found = [(verdict(values(claim, record), claim.least), claim) for claim in asked_of(record)]
    return "\n".join(f"{what:>18}: {_filled(claim.says, record)}" for what, claim in found)


def render(record: Record) -> str:
    """The page."""
    sections = [
        "# The ORPO paper's claims in small",
        _introduction(record),
        f"![six panels]({FIGURE.as_posix()})",
        "## The figures",
        _table(record),
    ]
    for what, heading in HEADINGS.items():
        claims = [claim for claim in asked_of(record) if verdict(values(claim, record), claim.least) == what]
        if claims:
            sections += [f"## {heading}", "\n".join(_sentence(claim, record, what) for claim in claims)]
    return (
        "\n\n".join(
            map(
                _wrapped,
                [*sections, "## How it was measured", _method(record), "## Your own model and pairs", OWN.strip()],
            )
        )
        + "\n"
    )


def _wrapped(section: str) -> str:
    """Paragraphs and lists at the width that this repository's documents have; tables, headings and pictures as is."""
    if section[0] in "|#!":
        return section
    paragraphs = [
        "\n".join(
            textwrap.fill(
                " ".join(item.split()),
                125,
                subsequent_indent="  " * item.startswith("- "),
                break_long_words=False,
                break_on_hyphens=False,
            )
            for item in re.split(r"\n(?=- )", paragraph.strip())
        )
        for paragraph in section.split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def _filled(text: str, record: Record) -> str:
    weights = ", ".join(f"{beta:g}" for beta in record.settings["betas"])
    return text.format(**{**record.settings, "beta": main_beta(record), "weights": weights})


def _sentence(claim: Claim, record: Record, what: str) -> str:
    least = f"{claim.form.format(claim.least)} or more"
    seen = f"{_filled(claim.asked, record)}: **{spread(values(claim, record), claim.form)}**, asked for {least}."
    return f"- {_filled(claim.says, record)} Here {seen} {'' if what == REPRODUCES else claim.reason(record)}".rstrip()


def _introduction(record: Record) -> str:
    settings, count = record.settings, len(record.seeds)
    if settings["model"] is None:
        model = LLAMA.format(**settings, tokens=record.vocabulary, millions=record.parameters / 1e6)
    else:
        model = f"`{settings['model']}` ({record.parameters / 1e6:,.1f} M parameters)"
    data = OWN_DOCS if settings["data"] is None else f"pairs of `{settings['data']}`"
    caution = " Fewer than three seeds say little of their spread." if count < 3 else ""
    seeds = f"{count} seed{'s' * (count > 1)}"
    return INTRODUCTION.format(
        **{**settings, "model": model, "data": data, "pairs": record.pairs}, seeds=seeds, caution=caution
    )


def _rows(record: Record) -> list[tuple[str, Callable[[Seed], Run], str]]:
    """Label, run of a seed, and the name its diversity goes by or "" without one."""
    rows: list[tuple[str, Callable[[Seed], Run], str]] = [("SFT", lambda seed: seed.run("sft"), "sft")]
    for beta in record.settings["betas"]:
        name = "orpo" if beta == main_beta(record) else ""
        rows.append((f"ORPO, beta {beta:g}", lambda seed, beta=beta: seed.run("orpo", beta), name))  # type: ignore[misc]
    ratio = f"probability ratio, beta {main_beta(record):g}"
    rows.append((ratio, lambda seed: seed.run("probability_ratio"), ""))
    return [*rows, ("DPO, after SFT", lambda seed: seed.run("dpo"), "dpo")]


def _table(record: Record) -> str:
    """Held-out figures at the end of each training, and what that training cost by itself."""

    def over(form: str, of: Callable[[Seed], float]) -> str:
        return spread([of(seed) for seed in record.seeds], form)

    def alike(name: str) -> list[str]:
        if not name:
            return ["", ""]
        return [
            over("{:.3f}", lambda seed: seed.diversity[name].per_input),
            over("{:.3f}", lambda seed: seed.diversity[name].across_input),
        ]

    def figures(of: Callable[[Seed], Run], at: int) -> list[str]:
        return [
            over("{:.2f}", lambda seed: of(seed).chosen[at]),
            over("{:.2f}", lambda seed: of(seed).rejected[at]),
            over("{:+.2f}", lambda seed: of(seed).log_odds[at]),
        ]

    head = ["", "chosen", "rejected", "log odds ratio", "per-input similarity", "across-input similarity"]
    head += ["forward passes", "sequences in them", "peak MiB", "time / ORPO"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines.append(["at the start", *figures(lambda seed: seed.run("sft"), 0), *alike("base"), *[""] * 4])
    for label, run, name in _rows(record):
        cost = [
            over("{:,}", lambda seed, run=run: run(seed).calls),  # type: ignore[misc]
            over("{:,}", lambda seed, run=run: run(seed).sequences),  # type: ignore[misc]
            over("{:.0f}", lambda seed, run=run: run(seed).peak_mib),  # type: ignore[misc]
            over("{:.2f}", lambda seed, name=name: seconds(seed, record, name) / seconds(seed, record, "orpo"))  # type: ignore[misc]
            if name
            else "",
        ]
        lines.append([label, *figures(run, -1), *alike(name), *cost])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _method(record: Record) -> str:
    on_gpu = str(record.settings["device"]).startswith("cuda")
    first = record.seeds[0]
    few = FEW.format(few=record.settings["few"], rate=BY_HEART) if first.by_heart else ""
    samples = [f"- {SHORT[name]}: `{_shown(found.example)}`" for name, found in first.diversity.items()]
    return METHOD.format(
        **record.settings,
        record=record,
        precision="bfloat16 autocast" if record.settings["bf16"] else "float32",
        about_few=few,
        memory=CUDA_PEAK if on_gpu else RESIDENT_PEAK,
        first=first.seed,
        shown="\n".join(samples),
    )


def _shown(text: str, length: int = 90) -> str:
    """On one line, fit for code in Markdown."""
    flat = " ".join(text.split()).replace("`", "'")
    return (flat[:length] + "…" if len(flat) > length else flat) or " "
