"""What has to be computed: targets, not positions.

A target is one (hidden row, token id) that counts in the NLL, in its answer's log-probability, or in both. Padding, the
rejected side's prompt and the last position are no targets and never meet the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import add, mul
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.shards import largest, summed

ANSWER, NLL = 1, 2  # bits of a target's kind


class Counts(NamedTuple):
    """Columns of the table ``[2P, 8]`` int64 that says how many of what each sequence holds.

    A range of labels always includes 0, which is a token of every vocabulary; over all rows it is that of the batch.
    """

    answers: tuple[int, ...]
    nlls: tuple[int, ...]
    first: tuple[int, ...]  # positions that are a target
    separate: tuple[int, ...]  # of these, how many are two: the NLL names another token than the answer
    low: tuple[int, ...]  # smallest and largest label that counts
    high: tuple[int, ...]
    nll_low: tuple[int, ...]
    nll_high: tuple[int, ...]


class Columns(NamedTuple):
    """The targets of pairs, pair by pair and within a pair chosen before rejected."""

    rows: Tensor  # [N] int64, row of the flattened hidden states
    ids: Tensor  # [N] int64, in [0, V)
    kind: Tensor  # [N] int8, ANSWER | NLL
    offsets: Tensor  # [2P + 1] int64, where the targets of chosen 0, rejected 0, chosen 1, ... begin


@dataclass(frozen=True)
class Sizes:
    """How many targets there are, on the host: all that a plan needs."""

    pairs: tuple[int, ...]  # targets of each pair; a single number where there are no pairs
    sides: tuple[int, int]  # targets of the chosen and of the rejected side
    valid: int  # pairs of which both answers have a token
    nll: int  # NLL tokens
    nll_sequences: int  # sequences that have one
    shared_rows: bool  # some row carries two targets
    positions: int

    @property
    def count(self) -> int:
        return sum(self.pairs)


@dataclass(frozen=True)
class Targets:
    """N targets; in order of pairs where there are pairs, so that a run of whole pairs is a plain slice."""

    rows: Tensor
    ids: Tensor  # rows of the head's weight, -1 where another rank holds it
    sizes: Sizes
    kind: Tensor | None = None
    offsets: Tensor | None = None
    counts: Tensor | None = None  # [2P, 8], the columns of Counts of whole sequences, chosen first
    group: Any = None  # of the ranks that hold other positions of the same sequences
    weights: Tensor | None = None  # [N], what each log-probability counts in its answer's sum; None counts each once

    def pairs(self, first: int, last: int, begin: int, end: int) -> Pairs:
        """Pairs ``first`` to ``last``, whose targets are ``begin`` to ``end``, and how these belong to them."""
        assert self.kind is not None  # asked of targets that form pairs
        assert self.offsets is not None
        assert self.counts is not None
        offsets = self.offsets[2 * first : 2 * last + 1]
        weights = None if self.weights is None else self.weights[begin:end]
        return Pairs(self.kind[begin:end], offsets, self.counts, self.sizes, first, last, begin, self.group, weights)


class Pairs(NamedTuple):
    """A run of whole pairs; ``G = last - first`` of them with ``n`` targets."""

    kind: Tensor  # [n]
    offsets: Tensor  # [2G + 1], less ``begin`` where a target of this run begins
    counts: Tensor  # [2P, 8] of all pairs
    sizes: Sizes  # of all pairs
    first: int
    last: int
    begin: int
    group: Any = None
    weights: Tensor | None = None  # [n]

    def per_pair(self, column: int) -> Tensor:
        """A column of the counts, ``[G, 2]``: chosen and rejected."""
        return self.counts[:, column].view(2, -1)[:, self.first : self.last].T

    def sums(self, values: Tensor, bit: int) -> Tensor:
        """Sums over the targets of a kind (0: over all), ``[G, 2]``, of every rank that holds positions of the pairs.

        Those over answers are weighted. A value that does not count may be infinite.
        """
        if bit:
            values = torch.where(self.kind & bit != 0, values, 0)
        if bit == ANSWER:
            values = weighted(values, self.weights)
        # In float64, as segment_reduce adds one after the other.
        found: Tensor = torch.segment_reduce(values.double(), "sum", offsets=self.offsets - self.begin, initial=0)
        if self.group is not None:
            found = summed(found, self.group)
        return found.to(values.dtype).view(-1, 2)

    def nll_share(self, by_sequence: bool, dtype: torch.dtype) -> Tensor:
        """Weight ``[G, 2]`` of one NLL token in the NLL."""
        nlls = self.per_pair(Counts._fields.index("nlls"))
        if by_sequence:  # the mean over the sequences that have an NLL token, of each one's mean
            return 1.0 / (nlls.clamp(min=1) * max(self.sizes.nll_sequences, 1)).to(dtype)
        return torch.full(nlls.shape, 1.0 / max(self.sizes.nll, 1), dtype=dtype, device=nlls.device)

    def spread(self, answer: Tensor, nll: Tensor) -> Tensor:
        """``g [n]`` from derivatives ``[G, 2]`` in a sequence's sum over its answer and over its NLL tokens."""
        table = torch.stack([answer, nll], -1).view(-1, 2)
        of_target = torch.repeat_interleave(table, self.offsets.diff(), 0, output_size=self.kind.numel())
        of_answer = weighted(torch.where(self.kind & ANSWER != 0, of_target[:, 0], 0), self.weights)
        return of_answer + torch.where(self.kind & NLL != 0, of_target[:, 1], 0)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """The product, 0 for a weight of 0 whatever the value."""
    return values if weights is None else torch.where(weights == 0, 0, values * weights.to(values.dtype))


def pair_sizes(
    labels: Tensor,  # [positions], flattened
    vocab: int,
    ignore_index: int,
    count: Callable[[], Tensor],
    group: Any = None,  # of the ranks that hold other positions of the same sequences
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[Sizes, Tensor, Tensor]:
    """``Sizes``, the table of ``count``, and that of whole sequences, by the one device-to-host copy of a call.

    The copy checks the labels too. Groups and rows are of this rank's positions, what means divide by of all. What
    ``meanwhile`` queues keeps a GPU busy until the host, which waits for the copy alone, has made its plan.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in ``[0, vocab)``.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture(labels)
    table = count()
    whole = table if group is None else _of_all_ranks(table, group)
    host = _on_host(table if group is None else torch.cat([table, whole]), meanwhile)
    own, every = (Counts(*zip(*rows, strict=True)) for rows in (host[: len(table)], host[-len(table) :]))
    _check_labels("labels", min(every.low), max(every.high), vocab, ignore_index)
    _check_labels("nll_labels", min(every.nll_low), max(every.nll_high), vocab, ignore_index)
    mine, sizes = (list(map(add, of.first, of.separate)) for of in (own, every))
    pairs = len(sizes) // 2
    found = Sizes(
        pairs=tuple(map(add, mine[:pairs], mine[pairs:])),
        sides=(sum(sizes[:pairs]), sum(sizes[pairs:])),
        valid=sum(map(bool, map(mul, every.answers[:pairs], every.answers[pairs:]))),
        nll=sum(every.nlls),
        nll_sequences=sum(map(bool, every.nlls)),
        shared_rows=any(own.separate),
        positions=labels.numel(),
    )
    return found, table, whole


def _on_host(table: Tensor, meanwhile: Callable[[], object]) -> list[list[int]]:
    if table.device.type != "cuda":
        meanwhile()
        return cast(list[list[int]], table.tolist())
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)  # or the copy waits for itself
    with torch.cuda.device(table.device):
        host.copy_(table, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        meanwhile()
    copied.synchronize()
    return cast(list[list[int]], host.tolist())


def _of_all_ranks(table: Tensor, group: Any) -> Tensor:
    """Counts added up, ranges joined: so a label that cannot be is an error on every rank, and none waits."""
    signs = table.new_tensor([-1, 1, -1, 1])
    return torch.cat([summed(table[:, :4], group), largest(table[:, 4:] * signs, group) * signs], 1)


def count(labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
    """``Counts`` of each sequence, ``[2P, 8]``. The label ranges are those of the batch in every row."""
    nll_labels, in_answer, in_nll, separate = _marked(labels, nll_labels, offsets, ignore_index)

    def per_sequence(mask: Tensor) -> Tensor:
        running = F.pad(mask.cumsum(0), (1, 0))
        return running[offsets[1:]] - running[offsets[:-1]]

    counts = [per_sequence(mask) for mask in (in_answer, in_nll, in_answer | in_nll, separate)]
    ranges = [*_label_range(labels, in_answer), *_label_range(nll_labels, in_nll)]
    return torch.stack([*counts, *(value.expand_as(counts[0]) for value in ranges)], 1)


def compact(
    labels: Tensor, nll_labels: Tensor, offsets: Tensor, table: Tensor, size: int, ignore_index: int
) -> Columns:
    """The ``size`` targets pair by pair; a position's second target follows its sequence's others."""
    nll_labels, in_answer, in_nll, separate = _marked(labels, nll_labels, offsets, ignore_index)
    pairs = (offsets.numel() - 1) // 2

    # Every position once for its first target and once for its second; a stable sort by owner brings them in order.
    wanted = torch.cat([in_answer | in_nll, separate])
    places = torch.nonzero_static(wanted, size=size).view(-1)
    rows = places % max(labels.numel(), 1)
    second = places >= labels.numel()
    owner = torch.searchsorted(offsets[1:], rows, right=True)
    order = torch.argsort(2 * (owner % max(pairs, 1)) + owner // max(pairs, 1), stable=True)
    rows, second = rows[order], second[order]
    of_nll = torch.where(in_answer[rows], second, True)  # whose label is the target
    is_nll = (in_nll & ~separate)[rows] | second
    is_answer = in_answer[rows] & ~second
    by_segment = torch.arange(2 * pairs, device=rows.device).view(2, pairs).T.reshape(-1)
    return Columns(
        rows=rows,
        ids=torch.where(of_nll, nll_labels[rows], labels[rows]),
        kind=(ANSWER * is_answer + NLL * is_nll).to(torch.int8),
        offsets=F.pad(table[:, 2:4].sum(1)[by_segment].cumsum(0), (1, 0)),
    )


def _marked(
    labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The NLL's labels, which are the chosen half's alone; where there is an answer, an NLL, and two targets."""
    positions = torch.arange(nll_labels.numel(), device=nll_labels.device)
    nll_labels = torch.where(positions < offsets[offsets.numel() // 2], nll_labels, ignore_index)
    in_answer, in_nll = labels != ignore_index, nll_labels != ignore_index
    return nll_labels, in_answer, in_nll, in_answer & in_nll & (labels != nll_labels)


def label_sizes(labels: Tensor, vocab: int, ignore_index: int) -> Sizes:
    """``Sizes`` of labels ``[positions]`` without pairs, by one device-to-host copy, which checks them too.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in ``[0, vocab)``.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture(labels)
    kept = labels != ignore_index
    found, low, high = torch.stack([kept.sum(), *_label_range(labels, kept)]).tolist()
    _check_labels("labels", low, high, vocab, ignore_index)
    return Sizes((found,), (found, 0), 0, 0, 0, False, labels.numel())


def label_targets(labels: Tensor, sizes: Sizes, ignore_index: int, places: Callable[[Tensor], Tensor]) -> Targets:
    """A target for each label ``[positions]`` that is not ignored, in order; ``places`` has its rows of the head."""
    rows = torch.nonzero_static(labels != ignore_index, size=sizes.count).view(-1)
    return Targets(rows, places(labels[rows]), sizes)


def sums_of_sequences(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums ``[S]`` of values ``[S, T]``, or packed ``[N]``. ``index_add`` would add in any order on a GPU."""
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0.0)


def _refuse_capture(labels: Tensor) -> None:
    """How many targets there are is read on the host, which a graph under capture cannot do."""
    if labels.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the loss cannot be captured in a CUDA graph: its shapes follow from how many labels count, which the host "
            f"reads from labels {tuple(labels.shape)}; capture the model without the loss and call the loss outside"
        )


def _label_range(labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the kept labels and 0, on the device."""
    low, high = F.pad(torch.where(kept, labels, 0), (0, 1)).aminmax()
    return low, high


def _check_labels(name: str, low: int, high: int, vocab: int, ignore_index: int) -> None:
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} holds {wrong}, but every label must be ignore_index ({ignore_index}) or in [0, {vocab}), "
            "the rows of weight: mask the label, or pass the head of the vocabulary it comes from"
        )
