"""The tensors that stand for logits and for their gradients.

``LazyLogits`` has the shape of logits and no memory. It is the output of an autograd node, and so is every view of it:
hooks of DDP, FSDP and DeepSpeed on a model's output fire as ever. Its gradient is a ``LazyGrad``, which adds up, scales
and passes through views without being computed; the head's node (``nodes``) turns it into those of hidden and weight.

Which rows of the root a view has is an integer tensor that goes through the same views as the logits would. It tells
aliasing too: two views share memory, as eager logits would, exactly if their ``rows`` do.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import uncast
from orpo_kernels.integrations.lazy.rows import Inputs
from orpo_kernels.integrations.lazy.symbols import Terms, View, added

_aten = torch.ops.aten


@lru_cache(256)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Strides under which the vocabulary is not contiguous.

    Libraries that launch a kernel of their own on logits look at the last stride first, and otherwise take the way of
    plain torch, which can be recognised.
    """
    strides, step = [], 1
    for size in shape[:-1]:
        strides.append(step)
        step *= max(size, 1)
    return *strides, max(step, 2)


class Edit(NamedTuple):
    """A scale in place of a view that shares memory with others."""

    slots: Tensor  # ``View.slots``
    factor: float | Tensor  # of all of them, or of each
    vocab: int  # columns, from the first
    graph: object  # ``View.graph`` of what was scaled where autograd followed it, else None


# What the handlers themselves ask of a stand-in, many times an operation. Its shape, dtype and device are its view's.
_PLAIN = frozenset(getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn"))


class LazyLogits(torch.Tensor):
    """A tensor of logits, or of what a loss first makes of them, that is not there."""

    view_of: View
    own: Tensor | None  # the values, once something changed them in place or needed all of them
    changed: bool  # whether ``own`` is no longer what the view says
    shown: bool  # whether somebody may have a view of ``own``
    lost: str | None  # why it cannot be used any more
    inputs: Inputs  # of the root, which live as long as this does
    own_version: int  # of ``own`` as it was computed
    edits: list[Edit]  # of views that share memory
    columns: list[Tensor]  # single logits of a token, which may be changed in place with their last name gone
    columns_known: dict[int, int]  # versions of tensors, by id, whose changes it has taken over

    @staticmethod
    def __new__(cls, view: View) -> LazyLogits:
        shape = view.shape
        self: LazyLogits = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=_strides(shape), dtype=view.dtype, device=view.rows.device
        )
        self.view_of, self.own, self.changed, self.lost, self.edits = view, None, False, None, []
        self.shown, self.columns, self.columns_known = False, [], {}
        self.own_version, self.inputs = 0, view.root.inputs()
        views = view.root.views
        views.append(weakref.ref(self))
        if len(views) % 64 == 0:
            views[:] = [each for each in views if each() is not None]
        return self

    def __init__(self, view: View) -> None:
        pass

    shape = property(lambda self: self.view_of.shape)  # type: ignore[assignment]
    dtype = property(lambda self: self.view_of.dtype)  # type: ignore[assignment]
    device = property(lambda self: self.view_of.rows.device)  # type: ignore[assignment]

    def dim(self) -> int:
        return self.view_of.rows.dim() + 1

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        from orpo_kernels.integrations.lazy.operations import call

        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The net below Python's functions: autograd's own detach, and whatever C++ calls."""
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return copy_of(args[0])
        written = _written(func, args, kwargs)
        if any(func.namespace != "c10d" or (x.requires_grad and torch.is_grad_enabled()) for x in written):
            raise RuntimeError(
                f"orpo_kernels: {func} would change lazy logits in place where it cannot be followed: "
                "unfuse(model) for such code"
            )
        values = torch.utils._pytree.tree_map_only(LazyLogits, lambda x: computed(x, str(func)), (args, kwargs))
        result = func(*values[0], **values[1])
        if written:  # by a collective, whose result arrives in the values that were computed
            from orpo_kernels.integrations.lazy.memory import changed_below

            for x in written:
                changed_below(x, str(func))
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[LazyLogits]:
    """The stand-ins that an operation writes into. Collectives do not declare it of their first argument."""
    if func.namespace == "c10d":
        into = args[:1] if func._opname.endswith("_") else ()
    else:
        declared = func._schema.arguments
        into = (
            *(value for argument, value in zip(declared, args, strict=False) if _mutates(argument)),
            *(kwargs[argument.name] for argument in declared if _mutates(argument) and argument.name in kwargs),
        )
    return [x for x in torch.utils._pytree.tree_leaves(into) if isinstance(x, LazyLogits)]


def _mutates(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def copy_of(x: LazyLogits) -> LazyLogits:
    """Another tensor that stands for the same, unknown to autograd."""
    copy = LazyLogits(x.view_of._replace(graph=object()))
    copy.own = None if x.own is None else x.own.detach()
    copy.shown, copy.columns_known = x.shown, dict(x.columns_known)
    copy.own_version, copy.changed, copy.lost, copy.edits = x.own_version, x.changed, x.lost, list(x.edits)
    return copy


def computed(x: LazyLogits, operation: str) -> Tensor:
    """The values of a stand-in, unknown to autograd, kept as long as it lives."""
    if x.lost is not None:
        raise RuntimeError(x.lost)
    if x.edits:
        raise RuntimeError(
            f"orpo_kernels: {operation} asks for lazy logits that were changed in place through another view, which it "
            "cannot follow: use that view, or unfuse(model)"
        )
    if x.own is None:
        x.view_of.root.site.report.materialise(operation, x.view_of.bytes)
        keep(x, x.view_of.dense())
    assert x.own is not None
    return x.own.detach()


def keep(x: LazyLogits, own: Tensor) -> None:
    """Take values as those that the stand-in stands for."""
    x.own, x.own_version, x.view_of.root.in_memory = own, own._version, True


class LazyGrad(torch.Tensor):
    """The gradient of a stand-in, as terms; ``view`` is what a dense gradient added to it is a gradient of."""

    view_of: View
    terms: Terms
    inputs: Inputs | None  # of the root, which live as long as this does; a checkpoint's are gone before its backward

    @staticmethod
    def __new__(cls, view: View, terms: Terms) -> LazyGrad:
        shape = view.shape
        self: LazyGrad = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=_strides(shape), dtype=view.dtype, device=view.rows.device
        )
        self.view_of, self.terms, self.inputs = view, terms, view.root.held()
        return self

    def __init__(self, view: View, terms: Terms) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        first = args[0]
        if name in ("detach", "alias", "clone") and isinstance(first, LazyGrad):
            return LazyGrad(first.view_of, first.terms)
        if name == "_to_copy" and isinstance(first, LazyGrad) and kwargs.get("device") in (None, first.device):
            return LazyGrad(first.view_of._replace(dtype=kwargs.get("dtype") or first.dtype), first.terms)
        if name in ("add", "add_") and not kwargs:
            a, b = args[:2]
            own = a if isinstance(a, LazyGrad) else b
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                total = LazyGrad(own.view_of, added(terms_of(a, own.view_of), terms_of(b, own.view_of)))
                if name == "add":
                    return total
                if isinstance(a, LazyGrad):
                    a.terms = total.terms
                    return a
        if name in ("mul", "div", "mul_", "div_", "neg") and isinstance(first, LazyGrad) and not kwargs:
            factor = -1.0 if name == "neg" else args[1]
            if not isinstance(factor, Tensor) or (factor.numel() == 1 and type(factor) is not LazyGrad):
                by = 1 / factor if name.startswith("div") else factor
                by = by.reshape(()) if isinstance(by, Tensor) else by
                terms = {key: term.times(by) for key, term in first.terms.items()}
                if not name.endswith("_"):
                    return LazyGrad(first.view_of, terms)
                first.terms = terms
                return first
        if name == "isnan":  # of every entry where it is of one, as checks of anomalies want to know
            found = torch.stack([term.any_nan() for term in first.terms.values()]).any()
            return found.expand(first.shape)
        if any(_mutates(argument) for argument in func._schema.arguments) and isinstance(first, LazyGrad):
            values = torch.utils._pytree.tree_map_only(LazyGrad, dense_grad, (args, kwargs))
            result = func(*values[0], **values[1])
            first.terms = first.view_of.terms_of_dense(values[0][0])
            return first if isinstance(result, Tensor) else result
        views = any(result.alias_info is not None for result in func._schema.returns)
        if views and isinstance(first, LazyGrad) and first.view_of.kind == "logits":
            whole = dense_grad(first)  # through a view of which the gradient may be changed in place
            first.terms = first.view_of.terms_of_dense(whole)
            return func(whole, *args[1:], **kwargs)
        values = torch.utils._pytree.tree_map_only(LazyGrad, dense_grad, (args, kwargs))
        return func(*values[0], **values[1])


def terms_of(grad: Tensor, view: View) -> Terms:
    return grad.terms if isinstance(grad, LazyGrad) else view.terms_of_dense(grad)


def dense_grad(grad: LazyGrad) -> Tensor:
    """The gradient in full, for whoever looks at it.

    Raises:
        RuntimeError: it is one of log-probabilities or probabilities, which the terms no longer are.
    """
    view, root = grad.view_of, grad.view_of.root
    if view.kind != "logits":
        raise RuntimeError(
            f"orpo_kernels: a hook asked for the gradient of lazy {view.kind} in full, which is known of logits alone: "
            "put the hook on the logits, or unfuse(model)"
        )
    rows = view.rows.reshape(-1)
    out = torch.zeros((rows.numel(), view.mapping.vocab), dtype=view.dtype, device=rows.device)
    place = torch.full_like(root.rows, -1)
    place[rows] = torch.arange(rows.numel(), device=rows.device)
    with torch.no_grad(), uncast(rows.device):
        for of, raw in root.logits(root.identity, rows):
            total = torch.zeros_like(raw)
            for term in grad.terms.values():
                term.add_to(total, raw, rows[of], place, of.start)
            total = total[:, : view.mapping.vocab]
            slope = view.mapping.to_raw(torch.ones_like(total), view.mapping.of_raw(raw, rows[of]), rows[of])
            out[of] = (total / slope).to(out.dtype)
    root.count(rows.numel())
    out = out.view(*view.rows.shape, view.mapping.vocab)
    return out if view.vocab_dim == -1 else out.movedim(-1, view.vocab_dim)
