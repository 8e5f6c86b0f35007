"""The page of the family: what docs/objectives.md says of each member, from the classes themselves, and its picture."""

import hashlib
import inspect
import json
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report.tables import markdown
from orpo_kernels import objectives
from orpo_kernels.objectives import APO, CPO, DPO, KTO, MMPO, SFT, AlphaPO, PairLogps, PairTerms

MEMBERS: list[Any] = [
    kind for name, kind in vars(objectives).items() if name in objectives.__all__ and is_dataclass(kind)
]
GIVEN = {"reference_logps": ("reference_chosen", "reference_rejected"), "margins": ("margins",)}
NAMED = ("When", "Source")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
ALPHA = 0.25  # AlphaPO has no default
SHAPES: dict[Any, dict[str, Any]] = {  # forms that are drawn beside each other; of others the default is
    AlphaPO: {f"alpha {alpha}": AlphaPO(alpha) for alpha in (ALPHA, 0.0, -ALPHA)},
    DPO: {"plain": DPO(), "label_smoothing 0.1": DPO(label_smoothing=0.1), "robust": DPO(0.1, 0.1, robust=True)},
    APO: {kind: APO(kind=kind) for kind in APO.KINDS},
    CPO: {kind: CPO(loss_type=kind) for kind in ("sigmoid", "hinge")},  # the others are SimPO's and IPO's shape
}
# Pairs that are drawn: of 20 tokens, with means around -2 where a loss is of means, else with log-ratios around 0.
TOKENS, MIDDLE, OF_MEANS, OF_SUMS = 20, -2.0, 3.8, 60.0


def paragraphs(member: Any) -> dict[str, str]:
    """Of a docstring as Markdown: "formula", "When", "Source", and "more", whatever stands between."""
    text = inspect.cleandoc(member.__doc__ or "").replace("``", "`")
    # Not in an indented block, which Markdown shows as it is.
    text = re.sub(
        r"^(?!    ).*$", lambda line: ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", line[0]), text, flags=re.M
    )
    formula, *others = text.split("\n\n")
    named = {key: one.removeprefix(f"{key}: ") for key in NAMED for one in others if one.startswith(f"{key}: ")}
    return {"formula": formula, "more": "\n\n".join(one for one in others if not one.startswith(NAMED)), **named}


def signature(member: Any) -> str:
    """As it is called, with its defaults."""
    given = [field.name if field.default is MISSING else f"{field.name}={field.default!r}" for field in fields(member)]
    return f"{member.__name__}({', '.join(given)})"


def needs(member: Any) -> list[str]:
    """What it asks for beside the log-probabilities, found by leaving it out."""
    wanted, (objective, *_) = [], _shapes(member).values()
    for name, parts in GIVEN.items():
        without: dict[str, Any] = dict.fromkeys(parts)
        try:
            objective(_pairs(torch.zeros(1), 1.0)._replace(**without))
        except ValueError:
            wanted.append(name)
    return wanted


def page() -> str:
    """What the letters mean, which loss when, and of each member its call, formula, remarks and source."""
    (letters,) = [part for part in (objectives.__doc__ or "").split("\n\n") if part.startswith("In the formulas")]
    lines, said = [], []
    for member in MEMBERS:
        of, name = paragraphs(member), member.__name__
        weight = getattr(member, "nll_weight", 0.0)
        asks = " and ".join(f"`{one}`" for one in needs(member))
        lines.append((f"[{name}](#{name.lower()})", " ".join(of["When"].split()), asks, f"{weight:g}"))
        said += [f"### {name}", f"`{signature(member)}`", of["formula"], of["more"], f"Source: {of['Source']}"]
    when = markdown(pd.DataFrame(lines, columns=["loss", "when", "needs", "weight of the NLL"]))
    return "\n\n".join([when, letters.replace("``", "`"), *filter(None, said)])


def curves() -> dict[str, dict[str, list[float]]]:
    """Losses over margins, by member and form: x, then a list for each form, from the classes in float64."""
    found: dict[str, dict[str, list[float]]] = {}
    for member in MEMBERS:
        if issubclass(member, SFT):  # its loss is that of no margin
            continue
        reach = OF_SUMS if needs(member) or member is CPO else OF_MEANS
        x = torch.linspace(-reach, reach, 81, dtype=torch.float64)
        lines = found[member.__name__] = {"x": x.tolist()}
        for name, objective in _shapes(member).items():
            lines |= {label: y.tolist() for label, y in _losses(objective, name, x).items()}
    return found


def draw(path: Path, source: str) -> None:
    """A panel for each, into a PNG whose metadata names the source."""
    drawn = curves()
    with plt.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.fontsize": 7}):
        figure, axes = plt.subplots(3, 5, figsize=(12, 6.6), layout="constrained")
        for axis, (title, lines) in zip(axes.flat, drawn.items(), strict=False):
            for label, y in lines.items():
                if label != "x":
                    axis.plot(lines["x"], y, label=label)
            axis.axvline(0, color="grey", linewidth=0.5)
            axis.set_title(title)
            if len(lines) > 2:
                low, high = axis.get_ylim()
                axis.set_ylim(top=high + 0.4 * (high - low))  # so that the legend covers no line
                axis.legend(frameon=False, loc="upper right")
        for axis in axes.flat[len(drawn) :]:
            axis.remove()
        figure.supxlabel("margin of the chosen answer over the rejected one, nats")
        figure.supylabel("loss")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})
    plt.close(figure)


def digest() -> str:
    """Of what the picture shows."""
    rounded = {title: {label: [round(y, 6) for y in ys] for label, ys in of.items()} for title, of in curves().items()}
    return f"orpo_kernels.objectives sha256 {hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]}"


def _shapes(member: Any) -> dict[str, Any]:
    return SHAPES.get(member) or {"": member()}


def _losses(objective: Any, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(objective, KTO):  # of an answer over the baseline
        sides = {
            "desirable": torch.ones(len(x), dtype=torch.bool),
            "undesirable": torch.zeros(len(x), dtype=torch.bool),
        }
        return {side: objective.of_answers(x, torch.zeros_like(x), which, 0.0) for side, which in sides.items()}
    if isinstance(objective, MMPO):
        return {f"score +{score:g}": objective(_pairs(x, score)) for score in (0.0, 1.0, 3.0)}
    found = objective(_pairs(x, 1.0))
    return {name: found.loss if isinstance(found, PairTerms) else found}


def _pairs(margin: torch.Tensor, score: float) -> PairLogps:
    """Pairs with everything that a loss may ask for, whose margin is half the chosen and half the rejected answer's."""
    middle, length = torch.full_like(margin, MIDDLE * TOKENS), torch.full_like(margin, TOKENS)
    half = margin / 2 * (1 if margin.abs().max() == OF_SUMS else TOKENS)
    return PairLogps(middle + half, middle - half, length, length, middle, middle, torch.full_like(margin, score))
