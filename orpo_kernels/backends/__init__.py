"""Backends: what computes E, its sums and its two products. The engine and the plans know only ``Backend``.

A backend says in one place why it cannot take a call; ``select`` takes the first that has no such reason.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orpo_kernels.scores import Head


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Forward(NamedTuple):
    """One chunk of n scores after the first product. Tensors of ``[n]`` have the accumulation dtype."""

    logps: Tensor  # [n] nats
    shift: Tensor  # [n], what each row's logits were shifted by
    inverse: Tensor  # [n], r = 1 / (exp(z_y - shift) + S), S = sum of exp(z - shift) over v != y
    entry: Tensor  # [n], what stands at the label's place in E: -S, times the softcap's slope at the label
    unit: Tensor | None  # [n, H] d logp / d hidden, where asked for
    exps: Tensor | None  # backend's own layout of E, where asked for
    logit_sum: Tensor | None  # [n] sum of the capped logits over V, under a softcap where asked for


class Backend(Protocol):
    """What the engine calls. ``n`` scores, ``H`` features, ``V`` tokens."""

    name: str

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take such inputs, as a sentence, or None."""
        ...

    def kept_itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of one entry of a kept E for inputs of ``dtype``."""
        ...

    def forward(
        self, hidden: Tensor, targets: Tensor, head: Head, *, keep: bool, unit: bool, logit_sum: bool
    ) -> Forward:
        """Log-probabilities of ``targets [n]`` given ``hidden [n, H]``, and what the backward needs.

        ``keep`` asks for E, ``unit`` for d logp / d hidden, ``logit_sum`` for the row sums of capped logits.
        """
        ...

    def grad_head(
        self,
        result: Forward,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        grad_logps: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        *,
        accumulate: bool,
    ) -> None:
        """Write (or add, with ``accumulate``) the head's gradients for ``grad_logps [n]``.

        Uses ``result.exps`` if kept and recomputes E tile by tile if not.
        """
        ...

    def column_mean(self, weight: Tensor) -> Tensor:
        """Mean over the vocabulary of ``weight [V, H]``, ``[H]`` in the accumulation dtype."""
        ...


def available() -> tuple[Backend, ...]:
    """Every backend, most wanted first."""
    from orpo_kernels.backends.torch_backend import TorchBackend

    return (TorchBackend(),)


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or for "auto" the first that takes such inputs.

    Raises:
        ValueError: no such backend, or it refuses these inputs, with its reason.
    """
    backends = available()
    names = [backend.name for backend in backends]
    if name != "auto" and name not in names:
        raise ValueError(f"backend must be 'auto' or one of {names}, got {name!r}")
    refusals: list[str] = []
    for backend in backends:
        if name in ("auto", backend.name):
            refusal = backend.refuses(device, dtype)
            if refusal is None:
                return backend
            refusals.append(f"{backend.name}: {refusal}")
    raise ValueError("no backend takes these inputs: " + "; ".join(refusals))
