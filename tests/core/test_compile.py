"""One graph over a model and the loss, without a break; the operators hold what torch.library asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from orpo_kernels import OrpoLoss, OrpoOutput, linear_logprobs, orpo_loss, preference_loss
from orpo_kernels.objectives import CPO, DPO, KTO, ORPO, CrossEntropy, PairLogps, SimPO
from orpo_kernels.operators import pack, unpack
from orpo_kernels.settings import Batch, Head, Settings
from tests.cases import DEVICE, Case, make

# The compiler's front and middle, without code generation, which would need a C++ compiler.
COMPILER = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_over_a_model_and_the_loss(dtype: torch.dtype, frozen: bool) -> None:
    case = make(dtype, pairs=2, bias=True)
    case.weight.requires_grad_(not frozen)
    body = torch.nn.Linear(32, 32).to(DEVICE, dtype)
    nll_labels = torch.where(case.labels == -100, 3, case.labels)

    def step(hidden: torch.Tensor) -> OrpoOutput:
        return orpo_loss(body(hidden), case.weight, case.labels, nll_labels=nll_labels, bias=case.bias, softcap=4.0)

    eager, compiled = step(case.hidden), torch.compile(step, fullgraph=True, backend=COMPILER)(case.hidden)
    for name, mine, theirs in zip(OrpoOutput._fields, compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")
    wanted = [t for t in (case.hidden, case.weight, case.bias, *body.parameters()) if t is not None and t.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(compiled.loss * 3, wanted), torch.autograd.grad(eager.loss * 3, wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_one_graph_over_log_probabilities() -> None:
    case = make(torch.float64, bias=True)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        logps = linear_logprobs(hidden.tanh(), case.weight, case.labels, bias=case.bias, logit_scale=0.5)
        return (logps.sum(-1) ** 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend=COMPILER)(case.hidden)
    torch.testing.assert_close(compiled, step(case.hidden))
    grads = case.grads(compiled)
    for name, expected in case.grads(step(case.hidden)).items():
        torch.testing.assert_close(grads[name], expected)


def test_a_compiled_call_without_gradients_and_with_offsets() -> None:
    case = make(torch.float32, pairs=1, length=4)
    packed = Case(case.hidden.detach().view(-1, 32), case.weight.detach(), case.labels.view(-1))
    offsets = torch.tensor([0, 4, 8], device=DEVICE)
    compiled = torch.compile(orpo_loss, fullgraph=True, backend=COMPILER)
    out = compiled(packed.hidden, packed.weight, packed.labels, cu_seqlens=offsets)
    torch.testing.assert_close(out.loss, case.ours().loss.detach())
    with pytest.raises(ValueError, match="labels holds 900"):
        compiled(packed.hidden, packed.weight, packed.labels * 0 + 900, cu_seqlens=offsets)


def test_operators_are_well_formed() -> None:
    case = make(torch.float32, bias=True)
    head = Head(case.weight, case.bias)
    tensors = (case.hidden, case.weight, case.bias)
    orpo = pack(head, Batch(case.labels), Settings(ORPO(0.1)))
    logps = pack(head, Batch(case.labels), Settings())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.orpo_kernels
    torch.library.opcheck(operators.preference_loss, (*tensors, *orpo, [True] * 3), test_utils=tests)
    torch.library.opcheck(operators.linear_logprobs, (*tensors, *logps, None, [False] * 3), test_utils=tests)


def test_values_survive_the_way_into_an_operator() -> None:
    labels, margins = torch.zeros(2, 3), torch.ones(1)
    head = Head(torch.ones(4, 2), None, 0.5, 30.0)
    batch = Batch(labels, None, None, None, margins)
    for objective in (ORPO(0.3), DPO(0.2, 0.1), None, largest_margin):
        settings = Settings(objective, None, "sequence", -1, "torch", 7)
        back = unpack(head.weight, head.bias, pack(head, batch, settings))
        assert back[0][2:] == head[2:]
        assert back[1].labels is labels
        assert back[1].margins is margins
        assert back[1].nll_labels is None
        assert back[2] == settings


def largest_margin(pairs: PairLogps) -> torch.Tensor:
    return torch.nn.functional.softplus(pairs.rejected_mean - pairs.chosen_mean)


@pytest.mark.parametrize(
    "objective",
    [SimPO(2.0, 0.5), DPO(0.1, 0.1, True), CPO(0.3, "ipo"), KTO(0.1), largest_margin, CrossEntropy()],
    ids=["simpo", "dpo", "cpo", "kto", "function", "cross-entropy"],
)
def test_one_graph_over_any_objective(objective: Any) -> None:
    case = make(torch.float64)
    reference = torch.randn(4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights = torch.linspace(0, 1, case.labels.numel(), device=DEVICE).view(case.labels.shape)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        options = {"reference_logps": reference, "answer_weights": weights} if objective != CrossEntropy() else {}
        return preference_loss(hidden, case.weight, case.labels, objective, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend=COMPILER)(case.hidden)
    eager = step(case.hidden)
    torch.testing.assert_close(compiled, eager)
    expected = case.grads(eager)
    for name, grad in case.grads(compiled).items():
        torch.testing.assert_close(grad, expected[name])


def test_an_objective_that_no_module_exports_is_refused_in_a_graph() -> None:
    case = make(torch.float32)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        def mine(pairs: PairLogps) -> torch.Tensor:
            return -pairs.chosen_mean

        return preference_loss(hidden, case.weight, case.labels, mine).loss

    with pytest.raises(Exception, match="define it at the top of the module, or call the loss outside"):
        torch.compile(step, fullgraph=True, backend=COMPILER)(case.hidden)


def test_new_values_compile_nothing_new() -> None:
    """The second value of a number and the second length make it a variable; no later one costs a compilation."""
    graphs = []

    def count(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    compiled = torch.compile(orpo_loss, fullgraph=True, backend=count)
    weight = torch.randn(30, 8, device=DEVICE)

    def call(beta: float, length: int, pairs: int = 2, **options: Any) -> None:
        hidden = torch.randn(2 * pairs, length, 8, device=DEVICE)
        labels = torch.randint(0, 30, (2 * pairs, length), device=DEVICE)
        found = compiled(hidden, weight, labels, beta=beta, **options)
        torch.testing.assert_close(found.loss, orpo_loss(hidden, weight, labels, beta=beta, **options).loss)

    for beta, length, pairs in ((0.1, 5, 2), (0.2, 5, 2), (0.2, 6, 2), (0.2, 6, 3)):
        call(beta, length, pairs)
    known = len(graphs)
    for step in range(6):
        call(0.3 + 0.1 * step, 7 + step, 2 + step)
    assert len(graphs) == known


def named(scale: float) -> Any:
    def largest_margin(pairs: PairLogps) -> torch.Tensor:
        return scale * pairs.chosen_mean

    return largest_margin


class Holder:
    @staticmethod
    def largest_margin(pairs: PairLogps) -> torch.Tensor:
        return -7 * pairs.chosen_mean


@dataclass(frozen=True, kw_only=True)
class Keywords:
    scale: float = 1.0

    def __call__(self, pairs: PairLogps) -> torch.Tensor:
        return -self.scale * pairs.chosen_mean


@dataclass
class Thawed:
    scale: float = 1.0

    def __call__(self, pairs: PairLogps) -> torch.Tensor:
        return -self.scale * pairs.chosen_mean


def test_another_objective_of_the_same_name_is_never_computed() -> None:
    """An objective travels by name: what the name does not pin down is refused, and a method is found where it is."""
    case = make(torch.float64)

    def step(hidden: torch.Tensor, objective: Any) -> torch.Tensor:
        return preference_loss(hidden, case.weight, case.labels, objective).loss

    compiled = torch.compile(step, fullgraph=True, backend=COMPILER)
    torch.testing.assert_close(compiled(case.hidden, Holder.largest_margin), step(case.hidden, Holder.largest_margin))
    for objective, said in (
        (named(9.0), "define it at the top"),
        (Keywords(scale=5.0), "keywords alone"),
        (Thawed(), "frozen"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=said):
            torch.compile(step, fullgraph=True, backend=COMPILER)(case.hidden, objective)


def test_an_integer_is_the_number_it_is() -> None:
    graphs = []
    compiled = torch.compile(orpo_loss, fullgraph=True, backend=lambda module, _: graphs.append(module) or module)
    case = make(torch.float32)
    inputs = (case.hidden.detach(), case.weight.detach(), case.labels)
    for beta in (1, 2, 0.5, 3, 0.25):
        torch.testing.assert_close(compiled(*inputs, beta=beta).loss, orpo_loss(*inputs, beta=beta).loss)


def test_a_module_follows_its_attributes() -> None:
    case = make(torch.float32)
    module = OrpoLoss(beta=0.3)
    compiled = torch.compile(module, fullgraph=True, backend=COMPILER)
    for beta in (0.3, 0.7):
        module.beta = beta
        found = compiled(case.hidden, case.weight, case.labels)
        torch.testing.assert_close(found.loss, orpo_loss(case.hidden, case.weight, case.labels, beta=beta).loss)
