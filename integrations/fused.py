"""One forward of a trainer's model with its head intercepted, and the loss or log-probabilities that come of it.

A forward is one ordinary call of the trainer's model, so that DDP and DeepSpeed see one module call: the head is
intercepted, the loss is computed where the hidden states are, and it leaves through the output's ``loss``. On the first
batch of a model and its head the loss waits until the model's output is there, because that batch asks the model what
it does to its logits (``hf_head.read``) and compares log-probabilities of a few tokens with the model's own.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from orpo_kernels.engine import mean_logit
from orpo_kernels.integrations.adapters import linear_head, stock_logits
from orpo_kernels.integrations.hf_head import MASKED, PROBES, Reading, detour, fingerprint, probes, read
from orpo_kernels.integrations.trainer import Patch, Settings, Site, first, say
from orpo_kernels.loss import PreferenceOutput, logprobs_of_head, plan_of_head, preference_of_head
from orpo_kernels.objectives import Objective
from orpo_kernels.settings import Batch as Labels
from orpo_kernels.settings import Head
from orpo_kernels.settings import Settings as CallSettings

CHECKED_ROWS = 8

R = TypeVar("R")


class Batch(NamedTuple):
    """Sequences stacked chosen first, with labels shifted, so that ``labels[s, t]`` is what position t predicts."""

    inputs: dict[str, Any]  # of the model
    answer: Tensor  # [2P, T]
    nll: Tensor  # [P, T]
    ignore_index: int
    averaged: slice = slice(None, -1)  # positions over which a trainer logs mean logits


class Logprobs(NamedTuple):
    """Log-probabilities of a batch in nats, 0 where there is no label."""

    answer: Tensor  # [2P, T]
    nll: Tensor  # [P, T]
    logit_means: Tensor  # [2], chosen and rejected, over all positions of ``Batch.averaged``
    lengths: Tensor  # [2P], answer tokens
    nll_tokens: Tensor  # []

    @property
    def answer_means(self) -> Tensor:
        """Mean log-probability of each answer, ``[2P]``; NaN for one without a token, as stock trainers have it."""
        return self.answer.sum(-1) / self.lengths

    @property
    def nll_loss(self) -> Tensor:
        """Mean negative log-likelihood over the NLL's tokens."""
        return -self.nll.sum() / self.nll_tokens


class Work(NamedTuple, Generic[R]):
    """What is to be computed of a batch."""

    score: Callable[[Tensor, Head, float, Settings], R]  # of hidden [2P, T, H], the head, what is added to its logits
    tracked: Callable[[R], Tensor]  # the differentiable tensor of the result
    plan: Callable[[Tensor, Head, Settings], object]  # says how it is computed


def fused_loss(
    patch: Patch,
    trainer: Any,
    model: nn.Module,
    site: Site,
    batch: Batch,
    objective: Objective,
    nll_weight: float | None = None,
    nll_reduction: str = "token",
) -> tuple[PreferenceOutput, Any] | str:
    """An objective's loss in one forward of ``model``, and the model's output: three products of the head's size.

    Means of logits are over the positions of ``batch.averaged``, padding included, as TRL logs them. Where the model
    cannot be fused, the reason.

    Raises:
        RuntimeError: a later batch takes another way through the model than the one that was checked, or the model's
            own log-probabilities differ.
    """
    labels = Labels(batch.answer, batch.nll)

    def given(settings: Settings) -> CallSettings:
        return _of_call(batch, settings, objective, nll_weight=nll_weight, nll_reduction=nll_reduction)

    def score(hidden: Tensor, head: Head, shift: float, settings: Settings) -> PreferenceOutput:
        out = preference_of_head(hidden, head, labels, given(settings))
        chosen, rejected = _logit_means(hidden, head, shift, batch, settings, out)
        return out._replace(chosen_logits_mean=chosen, rejected_logits_mean=rejected)

    def plan(hidden: Tensor, head: Head, settings: Settings) -> object:
        return plan_of_head(hidden, head, labels, given(settings))

    fused = _forward(patch, trainer, model, site, batch, Work(score, lambda out: out.loss, plan))
    return fused if isinstance(fused, str) else (fused[0]._replace(loss=fused[1]["loss"]), fused[1])


def fused_logprobs(
    patch: Patch, trainer: Any, model: nn.Module, site: Site, batch: Batch
) -> tuple[Logprobs, Any] | str:
    """Log-probabilities in one forward of ``model``, and its output, for losses of a trainer's own: or why not.

    Raises:
        RuntimeError: as ``fused_loss``.
    """
    pairs, ignore = batch.nll.shape[0], batch.ignore_index
    chosen, in_answer, in_nll = batch.answer[:pairs], batch.answer != ignore, batch.nll != ignore
    apart = in_nll & in_answer[:pairs] & (chosen != batch.nll)  # positions that are to predict two tokens
    wanted = torch.cat([torch.where(in_answer[:pairs], chosen, batch.nll), batch.answer[pairs:]])

    def score(hidden: Tensor, head: Head, shift: float, settings: Settings) -> Logprobs:
        given = _of_call(batch, settings)
        every = logprobs_of_head(hidden, head, Labels(wanted), given)
        nll = torch.where(in_nll, every[:pairs], 0)
        if apart.any():
            others = logprobs_of_head(hidden[:pairs][apart], head, Labels(batch.nll[apart]), given)
            nll = nll.masked_scatter(apart, others)
        means = _logit_means(hidden, head, shift, batch, settings, None)
        return Logprobs(torch.where(in_answer, every, 0), nll, means, in_answer.sum(-1), in_nll.sum())

    def plan(hidden: Tensor, head: Head, settings: Settings) -> object:
        how = plan_of_head(hidden, head, Labels(wanted), _of_call(batch, settings))
        return f"log-probabilities, {how}"

    work = Work(score, lambda result: torch.cat([result.answer, result.nll]), plan)
    fused = _forward(patch, trainer, model, site, batch, work)
    if isinstance(fused, str):
        return fused
    answer, nll = fused[1]["loss"].split([2 * pairs, pairs])
    return fused[0]._replace(answer=answer, nll=nll), fused[1]


def _of_call(batch: Batch, settings: Settings, objective: Objective | None = None, **more: Any) -> CallSettings:
    """What every fused function is told beside tensors; without an objective, of log-probabilities."""
    return CallSettings(objective, ignore_index=batch.ignore_index, **more, **settings._asdict())


@torch.no_grad()
def _logit_means(
    hidden: Tensor, head: Head, shift: float, batch: Batch, settings: Settings, out: PreferenceOutput | None
) -> Tensor:
    """Mean logit of the chosen and the rejected side over the positions that the trainer averages, ``[2]``.

    Without a softcap that is ``mean(h) . mean(W)``. Under one the scored positions are in ``out`` already, and only
    the others, which no loss needs, cost a product.
    """
    hidden, pairs = hidden.detach(), hidden.shape[0] // 2
    sides = []
    for side, chosen in ((slice(0, pairs), True), (slice(pairs, None), False)):
        rows = hidden[side, batch.averaged]
        if head.softcap is None:
            sides.append(mean_logit(rows.reshape(-1, rows.shape[-1]), head, settings.backend))
            continue
        scored = batch.answer[side, batch.averaged] != batch.ignore_index
        if chosen:
            scored = scored | (batch.nll[:, batch.averaged] != batch.ignore_index)
        if out is None:
            scored = torch.zeros_like(scored)
        share = scored.sum() / scored.numel()
        known = 0.0 if out is None else out.chosen_logits_mean if chosen else out.rejected_logits_mean
        sides.append(known * share + mean_logit(rows[~scored], head, settings.backend) * (1 - share))
    return torch.stack(sides) + shift


# What is known of a model, by head and mode: what its forward does, and its fingerprint then; or why it is not fused.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[tuple[Any, ...], Reading] | str]]
_known = weakref.WeakKeyDictionary()


def _forward(
    patch: Patch, trainer: Any, model: nn.Module, site: Site, batch: Batch, work: Work[R]
) -> tuple[R, Any] | str:
    """One ordinary call of ``model`` with the head intercepted: the result, and the output with what is tracked."""
    known = _known.setdefault(site.model, {})
    key = weakref.ref(site.head), site.model.training, torch.is_grad_enabled()
    mark, before = fingerprint(site.model, site.head), known.get(key)
    if isinstance(before, str):
        return before
    reading = before[1] if before is not None and before[0] == mark else None
    call = _Pass(patch, trainer, site, batch, work, reading)
    handle = site.base.register_forward_hook(call.after_base)
    try:
        with detour(site.head, call.at_head):
            output = model(**batch.inputs)
    except Exception as error:
        if call.reading is not None or call.calls == 0 or call.returned or isinstance(error, torch.OutOfMemoryError):
            raise
        call.refusal = (
            f"its forward fails on logits of other rows than it gave its head ({type(error).__name__}: {error})"
        )
    finally:
        handle.remove()
    if call.calls == 0:
        call.refusal = "its forward did not call its head"
    if call.refusal is not None:
        if reading is not None:
            raise RuntimeError(
                f"orpo_kernels cannot follow {type(site.model).__name__}: {call.refusal}, and on an earlier batch it "
                "called it once, on every position. Train it unpatched"
            )
        refusal = known[key] = f"{type(site.model).__name__}: {call.refusal}"
        return refusal
    assert call.reading is not None  # without one there is a refusal
    assert call.result is not None
    if reading is None:
        known[key] = mark, call.reading
        if first(trainer, "fused"):
            how = work.plan(call.hidden, call.reading.head(call.head), patch.settings)
            agreement = "" if call.agreement is None else f" (log-probabilities within {call.agreement:.1g} nats)"
            say(
                trainer,
                logging.INFO,
                f"fused the loss of this {type(trainer).__name__}: {how}. The model's logits, read as {call.reading}, "
                f"agree on the first batch{agreement}",
            )
    return call.result, output


class _Pass(Generic[R]):
    """One forward with the head intercepted: what the head is called with, and what came of it.

    Without a ``reading`` the model is asked for one: the head returns probes instead of a blank, and the loss is
    computed when the model has returned.
    """

    def __init__(
        self, patch: Patch, trainer: Any, site: Site, batch: Batch, work: Work[R], reading: Reading | None
    ) -> None:
        self.patch, self.trainer, self.site, self.batch = patch, trainer, site, batch
        self.work, self.reading = work, reading
        self.thread = threading.get_ident()
        self.calls, self.returned = 0, False
        self.refusal: str | None = None
        self.agreement: float | None = None  # nats
        self.result: R | None = None

    def at_head(self, input: Tensor) -> Tensor:
        """In place of the head's forward: logits of few rows, because no loss is made of them."""
        self.calls += 1
        head: Any = self.site.head
        if self.calls > 1:
            self.refusal = "its forward called its head more than once"
        elif input.shape[:-1] != self.batch.answer.shape:
            of, every = list(input.shape[:-1]), list(self.batch.answer.shape)
            self.refusal = f"its forward called its head on {of} of {every} positions"
        else:
            self.hidden, self.head = linear_head(head, input)
            if self.reading is not None:
                self.result = self._scored(self.reading)
        if self.refusal is not None or self.reading is not None:
            return input.new_zeros(1, 1, head.out_features)
        device = input.device.type
        self.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        dtype = torch.promote_types(input.dtype, torch.float32)
        # The model's own logits for a few tokens go through the rest of its forward behind the probes.
        labels = self.batch.answer.reshape(-1)
        places = torch.nonzero(labels != self.batch.ignore_index).view(-1)
        self.places = places[:: max(1, len(places) // CHECKED_ROWS)][:CHECKED_ROWS]
        rows = input.detach().reshape(-1, input.shape[-1])[self.places]
        with torch.no_grad():
            own, self.rows, of_rows = stock_logits(head, rows)
        self.eps = _rounding_of(own, self.rows, of_rows)
        self.given = torch.cat([probes(self.head.vocab, dtype, input.device), own.to(dtype)])
        return self.given[None].clone()  # models write into their logits

    def after_base(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        """The model has returned: read what it did and compute the loss if that is due, and hand on what is tracked."""
        if threading.get_ident() != self.thread or self.calls == 0:
            return
        self.returned = True
        if self.refusal is None and self.reading is None:
            reading = self._read(output.logits)
            if isinstance(reading, str):
                self.refusal = reading
                return
            with self.autocast:
                self.result = self._first_scored(reading)
                self._compare(output.logits[0, PROBES:], reading)
            self.reading = reading
        if self.result is not None:
            output["loss"] = self.work.tracked(self.result)

    def _read(self, logits: Tensor) -> Reading | str:
        if logits.dim() != 3 or logits.shape[:2] != (1, len(self.given)):
            return f"it makes logits {list(logits.shape)} of its head's output {[1, *self.given.shape]}"
        return read(self.given[:PROBES], logits[0, :PROBES])

    def _scored(self, reading: Reading) -> R:
        return self.work.score(self.hidden, reading.head(self.head), reading.shift, self.patch.settings)

    def _first_scored(self, reading: Reading) -> R:
        """The first call on this machine may be the one that finds a kernel which does not compile or launch here."""
        settings = self.patch.settings
        try:
            result = self._scored(reading)
            if self.hidden.is_cuda:
                torch.cuda.synchronize(self.hidden.device)  # a launch fails late
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if settings.backend != "auto":
                raise
            self.patch.settings = settings._replace(backend="torch")
            try:
                result = self._scored(reading)
            except Exception:  # what is wrong with the inputs is wrong here too, and no fault of the backend
                self.patch.settings = settings
                raise
            reason = " ".join(str(error).split())
            say(
                self.trainer,
                logging.WARNING,
                f"goes on with the torch backend, because the one that suits this device failed: "
                f"{type(error).__name__}: {reason[:300]}",
            )
        return result

    @torch.no_grad()
    def _compare(self, logits: Tensor, reading: Reading) -> None:
        """Raise if the model's own ``logits [k, V]`` give its labels other log-probabilities than ours.

        The tolerance is what rounding can do: each side rounds the label's logit and, in the log-sum-exp, every other
        one by its probability. Logits without a probability, masked ones, do not loosen it.

        Raises:
            RuntimeError: the two differ; the message has both numbers.
        """
        if len(logits) == 0:
            return
        labels = self.batch.answer.reshape(-1)[self.places]
        given = _of_call(self.batch, self.patch.settings)
        ours = logprobs_of_head(self.rows, reading.head(self.head), Labels(labels), given).double()
        logits, own = logits.double() - reading.shift, self.given[PROBES:, : reading.vocab].double()
        theirs = torch.log_softmax(logits, -1)
        size = torch.maximum(logits.abs(), reading.logit_scale * own.abs())
        weighed = torch.where(theirs > -50, theirs.exp() * size, 0.0).sum(-1)
        theirs, size = (values.gather(-1, labels[:, None]).squeeze(-1) for values in (theirs, size))
        # A label in a masked column has no probability either way.
        difference = torch.where(theirs > MASKED, (theirs - ours).abs(), 0.0)
        tolerance = 2 * self.eps * (size + weighed) + 1e-5
        self.agreement = difference.max().item()
        if not (difference <= tolerance).all():
            raise RuntimeError(
                f"orpo_kernels does not reproduce the logits of {type(self.site.model).__name__}: for {len(labels)} "
                f"tokens the model's own log-probabilities are {[round(x, 4) for x in theirs.tolist()]} and ours "
                f"{[round(x, 4) for x in ours.tolist()]}, a difference of {self.agreement:.3g} where rounding explains "
                f"{tolerance.max().item():.1g}. They were read as {reading}. Train it unpatched, and please report the "
                "model type"
            )


@torch.no_grad()
def _rounding_of(logits: Tensor, rows: Tensor, head: Head) -> float:
    """How the head's product rounds, relative to its size: what a few columns in float64 say, at least the dtype's eps.

    Float32 products are TF32's or bfloat16's where a program allows that.
    """
    columns = torch.arange(0, logits.shape[-1], max(1, logits.shape[-1] // 64), device=logits.device)
    exact = rows.double() @ head.weight[columns].double().T
    if head.bias is not None:
        exact += head.bias[columns].double()
    error = (logits[:, columns].double() - exact).abs().max() if len(rows) else torch.zeros(())
    size = logits.double().square().mean().sqrt() if len(rows) else torch.ones(())
    return max(torch.finfo(logits.dtype).eps, (error / size.clamp(min=1e-30)).item())
