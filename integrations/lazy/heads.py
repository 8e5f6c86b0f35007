"""``fuse(model)``: let a model's head return lazy logits, so that any loss made of them is computed without them.

The head module's ``forward`` is replaced, nothing else: its own hooks run, and the model is called as before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from orpo_kernels.backends import check_name
from orpo_kernels.integrations.lazy.report import Report
from orpo_kernels.integrations.lazy.rows import Root, Site, expire
from orpo_kernels.integrations.lazy.stand_in import lazy_logits
from orpo_kernels.integrations.trainer import Settings
from orpo_kernels.settings import Head, Needs

_reports: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()
_sites: weakref.WeakKeyDictionary[nn.Module, list[_LazyForward]] = weakref.WeakKeyDictionary()
_watching: list[Any] = []  # the handle of the optimisers' hook, once there is one


class _LazyForward:
    """Stands in for the forward of a head."""

    def __init__(self, head: nn.Linear, site: Site) -> None:
        self.head, self.site, self.own = head, site, head.forward

    @torch._dynamo.disable
    def __call__(self, input: Tensor) -> Tensor:
        head = self.head
        if not self._gains(input):
            return self.own(input)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        device = input.device.type
        if torch.is_autocast_enabled(device):
            to = torch.get_autocast_dtype(device)
            input, weight = input.to(to), weight.to(to)
            bias = None if bias is None else bias.to(to)
        if input.dtype != weight.dtype:
            return self.own(input)  # whose error names both
        needs = Needs.of(input, Head(weight, bias))
        root = Root(self.site, input.reshape(-1, input.shape[-1]), weight, bias, needs)
        self.site.report.calls += 1
        return lazy_logits(root, input, weight, bias, input.dtype)

    def _gains(self, input: Tensor) -> bool:
        """Whether logits are of a length and in a mode in which a loss may be made of them."""
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if tracing or torch.compiler.is_exporting() or type(input) not in (Tensor, nn.Parameter):
            return False
        if input.dim() < 2 or not input.is_floating_point() or input.is_meta or input.numel() == 0:
            return False
        return torch.is_grad_enabled() or (not torch.is_inference_mode_enabled() and input.shape[-2] > 1)


def fuse(
    model: nn.Module,
    head: nn.Linear | None = None,
    *,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> nn.Module:
    """Let the model's head return lazy logits, in place; ``unfuse`` takes that back.

    Log-probabilities, cross-entropy, entropy, accuracy and whatever else a training loss makes of logits are then
    computed without them, and the model's output is used as before. An operation that is not known gets the full
    logits, with a warning that names its line. ``print(fusion_report(model))`` says what became of the logits.

    A model whose head is no plain ``nn.Linear`` is left alone: a warning and the report say why.

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
    report = _reports.setdefault(model, Report())
    if isinstance(found, str):
        report.refusal = found
        report.note(f"{type(model).__name__} is not fused, because {found}")
        return model
    if report.fused:
        for forward in _sites[model]:
            forward.site.backend, forward.site.workspace_bytes = settings
        return model
    report.refusal, report.fused = None, True
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(expire))
    for module in found:
        site = Site(module, settings.backend, settings.workspace_bytes)
        site.report = report
        forward = _LazyForward(module, site)
        module.forward = forward  # type: ignore[method-assign,assignment]
        _sites.setdefault(model, []).append(forward)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give the model's head its own forward back. Logits that are there already stay lazy."""
    for forward in _sites.pop(model, []):
        if vars(forward.head).get("forward") is forward:
            del forward.head.forward
    if model in _reports:
        _reports[model].fused = False
    return model


def fusion_report(model: nn.Module) -> Report:
    """What became of the model's lazy logits since ``fuse`` or the report's ``reset``."""
    return _reports.setdefault(model, Report())


def heads_of(model: nn.Module) -> list[nn.Linear] | str:
    """The linear modules that make the model's logits, or why there is none to replace."""
    try:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        return f"{type(model).__name__} names no output embeddings: pass head="
    found = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        found = [head.original_module, *head.modules_to_save.values()]
    for module in found:
        if type(module) is not nn.Linear:
            return f"its head is a {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"
        if "forward" in vars(module) and not isinstance(module.forward, _LazyForward):
            return "its head's forward was replaced already"
    return found
