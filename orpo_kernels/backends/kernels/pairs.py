"""What pairs of sequences need around the targets: counting and compacting their labels, and the odds-ratio loss.

Symbols and rules as in ``common.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.backends import GivenPairs
from orpo_kernels.backends.kernels.common import ANY_BATCH, _expm1, _log1p
from orpo_kernels.objectives import CHOSEN_BOUND, REJECTED_BOUND
from orpo_kernels.targets import Columns, Pairs

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
    """One sequence a program: its row of ``targets.Counts``. The NLL's labels count on the chosen side alone."""
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
    count_kernel[(sequences,)](*tensors, sequences // 2, ignore_index, BLOCK=BLOCK, num_warps=4)


@triton.jit(**ANY_BATCH)
def compact_kernel(
    labels_ptr, nll_labels_ptr, starts_ptr, counts_ptr, rows_ptr, ids_ptr, kind_ptr, offsets_ptr, pairs, ignore,
    BLOCK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """One sequence a program: its targets in their places, pair by pair, chosen before rejected.

    Where a sequence's targets begin follows from the counts of those before it, which every program adds up for itself.
    Kinds are 1 for an answer's token, 2 for the NLL's, 3 for both.
    """
    sequence = tl.program_id(0)
    place = 2 * (sequence % pairs) + sequence // pairs
    before = tl.zeros((SEQUENCES,), tl.int64)
    for first in range(0, 2 * pairs, SEQUENCES):
        other = first + tl.arange(0, SEQUENCES)
        row = counts_ptr + 8 * other
        size = tl.load(row + 2, mask=other < 2 * pairs, other=0) + tl.load(row + 3, mask=other < 2 * pairs, other=0)
        before += tl.where(2 * (other % pairs) + other // pairs < place, size, 0)
    once = tl.load(counts_ptr + 8 * sequence + 2)
    base = tl.sum(before, 0)
    tl.store(offsets_ptr + place, base)
    if place == 2 * pairs - 1:
        tl.store(offsets_ptr + place + 1, base + once + tl.load(counts_ptr + 8 * sequence + 3))

    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    at, second_at = base, base + once
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        label = tl.load(labels_ptr + i, mask=i < end, other=ignore)
        nll_label = tl.load(nll_labels_ptr + i, mask=(i < end) & (sequence < pairs), other=ignore)
        in_answer, in_nll = label != ignore, nll_label != ignore
        one = in_answer | in_nll
        two = in_answer & in_nll & (label != nll_label)
        here = at + tl.cumsum(one.to(tl.int64), 0) - 1
        kind = tl.where(in_answer, 1, 0) + tl.where(in_nll & (two == 0), 2, 0)
        tl.store(rows_ptr + here, i, mask=one)
        tl.store(ids_ptr + here, tl.where(in_answer, label, nll_label), mask=one)
        tl.store(kind_ptr + here, kind.to(tl.int8), mask=one)
        here = second_at + tl.cumsum(two.to(tl.int64), 0) - 1
        tl.store(rows_ptr + here, i, mask=two)
        tl.store(ids_ptr + here, nll_label, mask=two)
        tl.store(kind_ptr + here, tl.where(two, 2, 0).to(tl.int8), mask=two)
        at += tl.sum(one.to(tl.int64), 0)
        second_at += tl.sum(two.to(tl.int64), 0)


def compact(
    labels: Tensor,
    nll_labels: Tensor,
    starts: Tensor,  # [2P + 1], where the labels of each sequence begin
    counts: Tensor,  # [2P, 8], from ``count``
    columns: Columns,
    ignore_index: int,
) -> None:
    """Write ``columns``."""
    sequences = counts.shape[0]
    tensors = (labels, nll_labels, starts, counts, *columns)
    blocks = {"BLOCK": BLOCK, "SEQUENCES": SEQUENCES}
    compact_kernel[(sequences,)](*tensors, sequences // 2, ignore_index, **blocks, num_warps=4)


@triton.jit(**ANY_BATCH)
def odds_ratio_kernel(
    logps_ptr, means_ptr, kind_ptr, offsets_ptr, counts_ptr, g_ptr, table_ptr, group, pairs, first_pair, base, beta,
    nll_weight, pair_weight, inv_nll, inv_chosen, inv_rejected, chosen_bound, rejected_bound, tiny,
    BLOCK: tl.constexpr, BY_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """One pair a program: sums, loss, metrics, and ``g = d loss / d logp`` of each of its targets.

    ``objectives.ORPO`` has the equations. ``table [10, group]`` is ``backends.PairTable.values``. A log-probability
    that does not count may be infinite, so kinds select and do not multiply.
    """
    pair = tl.program_id(0)
    start = tl.load(offsets_ptr + 2 * pair) - base
    middle = tl.load(offsets_ptr + 2 * pair + 1) - base
    end = tl.load(offsets_ptr + 2 * pair + 2) - base
    counts = counts_ptr + 8 * (first_pair + pair)
    chosen_length = tl.load(counts).to(tl.float32)
    rejected_length = tl.load(counts + 8 * pairs).to(tl.float32)
    nll_share = inv_nll
    if BY_SEQUENCE:
        nll_share = inv_nll / tl.maximum(tl.load(counts + 1), 1).to(tl.float32)
    own = tl.where((chosen_length > 0) & (rejected_length > 0), pair_weight, 0.0)
    chosen_terms = tl.zeros((BLOCK,), tl.float32)
    rejected_terms = tl.zeros((BLOCK,), tl.float32)
    nll_terms = tl.zeros((BLOCK,), tl.float32)
    chosen_logits = tl.zeros((BLOCK,), tl.float32)
    rejected_logits = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        logps = tl.load(logps_ptr + i, mask=i < end, other=0.0)
        kind = tl.load(kind_ptr + i, mask=i < end, other=0)
        answer = tl.where(kind & 1 != 0, logps, 0.0)
        chosen_terms += tl.where(i < middle, answer, 0.0)
        rejected_terms += tl.where(i < middle, 0.0, answer)
        nll_terms -= tl.where(kind & 2 != 0, logps, 0.0)
        logits = tl.load(means_ptr + i, mask=i < end, other=0.0)
        chosen_logits += tl.where(i < middle, logits, 0.0)
        rejected_logits += tl.where(i < middle, 0.0, logits)
    chosen_sum, rejected_sum = tl.sum(chosen_terms, 0), tl.sum(rejected_terms, 0)
    column = table_ptr + pair
    tl.store(column, chosen_sum)
    tl.store(column + group, rejected_sum)
    tl.store(column + 2 * group, chosen_length)
    tl.store(column + 3 * group, rejected_length)
    tl.store(column + 4 * group, tl.sum(nll_terms, 0) * nll_share)
    tl.store(column + 5 * group, tl.sum(chosen_logits, 0) * inv_chosen)
    tl.store(column + 6 * group, tl.sum(rejected_logits, 0) * inv_rejected)

    chosen = tl.minimum(chosen_sum / tl.maximum(chosen_length, 1.0), chosen_bound)
    rejected = tl.minimum(rejected_sum / tl.maximum(rejected_length, 1.0), rejected_bound)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    p_chosen, p_rejected = tl.exp(chosen), tl.exp(rejected)
    spread = p_rejected * -_expm1(chosen) + p_chosen * -_expm1(rejected)
    toward = tl.where(spread > 1e3 * tiny, p_rejected / tl.maximum(spread, tiny), _sigmoid(-log_odds))
    grad_chosen = -beta * toward / tl.maximum(chosen_length, 1.0)
    grad_rejected = beta * _sigmoid(-log_odds) / -_expm1(rejected) / tl.maximum(rejected_length, 1.0)
    counted = own > 0
    tl.store(column + 7 * group, tl.where(counted, beta * _softplus(-log_odds) * own, 0.0))
    tl.store(column + 8 * group, tl.where(counted, -_softplus(-log_odds) * own, 0.0))
    tl.store(column + 9 * group, tl.where(counted, log_odds * own, 0.0))
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        kind = tl.load(kind_ptr + i, mask=i < end, other=0)
        g = tl.where(kind & 1 != 0, tl.where(i < middle, grad_chosen, grad_rejected) * own, 0.0)
        g -= tl.where(kind & 2 != 0, nll_weight * nll_share, 0.0)
        tl.store(g_ptr + i, g, mask=i < end)


def odds_ratio(
    logps: Tensor, means: Tensor, pairs: Pairs, given: GivenPairs, beta: float, g: Tensor, table: Tensor
) -> None:
    """Write ``g`` and ``table [10, G]``; ``logps``, ``means`` and g are ``[n]``."""
    group, sizes = table.shape[1], pairs.sizes
    tensors = (logps, means, pairs.kind, pairs.offsets, pairs.counts, g, table)
    nlls = sizes.nll_sequences if given.by_sequence else sizes.nll
    shares = (1.0 / max(n, 1) for n in (sizes.valid, nlls, *sizes.sides))
    whole = (group, len(sizes.pairs), pairs.first, pairs.begin)
    bounds = (CHOSEN_BOUND, REJECTED_BOUND, torch.finfo(torch.float32).tiny)
    flags = {"BLOCK": BLOCK, "BY_SEQUENCE": given.by_sequence}
    odds_ratio_kernel[(group,)](*tensors, *whole, beta, given.nll_weight, *shares, *bounds, **flags, num_warps=4)
