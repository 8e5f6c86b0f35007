"""In place of ``llamafactory.train.dpo.trainer``: a trainer with its methods, written anew from what 0.9.5's compute.

``test_llamafactory.py`` loads this file under that module's name. ``make ecosystem`` trains with the real one.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer


class CustomDPOTrainer(Trainer):
    """ORPO, SimPO and, with the policy as its own reference, DPO."""

    def __init__(
        self, *, loss_type: str, beta: float = 0.3, ftx: float = 0.0, gamma: float = 0.4, **options: Any
    ) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False
        self.finetuning_args = SimpleNamespace(use_ref_model=loss_type == "sigmoid")
        self.loss_type, self.beta, self.ftx_gamma, self.simpo_gamma, self.ld_alpha = loss_type, beta, ftx, gamma, None
        self.kept: dict[str, list[float]] = defaultdict(list)

    def odds_ratio_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        return -chosen - self.beta * F.logsigmoid(odds)

    def simpo_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * (chosen - rejected - self.simpo_gamma / self.beta))

    def compute_preference_loss(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.loss_type == "sigmoid":
            losses = -F.logsigmoid(self.beta * ((chosen - chosen.detach()) - (rejected - rejected.detach())))
        else:
            losses = (self.odds_ratio_loss if self.loss_type == "orpo" else self.simpo_loss)(chosen, rejected)
        return losses, self.beta * chosen.detach(), self.beta * rejected.detach()

    def concatenated_forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        counted = labels[:, 1:] != -100
        of = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
        sums, lengths = (of * counted).sum(-1), counted.sum(-1)
        logps = sums if self.loss_type == "sigmoid" else sums / lengths
        return *logps.chunk(2), *logits.chunk(2), (sums / lengths).chunk(2)[0]

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        chosen, rejected, chosen_logits, rejected_logits, mean = self.concatenated_forward(model, batch)
        losses, chosen_rewards, rejected_rewards = self.compute_preference_loss(chosen, rejected)
        if self.ftx_gamma > 1e-6:
            losses = losses - self.ftx_gamma * mean
        found = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logits/chosen": chosen_logits,
            "logits/rejected": rejected_logits,
        }
        if self.loss_type == "orpo":
            found |= {"sft_loss": -mean, "odds_ratio_loss": (losses + mean) / self.beta}
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {prefix + name: value.mean().item() for name, value in found.items()}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        for name, value in metrics.items():
            self.kept[name].append(value)
        return (loss, metrics) if return_outputs else loss
