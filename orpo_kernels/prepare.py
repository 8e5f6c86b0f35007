"""From a caller's values to a plan and a call: checks, what is to be computed, and how. Nothing is multiplied here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels import checks
from orpo_kernels.backends import GivenPairs, acc_dtype, select
from orpo_kernels.engine import Call
from orpo_kernels.plan import Plan, choose
from orpo_kernels.settings import Batch, Head, Needs, Settings, checked, checked_head
from orpo_kernels.targets import Targets, label_sizes, label_targets, pair_sizes


class Prepared(NamedTuple):
    """A plan, and what the engine runs, for which the targets are compacted."""

    plan: Plan
    call: Callable[[], Call]


def ready(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Numbers checked, and tensors cast as autocast would for ``F.linear``; float64 is left alone, as it leaves it."""
    if not torch.compiler.is_compiling():
        head = checked_head(head)
    device = hidden.device.type if isinstance(hidden, Tensor) and not hidden.is_meta else "cpu"
    if not torch.is_autocast_enabled(device):
        return hidden, head
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(hidden), head._replace(weight=cast(head.weight), bias=cast(head.bias))


def prepare(hidden: Tensor, head: Head, batch: Batch, settings: Settings, needs: Needs | None = None) -> Prepared:
    """Everything before the first product; ``needs`` is what the tensors ask for, unless told.

    Inside an operator they no longer say. The objective is one that ``objectives.check_objective`` let pass.

    Raises:
        TypeError, ValueError: an input that cannot be right.
        RuntimeError: a CUDA graph is being captured.
    """
    objective = settings.objective
    checks.check_tensors(hidden, head, least=1 if objective is None else 2)
    settings = checked(settings)
    ignore = settings.ignore_index
    checks.check_labels("labels", batch.labels, hidden, expected=hidden.shape[:-1])
    labels = batch.labels.long().reshape(-1).contiguous()
    needs = needs or Needs.of(hidden, head)
    backend = select(settings.backend, hidden.device, hidden.dtype)
    plan_of = partial(
        choose,
        needs,
        vocab=head.vocab,
        features=head.features,
        trained=head.trained.shape[1],
        dtype=hidden.dtype,
        workspace_bytes=settings.workspace_bytes,
        backend=backend,
    )
    if objective is None:
        sizes = label_sizes(labels, head.vocab, ignore)
        plan = plan_of(sizes, splits=False)
        return Prepared(plan, lambda: Call(label_targets(labels, sizes, ignore), None, needs, plan, backend))

    if batch.cu_seqlens is None:
        offsets = checks.padded_offsets(hidden)
    else:
        checks.check_cu_seqlens(batch.cu_seqlens, hidden)
        offsets = batch.cu_seqlens.long().contiguous()
    nll_labels = labels
    if batch.nll_labels is not None:
        nll_labels = checks.flat_nll_labels(batch.nll_labels, hidden, ignore)
    pairs = offsets.numel() // 2
    checks.check_pair_numbers(
        "reference_logps", batch.reference_logps, hidden, 2 * pairs, "a sum for each sequence, chosen first"
    )
    checks.check_pair_numbers("margins", batch.margins, hidden, pairs, "one for each pair")
    sizes, table = pair_sizes(labels, nll_labels, offsets, head.vocab, ignore, backend.count)
    plan = plan_of(sizes, splits=not getattr(objective, "couples_pairs", False))
    given = GivenPairs(
        objective,
        settings.weight_of_nll,
        settings.nll_reduction == "sequence",
        plan.passes > 1,
        batch.of_pairs(acc_dtype(hidden.dtype)),
    )

    def call() -> Call:
        columns = backend.compact(labels, nll_labels, offsets, table, sizes.count, ignore)
        targets = Targets(columns.rows, columns.ids, sizes, columns.kind, columns.offsets, table)
        return Call(targets, given, needs, plan, backend)

    return Prepared(plan, call)
