"""How two runs of one objective agree."""

from __future__ import annotations

import math
from typing import Any

TIMINGS = ("runtime", "per_second", "per_sec", "flos", "memory", "speed", "time", "tkps")
LOSSES = ("loss", "train_loss")
# Of figures after three steps of Adam in float32, which turns the rounding of a small gradient into that of an update.
TOLERANCE = 1e-4


def compare(stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: differences, products, what was computed in full, and ``disagrees``, a sentence or None."""
    if "error" in stock:
        return {"skipped": stock["error"], "disagrees": None}
    models = fused.get("models", [])
    policy = max(models, key=lambda model: model["products"], default=None)
    found: dict[str, Any] = {
        "losses": [entry["loss"] for entry in stock["history"] if "loss" in entry],
        "differences": None,
        "fused_by_trainer": fused.get("fused_by_trainer", False),
        "calls": policy["calls"] if policy else 0,
        "products_per_call": round(policy["products"] / policy["calls"], 3) if policy and policy["calls"] else None,
        "refusals": sorted({model["refusal"] for model in models if model["refusal"]}),
        "materialised": [each for model in models for each in model["materialised"]],
        "disagrees": None,
    }
    if "error" in fused:
        found["disagrees"] = fused["error"]
        return found
    if [sorted(_kept(entry)) for entry in stock["history"]] != [sorted(_kept(entry)) for entry in fused["history"]]:
        found["disagrees"] = "not the same figures were logged"
        return found
    apart: dict[str, float] = {}
    for theirs, ours in zip(stock["history"], fused["history"], strict=True):
        for key, value in _kept(theirs).items():
            name = "loss" if key in LOSSES else "gradient" if key == "grad_norm" else "other"
            apart[name] = max(apart.get(name, 0.0), difference(value, ours[key]))
        if "weights" in theirs:
            off = math.dist(theirs["weights"], ours["weights"])
            apart["weights"] = off / max(math.hypot(*theirs["weights"]), 1e-30)
    found["differences"] = apart
    wrong = [f"{name} by {each:.1e}" for name, each in apart.items() if not each <= TOLERANCE]
    found["disagrees"] = f"figures differ: {', '.join(wrong)}" if wrong else None
    left_alone = not (found["calls"] or found["fused_by_trainer"] or found["refusals"])
    if left_alone and stock.get("head_calls"):
        found["disagrees"] = "the head was called, and nothing was fused"
    return found


def _kept(entry: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in entry.items()
        if isinstance(value, (int, float)) and not any(word in key for word in TIMINGS)
    }


def difference(theirs: float, ours: float) -> float:
    """Relative to the stock figure, or to 1 where that is smaller: margins are differences of figures of that size."""
    if math.isnan(theirs) or math.isnan(ours):
        return 0.0 if math.isnan(theirs) and math.isnan(ours) else math.inf
    return abs(ours - theirs) / max(abs(theirs), 1.0)
