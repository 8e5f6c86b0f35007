"""Random calls against the reference: shapes, masks, dtypes and options drawn together.

CI draws 300. ``ORPO_FUZZ_CASES=10000 pytest tests/core/test_fuzz.py`` draws as many as are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels import linear_logprobs, preference_loss, reference
from orpo_kernels.backends import torch_backend, torch_tiles
from orpo_kernels.objectives import DPO, SimPO
from tests.cases import DEVICE, GRAD_FLOOR, VALUE_FLOOR, Case, assert_as_accurate, cancelling, check, make

CASES = int(os.environ.get("ORPO_FUZZ_CASES", "300"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEAST = {"pairs": 1, "length": 8, "features": 24, "vocab": 100}
KEPT = 0.3  # of the labels
# What so many roundings of one number come to. Larger tensors average them, which the floors of other tests count on;
# here a value or a gradient may be made of one target.
# Of a logit: as a product, with the bias, by the scale; its exponential; and a sum of some of those.
VALUES = {dtype: 5 * torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16)}
# Of a gradient: E, a row of hidden times its coefficient, the result.
GRADS = {dtype: 3 * torch.finfo(dtype).eps / 2 for dtype in VALUES}
IGNORED = (-100, -1)

head = st.fixed_dictionaries(
    {
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, None, 2.0, 30.0]),
        "logit_scale": st.sampled_from([1.0, 1.0, 0.3, 1.7]),
    }
)
shape = st.fixed_dictionaries(
    {
        "pairs": st.integers(1, 4),
        "length": st.integers(1, 12),
        "features": st.integers(1, 24),
        "vocab": st.integers(2, 200),
        "keep": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        "confidence": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        "seed": st.integers(0, 10_000),
    }
)
engine = st.fixed_dictionaries(
    {
        "workspace": st.sampled_from([None, 1, 5_000, 50_000]),
        "tile": st.sampled_from([3, 64, 4096]),
        "rows": st.sampled_from([7, 4096]),
        "frozen": st.sampled_from([(), (), ("weight",), ("hidden",), ("weight", "bias"), ("bias",)]),
        "ignore": st.sampled_from(IGNORED),
    }
)
loss = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("orpo"),
            "beta": st.sampled_from([0.0, 0.1, 2.0]),
            "nll_weight": st.sampled_from([0.0, 1.0, 0.25]),
            "nll_reduction": st.sampled_from(["token", "sequence"]),
            "nll": st.sampled_from(["none", "more", "other"]),
            "upstream": st.sampled_from([1.0, 0.5, -3.0]),
        }
    ),
    st.fixed_dictionaries({"kind": st.just("logprobs")}),
    st.fixed_dictionaries(
        {
            "kind": st.just("objective"),
            "objective": st.sampled_from([SimPO(), SimPO(beta=0.5, gamma=1.0), DPO(), DPO(beta=1.0)]),
            "nll_weight": st.sampled_from([0.0, 0.5]),
            "margins": st.booleans(),
        }
    ),
)


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None, derandomize=CASES == 300, suppress_health_check=list(HealthCheck))
@given(shape=shape, head=head, engine=engine, loss=loss, dtype=st.sampled_from(DTYPES))
@pytest.mark.filterwarnings("ignore:.*an answer without a token")
def test_any_call(
    shape: dict[str, Any], head: dict[str, Any], engine: dict[str, Any], loss: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype.itemsize == 2:  # the naive error of a handful of numbers of few bits is luck, and no measure of ours
        shape = {**shape, **{name: shape[name] + more for name, more in LEAST.items()}}
        shape["keep"] = max(shape["keep"], KEPT)
    case = make(dtype, **shape, **{**head, "ignore_index": engine["ignore"]})
    case.labels[case.labels == -100] = engine["ignore"]
    for name in engine["frozen"]:
        if name in case.tensors and len(case.tensors) > 1:
            case.tensors[name].requires_grad_(False)
    # Small tiles and chunks, so that small inputs have many of each.
    with (
        mock.patch.dict(GRAD_FLOOR, GRADS),
        mock.patch.dict(VALUE_FLOOR, VALUES),
        mock.patch.object(torch_tiles, "TILE_ROWS", (engine["tile"],) * 2),
        mock.patch.object(torch_backend, "CHUNK_ROWS", (engine["rows"],) * 2),
    ):
        RUN[loss["kind"]](case, engine["workspace"], loss)


def orpo(case: Case, workspace: int | None, loss: dict[str, Any]) -> None:
    case.options |= {name: loss[name] for name in ("beta", "nll_weight", "nll_reduction")}
    if loss["nll"] != "none":
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, case.weight.shape[0], case.labels.shape, generator=generator).to(DEVICE)
        ignored = case.labels == case.options["ignore_index"]
        case.options["nll_labels"] = torch.where(ignored, tokens, case.labels) if loss["nll"] == "more" else tokens
    times = cancelling(case, lambda of: of.reference()["loss"])
    check(case, loss["upstream"], times, backend="torch", workspace_bytes=workspace)


def logprobs(case: Case, workspace: int | None, loss: dict[str, Any]) -> None:
    upstream = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def value(of: Case, function: Any, **options: Any) -> tuple[Tensor, Tensor]:
        logps = function(of.hidden, of.weight, of.labels, bias=of.bias, **of.options, **options)
        return logps, (logps * upstream.to(logps.dtype)).sum()

    ours = value(case, linear_logprobs, backend="torch", workspace_bytes=workspace)
    compare(case, ours, lambda of: value(of, reference.linear_logprobs))


def objective(case: Case, workspace: int | None, loss: dict[str, Any]) -> None:
    sequences = case.labels.shape[0]
    generator = torch.Generator().manual_seed(3)
    given = {"nll_weight": loss["nll_weight"]}
    if isinstance(loss["objective"], DPO):
        given["reference_logps"] = -5 * torch.rand(sequences, generator=generator).to(DEVICE)
    if loss["margins"]:
        given["margins"] = torch.rand(sequences // 2, generator=generator).to(DEVICE)

    def value(of: Case, function: Any, **options: Any) -> tuple[Tensor, Tensor]:
        options |= {"bias": of.bias, **given, **of.options}
        out = function(of.hidden, of.weight, of.labels, loss["objective"], **options)
        return (out["loss"] if isinstance(out, dict) else out.loss,) * 2

    # A loss that is linear in beta d has beta times d's error. Where it saturates, its gradient is e^(-beta d) times
    # something, and has as much. Errors of a sum's terms add up as a random walk does; a mean has its terms' at most.
    sums = isinstance(loss["objective"], DPO)
    tokens = int((case.labels != case.options["ignore_index"]).sum(1).max()) if sums else 1
    amplified = loss["objective"].beta * VALUE_FLOOR[case.hidden.dtype] * tokens**0.5
    ours = value(case, preference_loss, backend="torch", workspace_bytes=workspace)
    compare(case, ours, lambda of: value(of, reference.preference_loss), amplified)


RUN = {"orpo": orpo, "logprobs": logprobs, "objective": objective}
Found = tuple[Tensor, Tensor]  # a value, and the scalar whose gradients are compared


def compare(case: Case, ours: Found, run: Callable[[Case], Found], amplified: float = 0.0) -> None:
    """A value and its gradients against float64, beside the naive implementation's own error; ``amplified`` is what
    errors of log-probabilities come to in them."""
    dtype, true_case = case.hidden.dtype, case.to(torch.float64)
    naive, truth = run(case), run(true_case)
    size = max(1.0, truth[0].detach().abs().max().item())
    error, theirs = ((found[0].double() - truth[0]).abs().max().item() for found in (ours, naive))
    assert error <= max(2 * theirs, VALUE_FLOOR[dtype] * size + amplified)
    times = cancelling(case, lambda of: run(of)[1])
    grads, naive_grads, true_grads = case.grads(ours[1]), case.grads(naive[1]), true_case.grads(truth[1])
    for name, expected in true_grads.items():
        floor = GRAD_FLOOR[dtype] * times.get(name, 1.0) + amplified
        assert_as_accurate(name, grads[name], naive_grads[name], expected, floor)
