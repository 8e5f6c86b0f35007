"""Backends: what computes E, its sums and its two products. The engine and the plans know only ``Backend``.

A backend says in one place why it cannot take a call; ``select`` takes the first that has no such reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orpo_kernels.objective import PairTerms
from orpo_kernels.pairs import PairTable
from orpo_kernels.scores import Columns, Head, Scores


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Forward(NamedTuple):
    """Scores after the first product. Tensors of ``[n]`` have the accumulation dtype."""

    logps: Tensor  # [n] nats
    shift: Tensor  # [n], what each row's logits were shifted by
    inverse: Tensor  # [n], r = 1 / (exp(z_y - shift) + S), S = sum of exp(z - shift) over v != y
    entry: Tensor  # [n], what stands at the label's place in E: -S, times the softcap's slope at the label
    unit: Tensor | None  # the backend's own form of d logp / d hidden, where asked for and not to be had from exps
    exps: Tensor | None  # backend's own layout of E, where asked for
    logit_means: Tensor | None  # [n] mean over V of a row's capped logits but for the bias's, where asked for


class Backend(Protocol):
    """What the engine calls. ``n`` scores, ``H`` features, ``V`` tokens.

    ``hidden [rows, H]`` comes whole; ``rows [n]`` says which of its rows the scores ``targets [n]`` belong to.
    ``room`` is how many bytes of scratch a call may hold beside inputs, kept E and results.
    """

    name: str
    tuned_for: str  # the device type on which "auto" prefers it
    least_room: int  # bytes of scratch it needs beside a kept E

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take such inputs, as a sentence, or None."""
        ...

    def kept_itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of one entry of a kept E for inputs of ``dtype``."""
        ...

    def count_scores(self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
        """``scores.count_scores``."""
        ...

    def compact_scores(
        self,
        labels: Tensor,
        nll_labels: Tensor,
        offsets: Tensor,
        table: Tensor,
        count: int,
        ignore_index: int,
        by_sequence: bool,
        dtype: torch.dtype,
    ) -> Columns:
        """``scores.compact_scores``."""
        ...

    def rows_at_once(self, features: int, room: int) -> int:
        """Scores of one ``forward`` that keeps no E."""
        ...

    def scratch_bytes(self, n: int, vocab: int, features: int, dtype: torch.dtype, room: int, *, kept: bool) -> int:
        """What a pass over n scores holds beside a ``kept`` E, or without one, but for tiles that live in a cache."""
        ...

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        *,
        keep: bool,
        unit: bool,
        logit_means: bool,
        centre: Tensor | None,
        room: int,
    ) -> Forward:
        """Log-probabilities of ``targets``, and what the backward needs.

        ``keep`` asks for E, ``unit`` for what ``grad_hidden`` needs. ``logit_means`` are ``scale * h . centre`` with
        ``centre = mean(W)``; under a softcap, where no product gives them, they come from the tiles, biases included.
        """
        ...

    def pair_table(
        self,
        logps: Tensor,
        logit_means: Tensor,
        scores: Scores,
        pairs: slice,
        part: slice,
        objective: Callable[[Tensor, Tensor], PairTerms],
        nll_weight: float,
    ) -> PairTable:
        """``pairs.pair_table``."""
        ...

    def grad_hidden(
        self,
        result: Forward,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        grad_logps: Tensor | None,
        out: Tensor,
        *,
        shared: bool,
        room: int,
    ) -> None:
        """``out[rows] = grad_logps * d logp / d hidden`` (added, if rows are ``shared``), once; None means ones."""
        ...

    def scale_rows(self, out: Tensor, rows: Tensor, factors: Tensor) -> None:
        """``out[rows] *= factors`` in place; rows differ."""
        ...

    def grad_head(
        self,
        result: Forward,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        grad_logps: Tensor,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        *,
        accumulate: bool,
        room: int,
    ) -> None:
        """Write (or add, with ``accumulate``) the head's gradients for ``grad_logps [n]``.

        Uses ``result.exps`` if kept, for the last time, and computes E again tile by tile if not.
        """
        ...

    def scale(self, values: Tensor, by: Tensor) -> None:
        """``values *= by`` in place for a scalar ``by``, at no cost where that is 1."""
        ...

    def column_mean(self, weight: Tensor) -> Tensor:
        """Mean over the vocabulary of ``weight [V, H]``, ``[H]`` in the accumulation dtype."""
        ...


def available() -> tuple[Backend, ...]:
    """Every backend. One more is a class and a line here."""
    from orpo_kernels.backends.torch_backend import TorchBackend
    from orpo_kernels.backends.triton_backend import TritonBackend

    return TritonBackend(), TorchBackend()


def by_preference(device: torch.device) -> list[Backend]:
    """Every backend, those tuned for such a device first."""
    return sorted(available(), key=lambda backend: backend.tuned_for != device.type)


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or for "auto" the first by preference that takes such inputs.

    Raises:
        ValueError: no such backend, or it refuses these inputs, with its reason.
    """
    backends = by_preference(device)
    names = sorted(backend.name for backend in backends)
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
