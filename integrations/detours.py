"""Ways through a module that one thread takes for one call: another forward of a head, and who is told of an output.

A model that ``torch.compile`` has compiled is traced anew when the forward or the hooks of a module in it change. There
what stands in their place stays after its first use and asks, outside the compiled graphs, whether the thread that
comes by has a way of its own. Elsewhere nothing stays behind a call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

BREAKS = "orpo_kernels computes logits and losses of logits outside of compiled graphs: compile with fullgraph=False"

_CHANGES = threading.Lock()
_kept: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules in which something stays


def uncompiled(module: Any) -> Any:
    """The module itself, where ``torch.compile`` returned a wrapper around it."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model is compiled, by ``torch.compile(part)`` or by ``part.compile()``."""
    return any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in model.modules())


class Detour:
    """Stands in for a head's forward: threads that asked for it take their own way, all others what was there."""

    ours = True

    def __init__(self, head: nn.Module) -> None:
        self.own: Callable[..., Tensor] = head.forward
        self.before = vars(head).get("forward")  # lazy logits', or None
        self.ways: dict[int, Callable[[Tensor], Tensor]] = {}

    @torch._dynamo.disable(reason=BREAKS)
    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        way = self.ways.get(threading.get_ident())
        # What peft's layers are told beside hidden states, as which adapter each sequence takes, no way knows.
        return self.own(input, *args, **kwargs) if way is None or args or kwargs else way(input)

    def leave(self, head: nn.Module) -> None:
        del head.forward
        if self.before is not None:
            head.forward = self.before  # type: ignore[method-assign]


class _Watch:
    """A forward hook that tells threads that asked of a module's output."""

    def __init__(self) -> None:
        self.told: dict[int, Callable[[Any], None]] = {}

    @torch._dynamo.disable(reason=BREAKS)
    def __call__(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        told = self.told.get(threading.get_ident())
        if told is not None:
            told(output)


@contextmanager
def detour(head: nn.Module, way: Callable[[Tensor], Tensor], *, stays: bool = False) -> Iterator[None]:
    """Let ``way`` take the place of the head's forward in this thread, inside the block."""
    thread = threading.get_ident()
    with _CHANGES:
        here: Any = vars(head).get("forward")
        if not isinstance(here, Detour):
            here = head.forward = Detour(head)  # type: ignore[method-assign]
        here.ways[thread] = way
        if stays:
            _kept.add(head)
    try:
        yield
    finally:
        with _CHANGES:
            del here.ways[thread]
            if not here.ways and head not in _kept:
                here.leave(head)


@contextmanager
def watch(
    module: nn.Module, told: Callable[[Any], None], *, first: bool = False, stays: bool = False
) -> Iterator[None]:
    """Tell ``told`` what the module returns in this thread, inside the block: before other hooks, or after them."""
    thread = threading.get_ident()
    with _CHANGES:
        here = next((hook for hook in module._forward_hooks.values() if isinstance(hook, _Watch)), None)
        if here is None:
            here = _Watch()
            module.register_forward_hook(here, prepend=first)
        here.told[thread] = told
        if stays:
            _kept.add(module)
    try:
        yield
    finally:
        with _CHANGES:
            del here.told[thread]
            if not here.told and module not in _kept:
                _forget_watch(module)


def _forget_watch(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _Watch) and not hook.told:
            del module._forward_hooks[key]


def leave_nothing(modules: list[nn.Module] | None = None) -> None:
    """Take away what stays in compiled models, all of them or some modules, but what a thread is using."""
    with _CHANGES:
        for module in list(_kept) if modules is None else modules:
            _kept.discard(module)
            here = vars(module).get("forward")
            if isinstance(here, Detour) and not here.ways:
                here.leave(module)
            _forget_watch(module)


def replace_forward(head: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Put ``forward`` in the place of the head's own, under a detour if there is one; what was there."""
    with _CHANGES:
        here: Any = vars(head).get("forward")
        if isinstance(here, Detour):
            below, here.own, here.before = here.own, forward, forward
            return below
        was: Callable[..., Tensor] = head.forward
        head.forward = forward  # type: ignore[method-assign,assignment]
        return was


def restore_forward(head: nn.Module, forward: Callable[..., Tensor], own: Callable[..., Tensor]) -> None:
    """Put ``own`` back where ``replace_forward`` has put ``forward``, under a detour if there is one."""
    with _CHANGES:
        here: Any = vars(head).get("forward")
        if isinstance(here, Detour) and here.before is forward:
            here.own, here.before = own, None if own == type(head).forward.__get__(head) else own
        elif here is forward:
            del head.forward
            if head.forward != own:  # one that somebody had put there
                head.forward = own  # type: ignore[method-assign,assignment]
