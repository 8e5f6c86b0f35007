"""TRL's ORPOTrainer without full logits."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

from orpo_kernels.integrations import TRL_ORPO
from orpo_kernels.integrations.trl import Pairs, patch_of
from orpo_kernels.objectives import ORPO

ORPOTrainer: Any = TRL_ORPO.find_class()
LAST_POSITION_AVERAGED = Version(version("trl")) < Version("0.14")  # in the mean logits that it logs

PATCH = patch_of(
    ORPOTrainer,
    Pairs(
        loss="odds_ratio_loss",
        objective=lambda trainer: ORPO(trainer.beta),
        averages=lambda _: True,
        has_nll=lambda _: True,
        prompt_in_nll=True,
        averaged=slice(None) if LAST_POSITION_AVERAGED else slice(None, -1),
    ),
)
