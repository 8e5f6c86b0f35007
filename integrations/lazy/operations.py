"""What an operation on lazy logits becomes: answered by its handler, or by the full logits.

Handlers stand in ``views``, ``elementwise`` and ``reductions``, and are found by name (``registry``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy import elementwise, reductions, views  # noqa: F401 - they bring the handlers
from orpo_kernels.integrations.lazy.registry import HANDLERS, handles, in_place, sharing
from orpo_kernels.integrations.lazy.stand_in import DenseNode, LazyLogits, copy_of

# Operations that only look at a tensor's metadata or its place on the graph.
METADATA = frozenset(
    """
    size dim ndimension numel nelement stride storage_offset element_size get_device is_floating_point is_complex
    is_signed is_same_size is_tensor is_storage is_shared is_pinned is_inference is_conj is_neg is_coalesced has_names
    result_type can_cast register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward
    __hash__ __len__
    """.split()  # noqa: SIM905 - a list of so many strings would be read by nobody
)


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return _property(func, name, args, kwargs)
    if name in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    lazies = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)]
    for x in lazies:
        if x.lost is not None:
            raise RuntimeError(x.lost)
        _settle(x)
    if "input" in kwargs and not args:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    if name in HANDLERS and not any(x.changed for x in lazies) and kwargs.get("out") is None:
        result = HANDLERS[name](*args, **kwargs)
        if result is not NotImplemented:
            return result
    if _changes_first(func, name) and args and isinstance(args[0], LazyLogits):
        return _change(func, name, args, kwargs)
    args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, lambda x: values(x, name), (args, kwargs))
    return func(*args, **kwargs)


def values(x: LazyLogits, operation: str) -> Tensor:
    """The full logits, on the graph; kept while the stand-in lives, so that they are computed once.

    Without gradient, logits of one position a sequence are what generation reads: no word about them.
    """
    if x.own is None or (not x.changed and x.requires_grad and torch.is_grad_enabled() and not x.own.requires_grad):
        view = x.view_of
        if torch.is_grad_enabled() or view.rows.numel() > view.root.sequences:
            view.root.site.report.materialise(" > ".join((*view.chain, operation)), view.bytes)
        x.own = DenseNode.apply(x)
    own: Tensor = x.own
    return own


def _changes_first(func: Any, name: str) -> bool:
    if name in ("__setitem__", "set_", "resize_", "resize_as_"):
        return True
    in_place = (
        name.startswith("__i")
        and name.endswith("__")
        and name not in ("__invert__", "__index__", "__int__", "__init__")
    )
    return in_place or (name.endswith("_") and not name.endswith("__"))


def _change(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation in place that is no scale: on the values, which stand for this tensor from now on."""
    x: LazyLogits = args[0]
    own = values(x, name)
    if not x.changed and not (own.requires_grad and torch.is_grad_enabled()):
        own = own.clone()
    rest = torch.utils._pytree.tree_map_only(
        LazyLogits, lambda y: own if y is x else values(y, name), (args[1:], kwargs)
    )
    func(own, *rest[0], **rest[1])
    x.own, x.changed = own, True
    for other in sharing(x):
        other.lost = (
            f"orpo_kernels: {name} changed lazy logits in place, and this view of them, which was taken before, would "
            "have to follow: take the view after the change, or unfuse(model)"
        )
    return None if name == "__setitem__" else x


def _settle(x: LazyLogits) -> None:
    """Take over what was done in place through other views."""
    edits, x.edits = x.edits, []
    for rows, factor in edits:
        view = x.view_of
        inside = torch.isin(view.rows, rows)
        if not inside.any():
            continue
        if inside.all():
            mapping = view.mapping.times(factor)
        else:
            every = torch.ones(view.root.rows.shape, dtype=view.root.acc, device=rows.device)
            every[rows.reshape(-1)] = factor
            mapping = view.mapping.times_rows(every)
        if mapping is None:
            raise RuntimeError(
                "orpo_kernels: a part of these lazy logits was scaled in place through another view, which cannot be "
                "followed here: use that view, or unfuse(model)"
            )
        in_place(x, view.after("scale", mapping=mapping))


def _property(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    of = getattr(getattr(func, "__self__", None), "__name__", "")
    x = args[0]
    if name == "__get__" and of in ("T", "mT", "H", "mH"):
        return call(torch.Tensor.transpose, (x, -2, -1), {}) if x.dim() > 1 else x
    if name == "__get__" and of == "data":
        return copy_of(x)
    if name == "__set__" and of == "data":
        raise RuntimeError("orpo_kernels: lazy logits cannot take other data: unfuse(model) for such code")
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


# What a process, a file or a person asks of a tensor.


def _shown(x: LazyLogits, *_: Any, **__: Any) -> str:
    grad = f", grad_fn=<{type(x.grad_fn).__name__}>" if x.grad_fn is not None else ""
    return f"LazyLogits({x.view_of.kind}, shape={tuple(x.shape)}, dtype={x.dtype}, device={x.device}{grad})"


HANDLERS["__repr__"] = HANDLERS["__str__"] = _shown
HANDLERS["__format__"] = lambda x, spec="": _shown(x)


@handles("__reduce_ex__", "__deepcopy__")
def _pickled(x: LazyLogits, argument: Any) -> Any:
    """As plain tensors: a stand-in would take the hidden states and the whole head along."""
    if x.grad_fn is not None and isinstance(argument, dict):
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol: detach() first")
    plain = values(x.detach(), "a copy" if isinstance(argument, dict) else "pickle")
    return plain.clone() if isinstance(argument, dict) else plain.__reduce_ex__(argument)
