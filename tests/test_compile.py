"""One graph over a model and the loss, without a break; the operators hold what torch.library asks of them."""

from __future__ import annotations

import pytest
import torch

from orpo_kernels import OrpoOutput, linear_logprobs, orpo_loss
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
    options = (None, case.bias, 0.1, 1.0, "token", 1.0, None, -100, None, "auto", None, [True, True, True])
    inputs = (case.hidden, case.weight, case.labels)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.orpo_kernels.orpo_loss, (*inputs, *options), test_utils=tests)
    torch.library.opcheck(
        torch.ops.orpo_kernels.linear_logprobs, (*inputs, case.bias, 1.0, None, -100, "auto", None), test_utils=tests
    )
