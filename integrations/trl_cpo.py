"""TRL's CPOTrainer without full logits: CPO with its loss types, SimPO and AlphaPO."""

from __future__ import annotations

from typing import Any

from orpo_kernels.integrations import TRL_CPO
from orpo_kernels.integrations.trl import Pairs, patch_of
from orpo_kernels.objectives import CPO

CPOTrainer: Any = TRL_CPO.find_class()


def _objective(trainer: Any) -> CPO:
    return CPO(
        beta=trainer.beta,
        loss_type=trainer.loss_type,
        label_smoothing=trainer.label_smoothing,
        gamma=getattr(trainer, "simpo_gamma", 0.0),  # set for SimPO alone
        alpha=getattr(trainer, "alpha", 0.0),  # since trl 0.24
        nll_weight=trainer.cpo_alpha,
    )


PATCH = patch_of(
    CPOTrainer,
    Pairs(
        loss="cpo_loss",
        objective=_objective,
        averages=lambda trainer: trainer.loss_type in ("ipo", "simpo"),
        has_nll=lambda trainer: trainer.cpo_alpha != 0,
        prompt_in_nll=False,
        averaged=slice(None),
    ),
)
