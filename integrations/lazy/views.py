"""Views and casts of lazy logits: another stand-in, and nothing computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy.memory import give_column
from orpo_kernels.integrations.lazy.reductions import WIDEST_GATHER, taken
from orpo_kernels.integrations.lazy.registry import HANDLERS, copied, handles, is_vocab, made, position
from orpo_kernels.integrations.lazy.stand_in import LazyLogits, copy_of

MANY_PIECES = 4  # of a split from which on all of them are asked for, so that they are computed together


@handles("detach")
def _detach(x: LazyLogits) -> Any:
    return copy_of(x)


@handles("clone")
def _clone(x: LazyLogits, *, memory_format: Any = None) -> Any:
    return copied(x, "clone")


@handles("contiguous")
def _contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    if _is_contiguous(x):
        return x
    rows = x.view_of.rows.clone(memory_format=torch.contiguous_format)
    return made(x, x.view_of.after("contiguous", rows=rows, cut=False, packed=x.view_of.vocab_dim != -1))


@handles("is_contiguous")
def _is_contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return False
    view = x.view_of
    in_order = view.vocab_dim == -1 or view.packed or max(view.rows.shape[view.vocab_dim :], default=1) == 1
    return bool(view.rows.is_contiguous()) and in_order and (not view.cut or view.rows.numel() <= 1)


def _cast(x: LazyLogits, dtype: torch.dtype, copy: bool = False) -> Any:
    if not dtype.is_floating_point:
        return NotImplemented
    return x if dtype == x.dtype and not copy else copied(x, str(dtype).removeprefix("torch."), dtype=dtype)


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


@handles("nan_to_num")
def _finite(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Logits of finite hidden states are finite; those that are not stay what they are and show in the loss."""
    return copied(x, "nan_to_num") if x.view_of.mapping.bias is None else NotImplemented


@handles("nan_to_num_")
def _finite_(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    return x if x.view_of.mapping.bias is None else NotImplemented


def _reshaped(x: LazyLogits, operation: str, rows: Tensor) -> LazyLogits:
    return made(x, x.view_of.after(operation, rows=rows))


def _shaped(x: LazyLogits, name: str, shape: tuple[Any, ...]) -> Any:
    view = x.view_of
    if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size):
        shape = tuple(shape[0])
    if view.vocab_dim != -1 or not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    if -1 in shape and view.rows.numel() == 0:
        return NotImplemented
    lead, vocab = list(shape[:-1]), shape[-1]
    if vocab == -1 and -1 not in lead:
        vocab = view.mapping.vocab if math.prod(lead) == view.rows.numel() else None
    if vocab != view.mapping.vocab:
        return NotImplemented
    return _reshaped(x, name, getattr(view.rows, name)(lead))


@handles("view")
def _view(x: LazyLogits, *shape: Any) -> Any:
    return _shaped(x, "view", shape)


@handles("reshape")
def _reshape(x: LazyLogits, *shape: Any) -> Any:
    return _shaped(x, "reshape", shape)


HANDLERS["view_as"] = lambda x, other: x.view(other.shape)
HANDLERS["reshape_as"] = lambda x, other: x.reshape(other.shape)


@handles("flatten")
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = position(start_dim, x.dim()), position(end_dim, x.dim())
    if x.view_of.vocab_dim != -1 or not 0 <= start <= end < x.dim() - 1:
        return NotImplemented
    return _reshaped(x, "flatten", x.view_of.rows.flatten(start, end))


@handles("squeeze")
def _squeeze(x: LazyLogits, dim: Any = None) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or view.mapping.vocab == 1 or not isinstance(dim, int | None):
        return NotImplemented
    if dim is None:
        return _reshaped(x, "squeeze", view.rows.squeeze())
    return x if is_vocab(x, dim) else _reshaped(x, "squeeze", view.rows.squeeze(position(dim, x.dim())))


@handles("unsqueeze")
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    where = dim + x.dim() + 1 if dim < 0 else dim
    if x.view_of.vocab_dim != -1 or where >= x.dim():
        return NotImplemented
    return _reshaped(x, "unsqueeze", x.view_of.rows.unsqueeze(where))


@handles("transpose", "swapaxes", "swapdims")
def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    order = list(range(x.dim()))
    a, b = position(dim0, x.dim()), position(dim1, x.dim())
    order[a], order[b] = order[b], order[a]
    return _permute(x, *order)


@handles("permute")
def _permute(x: LazyLogits, *dims: Any) -> Any:
    view = x.view_of
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = tuple(dims[0])
    order = [position(dim, x.dim()) for dim in dims]
    vocab = x.dim() - 1 if view.vocab_dim == -1 else view.vocab_dim
    where = order.index(vocab)
    lead = [dim - (dim > vocab) for dim in order if dim != vocab]
    rows = view.rows.permute(lead)
    return made(x, view.after("transpose", rows=rows, vocab_dim=-1 if where == x.dim() - 1 else where, packed=False))


@handles("unbind", "__iter__")
def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    if x.view_of.vocab_dim != -1 or is_vocab(x, dim):
        return NotImplemented
    rows = x.view_of.rows
    pieces = rows.unbind(position(dim, x.dim()))
    out = tuple(made(x, x.view_of.after("unbind", rows=piece, family=rows)) for piece in pieces)
    return out


HANDLERS["__iter__"] = lambda x: NotImplemented if (pieces := _unbind(x)) is NotImplemented else iter(pieces)


@handles("split", "split_with_sizes", "chunk", "tensor_split")
def _split(x: LazyLogits, sizes: Any, dim: int = 0) -> Any:
    return _pieces(x, "split", sizes, dim)


def _pieces(x: LazyLogits, name: str, sizes: Any, dim: int) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or is_vocab(x, dim):
        return NotImplemented
    pieces = getattr(view.rows, name)(sizes, dim=position(dim, x.dim()))
    family = view.rows if len(pieces) >= MANY_PIECES else view.family
    return tuple(made(x, view.after(name, rows=piece, family=family)) for piece in pieces)


HANDLERS["split"] = lambda x, split_size_or_sections=None, dim=0, **kw: _pieces(
    x, "split", split_size_or_sections if split_size_or_sections is not None else kw["split_size"], dim
)
HANDLERS["split_with_sizes"] = lambda x, split_sizes, dim=0: _pieces(x, "split_with_sizes", split_sizes, dim)
HANDLERS["chunk"] = lambda x, chunks, dim=0: _pieces(x, "chunk", chunks, dim)
HANDLERS["tensor_split"] = lambda x, indices_or_sections, dim=0: _pieces(x, "tensor_split", indices_or_sections, dim)


@handles("narrow")
def _narrow(x: LazyLogits, dim: int, start: Any, length: Any) -> Any:
    if x.view_of.vocab_dim != -1 or is_vocab(x, dim):
        return NotImplemented
    return _reshaped(x, "narrow", x.view_of.rows.narrow(position(dim, x.dim()), start, length))


@handles("select")
def _select(x: LazyLogits, dim: int, index: int) -> Any:
    if x.view_of.vocab_dim != -1 or is_vocab(x, dim):
        return NotImplemented
    return _reshaped(x, "select", x.view_of.rows.select(position(dim, x.dim()), index))


@handles("index_select")
def _index_select(x: LazyLogits, dim: int, index: Tensor) -> Any:
    if not isinstance(x, LazyLogits) or x.view_of.vocab_dim != -1 or is_vocab(x, dim):
        return NotImplemented
    return _reshaped(x, "index_select", x.view_of.rows.index_select(position(dim, x.dim()), index))


@handles("broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> Any:
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], tuple | list) else tensors
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    if any(isinstance(tensor, LazyLogits) and tensor.shape != shape for tensor in tensors):
        return NotImplemented
    return tuple(tensor if isinstance(tensor, LazyLogits) else tensor.expand(shape) for tensor in tensors)


def _index(items: list[Any], device: torch.device) -> Tensor:
    """A list of places as a tensor: of integers also where it is empty, when torch would take floats."""
    return torch.as_tensor(items, device=device) if items else torch.empty(0, dtype=torch.long, device=device)


@handles("__getitem__")
def _getitem(x: Any, index: Any) -> Any:
    if not isinstance(x, LazyLogits) or x.view_of.vocab_dim != -1:
        return NotImplemented
    view = x.view_of
    items = list(index) if isinstance(index, tuple) else [index]
    items = [_index(item, x.device) if isinstance(item, list) else item for item in items]
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
        return made(x, view.after("getitem", rows=view.rows[lead], mapping=view.mapping.narrowed(stop), cut=True))
    rows = view.rows[lead] if lead else view.rows
    if isinstance(last, int) and not isinstance(last, bool):
        if not -view.mapping.vocab <= last < view.mapping.vocab:
            return NotImplemented
        last = torch.tensor(last, device=x.device)
    if not isinstance(last, Tensor) or last.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    advanced = [item for item in lead if isinstance(item, Tensor)]
    ids = torch.where(last < 0, last + view.mapping.vocab, last).long()
    if advanced and last.dim():  # picked together, as lp[arange, arange, y]
        if len(advanced) != len(lead):
            return NotImplemented
        rows, ids = torch.broadcast_tensors(rows, ids)
        return taken(x, "getitem", rows, ids)
    if last.numel() > WIDEST_GATHER:
        return NotImplemented
    whole = (*rows.shape, *ids.shape)
    out = taken(x, "getitem", rows[(..., *[None] * ids.dim())].expand(whole), ids.expand(whole))
    if last.dim() == 0 and out is not NotImplemented:  # eager torch gives a view here
        give_column(x, view._replace(rows=rows), out, int(ids))
    return out
