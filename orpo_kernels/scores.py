"""What has to be computed: scores, not positions.

A score is one (hidden row, target token) with a weight in the NLL and a weight in its sequence's mean log-probability.
Padding, the rejected side's prompt and the last position are no scores and never meet the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: ``z = cap(logit_scale * (hidden @ weight.T + bias))``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def cap(self, logits: Tensor) -> Tensor:
        """``softcap * tanh(logits / softcap)``, or the logits themselves without a softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Scores:
    """N scores, ordered pair by pair and, within a pair, chosen before rejected.

    The order lets a run of whole pairs be a plain slice, which is what the ``stash`` plan cuts.
    """

    rows: Tensor  # [N] int64, row of the flattened hidden states
    targets: Tensor  # [N] int64, in [0, V)
    nll_weight: Tensor  # [N] accumulation dtype; NLL = -sum(nll_weight * logps)
    answer_weight: Tensor  # [N] accumulation dtype, 1 / n_s in the answer of sequence s, else 0
    offsets: Tensor  # [2P + 1] int64, where the scores of chosen 0, rejected 0, chosen 1, ... begin
    pair_valid: Tensor  # [P] bool, both answers have a token
    pair_sizes: tuple[int, ...]  # scores of each pair, on the host: the planner cuts by it
    side_counts: tuple[int, int]  # scores of the chosen and of the rejected side
    valid_pairs: int
    shared_rows: bool  # some row carries two targets

    @property
    def count(self) -> int:
        return sum(self.pair_sizes)

    @property
    def pairs(self) -> int:
        return len(self.pair_sizes)


class Counts(NamedTuple):
    """Columns of the table ``[2P, 8]`` int64 that says how many of what each sequence holds."""

    answers: int
    nlls: int
    first: int  # positions that are a score
    separate: int  # of these, how many are two: the NLL names another token than the answer
    low: int  # smallest and largest label that counts, and 0
    high: int
    nll_low: int
    nll_high: int


class Columns(NamedTuple):
    """The tensors of ``Scores``."""

    rows: Tensor
    targets: Tensor
    nll_weight: Tensor
    answer_weight: Tensor
    offsets: Tensor
    pair_valid: Tensor


def orpo_scores(
    labels: Tensor,  # [positions], flattened
    nll_labels: Tensor,  # [positions], flattened; the chosen half counts
    offsets: Tensor,  # [2P + 1] int64, where each sequence begins; chosen 0..P-1, then rejected
    vocab: int,
    *,
    ignore_index: int,
    nll_reduction: str,
    dtype: torch.dtype,
    count: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    compact: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, bool, torch.dtype], Columns],
) -> Scores:
    """Compact labels into scores, with one device-to-host copy that also carries the checks of the labels.

    ``count`` and ``compact`` are ``count_scores`` and ``compact_scores``, or a backend's own.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in ``[0, vocab)``.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture(labels)
    pairs = (offsets.numel() - 1) // 2
    table = count(labels, nll_labels, offsets, ignore_index)
    host = [Counts(*row) for row in table.tolist()]  # the one host sync of a call
    for name, low, high in (("labels", "low", "high"), ("nll_labels", "nll_low", "nll_high")):
        lowest, highest = min(getattr(row, low) for row in host), max(getattr(row, high) for row in host)
        _check_labels(name, lowest, highest, vocab, ignore_index)
    sizes = [row.first + row.separate for row in host]
    columns = compact(labels, nll_labels, offsets, table, sum(sizes), ignore_index, nll_reduction == "sequence", dtype)
    return Scores(
        *columns,
        pair_sizes=tuple(a + b for a, b in zip(sizes[:pairs], sizes[pairs:], strict=True)),
        side_counts=(sum(sizes[:pairs]), sum(sizes[pairs:])),
        valid_pairs=sum(1 for a, b in zip(host[:pairs], host[pairs:], strict=True) if a.answers and b.answers),
        shared_rows=any(row.separate for row in host),
    )


def count_scores(labels: Tensor, nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
    """``Counts`` of each sequence, ``[2P, 8]``. The label ranges are those of the batch in every row."""
    nll_labels = _chosen_half(nll_labels, offsets, ignore_index)
    in_answer, in_nll = labels != ignore_index, nll_labels != ignore_index

    def per_sequence(mask: Tensor) -> Tensor:
        running = F.pad(mask.cumsum(0), (1, 0))
        return running[offsets[1:]] - running[offsets[:-1]]

    counts = [
        per_sequence(mask)
        for mask in (in_answer, in_nll, in_answer | in_nll, in_answer & in_nll & (labels != nll_labels))
    ]
    ranges = [*_label_report(labels, in_answer), *_label_report(nll_labels, in_nll)]
    return torch.stack([*counts, *(value.expand_as(counts[0]) for value in ranges)], 1)


def compact_scores(
    labels: Tensor,
    nll_labels: Tensor,
    offsets: Tensor,
    table: Tensor,  # of count_scores
    count: int,
    ignore_index: int,
    by_sequence: bool,
    dtype: torch.dtype,
) -> Columns:
    """The scores pair by pair, chosen before rejected; a position's second score follows its sequence's others."""
    nll_labels = _chosen_half(nll_labels, offsets, ignore_index)
    pairs = (offsets.numel() - 1) // 2
    in_answer, in_nll = labels != ignore_index, nll_labels != ignore_index
    separate = in_nll & in_answer & (labels != nll_labels)
    answers, nlls, first, twice = table[:, :4].unbind(1)

    # Every position once for its first score and once for its second; a stable sort by owner brings them in order.
    scored = torch.cat([in_answer | in_nll, separate])
    places = torch.nonzero_static(scored, size=count).view(-1)
    rows = places % max(labels.numel(), 1)
    second = places >= labels.numel()
    owner = torch.searchsorted(offsets[1:], rows, right=True)
    order = torch.argsort(2 * (owner % max(pairs, 1)) + owner // max(pairs, 1), stable=True)
    rows, second, owner = rows[order], second[order], owner[order]
    of_nll = torch.where(in_answer[rows], second, True)  # whose label is the target
    is_nll = (in_nll & ~separate)[rows] | second

    answer_share = 1.0 / answers.clamp(min=1).to(dtype)
    if by_sequence:  # the mean over the sequences that have an NLL token, of each one's mean
        nll_share = 1.0 / (nlls.clamp(min=1) * (nlls > 0).sum().clamp(min=1)).to(dtype)
    else:
        nll_share = (1.0 / nlls.sum().clamp(min=1).to(dtype)).expand_as(answer_share)
    by_segment = torch.arange(2 * pairs, device=rows.device).view(2, pairs).T.reshape(-1)
    return Columns(
        rows=rows,
        targets=torch.where(of_nll, nll_labels[rows], labels[rows]),
        nll_weight=nll_share[owner] * is_nll,
        answer_weight=answer_share[owner] * (in_answer[rows] & ~second),
        offsets=F.pad((first + twice)[by_segment].cumsum(0), (1, 0)),
        pair_valid=(answers[:pairs] > 0) & (answers[pairs:] > 0),
    )


def _chosen_half(nll_labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
    positions = torch.arange(nll_labels.numel(), device=nll_labels.device)
    return torch.where(positions < offsets[offsets.numel() // 2], nll_labels, ignore_index)


def logprob_scores(labels: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Rows and targets of every label that is not ignored; one device-to-host copy, which carries the check too.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in ``[0, vocab)``.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture(labels)
    flat = labels.reshape(-1)
    kept = flat != ignore_index
    count, low, high = torch.stack([kept.sum(), *_label_report(flat, kept)]).tolist()
    _check_labels("labels", low, high, vocab, ignore_index)
    rows = torch.nonzero_static(kept, size=count).view(-1)
    return rows, flat[rows]


def _refuse_capture(labels: Tensor) -> None:
    """How many scores there are is read on the host, which a graph under capture cannot do.

    Raises:
        RuntimeError: a CUDA graph is being captured on the current stream.
    """
    if labels.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the loss cannot be captured in a CUDA graph: its shapes follow from how many labels count, which the host "
            f"reads from labels {tuple(labels.shape)}; capture the model without the loss and call the loss outside"
        )


def _label_report(labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest kept label, on the device; 0 and 0 where none is kept."""
    if labels.numel() == 0:
        zero = torch.zeros((), dtype=torch.int64, device=labels.device)
        return zero, zero
    bounded = torch.where(kept, labels, 0)
    return bounded.min().long(), bounded.max().long()


def _check_labels(name: str, low: int, high: int, vocab: int, ignore_index: int) -> None:
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} holds {wrong}, but every label must be ignore_index ({ignore_index}) or in [0, {vocab}), "
            "the rows of weight: mask the label, or pass the head of the vocabulary it comes from"
        )
