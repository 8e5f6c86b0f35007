"""What has to be computed: scores, not positions.

A score is one (hidden row, target token) with a weight in the NLL and a weight in its sequence's mean log-probability.
Padding, the rejected side's prompt and the last position are no scores and never meet the head.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    valid_pairs: int
    shared_rows: bool  # some row carries two targets

    @property
    def count(self) -> int:
        return sum(self.pair_sizes)

    @property
    def pairs(self) -> int:
        return len(self.pair_sizes)


def orpo_scores(
    labels: Tensor,  # [positions], flattened
    nll_labels: Tensor,  # [positions], flattened; already `ignore_index` on the rejected side
    offsets: Tensor,  # [2P + 1] int64, where each sequence begins; chosen 0..P-1, then rejected
    vocab: int,
    *,
    ignore_index: int,
    nll_reduction: str,
    dtype: torch.dtype,
) -> Scores:
    """Compact labels into scores, with one device-to-host copy that also carries the checks of the labels.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in ``[0, vocab)``.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture(labels)
    pairs = (offsets.numel() - 1) // 2
    in_answer, in_nll = labels != ignore_index, nll_labels != ignore_index
    # Where both name the same token they are one score; where they differ the NLL's target is a score of its own.
    separate = in_nll & in_answer & (labels != nll_labels)
    first = in_answer | in_nll

    def per_sequence(mask: Tensor) -> Tensor:
        running = F.pad(mask.cumsum(0), (1, 0))
        return running[offsets[1:]] - running[offsets[:-1]]

    answer_counts, nll_counts = per_sequence(in_answer), per_sequence(in_nll)
    score_counts = per_sequence(first) + per_sequence(separate)
    report = torch.stack(
        [
            first.sum(),
            separate.sum(),
            nll_counts.sum(),
            *_label_report(labels, in_answer),
            *_label_report(nll_labels, in_nll),
        ]
    )
    host: list[int] = torch.cat([report, answer_counts, score_counts]).tolist()  # the one host sync of a call
    n_first, n_separate, n_nll, low, high, nll_low, nll_high = host[:7]
    _check_labels("labels", low, high, vocab, ignore_index)
    _check_labels("nll_labels", nll_low, nll_high, vocab, ignore_index)
    answers, sizes = host[7 : 7 + 2 * pairs], host[7 + 2 * pairs :]

    def positions(mask: Tensor, size: int) -> Tensor:
        return torch.nonzero_static(mask, size=size).view(-1)

    rows = positions(first, n_first)
    targets = torch.where(in_answer, labels, nll_labels)[rows]
    is_nll, is_answer = (in_nll & ~separate)[rows], in_answer[rows]
    if n_separate:
        extra = positions(separate, n_separate)
        rows, targets = torch.cat([rows, extra]), torch.cat([targets, nll_labels[extra]])
        is_nll = torch.cat([is_nll, torch.ones_like(extra, dtype=torch.bool)])
        is_answer = torch.cat([is_answer, torch.zeros_like(extra, dtype=torch.bool)])

    owner = torch.searchsorted(offsets[1:], rows, right=True)
    order = torch.argsort(2 * (owner % pairs) + owner // pairs, stable=True)
    rows, targets, is_nll, is_answer = rows[order], targets[order], is_nll[order], is_answer[order]
    owner = owner[order]

    if nll_reduction == "token":
        nll_share = torch.full((2 * pairs,), 1.0 / max(n_nll, 1), dtype=dtype, device=rows.device)
    else:  # the mean over the sequences that have an NLL token, of each one's mean
        having = (nll_counts > 0).sum().clamp(min=1)
        nll_share = 1.0 / (nll_counts.clamp(min=1) * having).to(dtype)
    answer_share = 1.0 / answer_counts.clamp(min=1).to(dtype)
    by_segment = torch.arange(2 * pairs, device=rows.device).view(2, pairs).T.reshape(-1)
    return Scores(
        rows=rows,
        targets=targets,
        nll_weight=nll_share[owner] * is_nll,
        answer_weight=answer_share[owner] * is_answer,
        offsets=F.pad(score_counts[by_segment].cumsum(0), (1, 0)),
        pair_valid=(answer_counts[:pairs] > 0) & (answer_counts[pairs:] > 0),
        pair_sizes=tuple(a + b for a, b in zip(sizes[:pairs], sizes[pairs:], strict=True)),
        valid_pairs=sum(1 for a, b in zip(answers[:pairs], answers[pairs:], strict=True) if a and b),
        shared_rows=n_separate > 0,
    )


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
