"""What only a GPU can show: real sizes, more than 2^31 logits, host syncs, memory, graphs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks.harness.memory import MIB, peak_of
from benchmarks.problems.cases import BETA, STATES, Batch, Pair
from benchmarks.problems.cases import Case as HeadCase
from benchmarks.problems.inputs import Problem, make_problem
from benchmarks.problems.providers import compose
from orpo_kernels import explain, orpo_loss, reference
from orpo_kernels.backends import select
from tests.cases import DEVICE, Case, check, make, relative

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")

BIG = HeadCase("big", 1024, 128256)
# 17,008 scores: E has 2.18e9 entries.
LONG = Batch("long", (Pair(1, 1063, 1063),) * 8, 1063)
FEW = Batch("few", (Pair(40, 90, 70), Pair(30, 60, 80)), 140)


def ours(problem: Problem, workspace: int | None) -> torch.Tensor:
    return orpo_loss(
        problem.hidden, problem.weight, problem.labels, nll_labels=problem.nll_labels, beta=BETA,
        softcap=problem.softcap, workspace_bytes=workspace,
    ).loss  # fmt: skip


def truth(problem: Problem, chunk: int = 1024) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and gradients in float64, a chunk of rows at a time: full logits would not fit."""
    rows = problem.hidden.detach().double().view(-1, problem.hidden.shape[-1])
    weight, targets = problem.weight.detach().double(), problem.targets.view(-1)

    def logps(part: slice, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return reference.linear_logprobs(hidden, head, targets[part], softcap=problem.softcap)

    parts = [slice(start, start + chunk) for start in range(0, rows.shape[0], chunk)]
    with torch.no_grad():
        known = torch.cat([logps(part, rows[part], weight) for part in parts])
    leaf = known.view(problem.targets.shape).requires_grad_()
    loss = compose(leaf, problem)
    (coefficients,) = torch.autograd.grad(loss, leaf)
    grad_hidden, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
    for part in parts:
        hidden, head = rows[part].requires_grad_(), weight.requires_grad_()
        grads = torch.autograd.grad(logps(part, hidden, head), (hidden, head), coefficients.view(-1)[part])
        grad_hidden[part] = grads[0]
        grad_weight += grads[1]
    return loss.item(), grad_hidden.view(problem.hidden.shape), grad_weight


def test_auto_takes_triton() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert select("auto", DEVICE, dtype).name == "triton"
    assert select("auto", DEVICE, torch.float64).name == "torch"


def test_more_than_two_to_the_31_logits() -> None:
    """One E of 2.18e9 entries, several groups, and slices computed again, against float64."""
    problem = make_problem(BIG, LONG, STATES["trained-like"], "bfloat16", "trainable", DEVICE)
    loss, grad_hidden, grad_weight = truth(problem)
    for workspace in (8 << 30, None, 1 << 30):
        problem.clear_gradients()
        found = ours(problem, workspace)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-4)
        assert problem.hidden.grad is not None
        assert problem.weight.grad is not None
        assert relative(problem.hidden.grad, grad_hidden) < 4e-3
        assert relative(problem.weight.grad, grad_weight) < 4e-3
    frozen = replace(problem, weight=problem.weight.detach())
    frozen.clear_gradients()
    ours(frozen, None).backward()
    assert relative(frozen.hidden.grad, grad_hidden) < 4e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab", [128256, 151936, 128257, 50257])
@pytest.mark.parametrize("features", [896, 1023])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_vocabularies(vocab: int, features: int, dtype: torch.dtype) -> None:
    check(make(dtype, pairs=2, length=60, features=features, vocab=vocab, scale=0.02))


def test_one_host_sync_in_forward_and_none_in_backward() -> None:
    """Counting the scores is the one thing the host waits for."""
    problem = make_problem(BIG, FEW, STATES["trained-like"], "bfloat16", "trainable", DEVICE)
    for workspace in (None, 1 << 20):
        ours(problem, workspace).backward()  # compiles and warms up, which may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss = ours(problem, workspace)
                forward = _waits(said)
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(forward) == 1, forward
        assert len(_waits(said)) == 1, _waits(said)


def _waits(said: list[warnings.WarningMessage]) -> list[str]:
    return [str(entry.message) for entry in said if "synchroniz" in str(entry.message)]


@pytest.mark.parametrize("head", ["trainable", "frozen"])
@pytest.mark.parametrize("workspace", [None, 1 << 30, 256 << 20])
def test_memory_stays_within_the_plan(head: str, workspace: int | None) -> None:
    problem = make_problem(BIG, LONG, STATES["trained-like"], "bfloat16", head, DEVICE)  # type: ignore[arg-type]
    plan = explain(problem.hidden, problem.weight, problem.labels, workspace_bytes=workspace)

    def call() -> None:
        problem.clear_gradients()
        ours(problem, workspace).backward()

    call()
    problem.clear_gradients()
    peak = peak_of(call, DEVICE).beyond_mib
    returned = sum(grad.numel() * grad.element_size() for grad in problem.gradients().values()) / MIB
    assert peak - returned <= 1.05 * plan.bytes / MIB + 64, str(plan)


def test_capture_into_a_graph_is_refused() -> None:
    case = make(torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture the model without the loss"), torch.cuda.graph(graph):
        case.ours()


def test_compiled_by_inductor() -> None:
    case = make(torch.bfloat16, bias=True, features=64, vocab=1000)
    torch.use_deterministic_algorithms(False)
    body = torch.nn.Linear(64, 64, device=DEVICE, dtype=torch.bfloat16)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return orpo_loss(body(hidden), case.weight, case.labels, bias=case.bias).loss

    eager, compiled = step(case.hidden), torch.compile(step, fullgraph=True)(case.hidden)
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=0)
    for mine, theirs in zip(case.grads(compiled).values(), case.grads(eager).values(), strict=True):
        assert relative(mine, theirs.double()) < 1e-2


def test_the_current_device_need_not_be_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: there is no other device to be current")
    case = make(torch.bfloat16)
    away = Case(
        case.hidden.detach().to("cuda:1").requires_grad_(), case.weight.detach().to("cuda:1"), case.labels.to("cuda:1")
    )
    torch.testing.assert_close(away.ours().loss.cpu(), case.ours().loss.cpu())
