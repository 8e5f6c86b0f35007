"""From a caller's arguments to a job: checks, what is to be computed, and the plan. Nothing is multiplied here."""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels import checks
from orpo_kernels.backends import acc_dtype, select
from orpo_kernels.engine import Job, LogprobsJob, grad_dtype
from orpo_kernels.objective import OddsRatio
from orpo_kernels.plan import Needs, choose, room_of
from orpo_kernels.scores import logprob_scores, orpo_scores


def needs_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which gradients autograd will ask for."""
    if not torch.is_grad_enabled():
        return Needs(False, False, False)
    return Needs(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)


def check_workspace(workspace_bytes: int | None) -> None:
    """A positive number of bytes, or None.

    Raises:
        ValueError: anything else.
    """
    if workspace_bytes is not None and (not isinstance(workspace_bytes, int) or workspace_bytes <= 0):
        raise ValueError(f"workspace_bytes must be a positive number of bytes or None, got {workspace_bytes!r}")


def prepare_orpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    nll_labels: Tensor | None,
    bias: Tensor | None,
    beta: float,
    nll_weight: float,
    nll_reduction: str,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    cu_seqlens: Tensor | None,
    backend: str,
    workspace_bytes: int | None,
    needs: Needs | None = None,
) -> Job:
    """Everything of ``orpo_loss`` before the first product: checks, scores, plan.

    ``needs`` is what the tensors ask for, unless told: inside an operator they no longer say.
    """
    checks.check_head(hidden, weight, bias, logit_scale, softcap)
    checks.check_scalar("beta", beta)
    checks.check_scalar("nll_weight", nll_weight)
    if nll_reduction not in ("token", "sequence"):
        raise ValueError(f"nll_reduction must be 'token' or 'sequence', got {nll_reduction!r}")
    check_workspace(workspace_bytes)
    checks.check_labels("labels", labels, hidden, expected=hidden.shape[:-1])
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, hidden)
        offsets = cu_seqlens.long().contiguous()
    else:
        offsets = checks.padded_offsets(hidden)
    flat = labels.long().reshape(-1).contiguous()
    nll_flat = flat
    if nll_labels is not None:
        nll_flat = checks.flat_nll_labels(nll_labels, hidden, ignore_index)
    chosen_backend = select(backend, hidden.device, hidden.dtype)
    scores = orpo_scores(
        flat,
        nll_flat,
        offsets,
        weight.shape[0],
        ignore_index=ignore_index,
        nll_reduction=nll_reduction,
        dtype=acc_dtype(hidden.dtype),
        count=chosen_backend.count_scores,
        compact=chosen_backend.compact_scores,
    )
    needs = needs or needs_of(hidden, weight, bias)
    plan = choose(
        needs,
        scores.pair_sizes,
        vocab=weight.shape[0],
        features=weight.shape[1],
        dtype=hidden.dtype,
        accumulates_in_place=grad_dtype(hidden.dtype) == acc_dtype(hidden.dtype),
        workspace_bytes=workspace_bytes,
        positions=flat.numel(),
        backend=chosen_backend,
    )
    return Job(
        scores=scores,
        objective=OddsRatio(float(beta)),
        nll_weight=float(nll_weight),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        needs=needs,
        plan=plan,
        backend=chosen_backend,
    )


def prepare_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    workspace_bytes: int | None = None,
    needs: Needs | None = None,
) -> LogprobsJob:
    """Everything of ``linear_logprobs`` before the first product; ``needs`` as for ``prepare_orpo``."""
    checks.check_head(hidden, weight, bias, logit_scale, softcap)
    checks.check_labels("labels", labels, hidden, expected=hidden.shape[:-1])
    check_workspace(workspace_bytes)
    rows, targets = logprob_scores(labels.long(), weight.shape[0], ignore_index)
    chosen_backend = select(backend, hidden.device, hidden.dtype)
    return LogprobsJob(
        rows=rows,
        targets=targets,
        positions=labels.numel(),
        logit_scale=float(logit_scale),
        softcap=softcap,
        needs=needs or needs_of(hidden, weight, bias),
        backend=chosen_backend,
        room=room_of(workspace_bytes, chosen_backend),
    )
