"""The head of a Hugging Face model: where its weight is, and what the model does to its output.

The head module is intercepted during one ordinary forward of the model, so whatever a model does to hidden states
before its head (a projection, a division) has happened by then. What it does to the logits afterwards is read from its
configuration by the tables below and checked once against the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.loss import linear_logprobs
from orpo_kernels.scores import Head

# Configuration attribute -> what it does to the logits, and the model types it does it in (None: all that have it).
# From the modelling code of transformers 5.23.
SOFTCAPS: dict[str, tuple[str, ...] | None] = {
    "final_logit_softcapping": None,  # gemma2, gemma3, gemma3n, gemma4, vaultgemma, nanochat, paligemma, ...
    "logits_soft_cap": ("recurrent_gemma",),
    "output_logit_soft_cap": ("xlstm",),
}
MULTIPLIERS: dict[str, tuple[str, ...] | None] = {
    "logit_scale": ("cohere", "cohere2", "cohere2_moe", "cohere_compass"),  # mpt has the attribute and ignores it
    "logits_scaling": ("hyperclovax", "hyperclovax_vision_v2"),
    "lm_head_multiplier": ("falcon_h1",),
    "output_multiplier": ("muse_glimmer", "muse_spark"),
}
DIVISORS: dict[str, tuple[str, ...] | None] = {
    "logits_scaling": (
        "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid",
        "granite4_vision", "granite_docling",
    ),  # minicpm3 divides its hidden states by it, before the head
}  # fmt: skip
SLICES = "unpadded_vocab_size"  # inkling keeps that many rows of its head


def head_module(model: nn.Module) -> nn.Module | str:
    """The module that turns hidden states into logits, or the reason why it cannot be replaced."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        return f"{type(model).__name__} names no output embeddings"
    wrapped = getattr(head, "modules_to_save", None)
    if wrapped is not None:  # peft keeps the trained copy beside the original
        head = wrapped[head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapter[0]]
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    if head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
        return "its head has forward hooks, which a fused loss would pass by"
    if not isinstance(head.weight, nn.Parameter) or head.weight.is_meta or head.weight.numel() == 0:
        return "its head's weight is sharded or offloaded"
    return head


def read_head(model: nn.Module, module: nn.Module) -> Head:
    """The head as it is now: tensors from the module, scale and softcap from the model's configuration."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(config, "model_type", "")

    def values(table: dict[str, tuple[str, ...] | None]) -> Iterator[float]:
        for attribute, kinds in table.items():
            value = getattr(config, attribute, None)
            if value is not None and (
                kinds is None or kind in kinds or getattr(model.config, "model_type", "") in kinds
            ):
                yield float(value)

    scale = 1.0
    for value in values(MULTIPLIERS):
        scale *= value
    for value in values(DIVISORS):
        scale /= value
    softcap = next((value for value in values(SOFTCAPS) if value), None)
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    kept = getattr(config, SLICES, None)
    if kept is not None and kept < weight.shape[0]:
        weight, bias = weight[:kept], None if bias is None else bias[:kept]
    return Head(weight, bias, scale, softcap)


@dataclass(frozen=True)
class Check:
    """Log-probabilities of a few tokens by both ways, for one comparison."""

    labels: Tensor  # [k]
    ours: Tensor  # [k] nats
    dtype: torch.dtype

    def compare(self, logits: Tensor, model: nn.Module, head: Head) -> None:
        """Raise if the model's own ``logits [1, k, V]`` say something else.

        The tolerance is what rounding the logits to their dtype can do: half an ulp at the label and as much in the
        log-sum-exp, doubled.

        Raises:
            RuntimeError: the two differ; the message has both numbers.
        """
        logits = logits.float().view(-1, logits.shape[-1])
        theirs = torch.log_softmax(logits, -1).gather(-1, self.labels[:, None]).squeeze(-1)
        difference = (theirs - self.ours).abs().max().item()
        tolerance = 2 * torch.finfo(self.dtype).eps * (1 + logits.abs().max().item()) + 1e-5
        if not difference <= tolerance:
            raise RuntimeError(
                f"orpo_kernels does not reproduce the logits of {type(model).__name__}: for {len(self.labels)} tokens "
                f"the model's own log-probabilities are {[round(x, 4) for x in theirs.tolist()]} and ours "
                f"{[round(x, 4) for x in self.ours.tolist()]}, a difference of {difference:.3g} where rounding "
                f"explains {tolerance:.1g}. It does something to its logits that the head's tables do not know (read: "
                f"scale {head.logit_scale}, softcap {head.softcap}, bias {head.bias is not None}). Train it unpatched, "
                "and please report the model type"
            )


@contextmanager
def intercepted(module: nn.Module, instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``instead`` take the place of the head's forward inside the block."""
    before = module.__dict__.get("forward")
    module.forward = instead
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class Interception:
    """What one intercepted forward is to compute from the head's input, and what came of it.

    ``compute`` gets the hidden states ``[B, T, H]`` and the head. The model is given a stand-in of one column for its
    logits, except when it is checked: then it gets its own head's output for a few tokens and finishes them as it
    always does, so that one forward serves both sides of the comparison.
    """

    def __init__(self, model: nn.Module, module: nn.Module, compute: Callable[[Tensor, Head], Any]) -> None:
        self.model, self.module, self.compute = model, module, compute
        self.calls = 0
        self.result: Any = None
        self.check: Check | None = None

    def run(
        self, wrapped: nn.Module, outer: nn.Module, carry: Callable[[Any], Tensor], labels: Tensor | None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """One ordinary call of ``wrapped`` with the head intercepted.

        Args:
            wrapped: what the trainer calls, with DDP or DeepSpeed around ``outer``.
            outer: the innermost module whose call returns the model's output; its output carries the result's graph.
            carry: picks the differentiable tensor of the result, which leaves through the output's ``loss``, so that
                wrappers which walk the output find every parameter.
            labels: ``[B, T]`` targets of the positions to check, -100 elsewhere; None without a check.

        Raises:
            RuntimeError: the model did not call its head exactly once, or the check failed.
        """
        own = self.module.forward

        def instead(hidden: Tensor) -> Tensor:
            self.calls += 1
            head = read_head(self.model, self.module)
            self.result = self.compute(hidden, head)
            if labels is None or hidden.shape[:-1] != labels.shape:
                return hidden.new_zeros((*hidden.shape[:-1], 1))
            with torch.no_grad():
                places = torch.nonzero(labels.reshape(-1) != -100).view(-1)
                places = places[:: max(1, len(places) // 8)][:8]
                rows, wanted = hidden.reshape(-1, hidden.shape[-1])[places], labels.reshape(-1)[places]
                ours = linear_logprobs(
                    rows, head.weight, wanted, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
                )
                logits: Tensor = own(rows[None])
                if len(places):
                    self.check = Check(wanted, ours, logits.dtype)
                return logits

        def attach(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self.calls:
                output["loss"] = carry(self.result)
            return output

        handle = outer.register_forward_hook(attach)
        try:
            with intercepted(self.module, instead):
                output = wrapped(*args, **kwargs)
        finally:
            handle.remove()
        if self.calls != 1:
            raise RuntimeError(
                f"{type(self.model).__name__} called its head {self.calls} times in one forward, expected once: "
                "orpo_kernels cannot replace it; train it unpatched"
            )
        if self.check is not None:
            self.check.compare(output.logits, self.model, read_head(self.model, self.module))
        return output
