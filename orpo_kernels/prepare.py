"""From a caller's values to a plan and a call: checks, what is to be computed, and how. Nothing is multiplied here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from orpo_kernels import checks
from orpo_kernels.backends import Backend, GivenPairs, acc_dtype, select
from orpo_kernels.engine import Call
from orpo_kernels.objectives import check_objective
from orpo_kernels.plan import Plan, choose
from orpo_kernels.settings import Batch, Head, Needs, Settings, checked
from orpo_kernels.targets import Sizes, Targets, label_sizes, label_targets, pair_sizes


@dataclass(frozen=True)
class Prepared:
    """A plan, and how to get at the targets that it is for."""

    plan: Plan
    needs: Needs
    backend: Backend
    given: GivenPairs | None
    targets: Callable[[], Targets]

    def call(self) -> Call:
        """What the engine runs."""
        return Call(self.targets(), self.given, self.needs, self.plan, self.backend)


def prepare(hidden: Tensor, head: Head, batch: Batch, settings: Settings, needs: Needs | None = None) -> Prepared:
    """Everything before the first product; ``needs`` is what the tensors ask for, unless told.

    Inside an operator they no longer say.

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
    if objective is None:
        backend = select(settings.backend, hidden.device, hidden.dtype)
        sizes = label_sizes(labels, head.vocab, ignore)
        plan = _plan(hidden, head, settings, needs, sizes, backend, splits=False)
        return Prepared(plan, needs, backend, None, lambda: label_targets(labels, sizes, ignore))

    check_objective(objective)
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
    backend = select(settings.backend, hidden.device, hidden.dtype)
    sizes, table = pair_sizes(labels, nll_labels, offsets, head.vocab, ignore, backend.count)
    splits = not getattr(objective, "couples_pairs", False)
    plan = _plan(hidden, head, settings, needs, sizes, backend, splits=splits)
    given = GivenPairs(
        objective,
        settings.weight_of_nll,
        settings.nll_reduction == "sequence",
        plan.passes > 1,
        batch.of_pairs(acc_dtype(hidden.dtype)),
    )

    def targets() -> Targets:
        columns = backend.compact(labels, nll_labels, offsets, table, sizes.count, ignore)
        return Targets(columns.rows, columns.ids, sizes, columns.kind, columns.offsets, table)

    return Prepared(plan, needs, backend, given, targets)


def _plan(
    hidden: Tensor, head: Head, settings: Settings, needs: Needs, sizes: Sizes, backend: Backend, *, splits: bool
) -> Plan:
    return choose(
        needs,
        sizes,
        vocab=head.vocab,
        features=head.features,
        dtype=hidden.dtype,
        workspace_bytes=settings.workspace_bytes,
        backend=backend,
        splits=splits,
    )
