"""One of two processes on gloo: every layout of data parallel and sharded training, stock and fused, on one start.

usage: python -m tests.lazy.distributed_worker RANK WORLD FOLDER

Writes FOLDER/rank{RANK}.json: of each layout and mode the errors against one process that saw the whole batch in
float64, or the traceback.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather, gather_object, pad_across_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.accuracy import relative_error
from orpo_kernels.integrations import fuse, fusion_report
from tests.integrations.models import VOCAB, batch, llama
from tests.ranks import join, leave

Batch = tuple[Tensor, Tensor]  # ids and labels

IDS = batch().inputs["input_ids"]
STEPS, PROMPT = 2, 3
# A power of two, so that a gradient is what SGD moved, divided by it, to the last bits of the weight.
RATE = 2.0**-6
MODES = ("stock", "fused", "unknown")  # unknown: fused, and an operation nobody knows reads the logits as well


@dataclass(frozen=True)
class Layout:
    """How a model is spread over two ranks."""

    wrap: Callable[[nn.Module], nn.Module]
    tied: bool = False
    accumulates: bool = False  # the rank's half of the batch in two parts, with gradients reduced after the second
    autocast: bool = False
    empty: bool = False  # whether nothing of the second rank's half is scored
    exact: bool = True  # float64 throughout; else float32 weights that something computes with in bfloat16


LATE = ("ddp", "fsdp1", "fsdp2 root", "fsdp2 root keeps weights", "fsdp2 head", "fsdp2 tail")


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        if options.get("find_unused_parameters"):
            model.nowhere = nn.Linear(3, 3, dtype=model.lm_head.weight.dtype)  # a parameter that is in fact unused
        return DistributedDataParallel(model, **options)

    return wrap


def fsdp1(head: bool = False, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """The whole model, with the head in a unit of its own or in the root's."""

    def wrap(model: nn.Module) -> nn.Module:
        if head:
            model.lm_head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"), **options)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)

    return wrap


def fsdp2(*units: str, root: bool | None = None, layers: bool = False, **options: Any) -> Callable[..., nn.Module]:
    """``fully_shard`` of the layers, of one more unit with the named modules, and of the root."""
    reshard, copies = options.pop("reshard", True), options.pop("copies", ())

    def wrap(model: nn.Module) -> nn.Module:
        shard: dict[str, Any] = {"mesh": mesh(*copies), **options}
        for layer in model.model.layers if layers else []:
            fully_shard(layer, **shard)
        if units:
            fully_shard([model.get_submodule(name) for name in units], reshard_after_forward=reshard, **shard)
        return fully_shard(model, reshard_after_forward=root, **shard)

    return wrap


@functools.cache
def mesh(*sizes: int) -> DeviceMesh:
    """Of all ranks; with sizes, of copies of the model and the ranks that shard each."""
    names = ("copies", "parts") if sizes else ("parts",)
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
CASTS = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, output_dtype=torch.bfloat16)  # as accelerate has it
TAIL = ("model.norm", "lm_head")
LAYOUTS: dict[str, Layout] = {
    "ddp": Layout(ddp()),
    "ddp tied": Layout(ddp(), tied=True),
    "ddp find_unused_parameters": Layout(ddp(find_unused_parameters=True)),
    "ddp find_unused_parameters tied": Layout(ddp(find_unused_parameters=True), tied=True),
    "ddp static_graph": Layout(ddp(static_graph=True)),
    "ddp static_graph tied": Layout(ddp(static_graph=True), tied=True),
    "ddp gradients as views": Layout(ddp(gradient_as_bucket_view=True)),
    "ddp accumulates": Layout(ddp(), accumulates=True),
    "ddp empty rank": Layout(ddp(), empty=True),
    "ddp autocast": Layout(ddp(), autocast=True, exact=False),
    "fsdp1": Layout(fsdp1(use_orig_params=True)),
    "fsdp1 flat parameters": Layout(fsdp1(use_orig_params=False)),
    "fsdp1 keeps weights": Layout(fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)),
    "fsdp1 bf16": Layout(
        fsdp1(use_orig_params=True, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32)), exact=False
    ),
    "fsdp1 head": Layout(fsdp1(head=True, use_orig_params=True)),
    "fsdp1 tied": Layout(fsdp1(use_orig_params=True), tied=True),
    "fsdp2 root": Layout(fsdp2(root=True)),
    "fsdp2 root tied": Layout(fsdp2(root=True), tied=True),
    "fsdp2 root keeps weights": Layout(fsdp2(root=False)),
    "fsdp2 layers": Layout(fsdp2(layers=True)),
    "fsdp2 layers empty rank": Layout(fsdp2(layers=True), empty=True),
    "fsdp2 layers accumulates": Layout(fsdp2(layers=True), accumulates=True),
    "fsdp2 root bf16": Layout(fsdp2(root=True, mp_policy=BF16), exact=False),
    "fsdp2 tail": Layout(fsdp2(*TAIL, layers=True, reshard=False)),  # accelerate's grouping
    "fsdp2 tail bf16": Layout(fsdp2(*TAIL, layers=True, reshard=False, mp_policy=BF16), exact=False),
    "fsdp2 tail bf16 outputs": Layout(fsdp2(*TAIL, layers=True, reshard=False, mp_policy=CASTS), exact=False),
    "fsdp2 head": Layout(fsdp2("lm_head", reshard=True)),
    "fsdp2 head empty rank": Layout(fsdp2("lm_head", reshard=True), empty=True),
    "fsdp2 head bf16": Layout(fsdp2("lm_head", reshard=True, mp_policy=BF16), exact=False),
    "fsdp2 head keeps weights": Layout(fsdp2("lm_head", reshard=False)),
    "fsdp2 head offload": Layout(fsdp2("lm_head", reshard=True, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "fsdp2 tail offload": Layout(
        fsdp2(*TAIL, layers=True, reshard=False, offload_policy=CPUOffloadPolicy(pin_memory=False))
    ),
    "fsdp2 hybrid": Layout(fsdp2(*TAIL, layers=True, reshard=False, copies=(2, 2))),
}


OF_FOUR = ("fsdp2 hybrid",)  # takes four ranks
LAYOUTS_OF_TWO = [name for name in LAYOUTS if name not in OF_FOUR]
WRAPPED_FIRST = ("ddp", "fsdp1", "fsdp2 head", "fsdp2 tail")
GONE = "fsdp1 head"  # whose weight nothing can gather again where the loss is made
LAZY = [name for name in LAYOUTS_OF_TWO if name != GONE]
# The table of what works with what has a row for several layouts each.
ROWS = {
    "ddp find": "DDP, find_unused_parameters",
    "ddp static": "DDP, static_graph",
    "ddp accumulates": "DDP, gradient accumulation",
    "ddp empty": "DDP, a rank without a label",
    "ddp": "DDP",
    "fsdp1 flat": "FSDP1, flat parameters",
    "fsdp1 keeps": "FSDP1, weights kept after the forward",
    "fsdp1 bf16": "FSDP1, bf16 policy",
    "fsdp1 head": "FSDP1, head in its own unit",
    "fsdp1": "FSDP1",
    "fsdp2 hybrid": "FSDP2, hybrid: copies of shards",
    "fsdp2 root keeps": "FSDP2, one unit that keeps its weights",
    "fsdp2 root bf16": "FSDP2, bf16 policy",
    "fsdp2 root": "FSDP2, one unit",
    "fsdp2 layers empty": "FSDP2, a rank without a label",
    "fsdp2 layers accumulates": "FSDP2, gradient accumulation",
    "fsdp2 layers": "FSDP2, units of layers and the rest",
    "fsdp2 tail bf16 outputs": "FSDP2, bf16 policy that casts the output",
    "fsdp2 tail bf16": "FSDP2, bf16 policy",
    "fsdp2 tail offload": "FSDP2, CPU offload",
    "fsdp2 tail": "FSDP2, [norm, head] in a unit",
    "fsdp2 head empty": "FSDP2, a rank without a label",
    "fsdp2 head bf16": "FSDP2, bf16 policy",
    "fsdp2 head keeps": "FSDP2, head in its own unit that keeps its weight",
    "fsdp2 head offload": "FSDP2, CPU offload",
    "fsdp2 head": "FSDP2, head in its own unit",
}


def row_of(layout: str) -> str:
    return next(row for start, row in ROWS.items() if layout.startswith(start))


def modes_of(name: str) -> tuple[str, ...]:
    if not LAYOUTS[name].exact:
        return ("stock", "fused")
    return (*MODES, "wrapped first") if name in WRAPPED_FIRST else MODES


def labels_of(layout: Layout, ids: Tensor) -> Tensor:
    """Next tokens behind the prompt."""
    labels = ids[:, 1:].clone()
    labels[:, :PROMPT] = -100
    if layout.empty:
        labels[len(labels) // 2 :] = -100
    return labels


def loss_of(logits: Tensor, labels: Tensor, unknown: bool) -> Tensor:
    """Two consumers of the same logits, one of them not linear in its log-probabilities; a mean over sequences."""
    scored = labels != -100
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    answer = (logps * scored).sum(-1) / scored.sum(-1).clamp(min=1)
    nll = F.cross_entropy(logits[..., :-1, :].reshape(-1, VOCAB), labels.reshape(-1), reduction="sum")
    loss = nll / labels.numel() - F.logsigmoid(answer).mean()
    return loss + logits.sort(-1).values[..., -5:].square().mean() if unknown else loss


def weights_of(wrapped: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter in full, whatever holds it."""
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): weight.detach().double().clone()
                for name, weight in wrapped.named_parameters()
            }
    return {
        name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().double().clone()
        for name, weight in model.named_parameters()
    }


@contextlib.contextmanager
def without_reduction(wrapped: nn.Module) -> Any:
    if hasattr(wrapped, "no_sync"):
        with wrapped.no_sync():
            yield
    else:
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)


def train(layout: Layout, batch: Batch, mode: str, alone: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradients of every step and the loss in evaluation; and what the report of a fused model says."""
    model = llama(tie_word_embeddings=layout.tied).to(torch.float64 if layout.exact or alone else torch.float32)
    if mode in ("fused", "unknown") and not alone:
        fuse(model)
    wrapped = model if alone else layout.wrap(model)
    if mode == "wrapped first" and not alone:
        fuse(model)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=RATE)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=layout.autocast and not alone)
    unknown, found = mode == "unknown", {}

    def backward(ids: Tensor, labels: Tensor, weight: float = 1.0) -> None:
        with cast:
            logits = wrapped(input_ids=ids).logits
        (weight * loss_of(logits, labels, unknown)).backward()

    before = weights_of(wrapped, model)
    for step in range(STEPS):
        if layout.accumulates and not alone:
            first, second = zip(*(each.chunk(2) for each in batch), strict=True)
            with without_reduction(wrapped):
                backward(*first, 0.5)
            backward(*second, 0.5)
        else:
            backward(*batch)
        optimiser.step()
        optimiser.zero_grad()
        after = weights_of(wrapped, model)
        found.update({f"step {step}: {name}": (before[name] - after[name]) / RATE for name in before})
        before = after
    with torch.no_grad(), cast:
        loss = loss_of(wrapped(input_ids=batch[0]).logits, batch[1], unknown).double()
    if not alone:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    found["loss in evaluation"] = loss
    report = fusion_report(model)
    said = {
        "calls": report.calls,
        "products": report.products,
        "materialised": [[record.operation, record.where, record.count] for record in report.materialised],
    }
    return found, said if mode != "stock" and not alone else {}


def judge(layout: Layout, mode: str, rank: int) -> dict[str, Any]:
    """Errors of one layout."""
    whole = IDS, labels_of(layout, IDS)
    truth, _ = train(layout, whole, mode, alone=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, said = train(layout, (whole[0].chunk(2)[rank], whole[1].chunk(2)[rank]), mode)
    except Exception:  # the layouts after this one are still worth their results
        return {"traceback": traceback.format_exc()}
    errors = {name: relative_error(found[name], expected) for name, expected in truth.items()}
    return {"errors": errors, **said}


def gathered(logits: Tensor) -> dict[str, Tensor]:
    """What evaluation loops do with logits of several ranks."""
    parts = [torch.empty(logits.shape, dtype=logits.dtype) for _ in range(2)]
    dist.all_gather(parts, logits)
    total = logits.clone()
    dist.all_reduce(total)
    padded = pad_across_processes(logits[:, : 5 + dist.get_rank()], dim=1)
    return {
        "all_gather": torch.cat(parts),
        "all_reduce": total,
        "accelerate gather": gather({"logits": logits})["logits"],
        "accelerate gather_for_metrics": Accelerator(cpu=True).gather_for_metrics(logits),
        "accelerate pad and gather": gather(padded),
        "accelerate gather_object": torch.cat(gather_object([logits.cpu()])),
    }


def collectives(rank: int) -> dict[str, Any]:
    ids, model = IDS.chunk(2)[rank], llama()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gathered(model(input_ids=ids).logits)
        try:
            found = gathered(fuse(model)(input_ids=ids).logits)
        except Exception:  # the message is the result
            return {"traceback": traceback.format_exc()}
    return {"errors": {name: relative_error(found[name], value) for name, value in expected.items()}}


def late(layout: Layout, rank: int) -> dict[str, Any]:
    """What is said of logits that are first used after a step of their head's optimiser."""
    model = fuse(llama())
    wrapped = layout.wrap(model)
    ids = IDS.chunk(2)[rank]
    logits = [wrapped(input_ids=ids).logits for _ in range(2)]
    logits[1].logsumexp(-1).mean().backward()
    torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
    try:
        return {"value": logits[0].logsumexp(-1).sum().item()}
    except RuntimeError as error:
        return {"refused": str(error)}


def main() -> None:
    rank, _, folder = join()
    results: dict[str, dict[str, Any]] = {
        name: {mode: judge(LAYOUTS[name], mode, rank) for mode in modes_of(name)} for name in LAZY
    }
    results[GONE] = {mode: judge(LAYOUTS[GONE], mode, rank) for mode in ("fused", "wrapped first")}
    for name in LATE:
        results[f"{name}, late"] = {"fused": late(LAYOUTS[name], rank)}
    results["collectives"] = {"fused": collectives(rank)}
    leave(results, rank, folder)


if __name__ == "__main__":
    main()
