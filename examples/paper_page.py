"""The page and the figure of a record of `python -m examples.paper`: every figure and every verdict comes from it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.paper_claims import (
    CLAIMS,
    DISAGREE,
    DOES_NOT,
    REPRODUCES,
    Claim,
    main_beta,
    of_beta,
    seconds,
    spread,
    values,
    verdict,
)
from examples.paper_record import Record, Seed
from examples.training import Run

FIGURE = Path("images", "paper.png")  # beside the page
COLOURS = {"base": "#9a9a9a", "sft": "#b0563b", "orpo": "#17324d", "probability_ratio": "#f2b45a", "dpo": "#5b8c5a"}
SHORT = {"base": "start", "sft": "SFT", "orpo": "ORPO", "probability_ratio": "probability ratio", "dpo": "SFT, DPO"}
HEADINGS = {
    REPRODUCES: "What reproduces",
    DOES_NOT: "What does not reproduce",
    DISAGREE: "Where the seeds disagree",
}


def write(record: Record, folder: Path) -> tuple[Path, Path]:
    """Page and figure into ``folder``; their paths."""
    page, picture = folder / "paper.md", folder / FIGURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(record), encoding="utf-8")
    drawn(record).savefig(picture, dpi=110, metadata={"Software": None})
    return page, picture


def summary(record: Record) -> str:
    """A verdict a line."""
    found = [(verdict(values(claim, record), claim.least), claim) for claim in CLAIMS]
    return "\n".join(f"{what:>18}: {_filled(claim.says, record)}" for what, claim in found)


def render(record: Record) -> str:
    """The page."""
    sections = [_introduction(record), f"![six panels]({FIGURE.as_posix()})", "## The figures", _table(record)]
    for what, heading in HEADINGS.items():
        claims = [claim for claim in CLAIMS if verdict(values(claim, record), claim.least) == what]
        if claims:
            sections += [f"## {heading}", "\n".join(_sentence(claim, record, what) for claim in claims)]
    return "\n\n".join([*sections, "## How it was measured", _method(record)]) + "\n"


def _filled(text: str, record: Record) -> str:
    ended = [of_beta(seed, record).chosen[-1] for seed in record.seeds]
    return text.format(
        beta=main_beta(record),
        steps=record.settings["steps"],
        weights=", ".join(f"{beta:g}" for beta in record.settings["betas"]),
        probability=math.exp(sum(ended) / len(ended)),
    )


def _sentence(claim: Claim, record: Record, what: str) -> str:
    seen = spread(values(claim, record), claim.form)
    asked = f"{_filled(claim.asked, record)}: **{seen}**; asked for at every seed: {claim.form.format(claim.least)}"
    why = f" {_filled(claim.reason, record)}" if claim.reason and what != REPRODUCES else ""
    return f"- {_filled(claim.says, record)} Here, {asked} or more.{why}"


def _introduction(record: Record) -> str:
    settings = record.settings
    if settings["model"] is None:
        model = (
            f"a Llama of {settings['layers']} layers, width {settings['hidden_size']} and {record.vocabulary:,} tokens "
            f"({record.parameters / 1e6:.1f} M parameters), that was first trained for {settings['pretraining']} steps on "
            "the source of Python's standard library"
        )
    else:
        model = f"`{settings['model']}` ({record.parameters / 1e6:,.0f} M parameters)"
    if settings["data"] is None:
        data = (
            f"{record.pairs} pairs from Python's documentation: the opening of a passage, its true continuation, and the "
            "same words shuffled. So what is preferred here is word order, which is not what people prefer of an answer"
        )
    else:
        data = f"{record.pairs:,} pairs of `{settings['data']}`"
    count = len(record.seeds)
    few = " Fewer than three seeds say little of their spread." if count < 3 else ""
    return (
        "# The ORPO paper's claims in small\n\n"
        "Written by `python -m examples.paper` from its record [paper.json](paper.json), and by nobody's hand: a verdict "
        "is a rule over the record. "
        "The paper is Hong, Lee, Thorne, "
        '"ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691, whose models have 125 M to '
        "7 B parameters.\n\n"
        f"Trained was {model}, on {data}. Every method starts from the same weights and sees the same batches: "
        f"{settings['steps']} steps of {settings['batch_size']} pairs. {settings['held_out']} pairs are held out, and "
        f"all log-probabilities are theirs: the mean of an answer's tokens, in nats, then the mean over answers.\n\n"
        f"There are {count} seeds. A seed decides the split, the order and the samples; figures are means over seeds, with the "
        "least and the most in brackets where they differ, and bands in the picture have the same ends. A claim counts "
        f"as reproduced if every seed shows it, and as not reproduced if none does.{few}"
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
    settings, versions = record.settings, record.versions
    on_cpu = not str(settings["device"]).startswith("cuda")
    memory = (
        "the rise of the process's resident size, after what could be given back was given back"
        if on_cpu
        else "CUDA's count of allocated bytes above what was held before"
    )
    example = record.seeds[0].diversity
    samples = "\n".join(f"- {SHORT[name]}: `{_shown(found.example)}`" for name, found in example.items())
    return (
        f"- {record.date}, commit {record.commit or 'unknown'}, {record.device}, {record.threads} threads, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, "
        f"{'bfloat16 autocast' if settings['bf16'] else 'float32'}. Learning rate {settings['learning_rate']:g}, DPO "
        f"{settings['dpo_rate']:g} of it with beta {settings['dpo_beta']:g}; warm-up, then linear decay. "
        f"{settings['max_length']} tokens of prompt and answer at most.\n"
        "- All losses are this package's: `linear_logprobs` for SFT, which does not run the rejected answers, "
        "`preference_loss` with `ORPO`, `ProbabilityRatio` and `DPO` for the others, `sequence_logprobs` for the reference.\n"
        "- Forward passes and sequences of training are counted by hooks on the model and on DPO's reference, which is "
        "a frozen copy in memory. Where its log-probabilities are computed once ahead (`precompute`), a training of several "
        "rounds over the data saves most of the reference's passes and its memory.\n"
        f"- Peak memory is {memory}: the copied model, gradients, the optimiser's state and activations.\n"
        "- Time is a quotient of medians of steps that the three methods took in turn on the same batches, in one process. "
        "The machine may have had other work; it met all three alike.\n"
        f"- Similarities are of {settings['samples']} samples of up to {settings['new_tokens']} tokens at temperature "
        f"{settings['temperature']:g} for each of {settings['prompts']} held-out prompts, embedded as counts of character "
        "n-grams (`examples/diversity.py`), which see spelling and no meaning; the paper embeds with a language model. Higher "
        "is less diverse.\n\n"
        f"The first sample of each model, for the first prompt of seed {record.seeds[0].seed}:\n\n{samples}"
    )


def _shown(text: str, length: int = 90) -> str:
    """On one line, fit for code in Markdown."""
    flat = " ".join(text.split()).replace("`", "'")
    return (flat[:length] + "…" if len(flat) > length else flat) or " "


def drawn(record: Record) -> Figure:
    """Six panels, one for each of the paper's subjects."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    sides, odds, ratio, costs, weights, alike = figure.subplots(2, 3).flatten()
    beta = main_beta(record)
    of = {name: (lambda seed, name=name: seed.run(name)) for name in ("sft", "probability_ratio", "dpo")}
    runs: dict[str, Callable[[Seed], Run]] = {**of, "orpo": lambda seed: seed.run("orpo", beta)}

    def curve(panel: Any, name: str, field: str, style: str = "-", label: str = "") -> None:
        series = [getattr(runs[name](seed), field) for seed in record.seeds]
        _band(panel, runs[name](record.seeds[0]).steps, series, COLOURS[name], style, label or SHORT[name])

    for name in ("sft", "orpo"):
        for side, style in (("chosen", "-"), ("rejected", "--")):
            curve(sides, name, side, style, f"{side}, {SHORT[name]}")
            other = "probability_ratio" if name == "sft" else "orpo"
            curve(ratio, other, side, style, f"{side}, {'odds' if other == 'orpo' else 'probability'} ratio")
    for name in ("sft", "orpo", "dpo"):
        curve(odds, name, "log_odds", label="DPO, after SFT" if name == "dpo" else "")
    sides.set(title=f"Held-out answers under SFT and ORPO, beta {beta:g}", ylabel="log-probability a token, nats")
    ratio.set(title=f"Odds ratio and probability ratio, beta {beta:g}", ylabel="log-probability a token, nats")
    odds.set(title="Log odds ratio of chosen to rejected")

    quotients: dict[str, Callable[[Seed], float]] = {
        "sequences": lambda s: (s.run("sft").sequences + s.run("dpo").sequences) / of_beta(s, record).sequences,
        "time": lambda s: seconds(s, record, "sft", "dpo") / seconds(s, record, "orpo"),
        "peak memory": lambda s: max(s.run("sft").peak_mib, s.run("dpo").peak_mib) / of_beta(s, record).peak_mib,
    }
    _bars(costs, list(quotients), {"dpo": [[of(s) for s in record.seeds] for of in quotients.values()]})
    costs.axhline(1, color="black", linestyle=":", linewidth=1)
    costs.set(title="SFT and then DPO, over ORPO (dotted)", ylabel="quotient")

    betas = record.settings["betas"]
    for side, style in (("chosen", "-o"), ("rejected", "--o")):
        series = [[getattr(s.run("orpo", each), side)[-1] for each in betas] for s in record.seeds]
        _band(weights, betas, series, COLOURS["orpo"], style, side)
    weights.set(title="ORPO in the end, by its weight", xlabel="beta", xscale="log")
    weights.set_ylabel("log-probability a token, nats")

    fields = {"per input": "per_input", "across inputs": "across_input"}
    _bars(
        alike,
        list(fields),
        {
            name: [[getattr(s.diversity[name], f) for s in record.seeds] for f in fields.values()]
            for name in ("base", "sft", "orpo", "dpo")
        },
    )
    alike.set(title="How alike samples are", ylabel="mean cosine similarity")
    for panel in (sides, odds, ratio):
        panel.set_xlabel("step")
    for panel in (sides, odds, ratio, weights, alike):
        panel.legend(frameon=False, fontsize=8)
    for panel in (sides, odds, ratio, costs, weights, alike):
        panel.grid(alpha=0.3)
    return figure


def _band(panel: Any, x: list[Any], series: list[list[float]], colour: str, style: str, label: str) -> None:
    """The mean over seeds, and a band from their least to their most."""
    at = list(zip(*series, strict=True))
    panel.plot(x, [sum(values) / len(values) for values in at], style, color=colour, label=label, linewidth=1.6)
    panel.fill_between(x, [min(v) for v in at], [max(v) for v in at], color=colour, alpha=0.15, linewidth=0)


def _bars(panel: Any, groups: list[str], found: dict[str, list[list[float]]]) -> None:
    """For each name a bar a group: the mean over seeds, and a line from their least to their most."""
    width = 0.8 / len(found)
    for index, (name, every) in enumerate(found.items()):
        means = [sum(values) / len(values) for values in every]
        ends = [
            [m - min(v) for m, v in zip(means, every, strict=True)],
            [max(v) - m for m, v in zip(means, every, strict=True)],
        ]
        at = [group + (index - (len(found) - 1) / 2) * width for group in range(len(groups))]
        panel.bar(at, means, width, yerr=ends, capsize=3, color=COLOURS[name], label=SHORT[name])
    panel.set_xticks(range(len(groups)), groups)
