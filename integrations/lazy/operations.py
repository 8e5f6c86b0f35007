"""Which operations on lazy logits are answered without them, and what each becomes.

A handler takes an operation's arguments as torch does and returns its result, or ``NotImplemented`` where it does not
know this form of it; then, and for every operation without a handler, the full logits are computed. Handlers stand in
``HANDLERS`` under the operation's name, which its function, its method and its operator share.

What reduces the vocabulary is made of five numbers a row, each differentiable: an entry, a log-probability, the
log-sum-exp, the mean and the expectation under softmax. Cross-entropy, entropy and the rest are plain torch on those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.integrations.lazy.gradient import Map, Term, Terms
from orpo_kernels.integrations.lazy.stand_in import (
    DenseNode,
    InPlaceNode,
    LazyLogits,
    ReduceNode,
    View,
    ViewNode,
    copy_of,
)

# Operations that only look at a tensor's metadata or its place on the graph.
METADATA = frozenset(
    ["size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_floating_point", "is_complex", "is_signed", "get_device", "element_size", "register_hook", "retain_grad", "requires_grad_", "backward", "is_same_size", "__hash__", "is_inference", "is_conj", "is_neg", "is_tensor", "result_type", "has_names", "is_nonzero_static", "_is_view", "__len__", "is_shared", "is_pinned", "register_post_accumulate_grad_hook", "can_cast", "is_storage", "is_coalesced"]
)
WIDEST_GATHER = 64  # entries of a row that are taken as dot products; for more of them a product is no dearer
MANY_PIECES = 4  # of a split from which on all of them are asked for, so that they are computed together

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


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
    """The full logits, on the graph; kept while the stand-in lives, so that they are computed once."""
    if x.own is None or (not x.changed and x.requires_grad and torch.is_grad_enabled() and not x.own.requires_grad):
        x.view_of.root.site.report.materialise(" > ".join((*x.view_of.chain, operation)), x.view_of.bytes)
        x.own = DenseNode.apply(x)
    return x.own


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
    for other in _sharing(x):
        other.lost = (
            f"orpo_kernels: {name} changed lazy logits in place, and this view of them, which was taken before, would "
            "have to follow: take the view after the change, or unfuse(model)"
        )
    return None if name == "__setitem__" else x


def _sharing(x: LazyLogits) -> list[LazyLogits]:
    """The other live stand-ins that would share memory with this one."""
    memory = x.view_of.rows.untyped_storage().data_ptr()
    found = [each() for each in x.view_of.root.views]
    return [y for y in found if y is not None and y is not x and y.view_of.rows.untyped_storage().data_ptr() == memory]  # type: ignore[misc,attr-defined]


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
        _in_place(x, view.after("scale", mapping=mapping))


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


# Views: another stand-in, and nothing computed.


def _made(x: LazyLogits, view: View) -> LazyLogits:
    out: LazyLogits = ViewNode.apply(x, view)
    return out


def _copied(x: LazyLogits, operation: str, **changes: Any) -> LazyLogits:
    """A stand-in with memory of its own."""
    return _made(x, x.view_of.after(operation, rows=x.view_of.rows.clone(), **changes))


def _in_place(x: LazyLogits, view: View) -> LazyLogits:
    x.own = None
    out: LazyLogits = InPlaceNode.apply(x, view)
    return out


def _dim(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


def _is_last(x: LazyLogits, dim: Any) -> bool:
    """Whether a dimension is the vocabulary's."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    where = x.view_of.vocab_dim
    return isinstance(dim, int) and _dim(dim, x.dim()) == (x.dim() - 1 if where == -1 else where)


@handles("detach", "detach_")
def _detach(x: LazyLogits) -> Any:
    return copy_of(x)


@handles("clone")
def _clone(x: LazyLogits, *, memory_format: Any = None) -> Any:
    return _copied(x, "clone")


@handles("contiguous")
def _contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    view = x.view_of
    return x if view.rows.is_contiguous() and view.vocab_dim == -1 else _copied(x, "contiguous")


@handles("is_contiguous")
def _is_contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> bool:
    return x.view_of.rows.is_contiguous() and x.view_of.vocab_dim == -1


def _cast(x: LazyLogits, dtype: torch.dtype, copy: bool = False) -> Any:
    if not dtype.is_floating_point:
        return NotImplemented
    return x if dtype == x.dtype and not copy else _copied(x, str(dtype).removeprefix("torch."), dtype=dtype)


for _name, _dtype in {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}.items():
    HANDLERS[_name] = lambda x, _dtype=_dtype, **kwargs: _cast(x, _dtype)


@handles("to", "type", "type_as")
def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LazyLogits):
        like = args[0]
        return x.to(like.device, like.dtype) if isinstance(like, LazyLogits) and not kwargs else NotImplemented
    dtype, device, copy = kwargs.get("dtype"), kwargs.get("device"), bool(kwargs.get("copy", False))
    for argument in args:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, Tensor):
            dtype, device = argument.dtype, argument.device
        elif isinstance(argument, str | torch.device | int) and not isinstance(argument, bool):
            device = argument
    if isinstance(device, str) and device.startswith("torch."):
        return NotImplemented
    if device is not None:
        device = torch.device(device)
        if device.type != x.device.type or device.index not in (None, x.device.index):
            return NotImplemented
    if dtype is None and device is None:
        return NotImplemented
    return _cast(x, dtype or x.dtype, copy)


@handles("cpu", "cuda")
def _move(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    return x if x.device.type == "cpu" and not args else NotImplemented


@handles("nan_to_num", "nan_to_num_")
def _finite(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Logits of finite hidden states are finite; those that are not stay what they are and show in the loss."""
    return x if x.view_of.mapping.bias is None else NotImplemented


def _reshaped(x: LazyLogits, operation: str, rows: Tensor) -> LazyLogits:
    return _made(x, x.view_of.after(operation, rows=rows))


@handles("view", "reshape")
def _view(x: LazyLogits, *shape: Any) -> Any:
    view = x.view_of
    if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size):
        shape = tuple(shape[0])
    if view.vocab_dim != -1 or not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    lead, vocab = list(shape[:-1]), shape[-1]
    if vocab == -1 and -1 not in lead:
        vocab = view.mapping.vocab if math.prod(lead) == view.rows.numel() else None
    if vocab != view.mapping.vocab:
        return NotImplemented
    if -1 in lead and view.rows.numel() == 0:
        return NotImplemented
    return _reshaped(x, "view", view.rows.reshape(lead))


@handles("view_as", "reshape_as")
def _view_as(x: Any, other: Any) -> Any:
    return _view(x, *other.shape) if isinstance(x, LazyLogits) else x.reshape(other.shape)


@handles("flatten")
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.view_of.vocab_dim != -1 or _dim(end_dim, x.dim()) >= x.dim() - 1:
        return NotImplemented
    return _reshaped(x, "flatten", x.view_of.rows.flatten(start_dim, _dim(end_dim, x.dim())))


@handles("squeeze")
def _squeeze(x: LazyLogits, dim: Any = None) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or view.mapping.vocab == 1 or not isinstance(dim, int | None):
        return NotImplemented
    if dim is None:
        return _reshaped(x, "squeeze", view.rows.squeeze())
    return x if _is_last(x, dim) else _reshaped(x, "squeeze", view.rows.squeeze(_dim(dim, x.dim())))


@handles("unsqueeze")
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    where = dim + x.dim() + 1 if dim < 0 else dim
    if x.view_of.vocab_dim != -1 or where >= x.dim():
        return NotImplemented
    return _reshaped(x, "unsqueeze", x.view_of.rows.unsqueeze(where))


@handles("transpose", "swapaxes", "swapdims")
def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    order = list(range(x.dim()))
    a, b = _dim(dim0, x.dim()), _dim(dim1, x.dim())
    order[a], order[b] = order[b], order[a]
    return _permute(x, *order)


@handles("permute")
def _permute(x: LazyLogits, *dims: Any) -> Any:
    view = x.view_of
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = tuple(dims[0])
    order = [_dim(dim, x.dim()) for dim in dims]
    vocab = x.dim() - 1 if view.vocab_dim == -1 else view.vocab_dim
    where = order.index(vocab)
    lead = [dim - (dim > vocab) for dim in order if dim != vocab]
    rows = view.rows.permute(lead)
    return _made(x, view.after("transpose", rows=rows, vocab_dim=-1 if where == x.dim() - 1 else where))


@handles("unbind", "__iter__")
def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    if x.view_of.vocab_dim != -1 or _is_last(x, dim):
        return NotImplemented
    rows = x.view_of.rows
    pieces = rows.unbind(_dim(dim, x.dim()))
    out = tuple(_made(x, x.view_of.after("unbind", rows=piece, family=rows)) for piece in pieces)
    return out


HANDLERS["__iter__"] = lambda x: NotImplemented if (pieces := _unbind(x)) is NotImplemented else iter(pieces)


@handles("split", "split_with_sizes", "chunk", "tensor_split")
def _split(x: LazyLogits, sizes: Any, dim: int = 0) -> Any:
    return _pieces(x, "split", sizes, dim)


def _pieces(x: LazyLogits, name: str, sizes: Any, dim: int) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or _is_last(x, dim):
        return NotImplemented
    pieces = getattr(view.rows, name)(sizes, dim=_dim(dim, x.dim()))
    family = view.rows if len(pieces) >= MANY_PIECES else view.family
    return tuple(_made(x, view.after(name, rows=piece, family=family)) for piece in pieces)


HANDLERS["split"] = lambda x, split_size_or_sections=None, dim=0, **kw: _pieces(
    x, "split", split_size_or_sections if split_size_or_sections is not None else kw["split_size"], dim
)
HANDLERS["split_with_sizes"] = lambda x, split_sizes, dim=0: _pieces(x, "split_with_sizes", split_sizes, dim)
HANDLERS["chunk"] = lambda x, chunks, dim=0: _pieces(x, "chunk", chunks, dim)
HANDLERS["tensor_split"] = lambda x, indices_or_sections, dim=0: _pieces(x, "tensor_split", indices_or_sections, dim)


@handles("narrow")
def _narrow(x: LazyLogits, dim: int, start: Any, length: Any) -> Any:
    if x.view_of.vocab_dim != -1 or _is_last(x, dim):
        return NotImplemented
    return _reshaped(x, "narrow", x.view_of.rows.narrow(_dim(dim, x.dim()), start, length))


@handles("select")
def _select(x: LazyLogits, dim: int, index: int) -> Any:
    if x.view_of.vocab_dim != -1 or _is_last(x, dim):
        return NotImplemented
    return _reshaped(x, "select", x.view_of.rows.select(_dim(dim, x.dim()), index))


@handles("index_select")
def _index_select(x: LazyLogits, dim: int, index: Tensor) -> Any:
    if not isinstance(x, LazyLogits) or x.view_of.vocab_dim != -1 or _is_last(x, dim):
        return NotImplemented
    return _reshaped(x, "index_select", x.view_of.rows.index_select(_dim(dim, x.dim()), index))


@handles("broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> Any:
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], tuple | list) else tensors
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    if any(isinstance(tensor, LazyLogits) and tensor.shape != shape for tensor in tensors):
        return NotImplemented
    return tuple(tensor if isinstance(tensor, LazyLogits) else tensor.expand(shape) for tensor in tensors)


@handles("__getitem__")
def _getitem(x: Any, index: Any) -> Any:
    if not isinstance(x, LazyLogits) or x.view_of.vocab_dim != -1:
        return NotImplemented
    view = x.view_of
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.as_tensor(item, device=x.device) if isinstance(item, list) else item for item in items]
    if any(isinstance(item, LazyLogits) for item in items):
        return NotImplemented

    def consumed(item: Any) -> int:
        if item is None or isinstance(item, bool):
            return 0
        return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1

    here = [i for i, item in enumerate(items) if item is Ellipsis]
    used = sum(consumed(item) for item in items if item is not Ellipsis)
    if here:
        items[here[0] : here[0] + 1] = [slice(None)] * (x.dim() - used)
        used = x.dim()
    if used < x.dim():  # the vocabulary is left whole
        return _reshaped(x, "getitem", view.rows[tuple(items)])
    if used > x.dim() or not items or items[-1] is None:
        return NotImplemented
    lead, last = tuple(items[:-1]), items[-1]
    if isinstance(last, slice):
        start, stop, step = last.indices(view.mapping.vocab)
        if (start, step) != (0, 1) or (stop < view.mapping.vocab and view.kind != "logits") or stop <= 0:
            return NotImplemented
        if stop == view.mapping.vocab:
            return _reshaped(x, "getitem", view.rows[lead])
        return _made(x, view.after("getitem", rows=view.rows[lead], mapping=view.mapping.narrowed(stop)))
    rows = view.rows[lead] if lead else view.rows
    if isinstance(last, int) and not isinstance(last, bool):
        last = torch.tensor(last, device=x.device)
    if not isinstance(last, Tensor) or last.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    advanced = [item for item in lead if isinstance(item, Tensor)]
    ids = torch.where(last < 0, last + view.mapping.vocab, last).long()
    if advanced and last.dim():  # picked together, as lp[arange, arange, y]
        if len(advanced) != len(lead):
            return NotImplemented
        rows, ids = torch.broadcast_tensors(rows, ids)
        return _taken(x, "getitem", rows, ids)
    if last.numel() > WIDEST_GATHER:
        return NotImplemented
    whole = (*rows.shape, *ids.shape)
    return _taken(x, "getitem", rows.view(*rows.shape, *[1] * ids.dim()).expand(whole), ids.expand(whole))


# Elementwise maps.


def _scaled(x: LazyLogits, factor: Any) -> View | None:
    """The view times a number, or a number for each of its rows."""
    view = x.view_of
    if isinstance(factor, Tensor) and (factor.requires_grad or isinstance(factor, LazyLogits)):
        return None
    if isinstance(factor, Tensor) and factor.numel() == 1 and factor.dim() <= x.dim():
        factor = factor.item()
    if isinstance(factor, int | float) and not isinstance(factor, bool):
        if view.kind != "logits":
            return view.after("scale", factor=view.factor * factor)
        mapping = view.mapping.times(float(factor))
        return None if mapping is None else view.after("scale", mapping=mapping)
    if not isinstance(factor, Tensor) or view.kind != "logits" or view.vocab_dim != -1 or factor.dim() != x.dim():
        return None
    if factor.shape[-1] != 1 or any(f not in (1, s) for f, s in zip(factor.shape[:-1], view.rows.shape, strict=True)):
        return None
    each = factor.squeeze(-1).expand(view.rows.shape).to(view.root.acc)
    if not (each > 0).all():
        return None
    every = torch.ones(view.root.rows.shape, dtype=view.root.acc, device=x.device)
    every[view.rows.reshape(-1)] = each.reshape(-1)
    if not torch.equal(every[view.rows], each):  # a row that is there twice, under two numbers
        return None
    mapping = view.mapping.times_rows(every)
    return None if mapping is None else view.after("scale", mapping=mapping)


def _widened(x: LazyLogits, factor: Any) -> bool:
    """Whether a product of both would have another dtype than x."""
    return isinstance(factor, Tensor) and torch.result_type(torch.empty(0, dtype=x.dtype), factor) != x.dtype


@handles("mul", "__mul__", "__rmul__", "multiply")
def _mul(a: Any, b: Any) -> Any:
    if not isinstance(a, LazyLogits):
        a, b = b, a
    if isinstance(b, LazyLogits):
        return _product(a, b)
    view = None if _widened(a, b) else _scaled(a, b)
    return NotImplemented if view is None else _made(a, _fresh(view))


def _fresh(view: View) -> View:
    """With memory of its own."""
    return replace(view, rows=view.rows.clone())


def _product(a: LazyLogits, b: LazyLogits) -> Any:
    """p log p and p z, whose sums are an entropy and an expectation."""
    a, b = (a, b) if a.view_of.kind == "probs" else (b, a)
    kind = {"log_probs": "probs_log_probs", "logits": "probs_logits"}.get(b.view_of.kind)
    p, other = a.view_of, b.view_of
    if p.kind != "probs" or kind is None or p.vocab_dim != -1 or other.vocab_dim != -1 or not p.same_rows(other):
        return NotImplemented
    if a.requires_grad != b.requires_grad or a.dtype != b.dtype:
        return NotImplemented
    return _made(a, _fresh(p.after("mul", kind=kind, factor=p.factor * other.factor)))


@handles("div", "__truediv__", "true_divide", "divide")
def _div(a: Any, b: Any, *, rounding_mode: Any = None) -> Any:
    if not isinstance(a, LazyLogits) or rounding_mode is not None or isinstance(b, LazyLogits) or _widened(a, b):
        return NotImplemented
    if isinstance(b, int | float) and b == 0:
        return NotImplemented
    view = _scaled(a, 1 / b)
    return NotImplemented if view is None else _made(a, _fresh(view))


@handles("mul_", "__imul__", "multiply_")
def _mul_(x: Any, factor: Any) -> Any:
    return _scale_in_place(x, factor)


@handles("div_", "__itruediv__", "true_divide_", "divide_")
def _div_(x: Any, by: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None or isinstance(by, LazyLogits) or (isinstance(by, int | float) and by == 0):
        return NotImplemented
    return _scale_in_place(x, 1 / by)


def _scale_in_place(x: Any, factor: Any) -> Any:
    view = _scaled(x, factor) if isinstance(x, LazyLogits) else None
    if view is None or (x.requires_grad and not torch.is_grad_enabled()):
        return NotImplemented
    if isinstance(factor, Tensor) and factor.numel() > 1:
        if _sharing(x):
            for other in _sharing(x):
                other.lost = (
                    "orpo_kernels: another view of these lazy logits was scaled row by row in place: use that view, or "
                    "unfuse(model)"
                )
    else:
        for other in _sharing(x):
            other.edits.append((x.view_of.rows, float(factor)))
    return _in_place(x, view)


@handles("neg", "__neg__", "negative")
def _neg(x: LazyLogits) -> Any:
    return NotImplemented if x.view_of.kind == "logits" else _made(x, _fresh(_scaled(x, -1)))  # type: ignore[arg-type]


@handles("tanh")
def _tanh(x: LazyLogits) -> Any:
    mapping = x.view_of.mapping.tanh() if x.view_of.kind == "logits" else None
    return NotImplemented if mapping is None else _copied(x, "tanh", mapping=mapping)


@handles("tanh_")
def _tanh_(x: LazyLogits) -> Any:
    mapping = x.view_of.mapping.tanh() if x.view_of.kind == "logits" and not _sharing(x) else None
    return NotImplemented if mapping is None else _in_place(x, x.view_of.after("tanh", mapping=mapping))


@handles("add", "__add__", "__radd__")
def _add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    x, bias = (a, b) if isinstance(a, LazyLogits) else (b, a)
    view = x.view_of
    if not isinstance(bias, Tensor) or isinstance(bias, LazyLogits) or bias.requires_grad or alpha != 1:
        return NotImplemented
    whole = bias.shape[-1:] == (view.mapping.vocab,) and bias.numel() == view.mapping.vocab and bias.dim() <= x.dim()
    if not whole or view.kind != "logits" or view.vocab_dim != -1 or _widened(x, bias):
        return NotImplemented
    mapping = view.mapping.plus(bias.detach().reshape(-1))
    return NotImplemented if mapping is None else _copied(x, "add", mapping=mapping)


@handles("sub", "__sub__", "subtract")
def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    """Logits less their own log-sum-exp are log-probabilities."""
    if not isinstance(a, LazyLogits) or isinstance(b, LazyLogits) or not isinstance(b, Tensor) or alpha != 1:
        return NotImplemented
    of = getattr(b, "_orpo_lse_of", None)
    view = a.view_of
    if of is None or view.kind != "logits" or b.dim() != a.dim() or not view.same_rows(of):
        return NotImplemented
    if a.requires_grad != b.requires_grad or a.dtype != b.dtype:
        return NotImplemented
    return _copied(a, "sub", kind="log_probs")


@handles("clamp", "clamp_min", "clip")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    """Not below the lowest number there is: nothing."""
    if not isinstance(x, LazyLogits) or max is not None or not isinstance(min, float):
        return NotImplemented
    return x if min <= torch.finfo(x.dtype).min and x.view_of.mapping.bias is None else NotImplemented


@handles("eq", "__eq__", "ne", "__ne__")
def _eq(a: Any, b: Any) -> Any:
    return NotImplemented


def _self_compared(a: Any, b: Any) -> Any:
    """A check for NaN, of logits that are finite where hidden and weight are."""
    same = a is b and isinstance(a, LazyLogits)
    return torch.ones((), dtype=torch.bool, device=a.device).expand(a.shape) if same else NotImplemented


HANDLERS["eq"] = HANDLERS["__eq__"] = _self_compared


# Distributions: stand-ins for log p and p.


@handles("log_softmax")
def _log_softmax(x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _distribution(
        x, "log_softmax", dim, dtype or (_stacklevel if isinstance(_stacklevel, torch.dtype) else None)
    )


@handles("softmax", "_softmax_backward_data")
def _softmax(x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _distribution(x, "softmax", dim, dtype or (_stacklevel if isinstance(_stacklevel, torch.dtype) else None))


def _distribution(x: LazyLogits, name: str, dim: Any, dtype: torch.dtype | None) -> Any:
    view = x.view_of
    plain = view.kind == "logits" or (view.kind == "log_probs" and view.factor == 1)
    if view.vocab_dim != -1 or not _is_last(x, dim) or not plain:
        return NotImplemented
    return _copied(x, name, kind="log_probs" if name == "log_softmax" else "probs", dtype=dtype or x.dtype)


@handles("exp")
def _exp(x: LazyLogits) -> Any:
    ok = x.view_of.kind == "log_probs" and x.view_of.factor == 1
    return _copied(x, "exp", kind="probs") if ok else NotImplemented


@handles("log")
def _log(x: LazyLogits) -> Any:
    ok = x.view_of.kind == "probs" and x.view_of.factor == 1
    return _copied(x, "log", kind="log_probs") if ok else NotImplemented


# Numbers of rows: here the product runs.


def _number(x: LazyLogits, operation: str, value: Tensor, terms: Callable[[Tensor], Terms]) -> Tensor:
    """A result in the accumulation dtype."""
    view = x.view_of
    view.root.site.report.chains[" > ".join((*view.chain, operation))] += 1
    if not (x.requires_grad and torch.is_grad_enabled()):
        return value
    out: Tensor = ReduceNode.apply(x, value, terms)
    return out


def _spread(view: View, rows: Tensor, values: Tensor) -> Tensor:
    """Values at rows ``[k]`` as a vector over the root's rows."""
    out = torch.zeros(view.root.rows.shape, dtype=view.root.acc, device=rows.device)
    return out.index_add_(0, rows.reshape(-1), values.reshape(-1).to(out.dtype))


def _entries(x: LazyLogits, operation: str, rows: Tensor, ids: Tensor) -> Tensor:
    """Logits at ``rows``, ``ids`` of one shape."""
    view, flat = x.view_of, (rows.reshape(-1), ids.reshape(-1))
    if view.root.hints is None and ids.numel() == rows.numel():
        view.root.hints = torch.zeros(view.root.rows.shape, dtype=torch.int64, device=ids.device)
    if view.root.hints is not None:
        view.root.hints[flat[0]] = flat[1]

    def terms(g: Tensor) -> Terms:
        return {view.mapping.key: Term(view.mapping, entries=((*flat, g.reshape(-1)),))}

    return _number(x, operation, view.root.entries(view.mapping, *flat).view(rows.shape), terms)


def _logps(x: LazyLogits, operation: str, rows: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities at ``rows``, ``ids`` of one shape."""
    view, flat = x.view_of, (rows.reshape(-1), ids.reshape(-1))
    table = view.root.table(view.mapping)

    def terms(g: Tensor) -> Terms:
        g = g.reshape(-1).to(view.root.acc)
        return {view.mapping.key: Term(view.mapping, softmax=-_spread(view, flat[0], g), entries=((*flat, g),))}

    return _number(x, operation, table.logps_of(*flat).view(rows.shape), terms)


def _lse(x: LazyLogits, operation: str, mapping: Map | None = None) -> Tensor:
    """Log-sum-exp of each row."""
    view = x.view_of
    mapping = mapping or view.mapping
    rows, table = view.rows.reshape(-1), view.root.table(mapping)
    if view.family is not None:
        table.expect(view.family.reshape(-1))

    def terms(g: Tensor) -> Terms:
        return {mapping.key: Term(mapping, softmax=_spread(view, rows, g))}

    return _number(x, operation, table.lse(rows).view(view.rows.shape), terms)


def _mean(x: LazyLogits, operation: str) -> Tensor:
    """Mean logit of each row."""
    view = x.view_of
    rows = view.rows.reshape(-1)

    def terms(g: Tensor) -> Terms:
        return {view.mapping.key: Term(view.mapping, constant=_spread(view, rows, g) / view.mapping.vocab)}

    return _number(x, operation, view.root.means(view.mapping, rows).view(view.rows.shape), terms)


def _expected(x: LazyLogits, operation: str) -> Tensor:
    """``sum_v p_v z_v`` of each row."""
    view = x.view_of
    rows, table = view.rows.reshape(-1), view.root.table(view.mapping)
    if view.family is not None:
        table.expect(view.family.reshape(-1))
    expected = table.moments(rows).expected

    def terms(g: Tensor) -> Terms:
        softmax = _spread(view, rows, g.reshape(-1).to(expected.dtype) * (1 - expected))
        return {view.mapping.key: Term(view.mapping, softmax=softmax, weighted=_spread(view, rows, g))}

    return _number(x, operation, expected.view(view.rows.shape), terms)


def _taken(x: LazyLogits, operation: str, rows: Tensor, ids: Tensor) -> Any:
    """What a stand-in has at ``rows``, ``ids`` of one shape, in its dtype."""
    view = x.view_of
    if ids.numel() and x.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < view.mapping.vocab:
        raise IndexError(f"index out of range: {operation} on {view.mapping.vocab} tokens of lazy logits")
    if view.kind == "logits":
        return _entries(x, operation, rows, ids).to(x.dtype)
    if view.kind in ("log_probs", "probs"):
        logps = _logps(x, operation, rows, ids)
        found = logps if view.kind == "log_probs" else logps.exp()
        return (found if view.factor == 1 else found * view.factor).to(x.dtype)
    return NotImplemented


@handles("gather")
def _gather(x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    if not isinstance(x, LazyLogits) or isinstance(index, LazyLogits) or x.view_of.vocab_dim != -1:
        return NotImplemented
    if not _is_last(x, dim) or index.shape[-1] > WIDEST_GATHER or index.dim() != x.dim():
        return NotImplemented
    rows = x.view_of.rows[tuple(slice(0, size) for size in index.shape[:-1])]
    return _taken(x, "gather", rows.unsqueeze(-1).expand(index.shape), index)


@handles("take_along_dim")
def _take_along_dim(x: Any, indices: Any, dim: Any = None) -> Any:
    if not isinstance(x, LazyLogits) or dim is None or indices.dim() != x.dim() or not _is_last(x, dim):
        return NotImplemented
    lead = torch.broadcast_shapes(indices.shape[:-1], x.shape[:-1])
    return _gather(x, dim, indices.expand(*lead, indices.shape[-1])) if lead == x.shape[:-1] else NotImplemented


@handles("logsumexp")
def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or not _is_last(x, dim) or view.kind not in ("logits", "log_probs"):
        return NotImplemented
    if view.kind == "logits":
        lse = _lse(x, "logsumexp")
    else:  # of f * log p: lse(f z) - f lse(z)
        mapping = view.mapping.times(view.factor)
        if mapping is None:
            return NotImplemented
        lse = _lse(x, "logsumexp", mapping) - view.factor * _lse(x, "logsumexp")
    out = (lse.unsqueeze(-1) if keepdim else lse).to(x.dtype)
    if keepdim and view.kind == "logits":
        out._orpo_lse_of = view  # type: ignore[attr-defined]
    return out


def _row_means(x: LazyLogits, operation: str) -> Tensor | None:
    """Mean over the vocabulary of what x stands for, in the accumulation dtype."""
    view = x.view_of
    if view.kind == "logits":
        return _mean(x, operation)
    if view.kind == "log_probs":
        return (_mean(x, operation) - _lse(x, operation)) * view.factor
    if view.kind == "probs_log_probs":
        return (_expected(x, operation) - _lse(x, operation)) * (view.factor / view.mapping.vocab)
    if view.kind == "probs_logits":
        return _expected(x, operation) * (view.factor / view.mapping.vocab)
    return None


def _summed(x: Any, operation: str, dim: Any, keepdim: bool, dtype: torch.dtype | None, average: bool) -> Any:
    if not isinstance(x, LazyLogits) or x.view_of.vocab_dim != -1:
        return NotImplemented
    if isinstance(dim, tuple | list) and sorted(_dim(d, x.dim()) for d in dim) == list(range(x.dim())):
        dim = None if not keepdim else dim
    everything = dim is None or dim == ()
    if not everything and not _is_last(x, dim):
        return NotImplemented
    means = _row_means(x, operation)
    if means is None:
        return NotImplemented
    if everything:
        out = means.mean() if average else means.sum() * x.view_of.mapping.vocab
    else:
        out = means if average else means * x.view_of.mapping.vocab
        out = out.unsqueeze(-1) if keepdim else out
    return out.to(dtype or x.dtype)


@handles("mean", "nanmean")
def _mean_of(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _summed(x, "mean", dim, keepdim, dtype, True)


@handles("sum", "nansum")
def _sum_of(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _summed(x, "sum", dim, keepdim, dtype, False)


def _top(x: LazyLogits, operation: str) -> Tensor | None:
    """Where each row's largest logit is."""
    view = x.view_of
    if view.kind not in ("logits", "log_probs", "probs") or view.factor <= 0:
        return None
    table = view.root.table(view.mapping)
    if view.family is not None:
        table.expect(view.family.reshape(-1))
    view.root.site.report.chains[" > ".join((*view.chain, operation))] += 1
    return table.moments(view.rows.reshape(-1)).argmax.view(view.rows.shape)


@handles("argmax")
def _argmax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim is None or x.view_of.vocab_dim != -1 or not _is_last(x, dim):
        return NotImplemented
    found = _top(x, "argmax")
    return NotImplemented if found is None else found.unsqueeze(-1) if keepdim else found


@handles("max")
def _max(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(x, LazyLogits) or not isinstance(dim, int) or x.view_of.vocab_dim != -1 or not _is_last(x, dim):
        return NotImplemented
    found = _top(x, "max")
    if found is None:
        return NotImplemented
    largest = _taken(x, "max", x.view_of.rows, found)
    if keepdim:
        largest, found = largest.unsqueeze(-1), found.unsqueeze(-1)
    return torch.return_types.max((largest, found))


@handles("amax")
def _amax(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    found = _max(x, dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim, keepdim)
    return found if found is NotImplemented else found[0]


@handles("topk")
def _topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or not _is_last(x, dim) or not largest or k > WIDEST_GATHER or view.factor <= 0:
        return NotImplemented
    if view.kind not in ("logits", "log_probs", "probs"):
        return NotImplemented
    rows = view.rows.reshape(-1)
    ids = torch.empty((rows.numel(), k), dtype=torch.int64, device=rows.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for of, logits in view.root.logits(view.mapping, rows):
            ids[of] = logits.topk(k, -1, sorted=sorted).indices
    view.root.count(rows.numel())
    ids = ids.view(*view.rows.shape, k)
    found = _taken(x, "topk", view.rows.unsqueeze(-1).expand(ids.shape), ids)
    return torch.return_types.topk((found, ids))


@handles("cross_entropy", "cross_entropy_loss")
def _cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    view = x.view_of if isinstance(x, LazyLogits) else None
    if view is None or view.kind != "logits" or size_average is not None or reduce is not None:
        return NotImplemented
    return _token_losses(x, "cross_entropy", target, weight, ignore_index, reduction, label_smoothing)


@handles("nll_loss")
def _nll_loss(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    view = x.view_of if isinstance(x, LazyLogits) else None
    if view is None or view.kind != "log_probs" or view.factor != 1 or size_average is not None or reduce is not None:
        return NotImplemented
    return _token_losses(x, "nll_loss", target, weight, ignore_index, reduction, 0.0)


def _token_losses(
    x: LazyLogits, name: str, target: Any, weight: Any, ignore: int, reduction: str, smoothing: float
) -> Any:
    view = x.view_of
    place = x.dim() - 1 if view.vocab_dim == -1 else view.vocab_dim
    if isinstance(target, LazyLogits) or target.is_floating_point() or weight is not None:
        return NotImplemented
    if (
        place != (0 if x.dim() == 1 else 1)
        or target.shape != view.rows.shape
        or reduction not in ("mean", "sum", "none")
    ):
        return NotImplemented
    kept = target != ignore
    rows, ids = view.rows[kept], target[kept]
    vocab = view.mapping.vocab
    if x.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise IndexError(f"Target {wrong} is out of bounds.")
    if x.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < vocab)).all())
    losses = -_logps(x, name, rows, ids)
    if smoothing:
        some = _made(x, replace(view, rows=rows, vocab_dim=-1))
        uniform = _lse(some, name) - _mean(some, name)
        losses = (1 - smoothing) * losses + smoothing * uniform
    if reduction == "none":
        every = losses.new_zeros(target.shape)
        every = every.masked_scatter(kept, losses)
        return every.to(x.dtype)
    total = losses.sum()
    return (total / kept.sum() if reduction == "mean" else total).to(x.dtype)


@handles("kl_div")
def _kl_div(
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """Against a plain distribution: its entropy is its own, and the cross term is a sum over tokens ``t * log p``."""
    view = x.view_of if isinstance(x, LazyLogits) else None
    if view is None or isinstance(target, LazyLogits) or view.kind != "log_probs" or view.factor != 1:
        return NotImplemented
    if reduction not in ("sum", "batchmean", "mean") or target.shape != x.shape or target.requires_grad:
        return NotImplemented
    if view.vocab_dim != -1 or size_average is not None or reduce is not None:
        return NotImplemented
    rows = view.rows.reshape(-1)
    flat = target.reshape(rows.numel(), -1)
    losses = torch.zeros(rows.numel(), dtype=view.root.acc, device=rows.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for of, logits in view.root.logits(view.mapping, rows):
            losses[of] = F.kl_div(
                logits.log_softmax(-1), flat[of].to(logits), reduction="none", log_target=log_target
            ).sum(-1)
    view.root.count(rows.numel())

    def terms(g: Tensor) -> Terms:
        probs = flat.exp() if log_target else flat
        return view.terms_of_dense((-probs * g.reshape(-1, 1)).reshape(x.shape))

    total = _number(x, "kl_div", losses, terms).sum()
    by = {"sum": 1, "batchmean": x.shape[0], "mean": x.numel()}[reduction]
    return (total / by).to(x.dtype)


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
