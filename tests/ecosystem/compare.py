"""How two runs of one objective agree."""

from __future__ import annotations

import math
from typing import Any

TIMINGS = ("runtime", "per_second", "flos", "memory", "speed", "time")
LOSSES = ("loss", "train_loss")
# Losses of float32 after three steps of Adam, which turns a rounding of a small gradient into one of an update.
TOLERANCE = 1e-4


def compare(stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: differences, products, what was computed in full, and ``disagrees``, a sentence or None."""
    if "error" in stock:
        return {"skipped": stock["error"], "disagrees": None}
    models = fused.get("models", [])
    policy = max(models, key=lambda model: model["products"], default=None)
    found: dict[str, Any] = {
        "losses": [entry["loss"] for entry in stock["history"] if "loss" in entry],
        "loss_difference": None,
        "other_difference": None,
        "calls": policy["calls"] if policy else 0,
        "products_per_call": round(policy["products"] / policy["calls"], 3) if policy and policy["calls"] else None,
        "other_models": len(models) - 1 if models else 0,
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
    losses, others = 0.0, {}
    for theirs, ours in zip(stock["history"], fused["history"], strict=True):
        for key, value in _kept(theirs).items():
            apart = difference(value, ours[key])
            if key in LOSSES:
                losses = max(losses, apart)
            else:
                others[key] = max(others.get(key, 0.0), apart)
    worst = max(others, key=lambda key: others[key], default=None)
    found["loss_difference"] = losses
    found["other_difference"] = others[worst] if worst else 0.0
    found["other_worst"] = worst
    if losses > TOLERANCE:
        found["disagrees"] = f"losses differ by {losses:.1e}"
    return found


def _kept(entry: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in entry.items()
        if isinstance(value, (int, float)) and not any(word in key for word in TIMINGS)
    }


def difference(theirs: float, ours: float) -> float:
    """Relative to the stock figure, or to 1 where that is smaller than a thousandth, as differences near 0 are."""
    if math.isnan(theirs) and math.isnan(ours):
        return 0.0
    return abs(ours - theirs) / (abs(theirs) if abs(theirs) > 1e-3 else 1.0)
