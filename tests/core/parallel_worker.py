"""One of several processes on gloo: heads split by rows of the vocabulary, and sequences split by positions.

usage: python -m tests.core.parallel_worker RANK WORLD FOLDER [WORDS in the names of the checks to run]

Writes FOLDER/rank{RANK}.json: of each check None, or its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as SplitAlong
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accuracy import GRAD_FLOOR, VALUE_FLOOR, relative_error
from orpo_kernels import (
    OrpoLoss,
    OrpoOutput,
    Shard,
    explain,
    linear_logprobs,
    orpo_loss,
    preference_loss,
    reference,
)
from orpo_kernels.objectives import DPO
from tests.cases import Case, assert_as_accurate, check, make
from tests.core.test_doors import FullLogits
from tests.integrations.models import VOCAB, batch, llama
from tests.ranks import join, leave

# A group of pairs fits, all pairs do not.
WORKSPACES = {"several groups": 150_000, "several groups bfloat16": 60_000}


class Own(torch.autograd.Function):
    """What a rank takes of a tensor that all have, by an index. Its gradient is added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, index: Any, group: Any) -> Tensor:
        ctx.like, ctx.index, ctx.group = whole, index, group
        return whole[index].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = torch.zeros_like(ctx.like)
        whole[ctx.index] = grad
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None


@dataclass
class Spread(Case):
    """A case of which every rank has a part: gradients of the whole come out where those of the parts were right."""

    shard: Shard | None = None
    sequences: Any = None  # a process group
    workspace: int | None = None

    def own(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]]:
        """Hidden states, weight, labels, bias and options of this rank."""
        hidden, weight, labels, bias, options = self.hidden, self.weight, self.labels, self.bias, dict(self.options)
        if self.shard is not None:
            rows = slice(self.shard.start, self.shard.start + self.shard.rows)
            weight = Own.apply(weight, rows, self.shard.group)
            bias = None if bias is None else Own.apply(bias, rows, self.shard.group)
        if self.sequences is not None:
            # Every n-th position: no rank has a run, and their numbers differ.
            every = (slice(None), slice(dist.get_rank(self.sequences), None, dist.get_world_size(self.sequences)))
            hidden, labels = Own.apply(hidden, every, self.sequences), labels[every]
            weight = Own.apply(weight, slice(None), self.sequences)
            bias = None if bias is None else Own.apply(bias, slice(None), self.sequences)
            if options.get("nll_labels") is not None:
                options["nll_labels"] = options["nll_labels"][every]
        return hidden, weight, labels, bias, options

    def ours(self, **options: Any) -> OrpoOutput:
        hidden, weight, labels, bias, own = self.own()
        parallel = {"shard": self.shard, "sequence_group": self.sequences}
        parallel |= {"backend": self.backend, "workspace_bytes": self.workspace}
        return orpo_loss(hidden, weight, labels, bias=bias, **parallel, **{**own, **options})


class Sent(TorchDispatchMode):
    """How many numbers went to other ranks, by the name of the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.numbers[func.name().split("::")[-1]] += sum(tensor.numel() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def uneven(vocab: int) -> Shard:
    """Rank r holds 1 + r parts of all, the last what is left."""
    ranks = dist.get_world_size()
    whole = ranks * (ranks + 1) // 2
    return Shard(None, (*(vocab * (rank * (rank + 1) // 2) // whole for rank in range(ranks)), vocab))


def spread(case: Case, shard: Shard | None, sequences: Any = None, workspace: int | None = None) -> Spread:
    return Spread(**case.__dict__, shard=shard, sequences=sequences, workspace=workspace)


def two_targets_a_position(**options: Any) -> Case:
    case = make(torch.float64, **options)
    nll = torch.where(torch.arange(case.labels.numel()).view_as(case.labels) % 3 == 0, 5, case.labels)
    case.options["nll_labels"] = nll
    return case


def labels_of_one_rank() -> Case:
    """All labels are tokens of the second rank."""
    case = make(torch.float32, bias=True, vocab=480)
    of_second = 480 // dist.get_world_size()
    case.labels = torch.where(case.labels == -100, -100, of_second + case.labels % of_second)
    return case


def overflowing(backend: str = "torch", needs: str = "both", dtype: torch.dtype = torch.float32) -> Case:
    """Some rows' best logits beat their labels' by hundreds of nats, on one rank or on all."""
    case = replace(make(dtype, vocab=512), backend=backend)
    with torch.no_grad():
        of_each = 512 // dist.get_world_size()
        case.weight[0] = 0.5  # a token of the first rank
        case.hidden[:, 1] = 20.0
        case.weight[of_each + 1] = -0.4  # and one of the second
        case.hidden[:, 3] = -20.0
        case.hidden[:, 5] *= 100.0
    case.labels[:, 1] = 511
    case.labels[:, 3] = 3
    case.labels[0::2, 5] = of_each + 2
    case.weight.requires_grad_(needs == "both")
    return case


def heads() -> dict[str, Callable[[], Spread]]:
    """Cases of split heads. What follows is checked as the whole head is: against float64, beside naive code."""
    even = partial(Shard.even)
    float32, bfloat16, float16, float64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

    def frozen(case: Case) -> Case:
        case.weight.requires_grad_(False)
        return case

    def frozen_body(case: Case) -> Case:
        case.hidden.requires_grad_(False)
        return case

    def ignored(case: Case) -> Case:
        case.labels[1] = case.labels[-1] = -100
        return case

    cases: dict[str, Case] = {
        **{f"plain {dtype}": make(dtype) for dtype in (float64, float32, bfloat16, float16)},
        **{f"bias {dtype}": make(dtype, bias=True) for dtype in (float64, bfloat16)},
        **{
            f"softcap and scale {dtype}": make(dtype, bias=True, softcap=3.0, logit_scale=0.7)
            for dtype in (float64, float32, bfloat16)
        },
        "certain": make(float32, confidence=3.0),
        "frozen": frozen(make(float64, softcap=5.0)),
        "frozen bfloat16": frozen(make(bfloat16)),
        "frozen body": frozen_body(make(float64, bias=True)),
        "recompute": make(float64, bias=True),
        "recompute bfloat16": make(bfloat16, bias=True, softcap=4.0),
        "several groups": make(float64, pairs=4, length=17, vocab=250 * dist.get_world_size()),
        "several groups bfloat16": make(bfloat16, pairs=4, length=17, vocab=250 * dist.get_world_size()),
        "two targets a position": two_targets_a_position(bias=True),
        "two targets a position, recompute": two_targets_a_position(),
        "two targets a position, frozen": frozen(two_targets_a_position(nll_reduction="sequence")),
        "labels of one rank": labels_of_one_rank(),
        "ignored rows": ignored(make(float64, pairs=3)),
        "overflow": overflowing(),
        "overflow bfloat16": overflowing(dtype=bfloat16),
        "overflow recompute": overflowing(),
        "overflow recompute bfloat16": overflowing(dtype=bfloat16),
        "overflow frozen": overflowing(needs="hidden"),
        "many rows in chunks": frozen(make(float32, pairs=1, length=2500, vocab=300)),
        "many rows in chunks, recompute": make(float32, pairs=1, length=2500, vocab=300),
    }
    triton: dict[str, Case] = {
        "plain": make(float32, bias=True),
        "softcap and scale": make(float32, bias=True, softcap=3.0, logit_scale=0.7),
        "frozen": frozen(make(float32)),
        "recompute": make(float32, bias=True),
        "overflow": overflowing("triton"),
        "overflow frozen": overflowing("triton", "hidden"),
        "overflow recompute": overflowing("triton"),
        "two targets a position, frozen": frozen(two_targets_a_position().to(float32)),
    }
    cases.update({f"triton, {name}": replace(case, backend="triton") for name, case in triton.items()})
    found: dict[str, Callable[[], Spread]] = {}
    for name, case in cases.items():
        vocab = case.weight.shape[0]
        splits: dict[str, Callable[[int], Shard]] = {"even": even, "uneven": uneven}
        for how, split in splits.items():
            if how == "even" or name.startswith(("plain", "overflow", "recompute", "triton, plain")):
                workspace = 1 if "recompute" in name else WORKSPACES.get(name)
                found[f"head, {name}, {how}"] = partial(spread, case, split(vocab), None, workspace)
    return found


def check_values(case: Callable[[], Spread]) -> None:
    made = case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if made.workspace is not None:
            hidden, weight, labels, bias, options = made.own()
            options |= {"shard": made.shard, "sequence_group": made.sequences, "workspace_bytes": made.workspace}
            plan = explain(hidden, weight, labels, bias=bias, backend=made.backend, **options)
            assert plan.name == ("recompute" if made.workspace == 1 else "store")
            assert made.workspace == 1 or len(plan.groups) > 1
        check(made, upstream=0.5)


def check_next_to_overflow() -> None:
    """Rows that overflow on one rank, while another's best logit is but a little less: its shift moves, E is computed
    again under one that bfloat16 does not have, and it is not rounded to it."""
    case = make(torch.bfloat16, keep=1.0)
    second = 500 // dist.get_world_size()
    with torch.no_grad():
        case.weight[:, :2] = torch.tensor([0.0, 1.0])  # what is added to every logit makes them coarse in bfloat16
        case.weight[3, 0], case.weight[0, 0], case.weight[second, 0] = -1.8984375, 1.9140625, 1.84375
        case.hidden.mul_(0.02)
        case.hidden[..., :2] = torch.tensor([16.0, 301.0])
    case.labels[:] = 3
    whole = case.ours(workspace_bytes=1)
    part = spread(case, Shard.even(500), None, 1).ours()
    torch.testing.assert_close(part.loss, whole.loss, rtol=VALUE_FLOOR[torch.bfloat16], atol=0)
    expected = case.grads(whole.loss)
    for name, grad in case.grads(part.loss).items():
        assert relative_error(grad, expected[name].double()) < 2 * GRAD_FLOOR[torch.bfloat16], name


def check_logprobs(case: Case, backend: str = "torch", **options: Any) -> None:
    """Log-probabilities under an upstream gradient that comes late."""
    made = spread(case, uneven(case.weight.shape[0]))
    upstream = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden, weight, labels, bias, own = made.own()
    found = linear_logprobs(hidden, weight, labels, bias=bias, shard=made.shard, backend=backend, **own, **options)
    dtype, exact = case.hidden.dtype, case.to(torch.float64)
    naive = reference.linear_logprobs(case.hidden, case.weight, labels, bias=case.bias, **case.options)
    truth = reference.linear_logprobs(exact.hidden, exact.weight, labels, bias=exact.bias, **case.options)
    assert_as_accurate("logps", found, naive, truth, VALUE_FLOOR[dtype])
    theirs, expected = case.grads((naive * upstream).sum()), exact.grads((truth * upstream).sum())
    for name, grad in case.grads((found * upstream).sum()).items():
        assert_as_accurate(name, grad, theirs[name], expected[name], GRAD_FLOOR[dtype])


def check_sent_by_heads(backend: str) -> None:
    """Four numbers a target in forward, one more for a bias, and in backward hidden's gradient."""
    for trains in (True, False):
        case = make(torch.float32, bias=True, vocab=500, length=40)
        case.weight.requires_grad_(trains)
        shard = Shard.even(500)
        rows = slice(shard.start, shard.start + shard.rows)
        weight, bias = (t.detach()[rows].requires_grad_(trains) for t in (case.weight, case.bias))
        targets = int((case.labels != -100).sum())
        with Sent() as sent:
            loss = orpo_loss(case.hidden, weight, case.labels, bias=bias, shard=shard, backend=backend).loss
        assert sent.numbers == {"allreduce_": 4 * targets + 1}
        with Sent() as sent:
            loss.backward()
        assert sent.numbers == {"allreduce_": case.hidden.numel()}
        with Sent() as sent:
            logps = linear_logprobs(case.hidden, weight, case.labels, shard=shard, backend=backend)
        assert sent.numbers == {"allreduce_": 3 * targets}
        summed = replace(shard, sums_hidden=False)  # somebody else does
        part = linear_logprobs(case.hidden, weight, case.labels, shard=summed, backend=backend)
        with Sent() as sent:
            (own,) = torch.autograd.grad(part.sum(), case.hidden)
        assert not sent.numbers
        dist.all_reduce(own)
        torch.testing.assert_close(own, torch.autograd.grad(logps.sum(), case.hidden)[0])


def check_sent_by_sequences() -> None:
    """Counts and three sums of every sequence, and nothing in backward, however long the sequences are."""
    for length in (8, 80):
        case = make(torch.float32, pairs=3, length=length)
        hidden = case.hidden.detach().requires_grad_()
        with Sent() as sent:
            loss = orpo_loss(hidden, case.weight, case.labels, sequence_group=dist.group.WORLD).loss
        assert sent.numbers == {"allreduce_": 6 * 8 + 3 * 6}
        with Sent() as sent:
            loss.backward()
        assert not sent.numbers


def sequences() -> dict[str, Callable[[], Spread]]:
    """Cases of split sequences."""
    every = dist.group.WORLD
    float32, bfloat16, float64 = torch.float32, torch.bfloat16, torch.float64
    short = make(float64, pairs=3, length=7)
    short.labels[:, 1:] = -100  # some ranks have nothing to score
    empty = make(float64, pairs=3, length=11)
    empty.labels[2] = -100
    half = two_targets_a_position(pairs=2, length=13)
    half.options["nll_labels"] = half.options["nll_labels"][:2]
    cases = {
        **{f"plain {dtype}": make(dtype, pairs=3, length=23) for dtype in (float64, float32, bfloat16)},
        "bias and softcap": make(float64, bias=True, softcap=3.0, length=21),
        "mean over sequences": make(float64, length=21, nll_reduction="sequence"),
        "two targets a position": two_targets_a_position(length=21),
        "nll labels of the chosen half": half,
        "recompute": make(float64, length=21),
        "ranks without a target": short,
        "an answer without a token": empty,
        "triton": replace(make(float32, length=21, bias=True), backend="triton"),
    }
    return {
        f"sequence, {name}": partial(spread, case, None, every, 1 if name == "recompute" else None)
        for name, case in cases.items()
    }


def check_both() -> None:
    """Positions over one dimension of a mesh and the vocabulary over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("cp", "tp"))
    shard = Shard.even(500, mesh["tp"].get_group())
    for dtype in (torch.float64, torch.bfloat16):
        check(spread(make(dtype, length=21, bias=True, softcap=4.0), shard, mesh["cp"].get_group()))


def check_any_objective() -> None:
    """DPO over split sequences is DPO over whole ones, and packed sequences are split as padded ones are."""
    case = make(torch.float64, pairs=3, length=12)
    sums = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = preference_loss(case.hidden, case.weight, case.labels, DPO(0.5), reference_logps=sums)
    expected = case.grads(whole.loss)
    own = spread(case, None, dist.group.WORLD)
    hidden, weight, labels, _, _ = own.own()
    offsets = torch.arange(7) * hidden.shape[1]
    for packed in (False, True):
        tensors = (hidden.reshape(-1, 32), weight, labels.reshape(-1)) if packed else (hidden, weight, labels)
        options = {"cu_seqlens": offsets} if packed else {}
        found = preference_loss(*tensors, DPO(0.5), reference_logps=sums, sequence_group=dist.group.WORLD, **options)
        torch.testing.assert_close(found.loss, whole.loss)
        torch.testing.assert_close(found.metrics(), whole.metrics())
        grads = torch.autograd.grad(found.loss, [case.hidden, case.weight], retain_graph=True)
        for grad, name in zip(grads, ("hidden", "weight"), strict=True):
            torch.testing.assert_close(grad, expected[name])


def check_bad_labels_fail_everywhere() -> None:
    """A label that cannot be is an error on every rank, also on those that did not have it."""
    case = make(torch.float32)
    if dist.get_rank() == 0:
        case.labels[0, 0] = 777
    with pytest.raises(ValueError, match=r"labels holds 777.*\[0, 500\)"):
        orpo_loss(case.hidden, case.weight, case.labels, sequence_group=dist.group.WORLD)


def check_dtensors() -> None:
    """A weight that is a DTensor split by rows gets a gradient that is one too; hidden may be one as well."""
    named = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plain = init_device_mesh("cpu", (dist.get_world_size(),))
    for vocab, mesh, replicated in ((500, named, False), (501, named, True), (501, plain, False)):
        case = make(torch.float64, bias=True, vocab=vocab, softcap=5.0)
        assert case.bias is not None
        expected = case.grads(case.ours().loss)
        weight, bias = (
            distribute_tensor(tensor.detach(), mesh, [SplitAlong(0)]).requires_grad_()
            for tensor in (case.weight, case.bias)
        )
        hidden: Any = case.hidden
        if replicated:
            hidden = DTensor.from_local(case.hidden, mesh, [Replicate()])
        shard = None if mesh is named else Shard.of(weight)
        out = orpo_loss(hidden, weight, case.labels, bias=bias, softcap=5.0, shard=shard)
        torch.testing.assert_close(out.loss, case.ours().loss)
        out.loss.backward()
        for mine, name in ((weight, "weight"), (bias, "bias")):
            assert isinstance(mine.grad, DTensor)
            assert mine.grad.placements == (SplitAlong(0),)
            torch.testing.assert_close(mine.grad.full_tensor(), expected[name])
        torch.testing.assert_close(case.hidden.grad, expected["hidden"])


class Scored(torch.nn.Module):
    """The loss inside a model's forward."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(32, 32, dtype=torch.float64)
        self.head = torch.nn.Linear(32, 500, bias=False, dtype=torch.float64)
        self.options = options

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return orpo_loss(self.body(hidden), self.head.weight, labels, **self.options).loss


def check_fsdp() -> None:
    """FSDP2 over one dimension of a mesh gathers the rows that tensor parallelism leaves to a rank of the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    case = make(torch.float64, pairs=2, features=32)
    model = Scored()
    halves = [[1, 3], [0, 2]]  # of the batch: one pair each
    expected = torch.autograd.grad(
        sum(model(case.hidden[half], case.labels[half]) for half in halves) / 2, list(model.parameters())
    )
    spread_out = parallelize_module(model, mesh["tp"], {"head": ColwiseParallel()})
    fully_shard(spread_out, mesh=mesh["dp"])
    half = halves[mesh["dp"].get_local_rank()]
    spread_out(case.hidden[half].detach(), case.labels[half]).backward()
    for parameter, grad in zip(spread_out.parameters(), expected, strict=True):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), grad)


def check_ddp_over_sequences() -> None:
    """DDP averages over the ranks that share sequences what is a sum: the loss times their number makes up for it."""
    case, ranks = make(torch.float64, length=14), dist.get_world_size()
    whole = Scored()
    expected = torch.autograd.grad(whole(case.hidden, case.labels), list(whole.parameters()))
    model = DistributedDataParallel(Scored(sequence_group=dist.group.WORLD))
    every = (slice(None), slice(dist.get_rank(), None, ranks))
    (ranks * model(case.hidden[every], case.labels[every])).backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def check_unnamed_dtensor_is_refused() -> None:
    """A DTensor split by rows is as likely FSDP2's, whose ranks have other sequences: nobody guesses."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make(torch.float32)
    weight = distribute_tensor(case.weight.detach(), mesh, [SplitAlong(0)])
    with pytest.raises(ValueError, match=r"weight is a sharded DTensor.*shard=Shard.of\(weight\)"):
        orpo_loss(case.hidden, weight, case.labels)


def check_refusals() -> None:
    """What cannot be is an error that says what to do, on every rank."""
    case, ranks = make(torch.float32, vocab=500), dist.get_world_size()
    shard = Shard.even(500)
    rows = case.weight.detach()[shard.start : shard.start + shard.rows]

    def refused(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(error, match=match):
            call()

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    split = distribute_tensor(case.weight.detach(), mesh, [SplitAlong(1)])
    own = distribute_tensor(case.weight.detach(), mesh, [SplitAlong(0)])
    hidden_split = distribute_tensor(case.hidden.detach(), mesh, [SplitAlong(1)])
    labels, hidden = case.labels, case.hidden
    refused(ValueError, "offsets must rise from 0", lambda: Shard(None, (0, 500)))
    refused(ValueError, "every rank holds at least one token", lambda: Shard.even(ranks - 1))
    refused(ValueError, "pass this rank's rows", lambda: orpo_loss(hidden, case.weight, labels, shard=shard))
    refused(TypeError, r"shard must be an orpo_kernels\.Shard", lambda: orpo_loss(hidden, rows, labels, shard=0))
    refused(TypeError, "pass .get_group", lambda: orpo_loss(hidden, case.weight, labels, sequence_group=mesh))
    refused(ValueError, r"placed as Shard\(0\)", lambda: orpo_loss(hidden, split, labels))
    refused(ValueError, "drop shard", lambda: orpo_loss(hidden, own, labels, shard=uneven(500)))
    refused(ValueError, "hidden must be whole on every rank", lambda: orpo_loss(hidden_split, own, labels))
    refused(ValueError, "labels holds 500", lambda: orpo_loss(hidden, rows, labels.clamp(min=500), shard=shard))
    refused(
        ValueError,
        "backend full takes no head that is split over ranks",
        lambda: orpo_loss(hidden, rows, labels, shard=shard, backend=FullLogits()),
    )


def check_compiled_is_refused() -> None:
    """A graph holds no collective of ours."""
    case, shard = make(torch.float32, vocab=500), Shard.even(500)
    rows = case.weight.detach()[shard.start : shard.start + shard.rows].clone()
    for weight, options in ((rows, {"shard": shard}), (case.weight, {"sequence_group": dist.group.WORLD})):

        def step(hidden: Tensor, weight: Tensor = weight, options: Any = options) -> Tensor:
            return orpo_loss(hidden, weight, case.labels, **options).loss

        torch._dynamo.reset()
        with pytest.raises(Exception, match="call the loss outside the compiled region"):
            torch.compile(step, fullgraph=True, backend="aot_eager")(case.hidden)


def check_module() -> None:
    """``OrpoLoss`` takes both at construction."""
    case = make(torch.float64)
    made = spread(case, Shard.even(500))
    hidden, weight, labels, _, _ = made.own()
    loss = OrpoLoss(beta=0.1, shard=made.shard)(hidden, weight, labels).loss
    torch.testing.assert_close(loss, case.ours().loss)
    split = spread(case, None, dist.group.WORLD)
    hidden, weight, labels, _, _ = split.own()
    loss = OrpoLoss(beta=0.1, sequence_group=dist.group.WORLD)(hidden, weight, labels).loss
    torch.testing.assert_close(loss, case.ours().loss)


def check_backward_twice() -> None:
    case = make(torch.float64)
    made = spread(case, Shard.even(500))
    loss = made.ours().loss
    for factor in (1.0, 3.0):
        found = (
            case.grads(loss, factor)
            if factor == 3.0
            else dict(
                zip(case.tensors, torch.autograd.grad(loss, [*case.tensors.values()], retain_graph=True), strict=True)
            )
        )
        for name, expected in case.grads(case.ours().loss, factor).items():
            torch.testing.assert_close(found[name], expected)


def check_transformers(folder: Path) -> None:
    """Llama under its own tensor-parallel plan: every gradient of one's own loop is that of one process."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    ranks = dist.get_world_size()
    model = llama(num_key_value_heads=4).double()
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "llama")
    dist.barrier()
    ids = batch().inputs["input_ids"]
    labels = ids[:, 1:].clone()
    labels[:, :3] = -100

    def grads(of: Any) -> dict[str, Tensor]:
        hidden = of.model(input_ids=ids).last_hidden_state[:, :-1]
        loss = orpo_loss(hidden, of.lm_head.weight, labels).loss
        loss.backward()
        named = {name: parameter.grad for name, parameter in of.named_parameters()}
        found = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}
        return {"loss": loss.detach(), **found}

    parallel = AutoModelForCausalLM.from_pretrained(
        folder / "llama", dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto", tp_size=ranks)
    )
    assert parallel.lm_head.weight.to_local().shape[0] < VOCAB
    expected, found = grads(model), grads(parallel)
    errors = {name: relative_error(found[name], value) for name, value in expected.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-10} == {}


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {
        name: partial(check_values, case) for name, case in {**heads(), **sequences()}.items()
    }
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found[f"log-probabilities {dtype}"] = partial(check_logprobs, make(dtype, bias=True, logit_scale=0.7))
    found["log-probabilities, recompute"] = partial(check_logprobs, make(torch.float64, softcap=4.0), workspace_bytes=1)
    found["log-probabilities next to overflow"] = check_next_to_overflow
    masked = make(torch.float32, bias=True)  # tokens that cannot be, on some ranks all
    with torch.no_grad():
        assert masked.bias is not None
        masked.bias[130:] = float("-inf")
    masked.labels = torch.where(masked.labels == -100, -100, masked.labels % 130)
    found["log-probabilities, masked tokens"] = partial(check_logprobs, masked)
    found["log-probabilities, triton"] = partial(check_logprobs, make(torch.float32, bias=True), "triton")
    found["numbers sent by a split head"] = partial(check_sent_by_heads, "torch")
    found["numbers sent by a split head, triton"] = partial(check_sent_by_heads, "triton")
    found["numbers sent by split sequences"] = check_sent_by_sequences
    found["both splits"] = check_both
    found["any objective"] = check_any_objective
    found["DDP over sequences"] = check_ddp_over_sequences
    found["labels out of range"] = check_bad_labels_fail_everywhere
    found["DTensors"] = check_dtensors
    if dist.get_world_size() == 4:
        found["FSDP2 over tensor parallelism"] = check_fsdp
    found["DTensor of an unnamed mesh"] = check_unnamed_dtensor_is_refused
    found["refusals"] = check_refusals
    found["torch.compile"] = check_compiled_is_refused
    found["OrpoLoss"] = check_module
    found["backward twice"] = check_backward_twice
    found["transformers"] = partial(check_transformers, folder)
    return found


def main() -> None:
    torch.use_deterministic_algorithms(True)  # and NaN in memory that nobody wrote, as in tests/conftest.py
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ["TRITON_INTERPRET"] = "1"
    rank, world, folder = join()
    results: dict[str, str | None] = {}
    for name, each in checks(folder).items():
        if not all(word in name for word in sys.argv[4:]) or (world == 4 and "triton" in name):  # slow, interpreted
            continue
        try:
            each()
            results[name] = None
        except Exception:  # the checks after this one are still worth their results
            results[name] = traceback.format_exc()
    leave(results, rank, folder)


if __name__ == "__main__":
    main()
