"""The planner's decisions, and that a run keeps to the memory its plan names."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_kernels import explain, linear_logprobs, orpo_loss, preference_loss
from orpo_kernels.backends.torch_backend import TorchBackend
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.objectives import SimPO
from orpo_kernels.plan import DEFAULT_WORKSPACE, Group, choose
from orpo_kernels.settings import Head, Needs
from orpo_kernels.targets import Sizes
from tests.cases import LargestTensor, make

LLAMA: dict[str, Any] = {"vocab": 128256, "features": 4096, "dtype": torch.bfloat16, "backend": TorchBackend()}
ROW = sum(TorchBackend().cost(1, 128256, 4096, torch.bfloat16, 0, store=True)[:2])  # bytes of one target
ALL = Needs(True, True, False)
ACCUMULATOR = 4 * 128256 * 4096
ROUNDED = ACCUMULATOR // 2  # the gradient in bfloat16, which does not exist while an E is held


def plan(pairs: list[int], needs: Needs = ALL, workspace: int | None = None, **options: Any) -> Any:
    sizes = Sizes(tuple(pairs), (sum(pairs), 0), len(pairs), 0, 0, False, sum(pairs))
    return choose(needs, sizes, workspace_bytes=workspace, **{**LLAMA, **options})


def test_the_plan_follows_what_needs_a_gradient() -> None:
    assert plan([100], Needs(False, False, False)).name == "forward"
    assert plan([100], Needs(True, False, False)).name == "frozen"
    for needs in (ALL, Needs(False, True, False), Needs(False, False, True)):
        assert plan([100], needs).name == "store"


def test_one_chunk_takes_the_accumulators_place() -> None:
    """By default E may grow to 1 GiB and one float32 copy of the weight, which several chunks would need anyway."""
    most = (DEFAULT_WORKSPACE + ACCUMULATOR) // ROW
    one = plan([most // 2] * 2)
    assert (one.name, len(one.groups), one.accumulator_bytes) == ("store", 1, 0)
    more = plan([most // 8] * 9)
    assert more.name == "store"
    assert len(more.groups) > 1
    assert more.accumulator_bytes == ACCUMULATOR
    assert more.stored_bytes <= DEFAULT_WORKSPACE + ROUNDED
    assert more.bytes <= DEFAULT_WORKSPACE + ACCUMULATOR


def test_several_chunks_have_the_place_of_the_gradient_they_return() -> None:
    """With the memory of one that is allocated at the end, dense batches take half as many groups."""
    heads = {(128256, 4096): 2, (152064, 3584): 3, (256000, 2304): 4, (151936, 896): 4}
    for (vocab, features), groups in heads.items():
        found = plan([2046] * 8, vocab=vocab, features=features, backend=TritonBackend())
        assert (found.name, len(found.groups)) == ("store", groups)
        assert found.bytes <= DEFAULT_WORKSPACE + 4 * vocab * features
    # What the sum over groups and the gradient take together at the end counts as well.
    assert plan([100] * 9, workspace=ACCUMULATOR - 1).name == "store"  # one group
    assert plan([4000] * 9, workspace=ACCUMULATOR - 1).name == "recompute"
    few = plan([100] * 99, workspace=ACCUMULATOR)
    assert (few.name, few.bytes) == ("store", max(few.bytes, ACCUMULATOR))


def test_groups_are_whole_pairs_in_order() -> None:
    groups = plan([7000, 9000, 1000, 40000, 10, 10], workspace=ACCUMULATOR - ROUNDED + 40000 * ROW).groups
    assert groups == (Group(0, 3, 0, 17000), Group(3, 4, 17000, 57000), Group(4, 6, 57000, 57020))


def test_a_float32_head_needs_no_accumulator() -> None:
    row = sum(TorchBackend().cost(1, 128256, 4096, torch.float32, 0, store=True)[:2])
    several = plan([4000] * 4, dtype=torch.float32, workspace=4000 * row)
    assert (several.name, len(several.groups), several.accumulator_bytes) == ("store", 4, 0)


@pytest.mark.parametrize("workspace", [1, 1 << 30])
def test_a_bound_too_small_for_the_accumulator_recomputes(workspace: int) -> None:
    asked = plan([8192], workspace=workspace)
    assert (asked.name, asked.passes, asked.stored_bytes) == ("recompute", 4, 0)
    assert "does not fit" in asked.reason
    assert asked.bytes <= max(workspace, 1024 * (ROW - 2 * 128256))  # the copies of 1,024 rows, the least there is


def test_an_objective_that_couples_pairs_is_not_split() -> None:
    together = plan([3000] * 9, splits=False)
    assert (together.name, len(together.groups)) == ("recompute", 1)
    assert plan([3000] * 9).name == "store"


def test_explain_reads_as_a_sentence() -> None:
    case = make(torch.bfloat16, pairs=2, keep=0.5)
    text = str(explain(case.hidden, case.weight, case.labels, backend="torch"))
    targets = int((case.labels != -100).sum())
    assert f"plan store on backend torch: 3 passes over {targets} targets" in text
    assert "of 36 positions), 1 group, 0 MiB" in text
    with torch.no_grad():
        assert explain(case.hidden, case.weight, case.labels).name == "forward"


def test_log_probabilities_take_the_same_plans() -> None:
    case = make(torch.bfloat16, pairs=2, keep=0.5)
    inputs = (case.hidden, case.weight, case.labels)
    kept = explain(linear_logprobs, *inputs, backend="torch")
    assert (kept.name, kept.passes, len(kept.groups)) == ("store", 3, 1)
    small = explain(linear_logprobs, *inputs, backend="torch", workspace_bytes=1)
    assert (small.name, small.passes) == ("recompute", 4)
    assert explain(linear_logprobs, case.hidden, case.weight.detach(), case.labels).passes == 2
    with torch.no_grad():
        assert explain(linear_logprobs, *inputs).passes == 1
    assert explain(preference_loss, *inputs, SimPO()) == explain(*inputs) == explain(orpo_loss, *inputs)
    with pytest.raises(ValueError, match="explain knows preference_loss, orpo_loss and linear_logprobs, got 'len'"):
        explain(len, *inputs)


def test_what_a_chip_multiplies_with_and_what_costs_the_fast_form() -> None:
    def form(vocab: int, features: int, softcap: float | None = None, bias: Any = None, arch: str = "sm_90") -> str:
        weight = torch.empty(vocab, features, dtype=torch.bfloat16)
        return TritonBackend(arch=arch).form(weight[:2], Head(weight, bias, 1.0, softcap))

    assert form(8, 4096) == "form tma, tiles of 128 x 256 x 64 in 8 warps"
    assert form(8, 896) == "form tma, tiles of 128 x 128 x 64 in 4 warps, 2 programs a multiprocessor"
    assert "2 programs" in form(8, 2304, 30.0)
    assert "2 programs" not in form(8, 3584, 30.0)
    said = r"form pointer, .*: rows of 899 features do not begin at multiples of 16 bytes, .*pad H to a multiple of 8"
    assert re.match(said, form(8, 899))
    assert "this chip has no tma tile for a softcap and a bias" in form(8, 4096, 30.0, torch.zeros(8))
    assert form(8, 4096, arch="sm_80") == "form pointer, tiles of 128 x 128 x 32 in 8 warps"
    case = make(torch.bfloat16, pairs=2)
    assert "form" not in str(explain(case.hidden, case.weight, case.labels, backend="torch"))
    row = {"vocab": 8, "features": 4, "dtype": torch.float32}
    assert str(plan([10], **row, form="form tma")).endswith("; form tma")


def test_explain_reads_no_head() -> None:
    """The mean row that a loss takes while the host waits is a pass over the head."""
    case = make(torch.bfloat16, pairs=2, keep=0.5)
    inputs = (case.hidden, case.weight, case.labels)
    with mock.patch.object(TorchBackend, "mean_weight", side_effect=AssertionError):
        assert explain(*inputs, backend="torch").name == "store"
        with pytest.raises(AssertionError):
            orpo_loss(*inputs, backend="torch")


class CountProducts(TorchDispatchMode):
    """Multiply-adds of all matrix products."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("plan", "passes"), [("store", 3), ("recompute", 4), ("frozen", 2), ("forward", 1)])
@pytest.mark.parametrize("late", [False, True])
def test_products_are_as_many_as_the_plan_says(plan: str, passes: int, late: bool) -> None:
    case = make(torch.float64, pairs=4, length=50, features=64, vocab=2000, keep=1.0)
    case.hidden.requires_grad_(plan != "forward")
    case.weight.requires_grad_(plan in ("store", "recompute"))
    workspace = 1 if plan == "recompute" else None
    inputs = (case.hidden, case.weight, case.labels)
    function = linear_logprobs if late else orpo_loss
    found = explain(function, *inputs, backend="torch", workspace_bytes=workspace)
    assert (found.name, found.passes) == (plan, passes)
    with CountProducts() as seen:
        out = function(*inputs, backend="torch", workspace_bytes=workspace)
        loss = (out * torch.randn_like(out)).sum() if late else out.loss
        if plan != "forward":
            loss.backward()
    one = found.targets * 64 * 2000
    assert passes <= seen.total / one < passes + 0.05  # less than a product beside: mean logits


@pytest.mark.parametrize("needs", ["nothing", "hidden", "head", "recompute", "logprobs", "logprobs recompute"])
def test_full_logits_never_exist(needs: str) -> None:
    """Only a kept E is as large as the scores times the vocabulary; every other plan stays within a tile.

    On the torch backend: where slices of E are memory like any other, test_gpu.py holds a run to its plan's bytes.
    """
    case = make(torch.bfloat16, pairs=8, length=40, features=8, vocab=20_000, keep=1.0)
    case.hidden.requires_grad_(needs != "nothing")
    case.weight.requires_grad_(needs not in ("nothing", "hidden"))
    kept = 640 * 20_001 * 2
    with LargestTensor() as seen:
        workspace = 1 if "recompute" in needs else None
        if "logprobs" in needs:
            inputs = (case.hidden, case.weight, case.labels)
            linear_logprobs(*inputs, backend="torch", workspace_bytes=workspace).sum().backward()
        else:
            loss = case.ours(backend="torch", workspace_bytes=workspace).loss
            if needs != "nothing":
                loss.backward()
    tile = 4097 * 640 * 2
    assert seen.largest <= (kept if needs in ("head", "logprobs") else tile)
