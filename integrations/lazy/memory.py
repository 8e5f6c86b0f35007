"""What would share memory in eager torch, and how a change in place of one tensor reaches the others.

Stand-ins share memory exactly if their ``rows`` do. A scale is a map of each of them where one says it, else it waits
until that one is used. Any other change happens on values computed in full; from then on they are what counts, and an
older view that would have to follow raises. Plain tensors that eager torch would have given as views follow too: views
of values computed in full, and a token's column of logits.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy.nodes import ChangedNode, DenseNode
from orpo_kernels.integrations.lazy.registry import in_place
from orpo_kernels.integrations.lazy.rows import Column
from orpo_kernels.integrations.lazy.stand_in import Edit, LazyLogits, keep
from orpo_kernels.integrations.lazy.symbols import View

_LOST = (
    "orpo_kernels: {} changed lazy logits in place, and this view of them, which was taken before, would have to "
    "follow: take the view after the change, or unfuse(model)"
)


def values(x: LazyLogits, operation: str) -> Tensor:
    """The full logits, on the graph; kept while the stand-in lives, so that they are computed once.

    Without gradient, logits of one position a sequence are what generation reads: no word about them.
    """
    leaf = x.is_leaf and x.requires_grad
    follows = x.requires_grad and torch.is_grad_enabled() and not leaf and not x.changed
    if x.own is None or (follows and not x.own.requires_grad):
        view = x.view_of
        if torch.is_grad_enabled() or view.rows.numel() > view.root.sequences:
            view.root.site.report.materialise(" > ".join((*view.chain, operation)), view.bytes)
        # A leaf's graph has the leaf in it: with a graph of their own its values would keep it alive for ever.
        with torch.set_grad_enabled(x.requires_grad or torch.is_grad_enabled()):  # they may be used again with gradient
            keep(x, x.view_of.dense() if leaf else DenseNode.apply(x))
    assert x.own is not None
    return DenseNode.apply(x, x.own) if leaf and torch.is_grad_enabled() else x.own


def memory_of(view: View) -> int:
    return int(view.rows.untyped_storage().data_ptr())


def sharing(x: LazyLogits) -> list[LazyLogits]:
    """The other live stand-ins whose memory, though maybe another part of it, would be this one's."""
    memory = memory_of(x.view_of)
    found = [each() for each in x.view_of.root.views]
    return [y for y in found if isinstance(y, LazyLogits) and y is not x and memory_of(y.view_of) == memory]


def places(slots: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Which ``slots`` are among others, and where those stand, flat."""
    if not among.numel():
        return torch.zeros_like(slots, dtype=torch.bool), torch.zeros_like(slots)
    found, order = among.reshape(-1).sort()
    at = torch.searchsorted(found, slots).clamp(max=found.numel() - 1)
    return found[at] == slots, order[at]


def _factors(slots: Tensor, edit: Edit, dtype: torch.dtype) -> Tensor:
    """The edit's factor at each of the slots, 1 where it has none."""
    inside, at = places(slots, edit.slots)
    if isinstance(edit.factor, Tensor):
        return edit.factor.reshape(-1)[at].to(dtype).where(inside, 1)
    return torch.ones_like(slots, dtype=dtype).masked_fill_(inside, edit.factor)


# What was given out.


def show(x: LazyLogits, result: Any) -> None:
    """Where a part of a result is a view of the values of ``x``, those are what counts from now on."""
    for y in torch.utils._pytree.tree_leaves(result):
        plain = isinstance(y, Tensor) and not isinstance(y, LazyLogits) and y.layout == torch.strided
        if plain and x.own is not None and y.untyped_storage().data_ptr() == x.own.untyped_storage().data_ptr() != 0:
            x.shown = True
            if y is not x.own:
                y._orpo_view_of = x  # which has to see changes as long as its view is there


def give_column(x: LazyLogits, view: View, tensor: Tensor, token: int) -> None:
    """Let a token's logits of ``x``, as ``x[..., token]`` has them, be known as what eager torch gives a view for."""
    columns, kept = view.root.columns, tensor.detach()
    if not (x.is_leaf and x.requires_grad):  # whose graph has the leaf in it, a cycle
        x.columns.append(tensor)
    columns.append(Column(weakref.ref(tensor), kept, kept._version, memory_of(view), view.slots(), token))
    if len(columns) % 64 == 0:
        columns[:] = [each for each in columns if each.tensor() is not None or each.kept._version != each.version]


def _columns(x: LazyLogits) -> list[Column]:
    """Those that share memory and have a token of this tensor."""
    memory, vocab = memory_of(x.view_of), x.view_of.mapping.vocab
    return [each for each in x.view_of.root.columns if each.memory == memory and each.token < vocab]


def _alive(x: LazyLogits) -> list[tuple[Column, Tensor]]:
    """Columns that somebody has."""
    found = [(each, each.tensor()) for each in _columns(x)]
    return [(each, tensor) for each, tensor in found if tensor is not None]


def _known(x: LazyLogits, column: Column, tensor: Tensor) -> None:
    """What changed a column is known everywhere else."""
    every = x.view_of.root.columns
    every[:] = [each._replace(version=tensor._version) if each is column else each for each in every]


def _vocab_last(x: LazyLogits, own: Tensor) -> Tensor:
    return own if x.view_of.vocab_dim == -1 else own.movedim(x.view_of.vocab_dim, -1)


# Scales.


def scale(x: LazyLogits, view: View, factor: float | Tensor) -> LazyLogits:
    """Let ``x`` stand for ``view``, which is it times a number, or one for each row."""
    others, columns = sharing(x), _alive(x)
    if others or columns:
        slots = x.view_of.slots()
        each = factor.squeeze(-1).expand(slots.shape) if isinstance(factor, Tensor) else factor
        edit = Edit(slots, each, view.mapping.vocab, view.graph if x.requires_grad else None)
        for other in others:
            _follow(other, edit)
        for column, tensor in columns:
            with torch.set_grad_enabled(x.requires_grad):
                tensor.mul_(_factors(column.slots, edit, tensor.dtype))
            _known(x, column, tensor)
    return in_place(x, view)


def _follow(x: LazyLogits, edit: Edit) -> None:
    """Take over what another view of the same memory was scaled by; what no map says waits until x is used."""
    view = x.view_of
    slots = view.slots()
    inside = torch.isin(slots, edit.slots)
    if not inside.any() or x.lost is not None:
        return
    if x.is_leaf and x.requires_grad:
        x.lost = _LOST.format("a scale")
        return
    if x.changed or x.shown:
        _apply(x, edit)
        return
    after, whole = None, not isinstance(edit.factor, Tensor) and bool(inside.all())
    if not x.edits and not _past(x, edit) and edit.vocab >= view.mapping.vocab:
        if view.kind != "logits":
            after = view.after("scale", factor=view.factor * edit.factor) if whole else None
        elif whole:
            assert not isinstance(edit.factor, Tensor)
            mapping = view.mapping.times(edit.factor)
            after = None if mapping is None else view.after("scale", mapping=mapping)
        else:
            factors = _factors(slots, edit, view.root.acc)
            every = torch.ones(view.root.rows.shape, dtype=view.root.acc, device=factors.device)
            every[view.rows] = factors
            once = torch.equal(every[view.rows], factors)  # else a row is there twice, under two numbers
            mapping = view.mapping.times_rows(every) if once else None
            after = None if mapping is None else view.after("scale", mapping=mapping)
    if after is None:
        x.edits.append(edit)
    else:
        with torch.set_grad_enabled(x.requires_grad):
            in_place(x, after)


def _past(x: LazyLogits, edit: Edit) -> bool:
    """Whether an edit was made past the graph of x: then gradients do not see the factor."""
    return x.requires_grad and edit.graph is not x.view_of.graph


def _apply(x: LazyLogits, edit: Edit) -> None:
    """Scale the values of x."""
    with torch.set_grad_enabled(x.requires_grad):
        own = values(x, "scale in place")
        factors = _factors(x.view_of.slots(), edit, own.dtype).unsqueeze(-1)
        with torch.set_grad_enabled(x.requires_grad and not _past(x, edit)):
            _vocab_last(x, own)[..., : edit.vocab].mul_(factors)
        _take(x, own)


# Any other change.


def change(func: Any, name: str, x: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation in place that is no scale: on the values, which stand for this tensor from now on.

    Raises:
        RuntimeError: a view of values in full would have to follow.
    """
    slots = x.view_of.slots()
    if any(y.shown and y.lost is None and torch.isin(y.view_of.slots(), slots).any() for y in sharing(x)):
        raise RuntimeError(
            f"orpo_kernels: {name} would change lazy logits in place, and a view in full of them that was taken before "
            "could not follow: take it after the change, or unfuse(model)"
        )
    with torch.set_grad_enabled(x.requires_grad or torch.is_grad_enabled()):
        own = values(x, name)  # on the graph also where the change is made past it
    rest = torch.utils._pytree.tree_map_only(LazyLogits, lambda y: own if y is x else values(y, name), (args, kwargs))
    func(own, *rest[0], **rest[1])
    _take(x, own)
    _lose_others(x, name)
    for column, tensor in _alive(x):
        inside, at = places(column.slots, slots)
        if inside.any():
            with torch.set_grad_enabled(x.requires_grad):
                now = _vocab_last(x, own)[..., column.token].reshape(-1)[at]
                tensor.copy_(now.to(tensor.dtype).where(inside, tensor))
            _known(x, column, tensor)
    return None if name == "__setitem__" else x


def _take(x: LazyLogits, own: Tensor) -> None:
    """Values that were changed are what x stands for, and where autograd followed the change its gradient is theirs."""
    x.changed, x.own_version = True, own._version
    if not x.is_leaf or not x.requires_grad:
        x.own = own
        if x.requires_grad and own.requires_grad and torch.is_grad_enabled():
            ChangedNode.apply(x, own)


def changed_below(x: LazyLogits, operation: str) -> None:
    """The values of x were written where Python does not see it."""
    assert x.own is not None  # they were computed for that
    x.changed, x.own_version = True, x.own._version
    _lose_others(x, operation)


def _lose_others(x: LazyLogits, name: str) -> None:
    """Stand-ins that would have to follow a change of x cannot be used any more."""
    slots = x.view_of.slots()
    for other in sharing(x):
        if torch.isin(other.view_of.slots(), slots).any():
            other.lost = _LOST.format(name)


def unsettled(x: LazyLogits) -> bool:
    """Whether there may be something for ``settle``."""
    root = x.view_of.root
    return bool(root.in_memory or x.lost is not None or x.edits or root.columns)


def settle(x: LazyLogits) -> None:
    """Take over what was done in place through other tensors that share its memory.

    Raises:
        RuntimeError: it cannot be followed.
    """
    root = x.view_of.root
    if root.in_memory:
        for y in (x, *sharing(x)):
            if y.own is not None and y.own._version != y.own_version and y.lost is None:
                y.changed, y.own_version = True, y.own._version
                _lose_others(y, "an operation on a view of them")
    if x.lost is not None:
        raise RuntimeError(x.lost)
    for edit in x.edits:
        _apply(x, edit)
    x.edits = []
    for column in _columns(x):
        version = column.kept._version
        if version in (column.version, x.columns_known.get(id(column.kept))):
            continue
        inside, at = places(x.view_of.slots(), column.slots)
        tensor = column.tensor()
        if inside.any() and tensor is None and x.requires_grad:
            raise RuntimeError(
                "orpo_kernels: single logits of a token, taken as logits[..., token], were changed in place and are "
                "gone with their gradient: write logits[..., token] = value, or unfuse(model)"
            )
        x.columns_known[id(column.kept)] = version
        if inside.any():
            tensor = column.kept if tensor is None else tensor
            with torch.set_grad_enabled(x.requires_grad):
                own = values(x, "a change of a token's logits")
                now = _vocab_last(x, own)[..., column.token]
                now.copy_(tensor.reshape(-1)[at].to(now.dtype).where(inside, now))
                _take(x, own)
