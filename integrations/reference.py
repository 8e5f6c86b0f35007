"""A reference model's log-probabilities of answers, computed once ahead of a training with DPO or a like loss.

One forward a batch without gradients, in which the head makes log-probabilities and no logits (``fused.py``). Where a
model's head cannot be fused its own logits are taken, and a warning says why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.integrations.fused import Batch, fused_answers
from orpo_kernels.integrations.trainer import Settings, find_site, first, say

IGNORED = -100  # Hugging Face's own
COLUMNS = "ref_chosen_logps", "ref_rejected_logps"  # as TRL's DPOTrainer and its collators read them
NO_INPUTS = ("labels", "completion_mask", *COLUMNS)  # what a batch has beside the model's inputs


class Reference:
    """As much of a trainer and its patch as a fused forward looks at."""

    def __init__(self, settings: Settings) -> None:
        from accelerate.utils import extract_model_from_parallel

        self.settings = settings
        main = os.environ.get("LOCAL_RANK", "0") == "0"
        self.accelerator = SimpleNamespace(unwrap_model=extract_model_from_parallel, is_local_main_process=main)
        first(self, "fused")  # how each batch is computed is not worth a line here

    def sums(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """``[S]``, of one batch; 0 for a sequence without a label."""
        device = next(model.parameters()).device
        answer = _shifted_labels(batch).to(device)
        inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS}
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        call = Batch({**inputs, "use_cache": False}, answer, answer, IGNORED)
        fused = site = find_site(self, model)
        if not isinstance(site, str):
            fused = fused_answers(self, self, model, site, call)
        if isinstance(fused, str):
            if first(self, "stock"):
                say(self, logging.WARNING, f"takes the reference's log-probabilities from full logits: {fused}")
            fused = _of_logits(model(**call.inputs).logits, answer)
        sums: Tensor = fused.sum(-1)
        return sums


def precompute(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
    keep_adapters: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """The summed log-probability of every answer under a causal language model of transformers, without full logits.

    The model runs without gradients and in evaluation mode, its adapters disabled, so that of a model with LoRA the
    base model is the reference. Modes, adapters and what asks for gradients are as before afterwards, also after an
    error. ``torch.autocast`` is the caller's.

    Args:
        model: the model, also inside peft's, DDP's or ``torch.compile``'s wrapper.
        batches: of ``input_ids [S, T]``, ``attention_mask`` and whatever else the model takes, with ``labels [S, T]``,
            not shifted, -100 outside the answers; or, as TRL's collators have it, with ``completion_mask [S, T]``, 1 on
            the answers. S may change from batch to batch.
        progress: show a bar on the machine's first process.
        keep_adapters: leave adapters as they are, where what they were trained to is the reference.
        backend, workspace_bytes: as in ``patch_trl``.

    Returns:
        ``[sequences]`` in the order of the batches, on the CPU, float32 (float64 for float64 models), nats; 0 for an
        answer without a token.

    Raises:
        TypeError, ValueError: a batch without labels, or with labels of another shape; no batch at all; or a setting
            that cannot be right.
        RuntimeError: the model's own log-probabilities of the first batch differ from the fused ones.
    """
    from tqdm.auto import tqdm

    reference = Reference(Settings.chosen(backend, workspace_bytes))
    quiet = not (progress and reference.accelerator.is_local_main_process)
    with torch.no_grad(), _evaluating(model, keep_adapters):
        found = [
            reference.sums(model, batch)
            for batch in tqdm(batches, desc="Reference log-probabilities", unit="batch", disable=quiet)
        ]
    if not found:
        raise ValueError("batches has no batch: an iterator that was used before is empty, pass the data loader itself")
    return torch.cat(found).cpu()


def add_reference_logps(
    dataset: Any,  # datasets.Dataset
    model: nn.Module,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    *,
    batch_size: int = 8,
    **options: Any,
) -> Any:
    """A dataset of pairs with the reference's sums in the columns ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        dataset: a ``datasets.Dataset`` of pairs; columns of these names are replaced.
        model: as ``precompute`` has it.
        collate: makes a batch of a list of B rows, as ``precompute`` has it: B chosen sequences, then their B rejected
            ones. TRL's ``DataCollatorForPreference`` is one, for the rows that its trainer has tokenised.
        batch_size: pairs in a batch.
        options: ``precompute``'s others.

    Returns:
        The ``datasets.Dataset``.

    Raises:
        TypeError: the dataset has no length, or has no columns to add to.
        ValueError: collate made other than two sequences of a row; and as ``precompute``.
    """
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"dataset must be a datasets.Dataset, got {type(dataset).__name__}: pass one split of a DatasetDict, and "
            "of an iterable dataset Dataset.from_list(list(dataset))"
        )

    def pairs(rows: list[Any]) -> Mapping[str, Any]:
        batch = collate(rows)
        if len(batch["input_ids"]) != 2 * len(rows):
            raise ValueError(
                f"collate must make two sequences of each row, chosen first, got {len(batch['input_ids'])} of "
                f"{len(rows)} rows: stack the chosen ones, then their rejected ones"
            )
        return batch

    loader: Any = torch.utils.data.DataLoader(dataset, batch_size, collate_fn=pairs)
    sums = precompute(model, loader, **options)
    sides = [part.chunk(2) for part in sums.split(2 * batch_size)]
    for column, parts in zip(COLUMNS, zip(*sides, strict=True), strict=True):
        if column in dataset.column_names:
            dataset = dataset.remove_columns(column)
        dataset = dataset.add_column(column, torch.cat(parts).numpy())
    return dataset


@contextmanager
def _evaluating(model: nn.Module, keep_adapters: bool) -> Iterator[None]:
    """Evaluation mode with adapters disabled; afterwards every module and parameter is as it was."""
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with ExitStack() as stack:
            model.eval()
            if not keep_adapters:
                _disable_adapters(model, stack)
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, tracked in trained.items():  # peft lets every adapter that it enables be trained
            parameter.requires_grad_(tracked)


def _disable_adapters(model: nn.Module, stack: ExitStack) -> None:
    """Until the stack is closed; of peft's models, and of adapters that transformers itself has put on a model."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "disable_adapter"):
            stack.enter_context(module.disable_adapter())
            return
    for module in modules:
        if getattr(module, "disable_adapters", None) is False:  # a layer's; of a model of transformers it is a method
            module.enable_adapters(False)
            stack.callback(module.enable_adapters, True)


def _shifted_labels(batch: Mapping[str, Any]) -> Tensor:
    """What each position predicts, ``[S, T]``.

    Raises:
        TypeError, ValueError: the batch has no input_ids, neither labels nor completion_mask, or one of other shape.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches must yield dicts, got {type(batch).__name__}: pass what the collator returns")
    name = "labels" if "labels" in batch else "completion_mask"
    if "input_ids" not in batch or name not in batch:
        raise ValueError(
            f"a batch must have input_ids, and labels or completion_mask to say which tokens are the answer's, got "
            f"{sorted(batch)}: copy input_ids to labels, with -100 at prompts and padding"
        )
    ids, marks = batch["input_ids"], batch[name]
    if not isinstance(ids, Tensor) or not isinstance(marks, Tensor):
        raise TypeError(f"input_ids and {name} must be tensors [S, T], got {type(marks).__name__}: collate the rows")
    if marks.shape != ids.shape:
        raise ValueError(
            f"{name} must have the shape of input_ids {list(ids.shape)}, got {list(marks.shape)}: pass it as it is, "
            "not shifted"
        )
    labels = marks if name == "labels" else ids.masked_fill(marks == 0, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities ``[S, T]`` from full logits, 0 where there is no label; virtual tokens come first there."""
    labels, logits = labels.to(logits.device), logits[:, logits.shape[1] - labels.shape[1] :]
    flat = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    losses = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(labels.shape)
