"""What pairs of sequences need around the targets: counting and compacting their labels, and the odds-ratio loss.

Symbols and rules as in ``common.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.backends.kernels.common import ANY_BATCH, _expm1, _log1p, launch
from orpo_kernels.scores import Columns

BLOCK = 1024  # targets or labels that a program looks at together
SEQUENCES = 128  # sequences whose counts it adds together


@triton.jit
def _log1mexp(x):
    """``log(1 - exp(x))`` for x < 0, by whichever form does not cancel (Maechler 2012)."""
    return tl.where(x > -0.6931, tl.log(-_expm1(tl.maximum(x, -0.6931))), _log1p(-tl.exp(tl.minimum(x, -0.6931))))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    """Without overflow and without cancellation on either side."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1 / (1 + small), small / (1 + small))


@triton.jit(**ANY_BATCH)
def count_kernel(labels_ptr, nll_labels_ptr, offsets_ptr, table_ptr, pairs, ignore, BLOCK: tl.constexpr):
    """One sequence a program: its row of ``scores.Counts``. The NLL's labels count on the chosen side alone."""
    sequence = tl.program_id(0)
    start, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    answers = tl.zeros((BLOCK,), tl.int64)
    nlls = tl.zeros((BLOCK,), tl.int64)
    scored = tl.zeros((BLOCK,), tl.int64)
    twice = tl.zeros((BLOCK,), tl.int64)
    low = tl.zeros((BLOCK,), tl.int64)
    high = tl.zeros((BLOCK,), tl.int64)
    nll_low = tl.zeros((BLOCK,), tl.int64)
    nll_high = tl.zeros((BLOCK,), tl.int64)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + i, mask=i < end, other=ignore)
        nll_label = tl.load(nll_labels_ptr + i, mask=(i < end) & (sequence < pairs), other=ignore)
        in_answer, in_nll = label != ignore, nll_label != ignore
        answers += in_answer.to(tl.int64)
        nlls += in_nll.to(tl.int64)
        scored += (in_answer | in_nll).to(tl.int64)
        twice += (in_answer & in_nll & (label != nll_label)).to(tl.int64)
        low = tl.minimum(low, tl.where(in_answer, label, 0))
        high = tl.maximum(high, tl.where(in_answer, label, 0))
        nll_low = tl.minimum(nll_low, tl.where(in_nll, nll_label, 0))
        nll_high = tl.maximum(nll_high, tl.where(in_nll, nll_label, 0))
    row = table_ptr + 8 * sequence
    tl.store(row, tl.sum(answers, 0))
    tl.store(row + 1, tl.sum(nlls, 0))
    tl.store(row + 2, tl.sum(scored, 0))
    tl.store(row + 3, tl.sum(twice, 0))
    tl.store(row + 4, tl.min(low, 0))
    tl.store(row + 5, tl.max(high, 0))
    tl.store(row + 6, tl.min(nll_low, 0))
    tl.store(row + 7, tl.max(nll_high, 0))


def count(labels: Tensor, nll_labels: Tensor, offsets: Tensor, table: Tensor, ignore_index: int) -> None:
    """Write ``table [2P, 8]``, all chosen sequences before all rejected ones."""
    sequences = table.shape[0]
    tensors = (labels, nll_labels, offsets, table)
    launch(count_kernel, (sequences,), *tensors, sequences // 2, ignore_index, BLOCK=BLOCK, num_warps=4)


@triton.jit(**ANY_BATCH)
def compact_kernel(
    labels_ptr, nll_labels_ptr, starts_ptr, counts_ptr, rows_ptr, ids_ptr, nll_weight_ptr, answer_weight_ptr,
    offsets_ptr, valid_ptr, pairs, ignore, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, BY_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """One sequence a program: its targets in their places, pair by pair, chosen before rejected.

    Where a sequence's targets begin follows from the counts of those before it, which every program adds up for itself.
    """
    sequence = tl.program_id(0)
    place = 2 * (sequence % pairs) + sequence // pairs
    before = tl.zeros((SEQUENCES,), tl.int64)
    nlls = tl.zeros((SEQUENCES,), tl.int64)
    having = tl.zeros((SEQUENCES,), tl.int64)
    for first in range(0, 2 * pairs, SEQUENCES):
        other = first + tl.arange(0, SEQUENCES)
        row = counts_ptr + 8 * other
        size = tl.load(row + 2, mask=other < 2 * pairs, other=0) + tl.load(row + 3, mask=other < 2 * pairs, other=0)
        before += tl.where(2 * (other % pairs) + other // pairs < place, size, 0)
        count = tl.load(row + 1, mask=other < 2 * pairs, other=0)
        nlls += count
        having += (count > 0).to(tl.int64)
    row = counts_ptr + 8 * sequence
    answers, own_nlls = tl.load(row), tl.load(row + 1)
    scored = tl.load(row + 2)
    base = tl.sum(before, 0)
    tl.store(offsets_ptr + place, base)
    if place == 2 * pairs - 1:
        tl.store(offsets_ptr + place + 1, base + scored + tl.load(row + 3))
    if sequence < pairs:
        tl.store(valid_ptr + sequence, (answers > 0) & (tl.load(counts_ptr + 8 * (sequence + pairs)) > 0))
    answer_share = 1.0 / tl.maximum(answers, 1).to(tl.float32)
    if BY_SEQUENCE:
        nll_share = 1.0 / (tl.maximum(own_nlls, 1) * tl.maximum(tl.sum(having, 0), 1)).to(tl.float32)
    else:
        nll_share = 1.0 / tl.maximum(tl.sum(nlls, 0), 1).to(tl.float32)

    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    at, second_at = base, base + scored
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        label = tl.load(labels_ptr + i, mask=i < end, other=ignore)
        nll_label = tl.load(nll_labels_ptr + i, mask=(i < end) & (sequence < pairs), other=ignore)
        in_answer, in_nll = label != ignore, nll_label != ignore
        one = in_answer | in_nll
        two = in_answer & in_nll & (label != nll_label)
        here = at + tl.cumsum(one.to(tl.int64), 0) - 1
        tl.store(rows_ptr + here, i, mask=one)
        tl.store(ids_ptr + here, tl.where(in_answer, label, nll_label), mask=one)
        tl.store(nll_weight_ptr + here, tl.where(in_nll & (two == 0), nll_share, 0.0), mask=one)
        tl.store(answer_weight_ptr + here, tl.where(in_answer, answer_share, 0.0), mask=one)
        here = second_at + tl.cumsum(two.to(tl.int64), 0) - 1
        tl.store(rows_ptr + here, i, mask=two)
        tl.store(ids_ptr + here, nll_label, mask=two)
        tl.store(nll_weight_ptr + here, tl.where(two, nll_share, 0.0), mask=two)
        tl.store(answer_weight_ptr + here, tl.where(two, 0.0, 0.0), mask=two)
        at += tl.sum(one.to(tl.int64), 0)
        second_at += tl.sum(two.to(tl.int64), 0)


def compact(
    labels: Tensor,
    nll_labels: Tensor,
    starts: Tensor,  # [2P + 1], where the labels of each sequence begin
    counts: Tensor,  # [2P, 8], from ``count``
    columns: Columns,
    ignore_index: int,
    by_sequence: bool,
) -> None:
    """Write ``columns``."""
    sequences = counts.shape[0]
    tensors = (labels, nll_labels, starts, counts, *columns)
    flags = {"BLOCK": BLOCK, "SEQUENCES": SEQUENCES, "BY_SEQUENCE": by_sequence}
    launch(compact_kernel, (sequences,), *tensors, sequences // 2, ignore_index, **flags, num_warps=4)


@triton.jit(**ANY_BATCH)
def odds_ratio_kernel(
    logps_ptr, means_ptr, answer_weight_ptr, nll_weight_ptr, offsets_ptr, valid_ptr, coefficients_ptr, table_ptr,
    pairs, base, beta, nll_weight, pair_weight, chosen_bound, rejected_bound, tiny, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair a program: means, loss, metrics, and ``g = d loss / d logp`` of each of its targets.

    ``objective.OddsRatio`` has the equations. The rows of ``table [8, pairs]`` are the fields of
    ``pairs.PairTable``.
    """
    pair = tl.program_id(0)
    start = tl.load(offsets_ptr + 2 * pair) - base
    middle = tl.load(offsets_ptr + 2 * pair + 1) - base
    end = tl.load(offsets_ptr + 2 * pair + 2) - base
    valid = tl.load(valid_ptr + pair)
    own = pair_weight * valid.to(tl.float32)
    chosen_terms = tl.zeros((BLOCK,), tl.float32)
    rejected_terms = tl.zeros((BLOCK,), tl.float32)
    nll_terms = tl.zeros((BLOCK,), tl.float32)
    chosen_logits = tl.zeros((BLOCK,), tl.float32)
    rejected_logits = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        logps = tl.load(logps_ptr + i, mask=i < end, other=0.0)
        weighted = logps * tl.load(answer_weight_ptr + i, mask=i < end, other=0.0)
        chosen_terms += tl.where(i < middle, weighted, 0.0)
        rejected_terms += tl.where(i < middle, 0.0, weighted)
        nll_terms -= logps * tl.load(nll_weight_ptr + i, mask=i < end, other=0.0)
        logits = tl.load(means_ptr + i, mask=i < end, other=0.0)
        chosen_logits += tl.where(i < middle, logits, 0.0)
        rejected_logits += tl.where(i < middle, 0.0, logits)
    chosen, rejected = tl.sum(chosen_terms, 0), tl.sum(rejected_terms, 0)
    tl.store(table_ptr + pair, tl.where(valid, tl.minimum(chosen, chosen_bound), chosen))
    tl.store(table_ptr + pairs + pair, tl.where(valid, tl.minimum(rejected, chosen_bound), rejected))
    tl.store(table_ptr + 2 * pairs + pair, tl.sum(nll_terms, 0))
    tl.store(table_ptr + 6 * pairs + pair, tl.sum(chosen_logits, 0))
    tl.store(table_ptr + 7 * pairs + pair, tl.sum(rejected_logits, 0))

    chosen, rejected = tl.minimum(chosen, chosen_bound), tl.minimum(rejected, rejected_bound)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    loss = beta * _softplus(-log_odds)
    p_chosen, p_rejected = tl.exp(chosen), tl.exp(rejected)
    spread = p_rejected * -_expm1(chosen) + p_chosen * -_expm1(rejected)
    toward = tl.where(spread > 1e3 * tiny, p_rejected / tl.maximum(spread, tiny), _sigmoid(-log_odds))
    grad_chosen = -beta * toward * own
    grad_rejected = beta * _sigmoid(-log_odds) / -_expm1(rejected) * own
    tl.store(table_ptr + 3 * pairs + pair, loss * own)
    tl.store(table_ptr + 4 * pairs + pair, -_softplus(-log_odds) * own)
    tl.store(table_ptr + 5 * pairs + pair, log_odds * own)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        per_sequence = tl.where(i < middle, grad_chosen, grad_rejected)
        g = per_sequence * tl.load(answer_weight_ptr + i, mask=i < end, other=0.0)
        g -= nll_weight * tl.load(nll_weight_ptr + i, mask=i < end, other=0.0)
        tl.store(coefficients_ptr + i, g, mask=i < end)


def odds_ratio(
    logps: Tensor,  # [n], as means, the weights and coefficients
    means: Tensor,
    answer_weight: Tensor,
    nll_weights: Tensor,
    offsets: Tensor,  # [2P + 1]
    valid: Tensor,  # [P]
    coefficients: Tensor,
    table: Tensor,  # [8, P]
    *scalars: float,
) -> None:
    """Write ``coefficients`` and ``table``.

    ``scalars``: first target, beta, nll_weight, weight of a pair, the two bounds, the smallest normal number.
    """
    pairs = table.shape[1]
    tensors = (logps, means, answer_weight, nll_weights, offsets, valid, coefficients, table)
    launch(odds_ratio_kernel, (pairs,), *tensors, pairs, *scalars, BLOCK=BLOCK, num_warps=4)
