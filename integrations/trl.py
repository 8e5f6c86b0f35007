"""TRL's ORPOTrainer without full logits.

Two methods are replaced. ``get_batch_loss_metrics`` is the whole loss, so its gradients come from the fused plan (three
products). ``concatenated_forward`` serves subclasses that compute their own loss from its log-probabilities (four
products, any upstream gradient). Everything else stays TRL's: data, padding, accumulation, logging, evaluation.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.integrations import TRL
from orpo_kernels.integrations.trainer import (
    Batch,
    Patch,
    Site,
    find_site,
    fused_logprobs,
    fused_orpo,
    keeps_stock,
    metrics_of_all_ranks,
)

ORPOTrainer: Any = TRL.find_class()


def get_batch_loss_metrics(self: Any, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
    """The ORPO loss and TRL's metrics of a batch, as TRL's method of this name returns them."""
    stock = PATCH.stock["get_batch_loss_metrics"]
    site = _site(self, model, ("concatenated_forward", "get_batch_logps"))
    if isinstance(site, Site) and PATCH.own_method(self, ("odds_ratio_loss",)):
        return stock(self, model, batch, train_eval)  # its log-probabilities come from concatenated_forward below
    fused = site if isinstance(site, str) else fused_orpo(PATCH, self, model, site, _batch(self, batch), self.beta)
    if isinstance(fused, str):
        keeps_stock(self, fused)
        return stock(self, model, batch, train_eval)
    out, (chosen, rejected) = fused.result
    logged = out._replace(chosen_logits_mean=chosen, rejected_logits_mean=rejected)
    loss = fused.tracked
    if self.aux_loss_enabled:
        loss = loss + self.aux_loss_coef * fused.output.aux_loss
    prefix = "eval_" if train_eval == "eval" else ""
    metrics = metrics_of_all_ranks(self.accelerator, logged)
    return loss, {prefix + name: value for name, value in metrics.items()}


def concatenated_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> Any:
    """What TRL's method of this name returns, with one-element stand-ins for the logits.

    Downstream takes the mean of the logits and nothing else; the stand-ins hold it.
    """
    site = _site(self, model, ("get_batch_logps",))
    fused = site if isinstance(site, str) else fused_logprobs(PATCH, self, model, site, _batch(self, batch))
    if isinstance(fused, str):
        keeps_stock(self, fused)
        return PATCH.stock["concatenated_forward"](self, model, batch)
    chosen, rejected = fused.result.answer_means.chunk(2)
    means = fused.result.logit_means
    result = (chosen, rejected, means[:1], means[1:], fused.result.nll_loss)
    return (*result, fused.output.aux_loss) if self.aux_loss_enabled else result


def _site(trainer: Any, model: nn.Module, stands_for: tuple[str, ...]) -> Site | str:
    if trainer.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    return PATCH.own_method(trainer, stands_for) or find_site(trainer, model)


def _batch(trainer: Any, batch: dict[str, Any]) -> Batch:
    """TRL's concatenated batch with labels shifted, as a call of the model."""
    ignore = getattr(trainer, "label_pad_token_id", -100)  # an option until trl 0.27
    options = {"label_pad_token_id": ignore} if _takes_label_pad(trainer.concatenated_inputs) else {}
    both = trainer.concatenated_inputs(
        batch,
        is_encoder_decoder=False,
        padding_value=trainer.padding_value,
        device=trainer.accelerator.device,
        **options,
    )
    ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
    tokens = torch.where(mask == 1, ids, ignore)[: batch["chosen_labels"].shape[0]]

    def shifted(labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=ignore)

    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    return Batch(inputs, shifted(both["concatenated_labels"]), shifted(tokens), ignore)


def _takes_label_pad(function: Any) -> bool:
    return "label_pad_token_id" in inspect.signature(function).parameters


PATCH = Patch(
    ORPOTrainer,
    {"get_batch_loss_metrics": get_batch_loss_metrics, "concatenated_forward": concatenated_forward},
    ("odds_ratio_loss", "get_batch_logps", "concatenated_inputs"),
)
