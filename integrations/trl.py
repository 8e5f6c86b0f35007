"""TRL's ORPOTrainer without full logits (``trl.experimental.orpo``; tested with trl 1.16).

Two methods are replaced. ``get_batch_loss_metrics`` is the whole loss, so its gradients come from the fused plan (three
products). ``concatenated_forward`` serves subclasses that compute their own loss from its log-probabilities (four
products, any upstream gradient). Everything else stays TRL's: data, padding, accumulation, logging, evaluation.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.backends import select
from orpo_kernels.engine import mean_logit
from orpo_kernels.integrations.heads import Interception, head_module
from orpo_kernels.loss import OrpoOutput, linear_logprobs, orpo_loss
from orpo_kernels.scores import Head

try:
    from trl.experimental.orpo import orpo_trainer as _trl
except ImportError as error:
    raise ImportError(
        "orpo_kernels patches the ORPOTrainer of trl.experimental.orpo (tested with trl 1.16), which "
        f"could not be imported: {error}. Install it with: pip install 'orpo_kernels[hf]'"
    ) from error

ORPOTrainer: Any = _trl.ORPOTrainer
IGNORE = -100
REPLACED = ("get_batch_loss_metrics", "concatenated_forward")
# What the fused loss stands in for. A subclass that has its own keeps TRL's path, which calls it.
STOOD_FOR = ("concatenated_forward", "odds_ratio_loss", "get_batch_logps")

_stock: dict[str, Any] = {}
_checked: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers whose first batch agreed with the model's own logits
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def is_patched() -> bool:
    """Whether ``ORPOTrainer`` has our methods now."""
    return bool(_stock)


def patch() -> None:
    """Replace the methods; a second call does nothing.

    Raises:
        ImportError: this version of TRL lacks one of the methods.
    """
    if is_patched():
        return
    missing = [name for name in (*REPLACED, *STOOD_FOR, "concatenated_inputs") if not hasattr(ORPOTrainer, name)]
    if missing:
        raise ImportError(f"this trl's ORPOTrainer has no {', '.join(missing)}: orpo_kernels is tested with trl 1.16")
    _stock.update({name: ORPOTrainer.__dict__[name] for name in (*REPLACED, *STOOD_FOR)})
    ORPOTrainer.get_batch_loss_metrics = get_batch_loss_metrics
    ORPOTrainer.concatenated_forward = concatenated_forward


def unpatch() -> None:
    """Put the methods back; without a patch nothing happens."""
    for name in REPLACED:
        if name in _stock:
            setattr(ORPOTrainer, name, _stock[name])
    _stock.clear()


class _Site(NamedTuple):
    """Where a trainer's model can be fused."""

    outer: nn.Module  # the module whose call returns the model's output, without DDP around it
    model: nn.Module  # the Hugging Face model, without peft around it
    head: nn.Module


def _site(trainer: Any, model: nn.Module, stands_for: tuple[str, ...]) -> _Site | str:
    """Where to fuse, or the reason why this trainer and model keep TRL's own path."""
    if trainer.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    for name in stands_for:
        mine, stock = _function(type(trainer), name), _function(ORPOTrainer, name)
        if mine is not stock:
            return f"{type(trainer).__name__} overrides {name}, which a fused loss would pass by"
    if isinstance(model, nn.DataParallel):
        return "nn.DataParallel replicates the model in threads: use one process a GPU (torchrun)"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP is not supported yet"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 is not supported yet"
    if hasattr(model, "_orig_mod") or getattr(trainer.args, "torch_compile", False):
        return "torch.compile around the whole model is not supported yet"
    outer = trainer.accelerator.unwrap_model(model)
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    head = head_module(inner)
    return head if isinstance(head, str) else _Site(outer, inner, head)


def _function(cls: Any, name: str) -> Any:
    method = getattr(cls, name)
    return getattr(method, "__func__", method)


def _keeps_stock(trainer: Any, reason: str) -> None:
    if trainer not in _warned:
        _warned.add(trainer)
        _trl.logger.warning(f"orpo_kernels does not fuse the loss of this {type(trainer).__name__}: {reason}")


class _Batch(NamedTuple):
    """TRL's concatenated batch with labels shifted, so that ``labels[s, t]`` is what position t predicts."""

    input_ids: Tensor  # [2P, T]
    attention_mask: Tensor  # [2P, T]
    answer: Tensor  # [2P, T]
    nll: Tensor  # [P, T], prompt and answer of the chosen side
    model_kwargs: dict[str, Any]


def _batch(trainer: Any, batch: dict[str, Any]) -> _Batch:
    both = trainer.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=trainer.padding_value, device=trainer.accelerator.device
    )
    ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
    pairs = batch["chosen_labels"].shape[0]
    tokens = torch.where(mask == 1, ids, IGNORE)[:pairs]

    def shifted(labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE)

    kwargs: dict[str, Any] = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    return _Batch(ids, mask, shifted(both["concatenated_labels"]), shifted(tokens), kwargs)


def _forward(trainer: Any, model: nn.Module, site: _Site, data: _Batch, compute: Any, carry: Any) -> tuple[Any, Any]:
    """One ordinary forward of the model with the head intercepted; the first of a trainer is checked."""
    check = data.answer if trainer not in _checked else None
    interception = Interception(site.model, site.head, compute)
    output = interception.run(
        model, site.outer, carry, check, data.input_ids, attention_mask=data.attention_mask, use_cache=False,
        **data.model_kwargs,
    )  # fmt: skip
    if interception.check is not None:
        _checked.add(trainer)
    return interception.result, output


class _Fused(NamedTuple):
    out: OrpoOutput
    logit_means: Tensor  # [2] over every position but the last, padding included, as TRL logs them


def get_batch_loss_metrics(self: Any, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
    """The ORPO loss and TRL's metrics of a batch, as TRL's method of this name returns them."""
    site = _site(self, model, STOOD_FOR)
    if isinstance(site, str):
        _keeps_stock(self, site)
        return _stock["get_batch_loss_metrics"](self, model, batch, train_eval)
    data = _batch(self, batch)

    def compute(hidden: Tensor, head: Head) -> _Fused:
        out = orpo_loss(
            hidden, head.weight, data.answer, nll_labels=data.nll, bias=head.bias, beta=self.beta,
            logit_scale=head.logit_scale, softcap=head.softcap, ignore_index=IGNORE,
        )  # fmt: skip
        return _Fused(out, _logit_means(hidden.detach(), head, data, out))

    fused, output = _forward(self, model, site, data, compute, lambda result: result.out.loss)
    loss = output["loss"]  # as it came through the model's output, where DDP has seen it
    gather = self.accelerator.gather_for_metrics
    out: OrpoOutput = fused.out._replace(
        chosen_logits_mean=fused.logit_means[0], rejected_logits_mean=fused.logit_means[1]
    )
    of_all_ranks = (gather(value.detach().float()) for value in out)
    metrics = OrpoOutput(*(v if mine.dim() else v.mean() for v, mine in zip(of_all_ranks, out, strict=True))).metrics()
    prefix = "eval_" if train_eval == "eval" else ""
    values = torch.stack(list(metrics.values())).tolist()  # one copy to the host, not eleven
    if self.aux_loss_enabled:
        loss = loss + self.aux_loss_coef * output.aux_loss
    return loss, {prefix + name: value for name, value in zip(metrics, values, strict=True)}


def concatenated_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> Any:
    """What TRL's method of this name returns, with one-element stand-ins for the logits.

    Downstream takes the mean of the logits and nothing else; the stand-ins hold it.
    """
    site = _site(self, model, ("get_batch_logps",))
    if isinstance(site, str):
        _keeps_stock(self, site)
        return _stock["concatenated_forward"](self, model, batch)
    data = _batch(self, batch)
    pairs = data.nll.shape[0]
    # TRL's labels name the same token for both uses, so one score serves them.
    wanted = data.answer.clone()
    wanted[:pairs] = torch.where(wanted[:pairs] == IGNORE, data.nll, wanted[:pairs])

    def compute(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        logps = linear_logprobs(
            hidden, head.weight, wanted, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
        )
        return logps, _logit_means(hidden.detach(), head, data, None)

    (_, logit_means), output = _forward(self, model, site, data, compute, lambda result: result[0])
    logps = output["loss"]
    in_answer = data.answer != IGNORE
    means = (logps * in_answer).sum(-1) / in_answer.sum(-1)
    in_nll = data.nll != IGNORE
    nll = -(logps[:pairs] * in_nll).sum() / in_nll.sum()
    result = (means[:pairs], means[pairs:], logit_means[:1], logit_means[1:], nll)
    return (*result, output.aux_loss) if self.aux_loss_enabled else result


@torch.no_grad()
def _logit_means(hidden: Tensor, head: Head, data: _Batch, out: OrpoOutput | None) -> Tensor:
    """Mean logit of the chosen and the rejected side over all positions but the last, as TRL logs it, ``[2]``.

    Without a softcap that is ``mean(h) . mean(W)``. Under one the scored positions are in ``out`` already, and only
    the others, which no loss needs, cost a product.
    """
    pairs = hidden.shape[0] // 2
    backend = select("auto", hidden.device, hidden.dtype)
    sides = []
    for side, mean in ((slice(0, pairs), 0), (slice(pairs, None), 1)):
        rows = hidden[side, :-1]
        if head.softcap is None:
            sides.append(mean_logit(backend, rows.reshape(-1, rows.shape[-1]), head))
            continue
        scored = data.answer[side, :-1] != IGNORE
        if mean == 0:
            scored = scored | (data.nll[:, :-1] != IGNORE)
        if out is None:
            scored = torch.zeros_like(scored)
        done = scored.sum()
        share = done / scored.numel()
        known = 0.0 if out is None else (out.chosen_logits_mean, out.rejected_logits_mean)[mean]
        others = mean_logit(backend, rows[~scored], head)
        sides.append(known * share + others * (1 - share))
    return torch.stack(sides)
