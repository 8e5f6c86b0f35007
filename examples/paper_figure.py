"""The figure of a record of `python -m examples.paper`: six panels, bands from the least to the most over seeds."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from examples.paper_claims import main_beta, of_beta, seconds
from examples.paper_record import Record, Seed
from examples.training import Run

COLOURS = {"base": "#9a9a9a", "sft": "#b0563b", "orpo": "#17324d", "probability_ratio": "#f2b45a", "dpo": "#5b8c5a"}
SHORT = {"base": "start", "sft": "SFT", "orpo": "ORPO", "probability_ratio": "probability ratio", "dpo": "SFT, DPO"}


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
    by_heart = all(seed.by_heart for seed in record.seeds)
    for index, name in enumerate(("orpo", "probability_ratio")):
        pick = (lambda seed, index=index: seed.by_heart[index]) if by_heart else runs[name]
        for side, style in (("chosen", "-"), ("rejected", "--")):
            label = f"{side}, {'odds' if name == 'orpo' else 'probability'} ratio"
            series = [getattr(pick(seed), side) for seed in record.seeds]
            _band(ratio, pick(record.seeds[0]).steps, series, COLOURS[name], style, label)
    for name in ("sft", "orpo", "dpo"):
        curve(odds, name, "log_odds", label="DPO, after SFT" if name == "dpo" else "")
    sides.set(title=f"Held-out answers under SFT and ORPO, beta {beta:g}", ylabel="log-probability a token, nats")
    which = f"{record.settings['few']} pairs by heart" if by_heart else "held-out answers"
    ratio.set(title=f"The two ratios, beta {beta:g}: {which}", ylabel="log-probability a token, nats")
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
    weights.set_xticks(betas, [f"{each:g}" for each in betas])
    weights.minorticks_off()
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
