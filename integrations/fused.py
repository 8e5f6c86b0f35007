"""One forward of a trainer's model with its head intercepted, and the loss or log-probabilities that come of it.

A forward is one ordinary call of the trainer's model, so that DDP, FSDP and DeepSpeed see one module call. The loss is
computed in the head's own forward, where whatever shards its weight has gathered it; its gradient comes back through
the head's output, so that whoever gathers the weight again for a backward is told; and it leaves through the output's
``loss``. Before the first batch of a model and its head one call without gradients asks the model what it does to its
logits (``hf_head.read``), and that batch compares log-probabilities of a few tokens with the model's own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from orpo_kernels.engine import mean_logit
from orpo_kernels.integrations.adapters import linear_head
from orpo_kernels.integrations.detours import leave_nothing
from orpo_kernels.integrations.hf_head import MASKED, PROBES, Reading, fingerprint
from orpo_kernels.integrations.intercept import Batch, Call, Question
from orpo_kernels.integrations.trainer import Patch, Settings, Site, first, say
from orpo_kernels.loss import PreferenceOutput, logprobs_of_head, plan_of_head, preference_of_head
from orpo_kernels.pairs import Objective
from orpo_kernels.settings import Batch as Labels
from orpo_kernels.settings import Head
from orpo_kernels.settings import Settings as CallSettings

R = TypeVar("R")


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
    labels = Labels(batch.answer, batch.nll, None, batch.reference_logps, batch.margins)

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


def fused_answers(patch: Patch, trainer: Any, model: nn.Module, site: Site, batch: Batch) -> Tensor | str:
    """Log-probabilities ``[S, T]`` of the answers alone, of any number of sequences, without gradient; or why not.

    Raises:
        RuntimeError: as ``fused_loss``.
    """
    labels = Labels(batch.answer)

    def score(hidden: Tensor, head: Head, shift: float, settings: Settings) -> Tensor:
        return logprobs_of_head(hidden, head, labels, _of_call(batch, settings))

    def plan(hidden: Tensor, head: Head, settings: Settings) -> object:
        return f"log-probabilities, {plan_of_head(hidden, head, labels, _of_call(batch, settings))}"

    with torch.no_grad():
        fused = _forward(patch, trainer, model, site, batch, Work(score, lambda logps: logps, plan))
    return fused if isinstance(fused, str) else fused[0]


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
    question = None
    if before is None or before[0] != mark:
        question = Question(site, batch)
        reading = question.asked_of(model)
        if isinstance(reading, str):
            refusal = known[key] = f"{type(site.model).__name__}: {reading}"
            return refusal
    else:
        reading = before[1]
    call = _Pass(patch, trainer, site, batch, work, reading, question)
    try:
        output = call.run(model)
    except torch._dynamo.exc.Unsupported:
        if call.calls:
            raise
        leave_nothing([site.head, site.base])  # in its own path nothing is to break its graph
        what = "it was compiled with fullgraph=True, and a fused loss breaks the graph at the head"
        refusal = known[key] = f"{type(site.model).__name__}: {what}. Compile it without"
        return refusal
    if call.refusal is not None:
        raise RuntimeError(
            f"orpo_kernels cannot follow {type(site.model).__name__}: {call.refusal}, and on an earlier batch it "
            "called it once, on every position. Train it unpatched"
        )
    assert call.result is not None  # without one there is a refusal
    if output["loss"].dtype != call.tracked.dtype:
        output["loss"] = _Uncast.apply(output["loss"], call.tracked.detach())
    if question is not None:
        known[key] = mark, reading
        if first(trainer, "fused"):
            agreement = "" if call.agreement is None else f" (log-probabilities within {call.agreement:.1g} nats)"
            say(
                trainer,
                logging.INFO,
                f"fused the loss of this {type(trainer).__name__}: {call.plan}. The model's logits, read as {reading}, "
                f"agree on the first batch{agreement}",
            )
    return call.result, output


class _Enter(torch.autograd.Function):
    """The head's output in the graph of the loss: its backward hands over the gradient that ``_Leave`` has met."""

    @staticmethod
    def forward(ctx: Any, tracked: Tensor, vocab: int, dtype: torch.dtype, gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        return tracked.new_zeros(1, 1, vocab, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradients.pop(), None, None, None


class _Leave(torch.autograd.Function):
    """The loss, as if it were made of the head's output.

    The gradient itself goes round the output's hooks, also those that FSDP1 is yet to register: they may cast it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, tracked: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.gradients, ctx.blank = gradients, output.detach()
        return tracked.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.gradients.append(gradients[0])
        return torch.zeros_like(ctx.blank), None, None


class _Uncast(torch.autograd.Function):
    """The loss with its own digits, where a policy of FSDP has cast the model's output to a narrower dtype."""

    @staticmethod
    def forward(ctx: Any, cast: Tensor, tracked: Tensor) -> Tensor:
        ctx.dtype = cast.dtype
        return tracked.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class _Pass(Call, Generic[R]):
    """The call whose head computes the loss; after a ``question`` it checks the answer."""

    def __init__(
        self,
        patch: Patch,
        trainer: Any,
        site: Site,
        batch: Batch,
        work: Work[R],
        reading: Reading,
        question: Question | None,
    ) -> None:
        super().__init__(site, batch)
        self.patch, self.trainer, self.work = patch, trainer, work
        self.reading, self.question = reading, question
        self.agreement: float | None = None  # nats
        self.gradients: list[Tensor] = []
        self.result: R | None = None

    def at_head(self, input: Tensor) -> Tensor:
        hidden, own = linear_head(self.site.head, input)
        self.head = self.reading.head(own)
        self.result = self._scored(hidden) if self.question is None else self._first_scored(hidden)
        if self.question is not None:
            self._compare(self.question)
            self.plan = str(self.work.plan(hidden, self.head, self.patch.settings))
        self.tracked = self.work.tracked(self.result)
        blank: Tensor = _Enter.apply(self.tracked, self.vocab, input.dtype, self.gradients)
        return blank

    def after_head(self, output: Tensor) -> None:
        self.tracked = _Leave.apply(output, self.tracked.detach(), self.gradients)

    def after_base(self, output: Any) -> None:
        output["loss"] = self.tracked

    def _scored(self, hidden: Tensor) -> R:
        return self.work.score(hidden, self.head, self.reading.shift, self.patch.settings)

    def _first_scored(self, hidden: Tensor) -> R:
        """The first call on this machine may be the one that finds a kernel which does not compile or launch here."""
        settings = self.patch.settings
        try:
            result = self._scored(hidden)
            if hidden.is_cuda:
                torch.cuda.synchronize(hidden.device)  # a launch fails late
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if settings.backend != "auto":
                raise
            self.patch.settings = settings._replace(backend="torch")
            try:
                result = self._scored(hidden)
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
    def _compare(self, asked: Question) -> None:
        """Raise if the model's own logits of a few tokens give their labels other log-probabilities than ours.

        The tolerance is what rounding can do: each side rounds the label's logit and, in the log-sum-exp, every other
        one by its probability. Logits without a probability, masked ones, do not loosen it.

        Raises:
            RuntimeError: the two differ; the message has both numbers.
        """
        labels, reading = asked.labels, self.reading
        if len(labels) == 0:
            return
        given = _of_call(self.batch, self.patch.settings)
        ours = logprobs_of_head(asked.rows, self.head, Labels(labels), given).double()
        logits, own = asked.logits.double() - reading.shift, asked.given[PROBES:, : reading.vocab].double()
        theirs = torch.log_softmax(logits, -1)
        size = torch.maximum(logits.abs(), reading.logit_scale * own.abs())
        weighed = torch.where(theirs > -50, theirs.exp() * size, 0.0).sum(-1)
        theirs, size = (values.gather(-1, labels[:, None]).squeeze(-1) for values in (theirs, size))
        # A label in a masked column has no probability either way.
        difference = torch.where(theirs > MASKED, (theirs - ours).abs(), 0.0)
        tolerance = 2 * asked.eps * (size + weighed) + 1e-5
        self.agreement = difference.max().item()
        if not (difference <= tolerance).all():
            raise RuntimeError(
                f"orpo_kernels does not reproduce the logits of {type(self.site.model).__name__}: for {len(labels)} "
                f"tokens the model's own log-probabilities are {[round(x, 4) for x in theirs.tolist()]} and ours "
                f"{[round(x, 4) for x in ours.tolist()]}, a difference of {self.agreement:.3g} where rounding explains "
                f"{tolerance.max().item():.1g}. They were read as {reading}. Train it unpatched, and please report the "
                "model type"
            )
