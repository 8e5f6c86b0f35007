"""The public surface: ``orpo_loss``, ``linear_logprobs``, ``explain`` and ``OrpoLoss``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn

from orpo_kernels import compiled
from orpo_kernels.engine import LogprobsFunction, Losses, OrpoFunction, warn_skipped
from orpo_kernels.plan import Plan
from orpo_kernels.prepare import needs_of, prepare_logprobs, prepare_orpo

P = ParamSpec("P")


class OrpoOutput(NamedTuple):
    """What ``orpo_loss`` returns. Only ``loss`` is differentiable; float32 (float64 for float64 inputs), nats."""

    loss: Tensor  # [], nll_weight * nll_loss + odds_ratio_loss
    nll_loss: Tensor  # [], mean negative log-likelihood over the NLL tokens
    odds_ratio_loss: Tensor  # [], beta * mean softplus(-log_odds)
    chosen_logps: Tensor  # [P], mean log-probability of an answer's tokens; 0 for an answer without a token
    rejected_logps: Tensor  # [P]
    chosen_rewards: Tensor  # [P], beta * chosen_logps
    rejected_rewards: Tensor  # [P]
    log_odds_ratio: Tensor  # [], mean of logsigmoid(log_odds)
    log_odds_chosen: Tensor  # [], mean of log_odds
    chosen_logits_mean: Tensor  # [], mean logit over the chosen side's scores and the vocabulary
    rejected_logits_mean: Tensor  # []
    skipped_pairs: Tensor  # [] int64, pairs without an odds ratio because an answer has no token

    def metrics(self) -> dict[str, Tensor]:
        """The scalars TRL logs, under TRL's names. Pairs that were skipped are left out of the means over pairs."""
        kept = (self.chosen_logps != 0) & (self.rejected_logps != 0)
        share = kept / kept.sum().clamp(min=1)

        def mean(per_pair: Tensor) -> Tensor:
            return (per_pair * share).sum()

        return {
            "rewards/chosen": mean(self.chosen_rewards),
            "rewards/rejected": mean(self.rejected_rewards),
            "rewards/accuracies": mean((self.chosen_rewards > self.rejected_rewards).float()),
            "rewards/margins": mean(self.chosen_rewards - self.rejected_rewards),
            "logps/rejected": mean(self.rejected_logps),
            "logps/chosen": mean(self.chosen_logps),
            "logits/rejected": self.rejected_logits_mean,
            "logits/chosen": self.chosen_logits_mean,
            "nll_loss": self.nll_loss,
            "log_odds_ratio": self.log_odds_ratio,
            "log_odds_chosen": self.log_odds_chosen,
        }


def orpo_loss(
    hidden: Tensor,  # [2P, T, H] or packed [N, H]; float32, bfloat16, float16 or float64
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T] or packed [N]; integers
    *,
    nll_labels: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll_reduction: str = "token",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> OrpoOutput:
    """ORPO from hidden states and the head's weight, without full logits.

        z_tv   = cap(logit_scale * (W_v . h_t + b_v))         cap(z) = softcap * tanh(z / softcap), or identity
        logp_t = z_{t, y_t} - logsumexp_v z_tv
        l_s    = mean of logp_t over the answer's tokens
        log_odds_p = (l_w - l_l) - (log(1 - exp(l_w)) - log(1 - exp(l_l)))
        loss   = nll_weight * NLL + beta * mean_p softplus(-log_odds_p)

    Sequences are stacked chosen first: pair p is sequence p and sequence P + p. ``labels[s, t]`` is the token that
    ``hidden[s, t]`` predicts, so labels are already shifted. A pair with an answer without a token has no odds ratio:
    it leaves the odds term, which is a mean over the other pairs, one warning says so, and ``skipped_pairs`` counts it.
    Finite inputs give finite results: l_l is held at or below -1e-6, where its true gradient diverges.

    Args:
        hidden: hidden states ``[2P, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``. Any strides.
        weight: the head ``[V, H]``, as ``nn.Linear`` has it.
        labels: answer tokens, ``ignore_index`` elsewhere.
        nll_labels: targets of the NLL, ``[P, T]`` or the shape of labels, whose rejected half is not read. None takes
            the chosen side of ``labels``. TRL's ORPO counts prompt and answer here. A position may name another
            target than ``labels`` does.
        bias: the head's bias ``[V]``.
        beta: weight of the odds term (lambda in the paper).
        nll_weight: weight of the NLL term.
        nll_reduction: "token", the mean over all NLL tokens, or "sequence", the mean over sequences of their means.
        logit_scale: factor on the logits, positive.
        softcap: the softcap c, or None.
        ignore_index: the label of positions that do not count.
        cu_seqlens: offsets ``[2P + 1]`` of packed sequences, chosen first.
        backend: "auto", or a backend's name.
        workspace_bytes: bound on what is held beyond inputs, returned gradients and tiles that stay in cache. None
            means 1 GiB, and the place of one float32 copy of the weight; a GPU takes 20 MiB in any case. Results do not
            depend on it beyond rounding.

    Returns:
        ``OrpoOutput``; its ``loss`` is differentiable once in hidden, weight and bias.

    Raises:
        TypeError, ValueError: an input that cannot be right; the message names it and the remedy.

    Precision: products in the dtype of the inputs (float16 in float32), all sums in float32 (float64 for float64).
    Under autocast hidden, weight and bias are cast as ``F.linear`` casts them. On a GPU a call copies a few integers to
    the host once, to compact the labels.

    Source: Hong, Lee, Thorne, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    if torch.compiler.is_compiling():
        *losses, skipped = compiled.orpo(
            hidden, weight, labels, nll_labels, bias, beta, nll_weight, nll_reduction, logit_scale, softcap,
            ignore_index, cu_seqlens, backend, workspace_bytes, list(needs_of(hidden, weight, bias)),
        )[: len(Losses._fields) + 1]  # fmt: skip
        return _output(Losses(*losses), skipped, beta)
    job = prepare_orpo(
        hidden, weight, labels, nll_labels, bias, beta, nll_weight, nll_reduction, logit_scale, softcap,
        ignore_index, cu_seqlens, backend, workspace_bytes,
    )  # fmt: skip
    warn_skipped(job.scores)
    losses = OrpoFunction.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, job)
    return _output(Losses(*losses), job.scores.pairs - job.scores.pair_valid.sum(), beta)


def _output(losses: Losses, skipped: Tensor, beta: float) -> OrpoOutput:
    return OrpoOutput(
        **losses._asdict(),
        chosen_rewards=beta * losses.chosen_logps,
        rejected_rewards=beta * losses.rejected_logps,
        skipped_pairs=skipped,
    )


def _takes_the_arguments_of(function: Callable[P, Any]) -> Callable[[Callable[..., Plan]], Callable[P, Plan]]:
    """Give a function another's parameters, for people and type checkers, so that they are written once."""

    def decorate(plain: Callable[..., Plan]) -> Callable[P, Plan]:
        plain.__signature__ = inspect.signature(function).replace(return_annotation=Plan)  # type: ignore[attr-defined]
        return plain

    return decorate


@_takes_the_arguments_of(orpo_loss)
def explain(*args: Any, **kwargs: Any) -> Plan:
    """The plan ``orpo_loss`` would follow for the same arguments, without computing anything.

    ``print(explain(...))`` says which plan, how many products, how many chunks, how many bytes, and why.

    Raises:
        TypeError, ValueError: as ``orpo_loss``.
    """
    call = inspect.signature(orpo_loss).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    given.update(
        zip(("hidden", "weight", "bias"), _autocast(given["hidden"], given["weight"], given["bias"]), strict=True)
    )
    return prepare_orpo(**given).plan


def linear_logprobs(
    hidden: Tensor,  # [..., H]; float32, bfloat16, float16 or float64
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]; integers
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """``logp_t = z_{t, y_t} - logsumexp_v z_tv`` per label, without full logits; any upstream gradient.

    What DPO, CPO, GRPO or a loss of your own needs. ``labels[..., t]`` is the token that ``hidden[..., t]`` predicts.

    Args:
        hidden: hidden states ``[..., H]``.
        weight: the head ``[V, H]``.
        labels: shape of hidden without its last dimension; ``ignore_index`` where no log-probability is wanted.
        bias: the head's bias ``[V]``.
        logit_scale: factor on the logits, positive.
        softcap: the softcap c, or None.
        ignore_index: the label of positions that do not count.
        backend: "auto", or a backend's name.
        workspace_bytes: bound on the slices of E on a GPU, 1 GiB unless told; on a CPU they live in the cache.

    Returns:
        The shape of labels, float32 (float64 for float64 inputs), nats, 0 where ignored.

    Raises:
        TypeError, ValueError: an input that cannot be right; the message names it and the remedy.

    Precision: as ``orpo_loss``. Four products of the head's size with gradients for the head, two with the head frozen,
    one without gradients.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    if torch.compiler.is_compiling():
        one_operator: Tensor = compiled.logprobs(
            hidden, weight, labels, bias, logit_scale, softcap, ignore_index, backend, workspace_bytes
        )
        return one_operator
    job = prepare_logprobs(hidden, weight, labels, bias, logit_scale, softcap, ignore_index, backend, workspace_bytes)
    out: Tensor = LogprobsFunction.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, job)
    return out.view(labels.shape)


class OrpoLoss(nn.Module):
    """``orpo_loss`` as a module: its settings at construction, its tensors at the call.

    Example:
        >>> loss = OrpoLoss(beta=0.1)
        >>> loss(hidden, model.lm_head.weight, labels).loss.backward()
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        nll_weight: float = 1.0,
        nll_reduction: str = "token",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.nll_weight = nll_weight
        self.nll_reduction = nll_reduction
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.ignore_index = ignore_index
        self.backend = backend
        self.workspace_bytes = workspace_bytes

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        nll_labels: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> OrpoOutput:
        """See ``orpo_loss``."""
        return orpo_loss(
            hidden,
            weight,
            labels,
            nll_labels=nll_labels,
            bias=bias,
            cu_seqlens=cu_seqlens,
            beta=self.beta,
            nll_weight=self.nll_weight,
            nll_reduction=self.nll_reduction,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            backend=self.backend,
            workspace_bytes=self.workspace_bytes,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, nll_weight={self.nll_weight}, nll_reduction={self.nll_reduction!r}"


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to the autocast dtype, as ``F.linear`` would; float64 is left alone, as autocast leaves it."""
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(hidden), cast(weight), None if bias is None else cast(bias)
