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
from orpo_kernels.integrations.fused import Batch, fused_logprobs, fused_orpo
from orpo_kernels.integrations.trainer import Patch, Site, find_site, keeps_stock, metrics_of_all_ranks

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
    out, output = fused
    loss = out.loss + self.aux_loss_coef * output.aux_loss if self.aux_loss_enabled else out.loss
    prefix = "eval_" if train_eval == "eval" else ""
    return loss, {prefix + name: value for name, value in metrics_of_all_ranks(self.accelerator, out).items()}


def concatenated_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> Any:
    """What TRL's method of this name returns; their mean stands for the logits, of which no more is read."""
    site = _site(self, model, ("get_batch_logps",))
    fused = site if isinstance(site, str) else fused_logprobs(PATCH, self, model, site, _batch(self, batch))
    if isinstance(fused, str):
        keeps_stock(self, fused)
        return PATCH.stock["concatenated_forward"](self, model, batch)
    of, output = fused
    result = (*of.answer_means.chunk(2), *of.logit_means.split(1), of.nll_loss)
    return (*result, output.aux_loss) if self.aux_loss_enabled else result


def _site(trainer: Any, model: nn.Module, stands_for: tuple[str, ...]) -> Site | str:
    if trainer.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    return PATCH.own_method(trainer, stands_for) or find_site(trainer, model)


def _batch(trainer: Any, batch: dict[str, Any]) -> Batch:
    """TRL's concatenated batch with labels shifted, as a call of the model."""
    ignore = getattr(trainer, "label_pad_token_id", -100)  # an option until trl 0.27
    options = {"padding_value": trainer.padding_value, "device": trainer.accelerator.device}
    if "label_pad_token_id" in inspect.signature(trainer.concatenated_inputs).parameters:
        options["label_pad_token_id"] = ignore
    both = trainer.concatenated_inputs(batch, is_encoder_decoder=False, **options)
    ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]

    def shifted(labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=ignore)

    tokens = torch.where(mask == 1, ids, ignore)[: batch["chosen_labels"].shape[0]]
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    return Batch(inputs, shifted(both["concatenated_labels"]), shifted(tokens), ignore)


PATCH = Patch(
    ORPOTrainer,
    {"get_batch_loss_metrics": get_batch_loss_metrics, "concatenated_forward": concatenated_forward},
    ("odds_ratio_loss", "get_batch_logps", "concatenated_inputs"),
)
