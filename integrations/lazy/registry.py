"""What the handlers of operations share: where they are found, and how one stand-in is made of another.

A handler takes an operation's arguments as torch does and returns its result, or ``NotImplemented`` where it does not
know this form of it; then, and for every operation without a handler, the full logits are computed. Handlers stand in
``HANDLERS`` under the operation's name, which its function, its method and its operator share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from orpo_kernels.integrations.lazy.nodes import InPlaceNode, ViewNode
from orpo_kernels.integrations.lazy.stand_in import LazyLogits
from orpo_kernels.integrations.lazy.symbols import View

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def made(x: LazyLogits, view: View) -> LazyLogits:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return LazyLogits(view)
    out: LazyLogits = ViewNode.apply(x, view)
    return out


def copied(x: LazyLogits, operation: str, **changes: Any) -> LazyLogits:
    """A stand-in with memory of its own."""
    return made(x, fresh(x.view_of.after(operation, **changes)))


def in_place(x: LazyLogits, view: View) -> LazyLogits:
    x.own = None
    out: LazyLogits = InPlaceNode.apply(x, view)
    return out


def fresh(view: View) -> View:
    """With memory of its own."""
    return view._replace(rows=view.rows.clone(), cut=False)


def position(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


def is_vocab(x: LazyLogits, dim: Any) -> bool:
    """Whether a dimension is the vocabulary's."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    where = x.view_of.vocab_dim
    return isinstance(dim, int) and position(dim, x.dim()) == (x.dim() - 1 if where == -1 else where)
