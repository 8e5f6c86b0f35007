"""Backends: what computes E, its sums and its two products. The engine and the planner know only ``Backend``.

A backend says in one place why it cannot take a call; ``select`` takes the first that has no such reason.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels import targets
from orpo_kernels.pairs import Objective, PairLogps, PairTerms, terms_of
from orpo_kernels.settings import Head
from orpo_kernels.targets import ANSWER, NLL, Columns, Pairs

# Rows whose S passes this, or is no number, take their largest logit as shift instead of the label's: they overflowed.
# exp(60) times any vocabulary and any weight still fits a float32, which exp(80) would not.
OVERFLOW_ABOVE = math.exp(60.0)
# Rows and tokens of a tile of logits where they are formed as they are: 16 MiB in float32.
LOGITS_TILE = (1024, 4096)


def slices(size: int, step: int) -> Iterator[slice]:
    """Slices of ``step``, the last as long as what is left."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients underflow before a loss scale is applied, so they wait for it in float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def uncast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; where it is off, nothing, which costs less."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class Grads(NamedTuple):
    """Where gradients are written, in ``grad_dtype`` or a wider one; None where none is asked for."""

    hidden: Tensor | None  # [rows, H], 0 where no target is
    weight: Tensor | None  # [V, f], of the last f columns of the weight: f < H where the first ones are frozen
    bias: Tensor | None

    def columns(self, hidden: Tensor) -> Tensor:
        """Of ``hidden [n, H]`` what multiplies E for the weight's gradient."""
        return hidden if self.weight is None else hidden[:, hidden.shape[1] - self.weight.shape[1] :]


class Part(NamedTuple):
    """Some targets of a call."""

    hidden: Tensor  # [rows, H], all of it
    rows: Tensor  # [n], which of its rows the targets belong to
    ids: Tensor  # [n], rows of the head's weight; -1 where another rank holds the label's
    head: Head
    scratch: int  # bytes a pass may hold beside its inputs, a stored E and its results
    shared_rows: bool = False  # a row may carry two targets, of this part or of another
    logit_means: bool = False  # whether ``Found.logit_means`` is wanted
    mean_weight: Tensor | None = None  # [H], the head's mean row: without a softcap it gives the mean logits
    # Of "expected" (and the entropy), "mean", "argmax" and "lse2" what ``Found.moments`` shall have, of a backend that
    # forms it in the same pass.
    moments: Collection[str] = ()


class Moments(NamedTuple):
    """Of rows of capped logits ``z [V]``, ``[n]`` each, accumulation dtype; None for what was not wanted."""

    expected: Tensor | None = None  # sum_v p_v z_v with p = softmax(z)
    entropy: Tensor | None = None  # -sum_v p_v log p_v; the log-sum-exp less the expected would cancel if a row is sure
    mean: Tensor | None = None  # mean over V
    argmax: Tensor | None = None  # int64, where the largest logit is; the first of equal ones
    lse2: Tensor | None = None  # log sum_v exp(2 z_v); less twice the log-sum-exp it is log sum_v p_v^2

    @staticmethod
    def joined(parts: Sequence[Moments]) -> Moments:
        """Those of rows one after the other."""
        return Moments(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*parts, strict=True)))


class MomentSums:
    """What ``Moments`` of n rows are made of, tile by tile of logits; sums in the accumulation dtype.

    The logits may stand under any ``shift [n]``. Exponentials stand under the largest logit so far, so that an entropy
    is made of terms of one sign.
    """

    def __init__(self, shift: Tensor, wanted: Collection[str], head: Head) -> None:
        self.shift, self.wanted, self.vocab = shift, wanted, head.vocab
        self.masked = head.bias is not None  # whether a logit may be -inf
        # Numbers until the first tile: what is not wanted takes no memory.
        self.largest: Any = torch.finfo(shift.dtype).min / 2
        self.exps: Any = 0.0  # sum of exp(u - largest)
        self.weighted: Any = 0.0  # of exp(u - largest) * (u - largest)
        self.squares: Any = 0.0  # of exp(u - largest)^2
        self.total: Any = 0.0
        self.argmax: Any = 0
        # Two tiles that every call uses again: fresh memory costs a CPU more than what is computed in it.
        self.tiles: Tensor | None = None

    def add(self, first: int, shifted: Tensor) -> None:
        """Take ``shifted [s, n]``, the logits u = z - shift of tokens ``first`` to ``first + s``."""
        if "mean" in self.wanted:
            self.total = self.total + shifted.sum(0, dtype=self.shift.dtype)
        if self.masked:  # a masked token has no part in the expectation: zero times a number that is finite
            shifted = shifted.clamp(min=torch.finfo(shifted.dtype).min / 4)
        before, exponentials = self.largest, not {"expected", "lse2"}.isdisjoint(self.wanted)
        if "argmax" in self.wanted:
            largest, place = shifted.max(0)
            self.argmax = torch.where(largest > before, place + first, self.argmax)
        elif exponentials:
            largest = shifted.amax(0)
        else:
            return
        self.largest = largest.to(self.shift.dtype).clamp(min=before)
        if not exponentials:
            return
        if self.tiles is None or self.tiles.shape[1] < shifted.shape[0]:
            self.tiles = self.shift.new_empty(2, *shifted.shape)
        below, exps = self.tiles[:, : shifted.shape[0]]
        torch.exp(below.copy_(shifted).sub_(self.largest), out=exps)
        moved = before - self.largest
        factor = moved.exp()
        if "lse2" in self.wanted:
            self.squares = self.squares * factor.square() + torch.linalg.vector_norm(exps, dim=0).square()
        if "expected" in self.wanted:
            weighted, self.exps = self.weighted + self.exps * moved, self.exps * factor + exps.sum(0)
            self.weighted = weighted * factor + exps.mul_(below).sum(0)

    def moments(self) -> Moments:
        expected = entropy = None
        if "expected" in self.wanted:
            below = self.weighted / self.exps
            expected, entropy = self.shift + (self.largest + below), self.exps.log() - below
        mean = self.shift + self.total / self.vocab if "mean" in self.wanted else None
        argmax = self.argmax if "argmax" in self.wanted else None
        lse2 = 2 * (self.shift + self.largest) + self.squares.log() if "lse2" in self.wanted else None
        return Moments(expected, entropy, mean, argmax, lse2)


class Found(NamedTuple):
    """What the first product yields."""

    logps: Tensor  # [n] nats, accumulation dtype
    logit_means: Tensor | None  # [n], mean over V of a row's capped logits; without a softcap, less the bias's
    state: Any  # what the backend's own backward needs, E among it where it is stored
    moments: Moments | None = None
    labels: Tensor | None = None  # [n], capped logits of the targets themselves, of a backend that keeps them


class Cost(NamedTuple):
    """Bytes that a pass over some targets holds beside inputs and results, but for tiles that live in a cache."""

    stored: int  # E
    scratch: int  # copies of rows, and slices of E that is not stored
    budget: int  # what ``Part.scratch`` is to be: how far the backend may go with scratch


# What PairTable.values begins with.
PAIR_ROWS = (
    "chosen_sum",
    "rejected_sum",
    "chosen_length",
    "rejected_length",
    "nll",
    "chosen_logits",
    "rejected_logits",
)


class PairTable(NamedTuple):
    """What a run of G pairs comes to. ``values`` has a row for each of ``PAIR_ROWS``, then the loss and the metrics.

    From ``nll`` on a row carries its share of the batch's mean, so that its sum over all pairs is that mean.
    """

    values: Tensor  # [len(PAIR_ROWS) + 1 + metrics, G]
    g: Tensor  # [n], d loss / d logp of each target


class Backend(ABC):
    """What computes a part. A new backend writes four methods; the others have defaults in plain torch to be fused.

    ``n`` targets, ``H`` features, ``V`` tokens. E is the matrix of shifted exponentials of the logits.
    """

    name: str
    tuned_for: str  # the device type on which "auto" prefers it
    takes_shards = False  # whether it minds ``Head.shard`` and an id of -1

    @abstractmethod
    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take such inputs, as a sentence, or None."""

    @abstractmethod
    def cost(self, n: int, vocab: int, features: int, dtype: torch.dtype, budget: int, *, store: bool) -> Cost:
        """What a pass over n targets holds when it may hold ``budget`` bytes in all, and keeps to as far as it can."""

    @abstractmethod
    def forward(self, part: Part, into: Grads, *, store: bool) -> Found:
        """Log-probabilities of the part's targets.

        With ``store`` E stays in ``state`` for ``backward``. Where ``into.hidden`` is given, d logp / d hidden is
        formed here or there, as the backend likes; it may wait in ``into.hidden``, in the rows of the part.
        """

    @abstractmethod
    def backward(self, part: Part, found: Found, g: Tensor, into: Grads, *, accumulate: bool) -> None:
        """Write the gradients for ``g [n] = d loss / d logp`` to ``into``; called once for each ``found``.

        With ``accumulate`` the head's gradients are added to what is there. Other parts' rows of ``into.hidden`` are
        left alone, and added to where rows are shared. An E that was not stored is computed again for the head.
        """

    # Plain torch, which a backend may fuse.

    def count(self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
        """``targets.count``."""
        return targets.count(labels, nll_labels, offsets, ignore_index)

    def compact(
        self, labels: Tensor, nll_labels: Tensor, offsets: Tensor, table: Tensor, size: int, ignore_index: int
    ) -> Columns:
        """``targets.compact``."""
        return targets.compact(labels, nll_labels, offsets, table, size, ignore_index)

    def pair_terms(self, found: Found, pairs: Pairs, given: GivenPairs) -> PairTable:
        """From log-probabilities to what each pair adds to the loss, and back to a coefficient for each target.

        Sums over a sequence are ``pairs.sums``, which knows what other ranks have of it.
        """
        acc = found.logps.dtype
        lengths = pairs.per_pair(0).to(acc)
        valid = (lengths > 0).all(1)
        sums = pairs.sums(found.logps, ANSWER)
        assert found.logit_means is not None  # asked for
        logits = [
            total / max(count, 1)
            for total, count in zip(pairs.sums(found.logit_means, 0).unbind(1), pairs.sizes.sides, strict=True)
        ]
        chunk = slice(pairs.first, pairs.last)
        known = PairLogps(
            *sums.unbind(1),
            *lengths.unbind(1),
            *(None if value is None else value[chunk] for value in given.tensors),
        )
        terms = terms_of(given.objective, known, valid, pairs.sizes.valid, differentiate=given.differentiate)
        share = valid.to(acc) / max(pairs.sizes.valid, 1)
        nll_share = pairs.nll_share(given.by_sequence, acc)
        nll = -(pairs.sums(found.logps, NLL) * nll_share).sum(1)
        weighted = [value * share for value in (terms.loss, *terms.metrics)]
        return PairTable(
            values=torch.stack([*sums.unbind(1), *lengths.unbind(1), nll, *logits, *weighted]),
            g=pairs.spread(_columns(terms) * share[:, None], -given.nll_weight * nll_share),
        )

    def form(self, hidden: Tensor, head: Head) -> str:
        """How hidden states ``[..., H]`` meet the head, for people to read, and what a faster way would ask for."""
        return ""

    def mean_weight(self, weight: Tensor) -> Tensor:
        """Mean over the vocabulary of ``weight [V, H]``, ``[H]`` in the accumulation dtype."""
        return weight.mean(0, dtype=acc_dtype(weight.dtype))

    def moments(self, part: Part) -> Moments:
        """``part.moments`` of the part's rows, by a product of their own: what ``forward`` did not form in passing."""
        head, acc = part.head, acc_dtype(part.hidden.dtype)
        found = []
        for of in slices(part.rows.numel(), LOGITS_TILE[0]):
            hidden = part.hidden[part.rows[of]]
            sums = MomentSums(hidden.new_zeros(hidden.shape[0], dtype=acc), part.moments, head)
            for tokens in slices(head.vocab, LOGITS_TILE[1]):
                sums.add(tokens.start, head.logits(hidden, tokens).T)
            found.append(sums.moments())
        return Moments.joined(found)

    def scale(self, values: Tensor, by: Tensor) -> None:
        """``values *= by`` in place for a scalar ``by``, at no cost where that is 1, if the host can know."""
        if by.device.type != "cpu" or float(by) != 1.0:
            values.mul_(by)


class GivenPairs(NamedTuple):
    """What the loss over pairs is told beside the log-probabilities."""

    objective: Objective
    nll_weight: float
    by_sequence: bool  # the NLL is a mean over sequences of their means
    differentiate: bool
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)  # the last three of PairLogps


def _columns(terms: PairTerms) -> Tensor:
    return torch.stack([terms.d_chosen_sum, terms.d_rejected_sum], 1)


def finalize(label: Tensor, shift: Tensor, sum_exp: Tensor, slope: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """From S to log-probabilities, ``1 / (a + S)`` and the label's entry of E, all ``[n]``.

    ``a = exp(label - shift)``; the entry is ``-S`` times the cap's slope at the label.
    """
    distance = label - shift
    # log1p keeps relative precision as p -> 1. Far below -30, where exp(-distance) would overflow, the shift is the
    # largest logit, so that S is 1 or more and what the label adds to it, nothing.
    near = distance.clamp(min=-30)
    logps = distance - near - torch.log1p(sum_exp * torch.exp(-near))
    return logps, (torch.exp(distance) + sum_exp).reciprocal(), sum_exp * -slope


def available() -> tuple[Backend, ...]:
    """Every backend. One more is a class and a line here."""
    from orpo_kernels.backends.torch_backend import TorchBackend
    from orpo_kernels.backends.triton_backend import TritonBackend

    return TritonBackend(), TorchBackend()


@cache
def by_preference(device: torch.device) -> tuple[Backend, ...]:
    """Every backend, those tuned for such a device first."""
    return tuple(sorted(available(), key=lambda backend: backend.tuned_for != device.type))


def check_name(name: str | Backend) -> None:
    """A backend, the name of one, or "auto".

    Raises:
        ValueError: anything else.
    """
    names = sorted(backend.name for backend in available())
    if not isinstance(name, Backend) and name not in ("auto", *names):
        raise ValueError(f"backend must be 'auto' or one of {names}, got {name!r}: or pass a Backend of your own")


def select(name: str | Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name`` or that it is, or for "auto" the first by preference that takes such inputs.

    Raises:
        ValueError: no such backend, or it refuses these inputs, with its reason.
    """
    refusals: list[str] = []
    for backend in (name,) if isinstance(name, Backend) else by_preference(device):
        if name in ("auto", backend.name, backend):
            refusal = backend.refuses(device, dtype)
            if refusal is None:
                return backend
            refusals.append(f"{backend.name}: {refusal}")
    check_name(name)
    raise ValueError("no backend takes these inputs: " + "; ".join(refusals))
