"""What every trainer's patch needs: where to fuse and why not, the two fused forwards, metrics of all ranks.

A forward is one ordinary call of the trainer's model, so that DDP and DeepSpeed see one module call: the head is
intercepted, the loss is computed where the hidden states are, and it leaves through the output's ``loss``. On the first
batch of a model and its head the loss waits until the model's output is there, because that batch asks the model what
it does to its logits (``hf_head.read``) and compares log-probabilities of a few tokens with the model's own.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from orpo_kernels.backends import available
from orpo_kernels.engine import mean_logit
from orpo_kernels.integrations.hf_head import MASKED, PROBES, Reading, fingerprint, head_module, probes, read
from orpo_kernels.loss import OrpoOutput, explain, linear_logprobs, orpo_loss
from orpo_kernels.settings import Head

BACKEND_VARIABLE = "ORPO_KERNELS_BACKEND"
WORKSPACE_VARIABLE = "ORPO_KERNELS_WORKSPACE_BYTES"
CHECKED_ROWS = 8

R = TypeVar("R", bound="Orpo | Logprobs")
logger = logging.getLogger("orpo_kernels")


@dataclass(frozen=True)
class Settings:
    """How fused losses are computed under a patch; the arguments of these names of ``orpo_loss``."""

    backend: str = "auto"
    workspace_bytes: int | None = None

    @classmethod
    def chosen(cls, backend: str | None, workspace_bytes: int | None) -> Settings:
        """The arguments, where they are None the environment's, else the defaults.

        Raises:
            ValueError: no backend has that name, or the workspace is no positive integer; the message names its source.
        """
        source = "backend" if backend is not None else BACKEND_VARIABLE
        backend = backend or os.environ.get(BACKEND_VARIABLE) or "auto"
        names = sorted(known.name for known in available())
        if backend != "auto" and backend not in names:
            raise ValueError(f"{source} must be 'auto' or one of {names}, got {backend!r}")
        given = os.environ.get(WORKSPACE_VARIABLE) if workspace_bytes is None else str(workspace_bytes)
        if not given:
            return cls(backend)
        if not given.isdecimal() or int(given) == 0:
            source = WORKSPACE_VARIABLE if workspace_bytes is None else "workspace_bytes"
            raise ValueError(f"{source} must be a positive number of bytes, got {given!r}")
        return cls(backend, int(given))


class Patch:
    """Replaced methods of a trainer class.

    Args:
        owner: the trainer class.
        replacements: methods by name.
        stands_for: further methods whose work the replacements do, so that a trainer with its own keeps its path.

    Raises:
        ImportError: the class lacks one of the methods.
    """

    def __init__(self, owner: type, replacements: dict[str, Callable[..., Any]], stands_for: tuple[str, ...]) -> None:
        self.owner, self.replacements, self.stands_for = owner, replacements, stands_for
        self.stock: dict[str, Any] = {}
        self.settings = Settings()
        missing = [name for name in (*replacements, *stands_for) if not hasattr(owner, name)]
        if missing:
            raise ImportError(
                f"{owner.__module__}.{owner.__name__} has no {', '.join(missing)}, so this version of its library is "
                "not one that its patch knows"
            )

    @property
    def applied(self) -> bool:
        return bool(self.stock)

    def apply(self, settings: Settings) -> None:
        """Replace the methods, or give the ones in place other settings."""
        self.settings = settings
        if not self.applied:
            self.stock = {name: self.owner.__dict__[name] for name in (*self.replacements, *self.stands_for)}
            for name, method in self.replacements.items():
                setattr(self.owner, name, method)

    def undo(self) -> None:
        """Put the methods back; without a patch nothing happens."""
        for name in self.replacements if self.applied else ():
            setattr(self.owner, name, self.stock[name])
        self.stock = {}

    def own_method(self, trainer: Any, names: tuple[str, ...]) -> str | None:
        """The first of these methods that the trainer, its class or a later patch brings itself, as a sentence."""
        library = self.owner.__module__.partition(".")[0]
        for name in names:
            found = _function(getattr(trainer, name))
            if found is self.replacements.get(name):
                found = _function(self.stock[name])
            home = getattr(found, "__globals__", {}).get("__name__", "")  # __module__ may be carried by a wrapper
            if found is _function(self.stock[name]) and home.partition(".")[0] == library:
                continue
            whose = "had its {} replaced" if name in vars(trainer) or type(trainer) is self.owner else "overrides {}"
            return f"{type(trainer).__name__} {whose.format(name)}, which a fused loss would pass by"
        return None


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


class Site(NamedTuple):
    """Where a trainer's model can be fused."""

    base: nn.Module  # the module whose call returns the model's output, without DDP around it
    model: nn.Module  # the Hugging Face model, without peft around it
    head: nn.Linear


def find_site(trainer: Any, model: nn.Module) -> Site | str:
    """Where to fuse in a ``transformers.Trainer``, or the reason why this one and its model keep their own path."""
    if isinstance(model, nn.DataParallel):
        return "nn.DataParallel replicates the model in threads: use one process a GPU (torchrun)"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP is not supported yet"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 is not supported yet"
    if hasattr(model, "_orig_mod") or getattr(trainer.args, "torch_compile", False):
        return "torch.compile around the whole model is not supported yet"
    base = trainer.accelerator.unwrap_model(model)
    inner = base.get_base_model() if hasattr(base, "get_base_model") else base
    head = head_module(inner)
    if isinstance(head, str):
        return head
    if not isinstance(vars(head).get("forward"), _Detour | None):
        return "its head's forward was replaced, which a fused loss would pass by"
    return Site(base, inner, head)


class Batch(NamedTuple):
    """Sequences stacked chosen first, with labels shifted, so that ``labels[s, t]`` is what position t predicts."""

    inputs: dict[str, Any]  # of the model
    answer: Tensor  # [2P, T]
    nll: Tensor  # [P, T]
    ignore_index: int


class Fused(NamedTuple, Generic[R]):
    """A fused forward of one batch."""

    result: R
    tracked: Tensor  # the differentiable tensor of the result, as it came through the model's output
    output: Any  # the model's


class Orpo(NamedTuple):
    """The loss of a batch, and the logits that TRL logs."""

    out: OrpoOutput
    logit_means: Tensor  # [2], chosen and rejected, over every position but the last, padding included


class Logprobs(NamedTuple):
    """Log-probabilities of a batch in nats, 0 where there is no label."""

    answer: Tensor  # [2P, T]
    nll: Tensor  # [P, T]
    logit_means: Tensor  # [2], as in Orpo
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


def fused_orpo(
    patch: Patch, trainer: Any, model: nn.Module, site: Site, batch: Batch, beta: float
) -> Fused[Orpo] | str:
    """The ORPO loss in one forward of ``model``: three products of the head's size; or why the model keeps its path.

    Raises:
        RuntimeError: a later batch takes another way through the model than the one that was checked, or the model's
            own log-probabilities differ.
    """

    own: dict[str, Any] = {"nll_labels": batch.nll, "beta": beta}

    def score(hidden: Tensor, head: Head, settings: Settings) -> Orpo:
        out = orpo_loss(hidden, labels=batch.answer, **own, **_keywords(head, batch.ignore_index, settings))
        return Orpo(out, _logit_means(hidden.detach(), head, batch, settings, out))

    def plan(hidden: Tensor, head: Head, settings: Settings) -> str:
        given = _keywords(head, batch.ignore_index, settings)
        return str(explain(hidden, labels=batch.answer, **own, **given))

    return _forward(patch, trainer, model, site, batch, score, lambda result: result.out.loss, plan)


def fused_logprobs(patch: Patch, trainer: Any, model: nn.Module, site: Site, batch: Batch) -> Fused[Logprobs] | str:
    """Log-probabilities in one forward of ``model``, for losses of a trainer's own: or why not.

    Raises:
        RuntimeError: as ``fused_orpo``.
    """
    pairs = batch.nll.shape[0]
    ignore = batch.ignore_index
    chosen = batch.answer[:pairs]
    in_nll = batch.nll != ignore
    apart = in_nll & (chosen != ignore) & (chosen != batch.nll)  # a position that is to predict two tokens
    wanted = batch.answer.clone()
    wanted[:pairs] = torch.where(chosen == ignore, batch.nll, chosen)

    def score(hidden: Tensor, head: Head, settings: Settings) -> Logprobs:
        every = _logprobs(hidden, head, wanted, ignore, settings)
        nll = torch.where(in_nll, every[:pairs], 0)
        if apart.any():
            second = _logprobs(hidden[:pairs][apart], head, batch.nll[apart], ignore, settings)
            nll = nll.masked_scatter(apart, second)
        means = _logit_means(hidden.detach(), head, batch, settings, None)
        in_answer = batch.answer != ignore
        return Logprobs(torch.where(in_answer, every, 0), nll, means, in_answer.sum(-1), in_nll.sum())

    def plan(hidden: Tensor, head: Head, settings: Settings) -> str:
        return (
            f"log-probabilities, {explain(linear_logprobs, hidden, labels=wanted, **_keywords(head, ignore, settings))}"
        )

    def tracked(result: Logprobs) -> Tensor:
        return torch.cat([result.answer, result.nll])

    fused = _forward(patch, trainer, model, site, batch, score, tracked, plan)
    if isinstance(fused, str):
        return fused
    answer, nll = fused.tracked.split([2 * pairs, pairs])
    return fused._replace(result=fused.result._replace(answer=answer, nll=nll))


def _logprobs(rows: Tensor, head: Head, labels: Tensor, ignore_index: int, settings: Settings) -> Tensor:
    return linear_logprobs(rows, labels=labels, **_keywords(head, ignore_index, settings))


def _keywords(head: Head, ignore_index: int, settings: Settings) -> dict[str, Any]:
    """What every fused function is told: ``Head`` and the settings of the patch, by their names."""
    return {**head._asdict(), **asdict(settings), "ignore_index": ignore_index}


@torch.no_grad()
def _logit_means(hidden: Tensor, head: Head, batch: Batch, settings: Settings, out: OrpoOutput | None) -> Tensor:
    """Mean logit of the chosen and the rejected side over all positions but the last, as TRL logs it, ``[2]``.

    Without a softcap that is ``mean(h) . mean(W)``. Under one the scored positions are in ``out`` already, and only
    the others, which no loss needs, cost a product.
    """
    pairs = hidden.shape[0] // 2
    sides = []
    for side, chosen in ((slice(0, pairs), True), (slice(pairs, None), False)):
        rows = hidden[side, :-1]
        if head.softcap is None:
            sides.append(mean_logit(rows.reshape(-1, rows.shape[-1]), head, settings.backend))
            continue
        scored = batch.answer[side, :-1] != batch.ignore_index
        if chosen:
            scored = scored | (batch.nll[:, :-1] != batch.ignore_index)
        if out is None:
            scored = torch.zeros_like(scored)
        share = scored.sum() / scored.numel()
        known = 0.0 if out is None else out.chosen_logits_mean if chosen else out.rejected_logits_mean
        sides.append(known * share + mean_logit(rows[~scored], head, settings.backend) * (1 - share))
    return torch.stack(sides)


@torch.no_grad()
def metrics_of_all_ranks(accelerator: Any, out: OrpoOutput) -> dict[str, float]:
    """``out.metrics()`` over all ranks with one collective and one copy to the host.

    As accelerate's ``gather_for_metrics`` does for each value by itself, samples that a sampler repeated to fill the
    last batch of a data loader are dropped.
    """
    dtype = out.loss.dtype
    of_ranks = accelerator.gather(torch.cat([value.detach().to(dtype).reshape(-1) for value in out])[None])
    state = accelerator.gradient_state
    kept = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
    parts = of_ranks.split([value.numel() for value in out], dim=1)
    gathered = type(out)(
        *(
            part.reshape(-1)[:kept].to(value.dtype) if value.dim() else part.reshape(-1)[:kept].mean()
            for part, value in zip(parts, out, strict=True)
        )
    )
    metrics = gathered.metrics()
    return dict(zip(metrics, torch.stack([value.to(dtype) for value in metrics.values()]).tolist(), strict=True))


def keeps_stock(trainer: Any, reason: str) -> None:
    """Say once per trainer that its loss is not fused, and why."""
    if _first(trainer, "unfused"):
        _say(trainer, logging.WARNING, f"does not fuse the loss of this {type(trainer).__name__}: {reason}")


def _first(trainer: Any, what: str) -> bool:
    """Whether this is to be said of a trainer for the first time; some trainers cannot be hashed."""
    said: set[str] = vars(trainer).setdefault("_orpo_kernels_said", set())
    first = what not in said
    said.add(what)
    return first


def _say(trainer: Any, level: int, line: str) -> None:
    """One line a machine. A program that configures no logging finds it on stderr all the same."""
    if not trainer.accelerator.is_local_main_process:
        return
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.log(level, "orpo_kernels: %s", line)


class _Detour:
    """Stands in for a head's forward: threads that asked for it take their own way, all others the head's."""

    def __init__(self, head: nn.Linear) -> None:
        self.own = head.forward
        self.ways: dict[int, Callable[[Tensor], Tensor]] = {}

    def __call__(self, input: Tensor) -> Tensor:
        way = self.ways.get(threading.get_ident())
        return self.own(input) if way is None else way(input)


_DETOURS = threading.Lock()


@contextmanager
def _detour(head: nn.Linear, way: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``way`` take the place of the head's forward in this thread, inside the block."""
    thread = threading.get_ident()
    with _DETOURS:
        detour = vars(head).get("forward")
        if detour is None:
            detour = head.forward = _Detour(head)  # type: ignore[method-assign]
        detour.ways[thread] = way
    try:
        yield
    finally:
        with _DETOURS:
            del detour.ways[thread]
            if not detour.ways:
                del head.forward


class _Known(NamedTuple):
    fingerprint: tuple[Any, ...]
    reading: Reading


class _Memory:
    """What is known of a model and one of its heads."""

    def __init__(self) -> None:
        self.readings: dict[tuple[bool, bool], _Known] = {}  # in training and in evaluation, with gradients or without
        self.refusal: str | None = None


_memories: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, _Memory]]
_memories = weakref.WeakKeyDictionary()


def _forward(
    patch: Patch,
    trainer: Any,
    model: nn.Module,
    site: Site,
    batch: Batch,
    score: Callable[[Tensor, Head, Settings], R],
    tracked: Callable[[R], Tensor],
    plan: Callable[[Tensor, Head, Settings], str],
) -> Fused[R] | str:
    """One ordinary call of ``model`` with the head intercepted.

    Args:
        score: what is to be computed from hidden states ``[2P, T, H]`` and the head.
        tracked: picks the differentiable tensor of the result, which leaves through the output's ``loss``, so that
            wrappers which walk the output find every parameter.
        plan: says how it was computed.
    """
    memory = _memories.setdefault(site.model, weakref.WeakKeyDictionary()).setdefault(site.head, _Memory())
    if memory.refusal is not None:
        return memory.refusal
    mode = (site.model.training, torch.is_grad_enabled())
    mark = fingerprint(site.model, site.head)
    known = memory.readings.get(mode)
    reading = known.reading if known is not None and known.fingerprint == mark else None
    call = _Pass(patch, trainer, site, batch, score, tracked, reading)
    handle = site.base.register_forward_hook(call.after_base)
    try:
        with _detour(site.head, call.at_head):
            output = model(**batch.inputs)
    except Exception as error:
        if call.reading is not None or call.calls == 0 or call.returned:
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
        memory.refusal = f"{type(site.model).__name__}: {call.refusal}"
        return memory.refusal
    assert call.reading is not None  # without one there is a refusal
    assert call.result is not None
    if reading is None:
        memory.readings[mode] = _Known(mark, call.reading)
        if _first(trainer, "fused"):
            how = plan(call.hidden.detach(), call.reading.head(site.head), patch.settings)
            agreement = "" if call.agreement is None else f" (log-probabilities within {call.agreement:.1g} nats)"
            _say(
                trainer,
                logging.INFO,
                f"fused the loss of this {type(trainer).__name__}: {how}. The model's logits, read as {call.reading}, "
                f"agree on the first batch{agreement}",
            )
    return Fused(call.result, output["loss"], output)


class _Pass(Generic[R]):
    """One forward with the head intercepted: what the head is called with, and what came of it.

    Without a ``reading`` the model is asked for one: the head returns probes instead of a blank, and the loss is
    computed when the model has returned.
    """

    def __init__(
        self,
        patch: Patch,
        trainer: Any,
        site: Site,
        batch: Batch,
        score: Callable[[Tensor, Head, Settings], R],
        tracked: Callable[[R], Tensor],
        reading: Reading | None,
    ) -> None:
        self.patch, self.trainer, self.site, self.batch = patch, trainer, site, batch
        self.score, self.tracked, self.reading = score, tracked, reading
        self.thread = threading.get_ident()
        self.calls = 0
        self.returned = False
        self.refusal: str | None = None
        self.agreement: float | None = None  # nats
        self.result: R | None = None

    def at_head(self, input: Tensor) -> Tensor:
        """In place of the head's forward: logits of few rows, because no loss is made of them."""
        self.calls += 1
        self.hidden = input
        head = self.site.head
        self.refusal = self._misfit()
        if self.refusal is not None or self.reading is not None:
            if self.refusal is None and self.reading is not None:
                self.result = self._scored(self.reading, self.patch.settings)
            return input.new_zeros(1, 1, head.weight.shape[0])
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
            own = type(head).forward(head, rows)
        self.eps = _rounding_of(own, rows, head)
        self.given = torch.cat([probes(head.weight.shape[0], dtype, input.device), own.to(dtype)])
        return self.given[None].clone()  # models write into their logits

    def _misfit(self) -> str | None:
        if self.calls > 1:
            return "its forward called its head more than once"
        if self.hidden.shape[:-1] != self.batch.answer.shape:
            return (
                f"its forward called its head on {list(self.hidden.shape[:-1])} of {list(self.batch.answer.shape)} "
                "positions"
            )
        return None

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
            output["loss"] = self.tracked(self.result)

    def _read(self, logits: Tensor) -> Reading | str:
        if logits.dim() != 3 or logits.shape[:2] != (1, len(self.given)):
            return f"it makes logits {list(logits.shape)} of its head's output {[1, *self.given.shape]}"
        return read(self.given[:PROBES], logits[0, :PROBES])

    def _scored(self, reading: Reading, settings: Settings) -> R:
        result = self.score(self.hidden, reading.head(self.site.head), settings)
        return cast(R, result._replace(logit_means=result.logit_means + reading.shift))

    def _first_scored(self, reading: Reading) -> R:
        """The first call on this machine may be the one that finds a kernel which does not compile or launch here."""
        settings = self.patch.settings
        try:
            result = self._scored(reading, settings)
            if self.hidden.is_cuda:
                torch.cuda.synchronize(self.hidden.device)  # a launch fails late
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if settings.backend != "auto":
                raise
            plain = replace(settings, backend="torch")
            result = self._scored(reading, plain)  # what is wrong with the inputs is wrong here too
            self.patch.settings = plain
            reason = " ".join(str(error).split())
            _say(
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
        rows = self.hidden.detach().reshape(-1, self.hidden.shape[-1])[self.places]
        ours = _logprobs(
            rows, reading.head(self.site.head), labels, self.batch.ignore_index, self.patch.settings
        ).double()
        logits, given = logits.double() - reading.shift, self.given[PROBES:, : reading.vocab].double()
        theirs = torch.log_softmax(logits, -1)
        size = torch.maximum(logits.abs(), reading.logit_scale * given.abs())
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
def _rounding_of(logits: Tensor, rows: Tensor, head: nn.Linear) -> float:
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
