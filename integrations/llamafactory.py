"""LLaMA-Factory's ORPO and SimPO (``pref_loss: orpo`` and ``simpo`` of ``stage: dpo``) without full logits.

LLaMA-Factory's configuration has no key that names code of another package, so the launcher is the way in, whose
children are patched too: ``python -m orpo_kernels run -m llamafactory.cli train config.yaml``.

Its ORPO is not TRL's: the NLL is that of the answer alone, averaged over a sequence and then over sequences. Losses
with a reference model keep their path; under the launcher their logits are lazy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from orpo_kernels.integrations import LLAMA_FACTORY
from orpo_kernels.integrations.fused import Batch, fused_loss
from orpo_kernels.integrations.trainer import Patch, find_site, keeps_stock
from orpo_kernels.loss import metrics_of
from orpo_kernels.objectives import ORPO, Objective, SimPO

CustomDPOTrainer: Any = LLAMA_FACTORY.find_class()
IGNORE_INDEX = -100  # LLaMA-Factory's own constant
LEAST_SFT = 1e-6  # up to here it takes the weight of its additional NLL for none
LOGGED = (  # in its order
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"{what}/{side}" for what in ("logps", "logits") for side in ("chosen", "rejected")),
)


def get_batch_loss_metrics(self: Any, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
    """The loss and LLaMA-Factory's metrics of a batch, as its method of this name returns them."""
    stock = PATCH.stock["get_batch_loss_metrics"]
    objective = _objective(self)
    if objective is None:
        return stock(self, model, batch, train_eval)
    site = PATCH.own_method(self, PATCH.stands_for) or find_site(self, model)
    fused: Any = site
    sft = self.ftx_gamma if self.ftx_gamma > LEAST_SFT else 0.0
    if not isinstance(site, str):
        weight = sft + (1.0 if self.loss_type == "orpo" else 0.0)
        fused = fused_loss(PATCH, self, model, site, _batch(batch), objective, weight, "sequence")
    if isinstance(fused, str):
        keeps_stock(self, fused)
        return stock(self, model, batch, train_eval)
    out, _ = fused
    with torch.no_grad():
        found = metrics_of(out, out.pairs.chosen_mean, out.pairs.rejected_mean)
        metrics = {name: found[name] for name in LOGGED}
        if self.loss_type == "orpo":
            nll = out.nll_loss
            metrics |= {"sft_loss": nll, "odds_ratio_loss": (out.objective_loss + sft * nll) / self.beta}
        prefix = "eval_" if train_eval == "eval" else ""
        names = [prefix + name for name in metrics]
        return out.loss, dict(zip(names, torch.stack([*metrics.values()]).tolist(), strict=True))


def _objective(trainer: Any) -> Objective | None:
    """None for what only its own path computes, or says what is wrong with."""
    if trainer.finetuning_args.use_ref_model or getattr(trainer, "ld_alpha", None) is not None:
        return None
    try:
        if trainer.loss_type == "orpo":
            return ORPO(trainer.beta)
        return SimPO(trainer.beta, trainer.simpo_gamma) if trainer.loss_type == "simpo" else None
    except (TypeError, ValueError):
        return None


def _batch(batch: dict[str, Any]) -> Batch:
    """Its batch, which is stacked chosen first already, with labels shifted."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    answer = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    inputs |= {"return_dict": True, "use_cache": False}
    return Batch(inputs, answer, answer[: len(answer) // 2], IGNORE_INDEX, slice(None))


PATCH = Patch(
    CustomDPOTrainer,
    {"get_batch_loss_metrics": get_batch_loss_metrics},
    ("concatenated_forward", "compute_preference_loss", "odds_ratio_loss", "simpo_loss"),
)
