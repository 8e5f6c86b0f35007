"""What the handlers of operations share: where they are found, and how one stand-in is made of another.

A handler takes an operation's arguments as torch does and returns its result, or ``NotImplemented`` where it does not
know this form of it; then, and for every operation without a handler, the full logits are computed. Handlers stand in
``HANDLERS`` under the operation's name, which its function, its method and its operator share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy.stand_in import Edit, InPlaceNode, LazyLogits, View, ViewNode

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def made(x: LazyLogits, view: View) -> LazyLogits:
    out: LazyLogits = ViewNode.apply(x, view)
    return out


def copied(x: LazyLogits, operation: str, **changes: Any) -> LazyLogits:
    """A stand-in with memory of its own."""
    return made(x, x.view_of.after(operation, rows=x.view_of.rows.clone(), **changes))


def in_place(x: LazyLogits, view: View) -> LazyLogits:
    x.own = None
    out: LazyLogits = InPlaceNode.apply(x, view)
    return out


def fresh(view: View) -> View:
    """With memory of its own."""
    return replace(view, rows=view.rows.clone())


def sharing(x: LazyLogits) -> list[LazyLogits]:
    """The other live stand-ins that would share memory with this one."""
    memory = x.view_of.rows.untyped_storage().data_ptr()
    found = [each() for each in x.view_of.root.views]
    return [y for y in found if y is not None and y is not x and y.view_of.rows.untyped_storage().data_ptr() == memory]  # type: ignore[misc,attr-defined]


def follow(x: LazyLogits, edit: Edit) -> None:
    """Take over what another view of the same memory was scaled by; what no map says waits until x is used."""
    view = x.view_of
    inside = torch.isin(view.rows.contiguous(), edit.rows.contiguous())
    if not inside.any():
        return
    after, whole = None, not isinstance(edit.factor, Tensor) and bool(inside.all())
    if not x.edits and not follows_past(x, edit) and edit.vocab >= view.mapping.vocab:
        if view.kind == "logits":
            every = None if whole else of_rows(replace(view, rows=view.root.rows), edit)
            mapping = view.mapping.times(edit.factor) if every is None else view.mapping.times_rows(every)  # type: ignore[arg-type]
            after = None if mapping is None else view.after("scale", mapping=mapping)
        elif whole:
            after = view.after("scale", factor=view.factor * edit.factor)
    if after is None:
        x.edits.append(edit)
    else:
        with torch.set_grad_enabled(x.requires_grad):
            in_place(x, after)


def follows_past(x: LazyLogits, edit: Edit) -> bool:
    """Whether an edit was made past the graph of x: then gradients do not see the factor."""
    return x.requires_grad and edit.graph is not x.view_of.graph


def of_rows(view: View, edit: Edit) -> Tensor:
    """The edit's factor at each row of a view, 1 where it has none."""
    every = torch.ones(view.root.rows.shape, dtype=view.root.acc, device=edit.rows.device)
    each = edit.factor.reshape(-1) if isinstance(edit.factor, Tensor) else torch.full_like(every[:1], edit.factor)
    every[edit.rows.reshape(-1)] = each.to(every.dtype)
    return every[view.rows]


def position(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


def is_vocab(x: LazyLogits, dim: Any) -> bool:
    """Whether a dimension is the vocabulary's."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    where = x.view_of.vocab_dim
    return isinstance(dim, int) and position(dim, x.dim()) == (x.dim() - 1 if where == -1 else where)
