"""Triton kernels over vectors and rows: everything between the products that is not a tile of E.

Symbols and rules as in ``triton_score.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orpo_kernels.backends.triton_score import ANY_BATCH, _cap


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for x > -1: near 0 as ``2 atanh(x / (2 + x))``, where log(1 + x) would cancel."""
    s = x / (2 + x)
    q = s * s
    near = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11)))))
    return tl.where(tl.abs(x) < 0.5, near, tl.log(1 + x))


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` with relative precision near 0: nine terms of the series up to 0.5, where they reach 2e-10."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1)


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
def label_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, centre_ptr, label_ptr, slope_ptr, shift_ptr, total_ptr, means_ptr,
    H, hidden_stride, weight_stride, logit_scale, softcap,
    BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_CENTRE: tl.constexpr,
):  # fmt: skip
    """The label's capped logit of one row and the cap's slope there; the row's first shift is that logit, its S 0.

    With the mean row of the head, ``centre``, also the row's mean logit.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    terms = tl.zeros((BLOCK_H,), tl.float32)
    central = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, H, BLOCK_H):
        features = start + tl.arange(0, BLOCK_H)
        h = tl.load(hidden_ptr + row * hidden_stride + features, mask=features < H, other=0.0)
        w = tl.load(weight_ptr + target * weight_stride + features, mask=features < H, other=0.0)
        terms += h.to(tl.float32) * w.to(tl.float32)
        if HAS_CENTRE:
            central += h.to(tl.float32) * tl.load(centre_ptr + features, mask=features < H, other=0.0)
    raw = tl.sum(terms, 0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + target).to(tl.float32)
    logit, slope = _cap(raw * logit_scale, softcap, HAS_SOFTCAP)
    tl.store(label_ptr + row, logit)
    tl.store(slope_ptr + row, slope)
    tl.store(shift_ptr + row, logit)
    tl.store(total_ptr + row, 0.0)
    if HAS_CENTRE:
        tl.store(means_ptr + row, logit_scale * tl.sum(central, 0))


@triton.jit(**ANY_BATCH)
def settle_kernel(
    sums_ptr, logit_sums_ptr, total_ptr, means_ptr, lost_ptr, N, tiles, most, share,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, LOGIT_SUMS: tl.constexpr,
):  # fmt: skip
    """``S += `` the tiles' sums, in tile order. A row whose S passes ``most`` or overflowed is lost, for now.

    Under a softcap ``share = 1 / V`` of the sums of logits goes to the mean logit.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = rows < N
    parts = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    logit_parts = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        places = tile[:, None].to(tl.int64) * N + rows[None, :]
        here = (tile[:, None] < tiles) & known[None, :]
        parts += tl.load(sums_ptr + places, mask=here, other=0.0)
        if LOGIT_SUMS:
            logit_parts += tl.load(logit_sums_ptr + places, mask=here, other=0.0)
    before = tl.load(total_ptr + rows, mask=known, other=0.0)
    total = before + tl.sum(parts, 0)
    kept = total < most  # false for inf and NaN too
    tl.store(lost_ptr + rows, tl.where(kept, 0, 1), mask=known)
    tl.store(total_ptr + rows, tl.where(kept, total, before), mask=known)
    if LOGIT_SUMS:
        mean = tl.load(means_ptr + rows, mask=known, other=0.0) + share * tl.sum(logit_parts, 0)
        tl.store(means_ptr + rows, mean, mask=known)


@triton.jit(**ANY_BATCH)
def resettle_kernel(
    sums_ptr, maxima_ptr, total_ptr, shift_ptr, lost_ptr, unit_ptr, N, H, unit_stride,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr, HAS_UNIT: tl.constexpr,
):  # fmt: skip
    """Lost rows' new shift and S; what earlier slices left in S and in the hidden product is brought to that shift."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lost = tl.load(lost_ptr + rows, mask=rows < N, other=0) != 0
    if tl.sum(lost.to(tl.int32), 0) == 0:
        return
    splits = tl.arange(0, SPLITS)
    places = splits[:, None].to(tl.int64) * N + rows[None, :]
    before = tl.load(shift_ptr + rows, mask=lost, other=0.0)
    best = tl.max(tl.load(maxima_ptr + places, mask=lost[None, :], other=-float("inf")), 0)
    shift = tl.maximum(best, before)
    factor = tl.exp(tl.where(lost, before - shift, 0.0))
    total = tl.load(total_ptr + rows, mask=lost, other=0.0) * factor
    total += tl.sum(tl.load(sums_ptr + places, mask=lost[None, :], other=0.0), 0)
    tl.store(total_ptr + rows, total, mask=lost)
    tl.store(shift_ptr + rows, shift, mask=lost)
    if HAS_UNIT:
        for start in range(0, H, BLOCK_H):
            features = start + tl.arange(0, BLOCK_H)
            here = unit_ptr + rows[:, None].to(tl.int64) * unit_stride + features[None, :]
            mask = lost[:, None] & (features[None, :] < H)
            tl.store(here, tl.load(here, mask=mask, other=0.0) * factor[:, None], mask=mask)


@triton.jit(**ANY_BATCH)
def finish_kernel(
    label_ptr, shift_ptr, total_ptr, logps_ptr, inverse_ptr, entry_ptr, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """From S to logp, ``r = 1 / (a + S)`` and the label's entry ``-S`` times the cap's slope, which stands in entry."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = rows < N
    label = tl.load(label_ptr + rows, mask=known, other=0.0)
    total = tl.load(total_ptr + rows, mask=known, other=1.0)
    distance = label - tl.load(shift_ptr + rows, mask=known, other=0.0)
    # Above -30 the label's own form keeps relative precision as p -> 1; far below, exp(-distance) would overflow where
    # the plain log-sum-exp has nothing to lose.
    near = -_log1p(total * tl.exp(-tl.maximum(distance, -30.0)))
    own = tl.exp(distance)
    far = distance - tl.log(own + tl.maximum(total, 1e-37))
    slope = tl.load(entry_ptr + rows, mask=known, other=1.0)
    tl.store(logps_ptr + rows, tl.where(distance > -30, near, far), mask=known)
    tl.store(inverse_ptr + rows, 1 / (own + total), mask=known)
    tl.store(entry_ptr + rows, -total * slope, mask=known)


@triton.jit(**ANY_BATCH)
def label_entry_kernel(exps_ptr, entry_ptr, targets_ptr, N, V, first, exps_stride, BLOCK_N: tl.constexpr):
    """Write each row's entry at its label's place, where that lies in the slice."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(targets_ptr + rows, mask=rows < N, other=-1) - first
    entry = tl.load(entry_ptr + rows, mask=rows < N, other=0.0)
    here = (rows < N) & (label >= 0) & (label < V)
    tl.store(exps_ptr + rows.to(tl.int64) * exps_stride + label, entry.to(exps_ptr.dtype.element_ty), mask=here)


@triton.jit(**ANY_BATCH)
def rows_kernel(
    source_ptr, out_ptr, source_rows_ptr, out_rows_ptr, a_ptr, b_ptr, entry_ptr, weight_ptr, targets_ptr,
    H, source_stride, out_stride, weight_stride, factor,
    BLOCK_H: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    HAS_ENTRY: tl.constexpr,
):  # fmt: skip
    """``out[i] = factor * a_i * b_i * (source[i] + entry_i * weight[target_i])``, one row a program, in float32.

    With GATHER the source's rows go by an index, with SCATTER the output's; a row of the output has one writer.
    """
    i = tl.program_id(0).to(tl.int64)
    source_row, out_row = i, i
    if GATHER:
        source_row = tl.load(source_rows_ptr + i)
    if SCATTER:
        out_row = tl.load(out_rows_ptr + i)
    k = factor
    if HAS_A:
        k *= tl.load(a_ptr + i)
    if HAS_B:
        k *= tl.load(b_ptr + i)
    features = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    values = tl.load(source_ptr + source_row * source_stride + features, mask=features < H, other=0.0).to(tl.float32)
    if HAS_ENTRY:
        row = weight_ptr + tl.load(targets_ptr + i) * weight_stride
        values += tl.load(entry_ptr + i) * tl.load(row + features, mask=features < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_row * out_stride + features, (k * values).to(out_ptr.dtype.element_ty), mask=features < H)


@triton.jit(**ANY_BATCH)
def scale_kernel(values_ptr, scale_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """``values *= scale`` in place. The scale stays on the device; when it is 1, the usual case, nothing is touched."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale == 1.0:
        return
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    for step in range(STEPS):
        places = start + step * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + places, mask=places < size, other=0.0).to(tl.float32)
        tl.store(values_ptr + places, (values * scale).to(values_ptr.dtype.element_ty), mask=places < size)


@triton.jit(**ANY_BATCH)
def odds_ratio_kernel(
    logps_ptr, means_ptr, answer_weight_ptr, nll_weight_ptr, offsets_ptr, valid_ptr, coefficients_ptr, table_ptr,
    pairs, base, beta, nll_weight, share, chosen_bound, rejected_bound, tiny, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair a program: means, loss, metrics, and ``g = d loss / d logp`` of each of its scores.

    ``objective.OddsRatio`` has the equations. The rows of ``table [8, pairs]`` are the fields of
    ``pairs.PairTable``.
    """
    pair = tl.program_id(0)
    start = tl.load(offsets_ptr + 2 * pair) - base
    middle = tl.load(offsets_ptr + 2 * pair + 1) - base
    end = tl.load(offsets_ptr + 2 * pair + 2) - base
    valid = tl.load(valid_ptr + pair)
    own = share * valid.to(tl.float32)
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


@triton.jit(**ANY_BATCH)
def compact_kernel(
    labels_ptr, nll_labels_ptr, starts_ptr, counts_ptr, rows_ptr, targets_ptr, nll_weight_ptr, answer_weight_ptr,
    offsets_ptr, valid_ptr, pairs, ignore, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, BY_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """One sequence a program: its scores in their places, pair by pair, chosen before rejected.

    Where a sequence's scores begin follows from the counts of those before it, which every program adds up for itself.
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
        tl.store(targets_ptr + here, tl.where(in_answer, label, nll_label), mask=one)
        tl.store(nll_weight_ptr + here, tl.where(in_nll & (two == 0), nll_share, 0.0), mask=one)
        tl.store(answer_weight_ptr + here, tl.where(in_answer, answer_share, 0.0), mask=one)
        here = second_at + tl.cumsum(two.to(tl.int64), 0) - 1
        tl.store(rows_ptr + here, i, mask=two)
        tl.store(targets_ptr + here, nll_label, mask=two)
        tl.store(nll_weight_ptr + here, tl.where(two, nll_share, 0.0), mask=two)
        tl.store(answer_weight_ptr + here, tl.where(two, 0.0, 0.0), mask=two)
        at += tl.sum(one.to(tl.int64), 0)
        second_at += tl.sum(two.to(tl.int64), 0)
