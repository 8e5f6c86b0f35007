"""The tensors that stand for logits and for their gradients, and the nodes between them on the autograd graph.

``LazyLogits`` has the shape of logits and no memory. It is the output of an autograd node, and so is every view of it:
hooks of DDP, FSDP and DeepSpeed on a model's output fire as ever. Its gradient is a ``LazyGrad``, which adds up, scales
and passes through views without being computed; the head's node turns it into the gradients of hidden and weight.

Which rows of the root a view has is an integer tensor that goes through the same views as the logits would. It tells
aliasing too: two views share memory, as eager logits would, exactly if their ``rows`` do.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine import refuse_second_derivatives
from orpo_kernels.integrations.lazy.gradient import DenseGrad, Map, Term, Terms, added
from orpo_kernels.integrations.lazy.rows import Inputs, Root

_aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """What a stand-in stands for: ``factor * kind(values of a map)`` at ``rows``."""

    root: Root
    rows: Tensor  # of the root, int64; the stand-in's shape without the vocabulary
    mapping: Map
    dtype: torch.dtype
    kind: str = "logits"  # or log_probs, probs, probs_log_probs (p * log p), probs_logits (p * z)
    factor: float = 1.0  # 1 for logits, whose factor is the map's
    vocab_dim: int = -1  # where the vocabulary stands, -1 or an index
    cut: bool = False  # whether its memory would hold more tokens of each row
    packed: bool = False  # whether it would lie in memory in the order of its dimensions, the vocabulary not last
    family: Tensor | None = None  # rows of what this is one of many pieces of: they are computed together
    chain: tuple[str, ...] = ()  # operations so far, for the report
    graph: object = field(default_factory=object)  # shared by views that autograd follows from one to another

    @property
    def shape(self) -> torch.Size:
        lead = list(self.rows.shape)
        lead.insert(len(lead) if self.vocab_dim == -1 else self.vocab_dim, self.mapping.vocab)
        return torch.Size(lead)

    def after(self, operation: str, **changes: Any) -> View:
        """The view that an operation makes of this one."""
        chain = self.chain if self.chain[-1:] == (operation,) else (*self.chain, operation)
        return replace(self, chain=chain, **changes)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def same_rows(self, other: View) -> bool:
        """Whether both have the same rows of the same root under the same map."""
        same = self.root is other.root and self.mapping.key == other.mapping.key
        return same and (self.rows is other.rows or torch.equal(self.rows, other.rows))

    def dense(self) -> Tensor:
        """What this stands for, computed; no view of anything, so that it may be changed in place."""
        root = self.root
        strides = [stride * self.mapping.vocab for stride in torch.empty_like(self.rows).stride()]
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        rows = self.rows.permute(order).reshape(-1)
        strides.insert(len(strides) if self.vocab_dim == -1 else self.vocab_dim, 1)
        out = torch.empty_strided(self.shape, strides, dtype=self.dtype, device=rows.device)
        flat = out.movedim(self.vocab_dim, -1).permute(*order, -1).view(rows.numel(), self.mapping.vocab)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            for of, logits in root.logits(self.mapping, rows):
                flat[of] = (_of_kind(self.kind, logits) * self.factor).to(self.dtype)
        root.count(rows.numel())
        return torch.empty_like(out, memory_format=torch.contiguous_format).copy_(out) if self.packed else out

    def slots(self) -> Tensor:
        """Where in memory each row would stand, as ``rows``: to compare with views that share it."""
        rows = self.rows
        places = torch.arange(rows.untyped_storage().nbytes() // rows.itemsize, device=rows.device)
        return places.as_strided(rows.shape, rows.stride(), rows.storage_offset()).contiguous()

    def terms_of_dense(self, grad: Tensor) -> Terms:
        """A dense gradient of the stand-in's shape."""
        if self.vocab_dim != -1:
            grad = grad.movedim(self.vocab_dim, -1)
        dense = DenseGrad(self.kind, self.factor, self.rows.reshape(-1), grad.reshape(-1, self.mapping.vocab))
        return {self.mapping.key: Term(self.mapping, dense=(dense,))}


def _of_kind(kind: str, logits: Tensor) -> Tensor:
    if kind == "logits":
        return logits
    logps = torch.log_softmax(logits, -1)
    if kind == "log_probs":
        return logps
    probs = logps.exp()
    lowest = torch.finfo(logits.dtype).min  # a masked token: 0 times -inf
    if kind == "probs":
        return probs
    return probs * (logps if kind == "probs_log_probs" else logits).clamp(min=lowest)


def _strides(shape: torch.Size) -> list[int]:
    """Strides under which the vocabulary is not contiguous.

    Libraries that launch a kernel of their own on logits look at the last stride first, and otherwise take the way of
    plain torch, which can be recognised.
    """
    strides, step = [], 1
    for size in shape[:-1]:
        strides.append(step)
        step *= max(size, 1)
    return [*strides, max(step, 2)]


class Edit(NamedTuple):
    """A scale in place of a view that shares memory with others."""

    slots: Tensor  # ``View.slots``
    factor: float | Tensor  # of all of them, or of each
    vocab: int  # columns, from the first
    graph: object  # ``View.graph`` of what was scaled where autograd followed it, else None


# What the handlers themselves ask of a stand-in, many times an operation.
_PLAIN = {torch.Tensor.dim}
_PLAIN.update(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn")
)


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
        self: LazyLogits = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, view.shape, strides=_strides(view.shape), dtype=view.dtype, device=view.rows.device
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
    copy = LazyLogits(replace(x.view_of, graph=object()))
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
        self: LazyGrad = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, view.shape, strides=_strides(view.shape), dtype=view.dtype, device=view.rows.device
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
            return LazyGrad(replace(first.view_of, dtype=kwargs.get("dtype") or first.dtype), first.terms)
        if name in ("add", "add_") and not kwargs:
            a, b = args[:2]
            own = a if isinstance(a, LazyGrad) else b
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                total = LazyGrad(own.view_of, added(_terms(a, own.view_of), _terms(b, own.view_of)))
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


def _terms(grad: Tensor, view: View) -> Terms:
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
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
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


class HeadNode(torch.autograd.Function):
    """From hidden and head to logits that are not there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, view: View
    ) -> LazyLogits:
        ctx.save_for_backward(hidden, weight, bias)
        view.root.node, ctx.unpacked = weakref.ref(ctx), None
        ctx.set_materialize_grads(False)
        ctx.tailed = tail is not None
        ctx.view, ctx.hidden_shape, ctx.hidden_dtype = view, hidden.shape, hidden.dtype
        return LazyLogits(view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if grad is None:
            return None, None, None, None, None
        inputs = ctx.view.root.unpacked(ctx)
        bias, of_weight, of_tail = inputs.bias, None, None
        grads = ctx.view.root.backward(list(_terms(grad, ctx.view).values()), inputs)
        hidden = None if grads.hidden is None else grads.hidden.to(ctx.hidden_dtype).view(ctx.hidden_shape)
        if grads.weight is not None:
            found = grads.weight.to(ctx.view.root.trained_dtype)
            of_weight, of_tail = (None, found) if ctx.tailed else (found, None)
        return (
            hidden,
            of_weight,
            None if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
            of_tail,
            None,
        )


class ViewNode(torch.autograd.Function):
    """From a stand-in to another; a gradient only changes its shape."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, view: View) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.before, ctx.after = x.view_of, view
        return LazyLogits(view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivatives()
        if grad is None:
            return None, None
        return LazyGrad(ctx.before, _terms(grad, ctx.after)), None


class InPlaceNode(torch.autograd.Function):
    """A stand-in that stands for another view from now on."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, view: View) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(x)
        ctx.before, ctx.after = x.view_of, view
        x.view_of = view
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivatives()
        if grad is None:
            return None, None
        return LazyGrad(ctx.before, _terms(grad, ctx.after)), None


class ChangedNode(torch.autograd.Function):
    """A stand-in whose values were changed: from now on its gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, own: Tensor) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        refuse_second_derivatives()
        return None, grad


class DenseNode(torch.autograd.Function):
    """From a stand-in to its values."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, own: Tensor | None = None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.view = x.view_of
        return x.view_of.dense() if own is None else own.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivatives()
        return None if grad is None else LazyGrad(ctx.view, ctx.view.terms_of_dense(grad)), None


class ReduceNode(torch.autograd.Function):
    """From a stand-in to numbers that were computed; ``terms`` makes their gradient a gradient of logits."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits, value: Tensor, terms: Callable[[Tensor], Terms]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.view, ctx.terms = x.view_of, terms
        return value.clone()  # an input returned as it is would be a view, which nobody may change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        refuse_second_derivatives()
        return None if grad is None else LazyGrad(ctx.view, ctx.terms(grad)), None, None


def lazy_logits(
    root: Root, hidden: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, dtype: torch.dtype
) -> LazyLogits:
    """The logits of a call of a head on ``hidden [..., H]``."""
    rows = root.rows.view(hidden.shape[:-1])
    out: LazyLogits = HeadNode.apply(hidden, weight, bias, tail, View(root, rows, root.identity, dtype))
    return out
