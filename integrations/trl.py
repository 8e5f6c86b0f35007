"""What patches of TRL's trainers of pairs share: ORPO's and CPO's, without full logits.

Two methods of a trainer are replaced. ``get_batch_loss_metrics`` is the whole loss, so its gradients come from the
fused plan (three products). ``concatenated_forward`` serves losses that are computed from its log-probabilities, a
subclass's own for one. Everything else stays TRL's: data, padding, accumulation, logging, evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.integrations.fused import Batch, fused_logprobs, fused_loss
from orpo_kernels.integrations.trainer import Patch, Site, find_site, keeps_stock, metrics_of_all_ranks
from orpo_kernels.pairs import Objective


class Pairs(NamedTuple):
    """What TRL's trainers of pairs do differently. The callables take the trainer, whose options may change."""

    loss: str  # the method that makes losses of log-probabilities
    objective: Callable[[Any], Objective]  # raises ValueError for options that only TRL's own loss takes
    averages: Callable[[Any], bool]  # whether an answer's log-probability is the mean of its tokens', or their sum
    has_nll: Callable[[Any], bool]
    prompt_in_nll: bool
    averaged: slice  # positions over which mean logits are logged


def patch_of(owner: type, rules: Pairs) -> Patch:
    """The patch of one of TRL's trainers of pairs.

    Raises:
        ImportError: the class lacks a method that is replaced, or one whose work the replacements do.
    """

    def get_batch_loss_metrics(self: Any, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
        """The loss and TRL's metrics of a batch, as TRL's method of this name returns them.

        Raises:
            RuntimeError: the patch has an objective of its own, and this trainer cannot be fused.
        """
        stock = patch.stock["get_batch_loss_metrics"]
        site: Any = _site(patch, self, model, ("concatenated_forward", "get_batch_logps"))
        own = patch.objective
        if own is None:
            objective = None if patch.own_method(self, (rules.loss,)) else _objective(rules, self)
        else:
            objective, site = own, patch.own_method(self, (rules.loss,)) or site
        if isinstance(site, Site) and objective is None:
            return stock(self, model, batch, train_eval)  # its log-probabilities come from concatenated_forward below
        fused: Any = site
        if isinstance(site, Site) and objective is not None:
            inputs = _batch(rules, self, batch)
            fused = fused_loss(patch, self, model, site, inputs if own is None else _given(inputs, batch), objective)
        if isinstance(fused, str):
            if own is not None:
                raise _another(own, fused)
            keeps_stock(self, fused)
            return stock(self, model, batch, train_eval)
        out, output = fused
        loss = out.loss + self.aux_loss_coef * output.aux_loss if self.aux_loss_enabled else out.loss
        if own is None and not rules.has_nll(self):
            out = out._replace(nll_loss=torch.zeros_like(out.nll_loss))
        sums, means = out.pairs[:2], (out.pairs.chosen_mean, out.pairs.rejected_mean)
        metrics = metrics_of_all_ranks(self.accelerator, out, means if rules.averages(self) else sums)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: value for name, value in metrics.items()}

    def concatenated_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> Any:
        """What TRL's method of this name returns; their mean stands for the logits, of which no more is read.

        Raises:
            RuntimeError: the patch has an objective of its own, which whoever asks for log-probabilities passes by.
        """
        if patch.objective is not None:
            raise _another(patch.objective, f"{type(self).__name__} makes its own of concatenated_forward")
        site = _site(patch, self, model, ("get_batch_logps",))
        fused: Any = site
        if isinstance(site, Site):
            fused = fused_logprobs(patch, self, model, site, _batch(rules, self, batch))
        if isinstance(fused, str):
            keeps_stock(self, fused)
            return patch.stock["concatenated_forward"](self, model, batch)
        of, output = fused
        logps = of.answer_means if rules.averages(self) else of.answer.sum(-1)
        nll = of.nll_loss if rules.has_nll(self) else torch.zeros_like(of.nll_loss)
        result = (*logps.chunk(2), *of.logit_means.split(1), nll)
        return (*result, output.aux_loss) if self.aux_loss_enabled else result

    replaced = {"get_batch_loss_metrics": get_batch_loss_metrics, "concatenated_forward": concatenated_forward}
    patch = Patch(owner, replaced, (rules.loss, "get_batch_logps", "concatenated_inputs"))
    return patch


def _another(objective: Objective, why: str) -> RuntimeError:
    return RuntimeError(f"patch_trl was given the objective {objective!r}, and another loss would be trained: {why}")


def _site(patch: Patch, trainer: Any, model: nn.Module, stands_for: tuple[str, ...]) -> Site | str:
    if trainer.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    return patch.own_method(trainer, stands_for) or find_site(trainer, model)


def _objective(rules: Pairs, trainer: Any) -> Objective | None:
    """None for options that no objective of ours takes: TRL's own loss does, or says what is wrong with them."""
    try:
        return rules.objective(trainer)
    except (TypeError, ValueError):
        return None


def _batch(rules: Pairs, trainer: Any, batch: dict[str, Any]) -> Batch:
    """TRL's concatenated batch with labels shifted, as a call of the model."""
    ignore = getattr(trainer, "label_pad_token_id", -100)  # an option until trl 0.27
    padding = trainer.padding_value if hasattr(trainer, "padding_value") else trainer.pad_token_id  # CPO's since 0.28
    options = {"padding_value": padding, "device": trainer.accelerator.device}
    if "label_pad_token_id" in inspect.signature(trainer.concatenated_inputs).parameters:
        options["label_pad_token_id"] = ignore
    both = trainer.concatenated_inputs(batch, is_encoder_decoder=False, **options)
    ids, mask, labels = (both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))

    def shifted(labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=ignore)

    answer, pairs = shifted(labels), batch["chosen_labels"].shape[0]
    nll = shifted(torch.where(mask == 1, ids, ignore)[:pairs]) if rules.prompt_in_nll else answer[:pairs]
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    return Batch(inputs, answer, nll, ignore, rules.averaged)


def _given(inputs: Batch, batch: dict[str, Any]) -> Batch:
    """With what an objective may need of the dataset: the reference model's sums under TRL's names, and margins."""
    device = inputs.answer.device
    reference = [batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps") if name in batch]
    margins = batch.get("margin")
    return inputs._replace(
        reference_logps=torch.cat([_numbers(side, device) for side in reference]) if len(reference) == 2 else None,
        margins=None if margins is None else _numbers(margins, device),
    )


def _numbers(values: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)
