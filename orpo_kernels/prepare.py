"""From a caller's values to a plan and a call: checks, what is to be computed, and how. Nothing is multiplied here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels import checks
from orpo_kernels.backends import GivenPairs, acc_dtype, select, uncast
from orpo_kernels.engine import Call
from orpo_kernels.plan import Plan, choose
from orpo_kernels.settings import Batch, Head, Needs, Settings, checked, checked_head
from orpo_kernels.shards import Shard
from orpo_kernels.targets import Targets, label_sizes, label_targets, pair_sizes


class Prepared(NamedTuple):
    """A plan, and what the engine runs, for which the targets are compacted."""

    plan: Plan
    call: Callable[[], Call]


def ready(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Numbers checked, and tensors cast as autocast would for ``F.linear``; float64 is left alone, as it leaves it."""
    if not torch.compiler.is_compiling():
        head = checked_head(head)
        if hasattr(head.weight, "full_tensor"):  # a DTensor
            hidden, head = _own_rows(hidden, head)
    elif head.shard is not None or hasattr(head.weight, "full_tensor"):
        raise TypeError(
            "inside torch.compile the head must be whole, got one that is split over ranks: call the loss outside the "
            "compiled region"
        )
    device = hidden.device.type if isinstance(hidden, Tensor) and not hidden.is_meta else "cpu"
    if not torch.is_autocast_enabled(device):
        return hidden, head
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(hidden), head._replace(weight=cast(head.weight), bias=cast(head.bias))


def _own_rows(hidden: Any, head: Head) -> tuple[Any, Head]:
    """The rows that this rank holds of a head whose weight is a DTensor, where its ranks hold the same hidden states.

    That is so if ``shard`` says it, or the mesh's dimension is called "tp", as transformers, accelerate and torchtitan
    call it. Under FSDP2 the weight looks alike but hidden states differ: any other is left for ``checks`` to refuse.

    Raises:
        ValueError: hidden is split, or the weight is not split as ``Shard.of`` asks.
    """
    weight, bias, shard = head.weight, head.bias, head.shard
    if shard is None and getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) != ("tp",):
        return hidden, head
    found = Shard.of(weight)
    if shard is not None and shard.offsets != found.offsets:
        raise ValueError(f"shard has offsets {shard.offsets}, but weight is split at {found.offsets}: drop shard")

    def own(tensor: Any) -> Any:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    if not all(placement.is_replicate() for placement in getattr(hidden, "placements", ())):
        raise ValueError(
            f"hidden must be whole on every rank that holds a part of the head, got {hidden.placements}: redistribute "
            "it to Replicate()"
        )
    return own(hidden), head._replace(weight=own(weight), bias=own(bias), shard=shard or found)


def prepare(
    hidden: Tensor, head: Head, batch: Batch, settings: Settings, needs: Needs | None = None, *, plan_only: bool = False
) -> Prepared:
    """Everything before the first product; ``needs`` is what the tensors ask for, unless told.

    Inside an operator they no longer say. With ``plan_only`` the mean row of the head is left out, a pass over it. The
    objective is one that ``pairs.check_objective`` let pass.

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
    if head.shard is not None and not backend.takes_shards:
        raise ValueError(f"backend {backend.name} takes no head that is split over ranks: pass 'torch' or 'triton'")
    group = settings.sequence_group
    plan_of = partial(
        choose,
        needs,
        vocab=head.widest,
        features=head.features,
        trained=head.trained.shape[1],
        dtype=hidden.dtype,
        workspace_bytes=settings.workspace_bytes,
        backend=backend,
        form=backend.form(hidden, head) if plan_only else "",
    )
    if objective is None:
        sizes = label_sizes(labels, head.whole_vocab, ignore)
        plan = plan_of(sizes, splits=False)

        def call_of_labels() -> Call:
            return Call(label_targets(labels, sizes, ignore, head.places), None, needs, plan, backend)

        return Prepared(plan, call_of_labels)

    if batch.cu_seqlens is None:
        offsets = checks.padded_offsets(hidden, pairs=settings.paired)
    else:
        checks.check_cu_seqlens(batch.cu_seqlens, hidden, pairs=settings.paired)
        offsets = batch.cu_seqlens.long().contiguous()
    if not settings.paired:  # the rejected ones are empty
        offsets = torch.cat([offsets, offsets[-1:].expand(offsets.numel() - 1)])
    nll_labels = labels
    if batch.nll_labels is not None:
        nll_labels = checks.flat_nll_labels(batch.nll_labels, hidden, ignore, pairs=settings.paired)
    pairs = offsets.numel() // 2
    checks.check_pair_numbers(
        "reference_logps", batch.reference_logps, hidden, 2 * pairs, "a sum for each sequence, chosen first"
    )
    checks.check_pair_numbers("margins", batch.margins, hidden, pairs, "one for each pair")
    checks.check_answer_weights(batch.answer_weights, batch.labels)
    count = partial(backend.count, labels, nll_labels, offsets, ignore)
    means: list[Tensor] = []

    def meanwhile() -> None:
        if not plan_only and head.softcap is None:
            with torch.no_grad(), uncast(hidden.device):
                means.append(backend.mean_weight(head.weight.detach()))

    sizes, table, of_sequences = pair_sizes(labels, head.whole_vocab, ignore, count, group, meanwhile)
    # Ranks that share sequences add up their sums once; each cuts its own positions as it likes.
    plan = plan_of(sizes, splits=group is None and not getattr(objective, "couples_pairs", False))
    given = GivenPairs(
        objective,
        settings.weight_of_nll,
        settings.nll_reduction == "sequence",
        plan.passes > 1,
        batch.of_pairs(acc_dtype(hidden.dtype)),
    )

    def call() -> Call:
        columns = backend.compact(labels, nll_labels, offsets, table, sizes.count, ignore)
        places = head.places(columns.ids)
        weights = None if batch.answer_weights is None else batch.answer_weights.reshape(-1)[columns.rows]
        targets = Targets(columns.rows, places, sizes, columns.kind, columns.offsets, of_sequences, group, weights)
        return Call(targets, given, needs, plan, backend, next(iter(means), None))

    return Prepared(plan, call)
