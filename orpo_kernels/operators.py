"""The losses under ``torch.compile(fullgraph=True)``: two operators that the compiler sees whole.

Compacting the labels copies a few integers to the host, which no graph can hold, so a compiled call is one opaque
operator that runs the eager code. Both have the form (tensors, settings), whatever the settings are: numbers travel in
a tensor, so that another beta is no other graph, and everything else as text. What differs from eager: gradients are
scaled out of place, and ``linear_logprobs`` computes again in backward what eager keeps (its size depends on the
labels), one product more.

An objective travels by its name, so inside a compiled graph it is a frozen dataclass or a function that its module
exports.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import PAIR_ROWS, acc_dtype, grad_dtype
from orpo_kernels.engine import Losses, late_grads, logps_of, run, warn_skipped
from orpo_kernels.pairs import metric_names
from orpo_kernels.prepare import prepare
from orpo_kernels.settings import Batch, Head, Needs, Settings, checked_head


class Packed(NamedTuple):
    """Values of a call in types that an operator takes. ``text`` says what follows what."""

    tensors: list[Tensor]
    text: str
    floats: Tensor  # float64, on the CPU: the compiler makes a constant of a number that an operator takes
    ints: list[int]


def pack(head: Head, batch: Batch, settings: Settings) -> Packed:
    """Everything but hidden, weight and bias, which autograd tracks; the compiler traces this."""
    words, tensors, ints = [], [], []
    one = torch.ones((), dtype=torch.float64)
    floats = [torch.zeros((), dtype=torch.float64)]
    whole = Settings._fields.index("ignore_index") - len(Settings._fields)  # from here on an int is one
    values = [*head[2:], *batch, *_parts(settings.objective), *settings[1:]]
    for place, value in enumerate(values, -len(values)):
        if value is None:
            words.append("none")
        elif isinstance(value, Tensor):
            tensors.append(value)
            words.append("tensor")
        elif isinstance(value, bool):
            words.append("true" if value else "false")
        elif isinstance(value, float) or (isinstance(value, int) and place < whole):
            floats.append(one * value)
            words.append("float")
        elif isinstance(value, int):
            ints.append(value)
            words.append("int")
        elif isinstance(value, str):
            words.append("=" + value)
        else:
            raise TypeError(
                f"inside torch.compile settings must be numbers, strings or None, got {type(value).__name__}: call the "
                "loss outside the compiled region"
            )
    return Packed(tensors, "\n".join(words), torch.stack(floats), ints)


def unpack(weight: Tensor, bias: Tensor | None, packed: Packed, *, build: bool = True) -> tuple[Head, Batch, Settings]:
    """The values that ``pack`` was given; without ``build`` the objective's class stands for it.

    The compiler's numbers have no value yet.
    """
    tensors, ints = iter(packed.tensors), iter(packed.ints)
    floats = iter(packed.floats[1:].tolist() if build else packed.floats[1:])
    fixed = {"none": None, "true": True, "false": False}
    ahead = {"tensor": tensors, "float": floats, "int": ints}
    values: list[Any] = [
        word[1:] if word.startswith("=") else next(ahead[word]) if word in ahead else fixed[word]
        for word in packed.text.split("\n")
    ]
    head = Head(weight, bias, *(values.pop(0) for _ in Head._fields[2:]))
    batch = Batch(*(values.pop(0) for _ in Batch._fields))
    rest = len(Settings._fields) - 1
    name, *numbers = values[: len(values) - rest]
    objective: Any = _exported(name) if name else None
    if name and name.endswith(":") and build:
        objective = objective(*numbers)
    return head, batch, Settings(objective, *values[len(values) - rest :])


def _parts(objective: Any) -> list[Any]:
    """Where an objective is to be found, and its fields if it is a dataclass."""
    if objective is None:
        return [None]
    if hasattr(objective, "__dataclass_fields__"):
        kind = type(objective)
        return [f"{kind.__module__}:{kind.__qualname__}:", *(getattr(objective, n) for n in kind.__match_args__)]
    return [f"{objective.__module__}:{objective.__code__.co_qualname}"]


def _exported(name: str) -> Any:
    module, path, *_ = name.split(":")
    found: Any = importlib.import_module(module)
    for step in path.split("."):
        if not hasattr(found, step):
            raise ValueError(
                f"inside torch.compile the objective must be a function or a frozen dataclass that its module exports, "
                f"but {module} has no {path}: define it at the top of the module, or call the loss outside"
            )
        found = getattr(found, step)
    frozen = getattr(getattr(found, "__dataclass_params__", None), "frozen", True)
    if not frozen or (is_dataclass(found) and any(field.kw_only or not field.init for field in fields(found))):
        raise ValueError(
            f"inside torch.compile {path} must be a frozen dataclass, without fields that are keywords alone, so that "
            "it is what its fields say: make it one, or call the loss outside"
        )
    return found


def _run(hidden: Tensor, head: Head, batch: Batch, settings: Settings, needs: Sequence[bool]) -> Any:
    head = checked_head(head)
    call = prepare(hidden, head, batch, settings, Needs(*needs)).call()
    with torch.autocast(hidden.device.type, enabled=False), _autograd_again(), torch.no_grad():
        return call, *run(call, hidden.reshape(-1, head.features), head)


def _autograd_again() -> Any:
    """An operator runs below autograd, which the derivatives of an objective in plain torch are taken by."""
    excluded = torch._C._dispatch_tls_local_exclude_set() - torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutogradFunctionality
    )
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _or_empty(hidden: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor]:
    found = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    return [found[0].view(hidden.shape) if found[0].numel() else found[0], *found[1:]]


def _room(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], *, waits: bool) -> list[Tensor]:
    """What ``_or_empty`` returns, without data; gradients that wait for an upstream scalar may be wider."""
    return [
        torch.empty_like(
            like, dtype=grad_dtype(like.dtype) if waits else like.dtype, memory_format=torch.contiguous_format
        )
        if wanted and like is not None
        else hidden.new_empty(0)
        for like, wanted in zip((hidden, weight, bias), needs, strict=True)
    ]


# What every operator takes: what autograd tracks, and the fields of ``Packed``.
TAKES = "Tensor hidden, Tensor weight, Tensor? bias, Tensor[] tensors, str text, Tensor floats, SymInt[] ints"


@torch.library.custom_op(
    "orpo_kernels::preference_loss", mutates_args=(), schema=f"({TAKES}, bool[] needs) -> Tensor[]"
)
def preference_operator(hidden: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any) -> list[Tensor]:
    """``engine.Losses``, and gradients for an upstream gradient of 1 (empty where not needed)."""
    head, batch, settings = unpack(weight, bias, Packed(*packed[:-1]))
    call, losses, grads = _run(hidden, head, batch, settings, packed[-1])
    if settings.paired:
        warn_skipped(call.targets)
    return [*(value.clone() for value in losses), *_or_empty(hidden, grads)]


@preference_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any) -> list[Tensor]:
    _, batch, settings = unpack(weight, bias, Packed(*packed[:-1]), build=False)
    sequences = hidden.shape[0] if batch.cu_seqlens is None else batch.cu_seqlens.shape[0] - 1
    pairs = sequences // 2 if settings.paired else sequences
    metrics, acc = len(metric_names(settings.objective)), acc_dtype(hidden.dtype)
    shapes = ((), (4 + metrics,), (len(PAIR_ROWS) + 1 + metrics, pairs))
    losses = [hidden.new_empty(shape, dtype=acc) for shape in shapes]
    return [*losses, *_room(hidden, weight, bias, packed[-1], waits=True)]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[len(Losses._fields) :])
    ctx.dtypes = [None if like is None else like.dtype for like in inputs[:3]]
    ctx.needs, ctx.others = inputs[-1], len(inputs[3])
    ctx.mark_non_differentiable(*output[1:])


def _scale(ctx: Any, grad_outputs: list[Tensor | None]) -> tuple[Any, ...]:
    upstream = grad_outputs[0]
    found = [
        (grad * upstream).to(dtype) if needed and dtype is not None and upstream is not None else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *found, [None] * ctx.others, None, None, None, None


torch.library.register_autograd("orpo_kernels::preference_loss", _scale, setup_context=_keep_gradients)


@torch.library.custom_op(
    "orpo_kernels::linear_logprobs",
    mutates_args=(),
    schema=f"({TAKES}, Tensor? upstream, bool[] needs) -> Tensor[]",
)
def logprobs_operator(hidden: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any) -> list[Tensor]:
    """Log-probabilities of the labels; with an upstream gradient of theirs, the three gradients instead."""
    *fields, upstream, needs = packed
    head, batch, settings = unpack(weight, bias, Packed(*fields))
    call, found, grads = _run(hidden, head, batch, settings, needs)
    if upstream is None:
        return [logps_of(call, found).view(batch.labels.shape)]
    with torch.autocast(hidden.device.type, enabled=False):
        grads = late_grads(call, hidden.reshape(-1, head.features), head, found, grads, upstream.reshape(-1))
    return _or_empty(hidden, [None if grad is None else grad.to(hidden.dtype) for grad in grads])


@logprobs_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any) -> list[Tensor]:
    *_, upstream, needs = packed
    if upstream is None:
        return [hidden.new_empty(hidden.shape[:-1], dtype=acc_dtype(hidden.dtype))]
    return _room(hidden, weight, bias, needs, waits=False)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, bias, tensors, ctx.text, floats, ctx.ints, *_ = inputs
    ctx.save_for_backward(hidden, weight, bias, floats, *tensors)


def _logprobs_grads(ctx: Any, grad_outputs: list[Tensor]) -> tuple[Any, ...]:
    hidden, weight, bias, floats, *tensors = ctx.saved_tensors
    tracked = (hidden, weight, bias)
    needs = [bool(needed) and like is not None for needed, like in zip(ctx.needs_input_grad, tracked, strict=False)]
    found = logprobs_operator(*tracked, tensors, ctx.text, floats, ctx.ints, grad_outputs[0], needs)
    grads = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return *grads, [None] * len(tensors), None, None, None, None, None


torch.library.register_autograd("orpo_kernels::linear_logprobs", _logprobs_grads, setup_context=_keep_inputs)


def preference(hidden: Tensor, head: Head, batch: Batch, settings: Settings) -> list[Tensor]:
    """The tensors of ``engine.Losses``, as the compiler sees them."""
    needs = list(Needs.of(hidden, head))
    found: list[Tensor] = preference_operator(hidden, head.weight, head.bias, *pack(head, batch, settings), needs)
    return found[: len(Losses._fields)]


def logprobs(hidden: Tensor, head: Head, batch: Batch, settings: Settings) -> Tensor:
    """Log-probabilities in the shape of labels, as the compiler sees them."""
    nothing = [False, False, False]
    found: list[Tensor] = logprobs_operator(hidden, head.weight, head.bias, *pack(head, batch, settings), None, nothing)
    return found[0]
