"""``fuse(model)``: let a model's head return lazy logits, so that any loss made of them is computed without them.

``patch_transformers`` does so for every model that a script calls.

The head module's ``forward`` is replaced, nothing else: its own hooks run, and the model is called as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_pre_hook

from orpo_kernels.backends import check_name
from orpo_kernels.integrations.adapters import callees, linear_head, refusal
from orpo_kernels.integrations.detours import BREAKS, replace_forward, restore_forward, uncompiled
from orpo_kernels.integrations.lazy.nodes import lazy_logits
from orpo_kernels.integrations.lazy.report import Report
from orpo_kernels.integrations.lazy.rows import Inputs, Root, Site, expire
from orpo_kernels.integrations.trainer import Settings
from orpo_kernels.settings import Head, Needs

# Libraries whose patched forward of a model computes its loss from hidden states, and does not call the head.
LOSS_WITHOUT_HEAD = ("liger_kernel", "unsloth", "unsloth_zoo", "unsloth_compiled_cache")

_reports: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()
_met: list[tuple[str, Report]] = []
_watching: list[Any] = []  # the handle of the optimisers' hook, once there is one


class _LazyForward:
    """Stands in for the forward of a head."""

    ours = True  # as other code of this package asks a forward that was replaced

    own: Callable[..., Tensor]  # what it stands in for

    def __init__(self, head: nn.Module, site: Site) -> None:
        self.head, self.site = head, site

    @torch._dynamo.disable(reason=BREAKS)
    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        head: Any = self.head
        if args or kwargs or not self._gains(input):  # peft's layers may be told which adapter each sequence takes
            return self.own(input, *args, **kwargs)
        if hasattr(head, "base_layer") and (why := refusal(head)) is not None:  # its adapters may have changed
            self.site.report.note(f"the logits are not lazy, because {why}")
            return self.own(input)
        of_head: Tensor = head.weight
        input, found = linear_head(head, input)
        weight, bias, tail = found.weight, found.bias, found.tail
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:  # which autocast leaves alone
            to = torch.get_autocast_dtype(device)
            input, weight = input.to(to), weight.to(to)
            bias = None if bias is None else bias.to(to)
        if input.dtype != weight.dtype:
            return self.own(input)  # whose error names both
        needs, inputs = Needs.of(input, Head(weight, bias, tail=tail)), Inputs(input, weight, bias)
        # A copy of the weight, cast or with adapters beside it, is not what an optimiser changes.
        trainable = weight is of_head and weight.requires_grad
        root = Root(self.site, inputs, needs, sequences=input.shape[:-2].numel(), trainable=trainable, tail=tail)
        self.site.report.calls += 1
        self.site.report.rows += root.rows.numel()
        return lazy_logits(root, input, weight, bias, tail, input.dtype)

    def replica(self) -> nn.Module:
        """For ``nn.DataParallel``, which gathers the logits of all devices: the head with its stock forward."""
        copy = nn.Module._replicate_for_data_parallel(self.head)
        for name in ("forward", "_replicate_for_data_parallel"):
            del vars(copy)[name]
        return copy

    def _gains(self, input: Tensor) -> bool:
        """Whether logits are of a length and in a mode in which a loss may be made of them."""
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if tracing or torch.compiler.is_exporting() or type(input) not in (Tensor, nn.Parameter):
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return False  # vmap, torch.func and forward-mode derivatives
        if input.dim() < 2 or not input.is_floating_point() or input.is_meta or input.numel() == 0:
            return False
        return torch.is_grad_enabled() or (not torch.is_inference_mode_enabled() and input.shape[-2] > 1)


def fuse(
    model: nn.Module,
    head: nn.Module | None = None,
    *,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> nn.Module:
    """Let the model's head return lazy logits, in place; ``unfuse`` takes that back.

    Log-probabilities, cross-entropy, entropy, accuracy and whatever else a training loss makes of logits are then
    computed without them, and the model's output is used as before. An operation that is not known gets the full
    logits, with a warning that names its line. ``print(fusion_report(model))`` says what became of the logits.

    A model whose head is neither a plain ``nn.Linear`` nor one with peft's LoRA is left alone: a warning and the report
    say why. Fuse after peft has put its adapters in, or once more.

    Args:
        model: a model whose ``get_output_embeddings()`` names its head, also inside peft; or any module with ``head``.
        head: the head, where the model does not name it.
        backend: as in ``orpo_loss``; None takes the environment's ``ORPO_KERNELS_BACKEND``, else "auto".
        workspace_bytes: as in ``orpo_loss``; None takes ``ORPO_KERNELS_WORKSPACE_BYTES``, else the default.

    Returns:
        The model.

    Raises:
        ValueError: no such backend or number of bytes, or a head that is not a part of the model.
    """
    settings = Settings.chosen(backend, workspace_bytes)
    check_name(settings.backend)
    if head is not None and all(head is not module for module in model.modules()):
        raise ValueError("head must be a module of the model, got one that is no part of it: pass its own")
    found = [head] if head is not None else heads_of(model)
    report = fusion_report(model)
    if isinstance(found, str):
        report.refusal = found
        report.note(f"{type(model).__name__} is not fused, because {found}")
        return model
    report.refusal, report.fused = None, True
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(expire))
    ours = {id(module): forward for forward, module in _lazy_heads(model)}
    for module in found:
        inner = getattr(module, "base_layer", None)
        if id(inner) in ours:  # fused before peft's layer came around it
            _give_back(ours[id(inner)], inner)
        forward = ours.get(id(module))
        if forward is None:  # also the head that took an earlier one's place
            forward = _LazyForward(module, Site(module, *settings))
            forward.own = replace_forward(module, forward)
            module._replicate_for_data_parallel = forward.replica  # type: ignore[method-assign]
        forward.site.report = report
        forward.site.backend, forward.site.workspace_bytes = settings
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give the model's head its own forward back. Logits that are there already stay lazy."""
    report = fusion_report(model)
    for forward, module in _lazy_heads(model):
        _give_back(forward, module)
    report.fused = False
    return model


def _give_back(forward: _LazyForward, module: Any) -> None:
    """Give a module its own forward back."""
    vars(module).pop("_replicate_for_data_parallel", None)
    if vars(module).get("_old_forward") is forward:
        module._old_forward = forward.own
    else:
        restore_forward(module, forward, forward.own)


def fusion_report(model: nn.Module) -> Report:
    """What became of the model's lazy logits since ``fuse`` or the report's ``reset``.

    A copy of a fused model has a report of its own; models that share a head share its report.
    """
    heads = _lazy_heads(model)
    if heads:
        _reports[model] = heads[0][0].site.report
    elif model not in _reports:
        _reports[model] = Report()
    report = _reports[model]
    for forward, _ in heads:
        if forward.site.report is not report:
            report.take(forward.site.report)
            forward.site.report = report
    report.fused = bool(heads)
    if all(report is not met for _, met in _met):
        _met.append((type(model).__name__, report))
    return report


def _lazy_heads(model: nn.Module) -> list[tuple[_LazyForward, nn.Module]]:
    """Heads that were fused, as they are in the model now: wrapped since, as peft does, copied or replaced."""
    found: list[tuple[Any, nn.Module]] = []
    for module in model.modules():
        here = vars(module).get("forward")
        # A patched trainer's detour and accelerate's hooks keep what they call.
        places = here, getattr(here, "before", None), vars(module).get("_old_forward")
        found += [(forward, module) for forward in places if isinstance(forward, _LazyForward)]
    return found


def patch_transformers(*, backend: str | None = None, workspace_bytes: int | None = None) -> None:
    """``fuse`` every model of transformers that can generate, when it is first called, whoever trains it.

    Models may exist already. Patching twice is patching once, with the settings of the second for models to come.

    Args:
        backend, workspace_bytes: as ``fuse`` has them.

    Raises:
        ImportError: transformers is missing.
        ValueError: no such backend or number of bytes.
    """
    from transformers.modeling_utils import PreTrainedModel

    _everywhere.settings = Settings.chosen(backend, workspace_bytes)
    PreTrainedModel.__call__ = _everywhere


def unpatch_transformers() -> None:
    """Give transformers' models their own call back, and those that were fused by it their head's forward."""
    from transformers.modeling_utils import PreTrainedModel

    if vars(PreTrainedModel).get("__call__") is _everywhere:
        del PreTrainedModel.__call__
    _everywhere.settings = None
    for model in list(_everywhere.seen):
        unfuse(model)
    _everywhere.seen.clear()


class _Everywhere:
    """What ``patch_transformers`` has put in place, and where else a script may have put it: one that replaces the call
    of a model's class for a while, as ms-swift does, reads it from there and gives it back to that class."""

    def __init__(self) -> None:
        self.settings: Settings | None = None  # of models to come; None while nothing is patched
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __get__(self, model: Any, cls: type) -> Callable[..., Any]:
        """``PreTrainedModel.__call__``: read when a model is called, and when ``torch.compile`` wraps one.

        Dynamo reads it from the class and gets the stock method, and so traces calls of models within models as ever.
        """
        if model is None:
            return self if CompileContext.try_get() is None else nn.Module.__call__
        if self.settings is not None and model not in self.seen:
            self.seen.add(model)
            if model.can_generate():  # before 4.52 every model is a GenerationMixin, those without a head too
                fuse(model, **self.settings._asdict())
        bound: Callable[..., Any] = nn.Module.__call__.__get__(model)
        return bound

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """``PreTrainedModel.__call__(model, ...)``."""
        return self.__get__(model, type(model))(*args, **kwargs)


_everywhere = _Everywhere()


def reports() -> list[tuple[str, Report]]:
    """The class and the report of every model that ``fuse`` has met, also of those that are gone."""
    return list(_met)


def heads_of(model: nn.Module) -> list[nn.Module] | str:
    """The modules that make the model's logits, or why there is none to replace."""
    model = uncompiled(model)
    whose = getattr(getattr(model.forward, "__func__", model.forward), "__module__", "").partition(".")[0]
    if whose in LOSS_WITHOUT_HEAD:
        return f"its forward is {whose}'s, which computes its loss without calling the head"
    try:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        return f"{type(model).__name__} names no output embeddings: pass head="
    found = [uncompiled(module) for module in callees(head)]
    for module in found:
        if (why := refusal(module)) is not None:
            return why
        here = vars(module).get("_old_forward", vars(module).get("forward"))
        if here is not None and not getattr(here, "ours", False):
            return "its head's forward was replaced already"
    return found
