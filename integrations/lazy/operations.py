"""What an operation on lazy logits becomes: answered by its handler, or by the full logits.

Handlers stand in ``views``, ``elementwise`` and ``reductions``, and are found by name (``registry``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.integrations.lazy import elementwise, reductions, views  # noqa: F401 - they bring the handlers
from orpo_kernels.integrations.lazy.registry import HANDLERS, follows_past, handles, of_rows, sharing
from orpo_kernels.integrations.lazy.stand_in import ChangedNode, DenseNode, LazyLogits, copy_of, keep

# Operations that only look at a tensor's metadata or its place on the graph.
METADATA = frozenset(
    """
    size dim ndimension numel nelement stride storage_offset element_size get_device is_floating_point is_complex
    is_signed is_same_size is_tensor is_storage is_shared is_pinned is_inference is_conj is_neg is_coalesced has_names
    result_type can_cast register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward
    detach_ grad __hash__ __len__
    """.split()  # noqa: SIM905 - a list of so many strings would be read by nobody
)


@torch._dynamo.disable  # compiled, what the handlers do to autograd's graph would be lost
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
        with _outside_inference():
            _settle(x)
        if x.lost is not None:
            raise RuntimeError(x.lost)
    if "input" in kwargs and not args:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    out = kwargs.pop("out", None)
    if isinstance(out, LazyLogits):
        return _change(torch.Tensor.copy_, "out=", (out, call(func, args, kwargs)), {})
    if out is not None:
        kwargs = {**kwargs, "out": out}
    if name in raised_by_autocast(lazies):
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, _in_float32, (args, kwargs))
    if name in HANDLERS and not any(x.changed for x in lazies) and kwargs.get("out") is None:
        with _outside_inference():
            result = HANDLERS[name](*args, **kwargs)
        if result is not NotImplemented:
            return result
    if _changes_first(func, name) and args and isinstance(args[0], LazyLogits):
        with _outside_inference():
            return _change(func, name, args, kwargs)
    with _outside_inference():
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, lambda x: values(x, name), (args, kwargs))
    return func(*args, **kwargs)


# Operations that autocast computes in float32. The lists are torch's own for each device type.
RAISED = {"cpu": frozenset(["cross_entropy", "cross_entropy_loss", "nll_loss", "kl_div"])}
RAISED["cuda"] = RAISED["cpu"] | {"log_softmax", "softmax", "sum", "exp", "log"}


def raised_by_autocast(lazies: list[LazyLogits]) -> frozenset[str]:
    """Operations that autocast computes in float32 where it is on."""
    device = lazies[0].device.type if lazies else "cpu"
    return RAISED.get(device, frozenset()) if torch.is_autocast_enabled(device) else frozenset()


def _in_float32(x: LazyLogits) -> Any:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@contextmanager
def _outside_inference() -> Iterator[None]:
    """What a stand-in keeps may be asked for again with gradient, where tensors of inference mode are useless."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


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
        keep(x, x.view_of.dense() if leaf else DenseNode.apply(x))
    assert x.own is not None
    return DenseNode.apply(x, x.own) if leaf and torch.is_grad_enabled() else x.own


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
    with torch.set_grad_enabled(x.requires_grad or torch.is_grad_enabled()):
        own = values(x, name)  # on the graph also where the change is made past it
    rest = torch.utils._pytree.tree_map_only(
        LazyLogits, lambda y: own if y is x else values(y, name), (args[1:], kwargs)
    )
    func(own, *rest[0], **rest[1])
    _take(x, own)
    _took_over(x, name)
    return None if name == "__setitem__" else x


def _take(x: LazyLogits, own: Tensor) -> None:
    """Values that were changed are what x stands for, and where autograd followed the change its gradient is theirs."""
    x.changed = True
    if not x.is_leaf or not x.requires_grad:
        x.own = own
        if x.requires_grad and own.requires_grad and torch.is_grad_enabled():
            ChangedNode.apply(x, own)


def _took_over(x: LazyLogits, name: str) -> None:
    """From now on the values that x has are what it stands for."""
    x.changed = True
    for other in sharing(x):
        other.lost = (
            f"orpo_kernels: {name} changed lazy logits in place, and this view of them, which was taken before, would "
            "have to follow: take the view after the change, or unfuse(model)"
        )


def _settle(x: LazyLogits) -> None:
    """Take over what was done in place through other tensors that share its memory."""
    root = x.view_of.root
    if root.in_memory:
        for y in (x, *sharing(x)):
            if y.own is not None and not y.changed and y.own._version != y.own_version:
                _took_over(y, "an operation on a view of them")
    if any(column._version != version for column, version in root.columns):
        raise RuntimeError(
            "orpo_kernels: single logits of a token, taken as logits[..., token], were changed in place, which lazy "
            "logits cannot follow: write logits[..., token] = value, or unfuse(model)"
        )
    for edit in x.edits:
        view = x.view_of
        past, scale = follows_past(x, edit), of_rows(view, edit)
        scale = scale.unsqueeze(-1).expand(*view.rows.shape, view.mapping.vocab)
        scale = scale.where(torch.arange(view.mapping.vocab, device=scale.device) < edit.vocab, 1)
        scale = (scale if view.vocab_dim == -1 else scale.movedim(-1, view.vocab_dim)).to(x.dtype)
        with torch.set_grad_enabled(x.requires_grad):
            own = values(x, "scale in place")
            with torch.set_grad_enabled(x.requires_grad and not past):
                own.mul_(scale)
            _take(x, own)
    x.edits = []


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
