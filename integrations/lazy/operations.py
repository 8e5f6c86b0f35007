"""What an operation on lazy logits becomes: answered by its handler, or by the full logits.

Handlers stand in ``views``, ``elementwise`` and ``reductions``, and are found by name (``registry``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from orpo_kernels.integrations.lazy import elementwise, reductions, views  # noqa: F401 - they bring the handlers
from orpo_kernels.integrations.lazy.memory import change, settle, show, unsettled, values
from orpo_kernels.integrations.lazy.registry import HANDLERS, handles
from orpo_kernels.integrations.lazy.stand_in import LazyLogits, copy_of

# Operations that only look at a tensor's metadata or its place on the graph.
METADATA = frozenset(
    """
    size dim ndimension numel nelement stride storage_offset element_size get_device is_floating_point is_complex
    is_signed is_same_size is_tensor is_storage is_shared is_pinned is_inference is_conj is_neg is_coalesced has_names
    result_type can_cast register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward
    detach_ grad __hash__ __len__
    """.split()  # noqa: SIM905 - a list of so many strings would be read by nobody
)
PROPERTY = frozenset(("__get__", "__set__", "__delete__"))
# Operations that take a tensor's shape, dtype and device for a new one.
LIKE = frozenset(
    """
    new_zeros new_ones new_empty new_full new_tensor zeros_like ones_like empty_like full_like rand_like randn_like
    """.split()  # noqa: SIM905 - as above
)
# Operations that would leave the stand-in with another shape, which a tensor without memory cannot take.
RESHAPES = frozenset(
    """
    squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_ as_strided_ resize_ resize_as_ set_
    """.split()  # noqa: SIM905 - as above
)


@torch._dynamo.disable  # compiled, what the handlers do to autograd's graph would be lost
def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives."""
    name = func.__name__ if hasattr(func, "__name__") else str(func)
    if name in PROPERTY:
        return _property(func, name, args, kwargs)
    if name in METADATA:
        x = args[0] if args else None
        if name in ("register_hook", "retain_grad") and isinstance(x, LazyLogits) and x.changed and x.own is not None:
            return func(x.own, *args[1:], **kwargs)  # which is what is used of it from now on
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name in LIKE:
        like = torch.utils._pytree.tree_map_only(
            LazyLogits, lambda x: torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape), (args, kwargs)
        )
        return func(*like[0], **like[1])
    lazies = _lazies((*args, *kwargs.values()))
    for x in lazies:
        if unsettled(x):
            with _outside_inference():
                settle(x)
    out = None
    if kwargs:
        if "input" in kwargs and not args:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        out = kwargs.pop("out", None)
    if isinstance(out, LazyLogits):
        return change(torch.Tensor.copy_, "out=", out, (call(func, args, kwargs),), {})
    if out is not None:
        kwargs = {**kwargs, "out": out}
    if name in RAISED["cuda"] and name in raised_by_autocast(lazies):  # the first has all of them
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, _in_float32, (args, kwargs))
    if name in HANDLERS and not any(x.changed or x.shown for x in lazies) and kwargs.get("out") is None:
        with _outside_inference():
            result = HANDLERS[name](*args, **kwargs)
        if result is not NotImplemented:
            return result
    if name in RESHAPES and args and isinstance(args[0], LazyLogits):
        raise RuntimeError(
            f"orpo_kernels: {name} would give lazy logits another shape in place, which they cannot take: use "
            f"{name.removesuffix('_')}, which returns a tensor, or unfuse(model)"
        )
    if _changes_first(func, name) and args and isinstance(args[0], LazyLogits):
        with _outside_inference():
            return change(func, name, args[0], args[1:], kwargs)
    if str(getattr(func, "__module__", "")).startswith("torch.distributed"):
        with torch._C.DisableTorchFunctionSubclass():  # collectives write into what they are given: see below Python
            return func(*args, **kwargs)
    with _outside_inference():
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, lambda x: values(x, name), (args, kwargs))
    result = func(*args, **kwargs)
    for x in lazies:
        show(x, result)
    return result


def _lazies(values: Iterable[Any]) -> list[LazyLogits]:
    """The stand-ins among arguments, also in lists of them."""
    found: list[LazyLogits] = []
    for value in values:
        if isinstance(value, LazyLogits):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += _lazies(value.values() if isinstance(value, dict) else value)
    return found


# Operations that autocast computes in float32. The lists are torch's own for each device type.
RAISED = {"cpu": frozenset(["cross_entropy", "cross_entropy_loss", "nll_loss", "kl_div"])}
RAISED["cuda"] = RAISED["cpu"] | {"log_softmax", "softmax", "logsumexp", "sum", "exp", "log"}


def raised_by_autocast(lazies: list[LazyLogits]) -> frozenset[str]:
    """Operations that autocast computes in float32 where it is on."""
    device = lazies[0].view_of.rows.device.type if lazies else "cpu"
    return RAISED.get(device, frozenset()) if torch.is_autocast_enabled(device) else frozenset()


def _in_float32(x: LazyLogits) -> Any:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


_NOTHING = nullcontext()


def _outside_inference() -> AbstractContextManager[None]:
    """What a stand-in keeps may be asked for again with gradient, where tensors of inference mode are useless."""
    return _left() if torch.is_inference_mode_enabled() else _NOTHING


@contextmanager
def _left() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _changes_first(func: Any, name: str) -> bool:
    if name == "__setitem__":
        return True
    in_place = (
        name.startswith("__i")
        and name.endswith("__")
        and name not in ("__invert__", "__index__", "__int__", "__init__")
    )
    return in_place or (name.endswith("_") and not name.endswith("__"))


def _property(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    of = getattr(getattr(func, "__self__", None), "__name__", "")
    x = args[0]
    if name == "__get__" and (of in ("mT", "mH") or (of in ("T", "H") and x.dim() == 2)):
        return call(torch.Tensor.transpose, (x, -2, -1), {})
    if name == "__get__" and of == "T":
        return call(torch.Tensor.permute, (x, *range(x.dim() - 1, -1, -1)), {})
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


@handles("share_memory_")
def _shared(x: LazyLogits) -> LazyLogits:
    """No value changes: what shares memory with this tensor stays what it is."""
    values(x, "share_memory_").share_memory_()
    return x


@handles("__reduce_ex__", "__deepcopy__")
def _pickled(x: LazyLogits, argument: Any) -> Any:
    """As plain tensors: a stand-in would take the hidden states and the whole head along."""
    if x.grad_fn is not None and isinstance(argument, dict):
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol: detach() first")
    plain = values(x.detach(), "a copy" if isinstance(argument, dict) else "pickle")
    return plain.clone() if isinstance(argument, dict) else plain.__reduce_ex__(argument)
