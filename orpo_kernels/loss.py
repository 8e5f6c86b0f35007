"""The public surface: ``preference_loss``, ``orpo_loss``, ``linear_logprobs``, ``explain`` and ``OrpoLoss``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, overload

import torch
from torch import Tensor, nn

from orpo_kernels import operators
from orpo_kernels.backends import Backend, check_name
from orpo_kernels.checks import shape
from orpo_kernels.engine import Losses, fused, warn_skipped
from orpo_kernels.objectives import ORPO
from orpo_kernels.pairs import Objective, PairLogps, check_objective, metric_names
from orpo_kernels.plan import Plan
from orpo_kernels.prepare import prepare, ready
from orpo_kernels.settings import Batch, Head, Settings, checked, checked_head
from orpo_kernels.shards import Shard, summed
from orpo_kernels.targets import sums_of_sequences, weighted

P = ParamSpec("P")


class PreferenceOutput(NamedTuple):
    """What ``preference_loss`` returns. Only ``loss`` is differentiable; float32 (float64 for float64 inputs), nats."""

    loss: Tensor  # [], nll_weight * nll_loss + objective_loss
    nll_loss: Tensor  # [], mean negative log-likelihood over the NLL tokens
    objective_loss: Tensor  # [], mean of the objective over the pairs that are valid
    pairs: PairLogps  # [P] each, what the objective saw
    chosen_rewards: Tensor  # [P], the objective's rewards, or sums of log-probabilities less the reference's
    rejected_rewards: Tensor  # [P]
    chosen_logits_mean: Tensor  # [], mean logit over the chosen side's targets and the vocabulary
    rejected_logits_mean: Tensor  # []
    valid: Tensor  # [P] bool, both answers have a token
    objective_metrics: dict[str, Tensor]  # [] each, means over the valid pairs of what the objective reports

    def metrics(self) -> dict[str, Tensor]:
        """The scalars TRL logs, under TRL's names, and the objective's own. Means are over the valid pairs."""
        return {**metrics_of(self, self.pairs.chosen_sum, self.pairs.rejected_sum), **self.objective_metrics}


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
    chosen_logits_mean: Tensor  # [], mean logit over the chosen side's targets and the vocabulary
    rejected_logits_mean: Tensor  # []
    skipped_pairs: Tensor  # [] int64, pairs without an odds ratio because an answer has no token
    valid: Tensor  # [P] bool, the other pairs

    def metrics(self) -> dict[str, Tensor]:
        """The scalars TRL logs, under TRL's names. Pairs that were skipped are left out of the means over pairs."""
        own = {"log_odds_ratio": self.log_odds_ratio, "log_odds_chosen": self.log_odds_chosen}
        return {**metrics_of(self, self.chosen_logps, self.rejected_logps), **own}


def metrics_of(out: PreferenceOutput | OrpoOutput, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Under TRL's names, with the log-probabilities of answers ``[P]`` as they are to be logged."""
    count = out.valid.sum().clamp(min=1)

    def mean(per_pair: Tensor) -> Tensor:
        """Over the valid pairs; 0 where there is none."""
        return torch.where(out.valid, per_pair.to(chosen.dtype), 0).sum() / count

    return {
        "rewards/chosen": mean(out.chosen_rewards),
        "rewards/rejected": mean(out.rejected_rewards),
        "rewards/accuracies": mean(out.chosen_rewards > out.rejected_rewards),
        "rewards/margins": mean(out.chosen_rewards - out.rejected_rewards),
        "logps/rejected": mean(rejected),
        "logps/chosen": mean(chosen),
        "logits/rejected": out.rejected_logits_mean,
        "logits/chosen": out.chosen_logits_mean,
        "nll_loss": out.nll_loss,
    }


def preference_loss(
    hidden: Tensor,  # [2P, T, H] or packed [N, H]; float32, bfloat16, float16 or float64
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2P, T] or packed [N]; integers
    objective: Objective,
    *,
    nll_labels: Tensor | None = None,
    reference_logps: Tensor | None = None,
    reference: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None = None,
    margins: Tensor | None = None,
    answer_weights: Tensor | None = None,
    bias: Tensor | None = None,
    nll_weight: float | None = None,
    nll_reduction: str = "token",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shard: Shard | None = None,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    sequence_group: torch.distributed.ProcessGroup | None = None,
    backend: str | Backend = "auto",
    workspace_bytes: int | None = None,
) -> PreferenceOutput:
    """A loss over pairs of answers from hidden states and the head's weight, without full logits.

        z_tv   = cap(logit_scale * (W_v . h_t + b_v))         cap(z) = softcap * tanh(z / softcap), or identity
        logp_t = z_{t, y_t} - logsumexp_v z_tv
        loss   = nll_weight * NLL + mean_p objective(sums and lengths of logp over the answers of pair p)

    Sequences are stacked chosen first: pair p is sequence p and sequence P + p. ``labels[s, t]`` is the token that
    ``hidden[s, t]`` predicts, so labels are already shifted. A pair with an answer without a token leaves the mean over
    pairs, one warning says so, and ``valid`` is False for it.

    Args:
        hidden: hidden states ``[2P, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``. Any strides.
        weight: the head ``[V, H]``, as ``nn.Linear`` has it.
        labels: answer tokens, ``ignore_index`` elsewhere.
        objective: one of ``orpo_kernels.objectives``, or any callable from ``PairLogps`` to losses ``[P]`` in torch.
            The loss of a pair must not depend on other pairs, unless the callable has ``couples_pairs = True``.
        nll_labels: targets of the NLL, ``[P, T]`` or the shape of labels, whose rejected half is not read. None takes
            the chosen side of ``labels``. TRL counts prompt and answer here. A position may name another target than
            ``labels`` does.
        reference_logps: a reference model's log-probabilities summed over the answers, ``[2P]``, chosen first; for
            objectives that need them, as ``DPO``.
        reference: in their place a reference model's hidden states, in the form of ``hidden``, with its head's weight
            and, if there is one, bias: its log-probabilities are computed here without gradients, at one product. Scale
            and cap are those of the head that trains.
        margins: a number for each pair ``[P]``, for objectives that use one.
        answer_weights: what each log-probability counts in its answer's sum, in the shape of labels; lengths stay those
            of the answers. None counts each once. ``objectives.length_desensitised`` gives those of LD-DPO.
        bias: the head's bias ``[V]``. An entry of -inf masks its token, without a softcap.
        nll_weight: weight of the NLL. None takes the objective's own: 1 for ORPO, 0 where it names none.
        nll_reduction: "token", the mean over all NLL tokens, or "sequence", the mean over sequences of their means.
        logit_scale: factor on the logits, positive.
        softcap: the softcap c, or None.
        shard: how the vocabulary is split over ranks (``Shard``): weight and bias are this rank's rows, everything else
            is the same on each, and so are all values and the gradient of hidden. None takes a DTensor that is split by
            rows over a mesh called "tp" as what it is, and any other weight as whole.
        ignore_index: the label of positions that do not count.
        cu_seqlens: offsets ``[2P + 1]`` of packed sequences, chosen first.
        sequence_group: ranks over which the positions of every sequence are split, in any way: each gives some of the
            positions of all 2P sequences, with labels that were shifted before the split. Every rank gets the loss of
            the whole sequences, the gradient of its own hidden states, and its part of the weight's, whose sum over
            the group is the whole: where gradients are averaged over these ranks, multiply the loss by their number.
        backend: "auto", a backend's name, or a ``backends.Backend`` of your own.
        workspace_bytes: bound on what is held beyond inputs, returned gradients and tiles that stay in cache, down to
            the copies of 1,024 hidden rows on a CPU and 20 MiB on a GPU, which are taken in any case. None means 1 GiB
            and the place of one float32 copy of the weight. Results do not depend on it beyond rounding.

    Returns:
        ``PreferenceOutput``; its ``loss`` is differentiable once in hidden, weight and bias.

    Raises:
        TypeError, ValueError: an input that cannot be right; the message names it and the remedy.
        RuntimeError: a CUDA graph is being captured; in backward, second derivatives are asked for.

    Precision: products in the dtype of the inputs (float16 in float32), all sums in float32 (float64 for float64). The
    objective is computed in that dtype too. Under autocast hidden, weight and bias are cast as ``F.linear`` casts them.
    On a GPU a call copies a few integers to the host once, to compact the labels. Three products of the head's size,
    two with the head frozen, one without gradients, four where the workspace is small.
    """
    check_objective(objective)
    head = Head(weight, bias, logit_scale, softcap, shard)
    batch = Batch(labels, nll_labels, cu_seqlens, reference_logps, margins, answer_weights)
    settings = Settings(objective, nll_weight, nll_reduction, ignore_index, backend, workspace_bytes, sequence_group)
    if reference is not None:
        batch = batch._replace(reference_logps=_of_reference(reference, head, batch, settings))
    return preference_of_head(hidden, head, batch, settings)


def preference_of_head(hidden: Tensor, head: Head, batch: Batch, settings: Settings) -> PreferenceOutput:
    """``preference_loss`` for values."""
    objective = settings.objective
    losses, known = _losses(hidden, head, batch, settings)
    nll, chosen_logits, rejected_logits, mean, *metrics = losses.means.unbind()
    chosen_rewards, rejected_rewards = getattr(objective, "rewards", _log_ratios)(known)
    return PreferenceOutput(
        loss=losses.loss,
        nll_loss=nll,
        objective_loss=mean,
        pairs=known,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_logits_mean=chosen_logits,
        rejected_logits_mean=rejected_logits,
        valid=known.valid,
        objective_metrics=dict(zip(metric_names(objective), metrics, strict=True)),
    )


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
    shard: Shard | None = None,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    sequence_group: torch.distributed.ProcessGroup | None = None,
    backend: str | Backend = "auto",
    workspace_bytes: int | None = None,
) -> OrpoOutput:
    """ORPO from hidden states and the head's weight, without full logits.

        z_tv   = cap(logit_scale * (W_v . h_t + b_v))         cap(z) = softcap * tanh(z / softcap), or identity
        logp_t = z_{t, y_t} - logsumexp_v z_tv
        l_s    = mean of logp_t over the answer's tokens
        log_odds_p = (l_w - l_l) - (log(1 - exp(l_w)) - log(1 - exp(l_l)))
        loss   = nll_weight * NLL + beta * mean_p softplus(-log_odds_p)

    ``preference_loss`` with the objective ``ORPO(beta)``, and fields under ORPO's names. A pair with an answer without
    a token has no odds ratio: it leaves the odds term, and ``skipped_pairs`` counts it. Finite inputs give finite
    results, where float16 can hold their gradients: l_l is held at or below -1e-6, where its true gradient diverges.

    Args:
        beta: weight of the odds term (lambda in the paper).

        The others are ``preference_loss``'s.

    Returns:
        ``OrpoOutput``; its ``loss`` is differentiable once in hidden, weight and bias.

    Raises:
        TypeError, ValueError, RuntimeError: as ``preference_loss``.

    Source: Hong, Lee, Thorne, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691.
    """
    head, batch = Head(weight, bias, logit_scale, softcap, shard), Batch(labels, nll_labels, cu_seqlens)
    objective = ORPO(beta)
    settings = Settings(objective, nll_weight, nll_reduction, ignore_index, backend, workspace_bytes, sequence_group)
    losses, known = _losses(hidden, head, batch, settings)
    nll, chosen_logits, rejected_logits, odds, log_sigmoid, log_odds = losses.means.unbind()
    valid, chosen, rejected = known.valid, known.chosen_mean, known.rejected_mean
    return OrpoOutput(
        loss=losses.loss,
        nll_loss=nll,
        odds_ratio_loss=odds,
        chosen_logps=chosen,
        rejected_logps=rejected,
        chosen_rewards=objective.beta * chosen,
        rejected_rewards=objective.beta * rejected,
        log_odds_ratio=log_sigmoid,
        log_odds_chosen=log_odds,
        chosen_logits_mean=chosen_logits,
        rejected_logits_mean=rejected_logits,
        skipped_pairs=(~valid).sum(),
        valid=valid,
    )


def _losses(hidden: Tensor, head: Head, batch: Batch, settings: Settings) -> tuple[Losses, PairLogps]:
    """The loss, and what is known of the pairs."""
    hidden, head = ready(hidden, head)
    if torch.compiler.is_compiling():
        losses = Losses(*operators.preference(hidden, head, batch, settings))
    else:
        call = prepare(hidden, head, batch, settings).call()
        if settings.paired:
            warn_skipped(call.targets)
        losses = Losses(*fused(hidden, head, call))
    chosen_sum, rejected_sum, chosen_length, rejected_length = losses.values[:4].unbind()
    given = batch.of_pairs(losses.values.dtype)
    return losses, PairLogps(chosen_sum, rejected_sum, chosen_length, rejected_length, *given)


def _of_reference(reference: tuple[Tensor, ...], head: Head, batch: Batch, settings: Settings) -> Tensor:
    """The sums over the answers, ``[2P]``, of a reference model's hidden states and head."""
    if batch.reference_logps is not None:
        raise ValueError("reference and reference_logps say the same twice: drop one")
    if not isinstance(reference, (tuple, list)) or len(reference) not in (2, 3):
        raise TypeError(
            "reference must be (hidden, weight) or (hidden, weight, bias) of the reference model, got "
            f"{type(reference).__name__}: pass its last hidden states and its head's own tensors"
        )
    hidden, weight, *bias = reference
    if isinstance(hidden, Tensor) and hidden.shape[:-1] != batch.labels.shape:
        raise ValueError(
            f"reference's hidden must be {shape(batch.labels)[:-1]}, H], one state for each label, got shape "
            f"{shape(hidden)}: run the reference model on the same tokens"
        )
    with torch.no_grad():
        logps = linear_logprobs(
            hidden,
            weight,
            batch.labels,
            bias=bias[0] if bias else None,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            shard=head.shard,
            ignore_index=settings.ignore_index,
            backend=settings.backend,
            workspace_bytes=settings.workspace_bytes,
        )
        sums = sums_of_sequences(weighted(logps, batch.answer_weights), batch.cu_seqlens)
    return sums if settings.sequence_group is None else summed(sums, settings.sequence_group)


def _log_ratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    if pairs.reference_chosen is None or pairs.reference_rejected is None:
        return pairs.chosen_sum, pairs.rejected_sum
    return pairs.chosen_sum - pairs.reference_chosen, pairs.rejected_sum - pairs.reference_rejected


@overload
def explain(function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Plan: ...
@overload
def explain(hidden: Tensor, /, *args: Any, **kwargs: Any) -> Plan: ...
@overload
def explain(**kwargs: Any) -> Plan: ...
def explain(*args: Any, **kwargs: Any) -> Plan:
    """The plan a function of this module would follow for the same arguments, without multiplying anything.

    ``explain(linear_logprobs, hidden, weight, labels)``; without a function it is ``orpo_loss``.
    ``print(explain(...))`` says which plan, how many products, how many groups, how many bytes, and why. It counts the
    labels, for which the host waits on a GPU; with ``sequence_group`` every rank of it has to call.

    Raises:
        TypeError, ValueError: as the function.
    """
    function, given = (args[0], args[1:]) if args and callable(args[0]) else (orpo_loss, args)
    if function not in (preference_loss, orpo_loss, linear_logprobs):
        raise ValueError(
            "explain knows preference_loss, orpo_loss and linear_logprobs, got "
            f"{getattr(function, '__name__', function)!r}: pass one of them, and its arguments"
        )
    bound = inspect.signature(function).bind(*given, **kwargs)
    bound.apply_defaults()
    named = bound.arguments
    if function is orpo_loss:
        named["objective"] = ORPO(named["beta"])
    elif function is preference_loss:
        check_objective(named["objective"])

    def values(kind: Any) -> Any:
        """``Head``, ``Batch`` or ``Settings``: their fields are the keywords."""
        return kind(**{field: named[field] for field in kind._fields if field in named})

    return plan_of_head(named["hidden"], values(Head), values(Batch), values(Settings))


def plan_of_head(hidden: Tensor, head: Head, batch: Batch, settings: Settings) -> Plan:
    """``explain`` for values."""
    hidden, head = ready(hidden, head)
    return prepare(hidden, head, batch, settings, plan_only=True).plan


def linear_logprobs(
    hidden: Tensor,  # [..., H]; float32, bfloat16, float16 or float64
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]; integers
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shard: Shard | None = None,
    ignore_index: int = -100,
    backend: str | Backend = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """``logp_t = z_{t, y_t} - logsumexp_v z_tv`` per label, without full logits; any upstream gradient.

    What GRPO or a loop of your own needs. ``labels[..., t]`` is the token that ``hidden[..., t]`` predicts.

    Args:
        hidden: hidden states ``[..., H]``.
        weight: the head ``[V, H]``.
        labels: shape of hidden without its last dimension; ``ignore_index`` where no log-probability is wanted.
        bias, logit_scale, softcap, shard, ignore_index, backend, workspace_bytes: as ``preference_loss`` has them.

    Returns:
        The shape of labels, float32 (float64 for float64 inputs), nats, 0 where ignored.

    Raises:
        TypeError, ValueError, RuntimeError: as ``preference_loss``.

    Precision: as ``preference_loss``. Three products of the head's size where the exponentials of all labels fit the
    workspace, in which they wait for backward; four where they do not, two with the head frozen, one without gradients.
    """
    settings = Settings(None, None, "token", ignore_index, backend, workspace_bytes)
    return logprobs_of_head(hidden, Head(weight, bias, logit_scale, softcap, shard), Batch(labels), settings)


def logprobs_of_head(hidden: Tensor, head: Head, batch: Batch, settings: Settings) -> Tensor:
    """``linear_logprobs`` for values; the settings have no objective."""
    hidden, head = ready(hidden, head)
    if torch.compiler.is_compiling():
        return operators.logprobs(hidden, head, batch, settings)
    call = prepare(hidden, head, batch, settings).call()
    out: Tensor = fused(hidden, head, call)
    return out.view(batch.labels.shape)


class OrpoLoss(nn.Module):
    """``orpo_loss`` as a module: its settings at construction, its tensors at the call.

    ``settings`` are the keywords of ``orpo_loss`` that are no tensors; they are checked here and kept as attributes.

    Example:
        >>> loss = OrpoLoss(beta=0.1)
        >>> loss(hidden, model.lm_head.weight, labels).loss.backward()
    """

    NAMES = ("beta", "logit_scale", "softcap", "shard", *Settings._fields[1:])

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        unknown = settings.keys() - set(self.NAMES)
        if unknown:
            raise TypeError(f"OrpoLoss takes {', '.join(self.NAMES)}; got {', '.join(sorted(unknown))}")
        parameters = inspect.signature(orpo_loss).parameters
        for name in self.NAMES:
            setattr(self, name, settings.get(name, parameters[name].default))
        kept = self._settings()
        checked(Settings(ORPO(kept["beta"]), *(kept[name] for name in Settings._fields[1:])))
        checked_head(Head(torch.empty(0), None, kept["logit_scale"], kept["softcap"]))
        check_name(kept["backend"])

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
        tensors: dict[str, Any] = {"nll_labels": nll_labels, "bias": bias, "cu_seqlens": cu_seqlens}
        return orpo_loss(hidden, weight, labels, **tensors, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.NAMES}

    def extra_repr(self) -> str:
        return f"beta={self.beta}, nll_weight={self.nll_weight}, nll_reduction={self.nll_reduction!r}"
