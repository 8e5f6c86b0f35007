"""The planner's decisions, and that a run keeps to the memory its plan names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orpo_kernels import explain, linear_logprobs
from orpo_kernels.backends.torch_backend import TorchBackend
from orpo_kernels.plan import DEFAULT_WORKSPACE, Group, Needs, choose
from tests.cases import make

LLAMA: dict[str, Any] = {
    "vocab": 128256, "features": 4096, "dtype": torch.bfloat16, "accumulates_in_place": False, "positions": 0,
    "backend": TorchBackend(),
}  # fmt: skip
ALL = Needs(True, True, False)
ACCUMULATOR = 4 * 128256 * 4096


def plan(pairs: list[int], needs: Needs = ALL, workspace: int | None = None, **options: Any) -> Any:
    return choose(needs, pairs, workspace_bytes=workspace, **{**LLAMA, **options})


def test_the_plan_follows_what_needs_a_gradient() -> None:
    assert plan([100], Needs(False, False, False)).name == "score"
    assert plan([100], Needs(True, False, False)).name == "frozen"
    for needs in (ALL, Needs(False, True, False), Needs(False, False, True)):
        assert plan([100], needs).name == "stash"


def test_one_chunk_takes_the_accumulators_place() -> None:
    """By default E may grow to 1 GiB and one float32 copy of the weight, which several chunks would need anyway."""
    most = (DEFAULT_WORKSPACE + ACCUMULATOR) // (2 * 128256)
    one = plan([most // 2] * 2)
    assert (one.name, len(one.groups), one.accumulator_bytes) == ("stash", 1, 0)
    more = plan([most // 8] * 9)
    assert more.name == "stash"
    assert len(more.groups) > 1
    assert more.accumulator_bytes == ACCUMULATOR
    assert more.kept_bytes <= DEFAULT_WORKSPACE


def test_groups_are_whole_pairs_in_order() -> None:
    groups = plan([7000, 9000, 1000, 40000, 10, 10], workspace=ACCUMULATOR + 40000 * 2 * 128256).groups
    assert groups == (Group(0, 3, 0, 17000), Group(3, 4, 17000, 57000), Group(4, 6, 57000, 57020))


def test_a_float32_head_needs_no_accumulator() -> None:
    several = plan([4000] * 4, dtype=torch.float32, accumulates_in_place=True, workspace=4000 * 4 * 128256)
    assert (several.name, len(several.groups), several.accumulator_bytes) == ("stash", 4, 0)


@pytest.mark.parametrize("workspace", [1, 1 << 30])
def test_a_bound_too_small_for_the_accumulator_recomputes(workspace: int) -> None:
    asked = plan([8192], workspace=workspace)
    assert (asked.name, asked.mm, asked.bytes) == ("recompute", 4, 0)
    assert "do not fit" in asked.reason


def test_explain_reads_as_a_sentence() -> None:
    case = make(torch.bfloat16, pairs=2, keep=0.5)
    text = str(explain(case.hidden, case.weight, case.labels, backend="torch"))
    scores = int((case.labels != -100).sum())
    assert f"plan stash on backend torch: 3 mm over {scores} scores" in text
    assert "of 36 positions), 1 chunk, 0 MiB" in text
    with torch.no_grad():
        assert explain(case.hidden, case.weight, case.labels).name == "score"


class LargestTensor(TorchDispatchMode):
    """The largest storage any operation returned, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("needs", ["nothing", "hidden", "head", "recompute", "logprobs"])
def test_full_logits_never_exist(needs: str) -> None:
    """Only a kept E is as large as the scores times the vocabulary; every other plan stays within a tile.

    On the torch backend: where slices of E are memory like any other, test_gpu.py holds a run to its plan's bytes.
    """
    case = make(torch.bfloat16, pairs=8, length=40, features=8, vocab=20_000, keep=1.0)
    case.hidden.requires_grad_(needs != "nothing")
    case.weight.requires_grad_(needs not in ("nothing", "hidden"))
    kept = 640 * 20_001 * 2
    with LargestTensor() as seen:
        if needs == "logprobs":
            linear_logprobs(case.hidden, case.weight, case.labels, backend="torch").sum().backward()
        else:
            loss = case.ours(backend="torch", workspace_bytes=1 if needs == "recompute" else None).loss
            if needs != "nothing":
                loss.backward()
    tile = 4097 * 640 * 2
    assert seen.largest <= (kept if needs == "head" else tile)
