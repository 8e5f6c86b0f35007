"""What would share memory in eager torch, and how a change in place of one tensor reaches the others.

Stand-ins share memory exactly if their ``rows`` do. A scale is recorded at each of them (``LazyLogits.edits``) and
taken over when it is next used. Any other change happens on values computed in full; from then on they are what
counts, and an older view that would have to follow raises. A plain tensor that eager torch would have given as a view
of the logits is watched by its version.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy.registry import in_place
from orpo_kernels.integrations.lazy.rows import Watched
from orpo_kernels.integrations.lazy.stand_in import DenseNode, LazyLogits, View

_LOST = (
    "orpo_kernels: {} changed lazy logits in place, and this view of them, which was taken before, would have to "
    "follow: take the view after the change, or unfuse(model)"
)


_CANNOT_FOLLOW = (
    "orpo_kernels: {} would change lazy logits in place, and a view in full of them that was taken before could not "
    "follow: take it after the change, or unfuse(model)"
)


def values(x: LazyLogits, operation: str) -> Tensor:
    """The full logits, on the graph; kept while the stand-in lives, so that they are computed once.

    Without gradient, logits of one position a sequence are what generation reads: no word about them.
    """
    if x.own is None or (not x.changed and x.requires_grad and not x.own.requires_grad):
        view = x.view_of
        if torch.is_grad_enabled() or view.rows.numel() > view.root.sequences:
            view.root.site.report.materialise(" > ".join((*view.chain, operation)), view.bytes)
        with torch.enable_grad():  # what is made of them under no_grad has no gradient, but they may be used again
            x.own = DenseNode.apply(x)
    own: Tensor = x.own
    return own


def memory_of(view: View) -> int:
    return int(view.rows.untyped_storage().data_ptr())


def sharing(x: LazyLogits) -> list[LazyLogits]:
    """The other live stand-ins whose memory, not only whose part of it, would be this one's."""
    memory = memory_of(x.view_of)
    found = [each() for each in x.view_of.root.views]
    return [y for y in found if isinstance(y, LazyLogits) and y is not x and memory_of(y.view_of) == memory]


def give_out(view: View, tensor: Tensor, column: int | None, owner: LazyLogits | None = None) -> None:
    """Watch a plain tensor that eager torch would have given as a view: a column, or all values of ``owner``."""
    if not tensor.is_inference():
        root, by = view.root, None if owner is None else weakref.ref(owner)
        one = Watched(weakref.ref(tensor), tensor._version, memory_of(view), view.slots(), column, view.vocab_dim, by)
        root.watched.append(one)
        if len(root.watched) % 64 == 0:
            root.watched[:] = [each for each in root.watched if each.tensor() is not None]


def give_out_views(x: LazyLogits, result: Any) -> None:
    """The values of ``x`` are what counts from now on where a part of a result is a view of them."""
    for y in torch.utils._pytree.tree_leaves(result):
        plain = isinstance(y, Tensor) and not isinstance(y, LazyLogits) and y.layout == torch.strided
        if plain and x.own is not None and y.untyped_storage().data_ptr() == x.own.untyped_storage().data_ptr() != 0:
            x.changed = True
            give_out(x.view_of, x.own, None, x)
            return


def _watched(view: View) -> list[tuple[Watched, Tensor]]:
    """What has been given out and is alive of the memory of a view."""
    memory = memory_of(view)
    found = [(each, each.tensor()) for each in view.root.watched if each.memory == memory]
    return [(each, tensor) for each, tensor in found if tensor is not None]


def _places(slots: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Which ``slots`` are among others, and where those stand, flat."""
    found, order = among.reshape(-1).sort()
    at = torch.searchsorted(found, slots.contiguous()).clamp(max=max(found.numel() - 1, 0))
    return (found[at] == slots, order[at]) if found.numel() else (torch.zeros_like(slots, dtype=torch.bool), at)


def settle(x: LazyLogits) -> None:
    """Take over what was done in place through other views.

    Raises:
        RuntimeError: it cannot be followed.
    """
    for each, tensor in _watched(x.view_of) if x.view_of.root.watched else ():
        known = x.taken_over.get(id(tensor), each.version)
        if tensor._version == known or (each.owner is not None and each.owner() is x):
            continue
        x.taken_over[id(tensor)] = tensor._version
        inside, at = _places(x.view_of.slots(), each.slots)
        if not inside.any():
            continue
        if each.column is None:
            x.lost = _LOST.format("something")
        elif each.column < x.view_of.mapping.vocab:
            own = _own_to_change(x, "a change in place of a token's logits")
            column = _vocab_last(x, own)[..., each.column]
            with torch.enable_grad():
                column.copy_(torch.where(inside, tensor.reshape(-1)[at], column))
    if x.lost is not None:
        raise RuntimeError(x.lost)
    edits, x.edits = x.edits, []
    for slots, vocab, factor in edits:
        inside = torch.isin(x.view_of.slots(), slots)
        if not inside.any():
            continue
        whole = not x.changed and vocab >= x.view_of.mapping.vocab
        view = _partly_scaled(x.view_of, inside, factor) if whole else None
        if view is not None:
            in_place(x, view)
            continue
        own = _own_to_change(x, "a scale in place of a part")
        with torch.enable_grad():
            _vocab_last(x, own)[..., :vocab].mul_(_factors(inside, factor, own).unsqueeze(-1))


def _own_to_change(x: LazyLogits, operation: str) -> Tensor:
    """The values of ``x``, which are what counts from now on."""
    own = values(x, operation)
    if not x.changed and not own.requires_grad:
        own = own.clone()  # others may hold the same
    x.own, x.changed = own, True
    return own


def _vocab_last(x: LazyLogits, own: Tensor) -> Tensor:
    return own if x.view_of.vocab_dim == -1 else own.movedim(x.view_of.vocab_dim, -1)


def _factors(inside: Tensor, factor: float, like: Tensor) -> Tensor:
    return torch.ones_like(inside, dtype=like.dtype).masked_fill_(inside, factor)


def _partly_scaled(view: View, inside: Tensor, factor: float) -> View | None:
    """The view with some of its rows scaled, or None where no map is that."""
    if view.kind != "logits":
        return view.after("scale", factor=view.factor * factor) if inside.all() else None
    if inside.all():
        mapping = view.mapping.times(factor)
    else:
        every = torch.ones(view.root.rows.shape, dtype=view.root.acc, device=inside.device)
        every[view.rows[inside]] = factor
        if (every[view.rows[~inside]] != 1).any():  # a row that is there twice, under two numbers
            return None
        mapping = view.mapping.times_rows(every)
    return None if mapping is None else view.after("scale", mapping=mapping)


def scale(x: LazyLogits, view: View, factor: float | None) -> LazyLogits:
    """Let ``x`` stand for ``view``, which is it times ``factor``, or None for one number a row."""
    slots = x.view_of.slots()
    given_out = [(*one, torch.isin(one[0].slots, slots)) for one in _watched(x.view_of)]
    given_out = [one for one in given_out if one[2].any() and (one[0].column or 0) < view.mapping.vocab]
    if factor is None and given_out:
        raise RuntimeError(_CANNOT_FOLLOW.format("a scale"))
    owners = [each.owner() for each, *_ in given_out if each.owner is not None]
    for other in sharing(x):
        if any(other is owner for owner in owners):
            continue
        if factor is not None and (x.requires_grad or not other.requires_grad):
            other.edits.append((slots, view.mapping.vocab, factor))
        elif torch.isin(other.view_of.slots(), slots).any():
            other.lost = _LOST.format("a scale")
    for each, tensor, inside in given_out:
        assert factor is not None
        by, columns = _factors(inside, factor, tensor), tensor
        if each.column is None:
            by, columns = by.unsqueeze(-1), tensor.movedim(each.vocab_dim, -1)[..., : view.mapping.vocab]
        with torch.set_grad_enabled(x.requires_grad):
            columns.mul_(by)
        _renew(x.view_of, each, tensor)
    return in_place(x, view)


def _renew(view: View, watched: Watched, tensor: Tensor) -> None:
    """What changed a tensor that was given out is known everywhere else."""
    every = view.root.watched
    every[:] = [each._replace(version=tensor._version) if each is watched else each for each in every]


def change(func: Any, name: str, x: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation in place that is no scale: on the values, which stand for this tensor from now on.

    Raises:
        RuntimeError: a view of the logits that is no stand-in would have to follow.
    """
    slots = x.view_of.slots()
    given_out = [
        (each, tensor, *_places(each.slots, slots))
        for each, tensor in _watched(x.view_of)
        if each.owner is None or each.owner() is not x
    ]
    given_out = [one for one in given_out if one[2].any()]
    if any(each.column is None for each, *_ in given_out):
        raise RuntimeError(_CANNOT_FOLLOW.format(name))
    own = values(x, name)
    if not x.changed and not own.requires_grad:
        own = own.clone()
    rest = torch.utils._pytree.tree_map_only(LazyLogits, lambda y: own if y is x else values(y, name), (args, kwargs))
    func(own, *rest[0], **rest[1])
    x.own, x.changed = own, True
    for other in sharing(x):
        if torch.isin(other.view_of.slots(), slots).any():
            other.lost = _LOST.format(name)
    for each, tensor, inside, at in given_out:
        if each.column is not None and each.column < x.view_of.mapping.vocab:
            column = _vocab_last(x, own)[..., each.column].reshape(-1)
            with torch.enable_grad():
                tensor.copy_(torch.where(inside, column[at], tensor))
            _renew(x.view_of, each, tensor)
    return None if name == "__setitem__" else x
