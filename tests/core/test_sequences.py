"""Sums over whole answers: against float64, padded beside packed, gradients, and as a reference of a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_kernels import preference_loss, reference, sequence_logprobs
from orpo_kernels.objectives import DPO
from tests.cases import DEVICE, GRAD_FLOOR, VALUE_FLOOR, Case, assert_as_accurate, every_run, make

OPTIONS: dict[str, Any] = {"logit_scale": 0.7, "softcap": 5.0}


def naive(case: Case, average: bool = False, **options: Any) -> Tensor:
    logps = reference.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias, **options)
    lengths = (case.labels != -100).sum(-1).clamp(min=1)
    return logps.sum(-1) / lengths if average else logps.sum(-1)


def ours(case: Case, packed: bool = False, **options: Any) -> Tensor:
    """Packed, the padding of every sequence is left out."""
    if not packed:
        return sequence_logprobs(case.hidden, case.weight, case.labels, bias=case.bias, **options)
    kept = case.labels != -100
    offsets = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0)).int()
    inputs = case.hidden[kept], case.weight, case.labels[kept]
    return sequence_logprobs(*inputs, bias=case.bias, cu_seqlens=offsets, **options)


def with_empty_answers(dtype: torch.dtype) -> Case:
    case = make(dtype, pairs=3, bias=True, vocab=600)
    case.labels[2] = case.labels[5] = -100  # one in the middle and the last
    return case


@every_run
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed: bool, average: bool, backend: str, dtype: torch.dtype) -> None:
    case = with_empty_answers(dtype)
    truth_case = case.to(torch.float64)
    upstream = torch.linspace(-1, 2, 6, device=DEVICE)
    truth, plain = naive(truth_case, average, **OPTIONS), naive(case, average, **OPTIONS)
    found = ours(case, packed, average=average, backend=backend, **OPTIONS)
    assert found.shape == (6,)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found[2] == found[5] == 0
    assert_as_accurate("sums", found, plain, truth, VALUE_FLOOR[dtype])
    plain_grads, grads = case.grads((plain * upstream).sum()), case.grads((found * upstream).sum())
    for name, expected in truth_case.grads((truth * upstream).sum()).items():
        assert_as_accurate(f"grad_{name}", grads[name], plain_grads[name], expected, GRAD_FLOOR[dtype])


def test_any_number_of_sequences() -> None:
    case = make(torch.float64)
    for count in (1, 3):
        part = Case(case.hidden[:count], case.weight, case.labels[:count])
        for packed in (False, True):
            torch.testing.assert_close(ours(part, packed), naive(part))
    none = sequence_logprobs(case.hidden[:0], case.weight, case.labels[:0])
    assert none.shape == (0,)


def test_another_ignore_index_and_a_small_workspace() -> None:
    case = make(torch.float64)
    other = torch.where(case.labels == -100, -1, case.labels).int()
    options: dict[str, Any] = {"ignore_index": -1, "workspace_bytes": 1, "average": True}
    found = sequence_logprobs(case.hidden, case.weight, other, **options)
    torch.testing.assert_close(found, naive(case, average=True))


def test_it_is_what_a_loss_takes_as_its_reference() -> None:
    case, of_reference = make(torch.float64, pairs=3), make(torch.float64, pairs=3, seed=1)
    of_reference.labels = case.labels
    with torch.no_grad():
        given = ours(of_reference)
    out = preference_loss(case.hidden, case.weight, case.labels, DPO(0.3), reference_logps=given)
    expected = reference.preference_loss(
        case.hidden, case.weight, case.labels, DPO(0.3), reference_logps=naive(of_reference).detach()
    )
    torch.testing.assert_close(out.loss, expected["loss"])
    with torch.no_grad():
        own = preference_loss(case.hidden, case.weight, case.labels, DPO(0.3), reference_logps=ours(case))
    torch.testing.assert_close(own.loss, torch.full_like(own.loss, 2).log())  # the model itself: every margin is 0


def test_two_runs_give_the_same_bits() -> None:
    case = make(torch.float32, pairs=4, vocab=2000)
    assert torch.equal(ours(case, packed=True), ours(case, packed=True))


@pytest.mark.parametrize("packed", [False, True])
def test_one_graph(packed: bool) -> None:
    case = make(torch.float64)
    flat = Case(case.hidden.flatten(0, 1), case.weight, case.labels.flatten()) if packed else case
    offsets = torch.tensor([0, 9, 18, 27, 36], device=DEVICE) if packed else None

    def step(hidden: Tensor) -> Tensor:
        return sequence_logprobs(hidden.tanh(), flat.weight, flat.labels, cu_seqlens=offsets, average=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(flat.hidden)
    torch.testing.assert_close(compiled, step(flat.hidden))
    found, expected = (torch.autograd.grad(out.square().sum(), flat.hidden)[0] for out in (compiled, step(flat.hidden)))
    torch.testing.assert_close(found, expected)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no sequences": ({"hidden": torch.zeros(6, 8), "labels": torch.zeros(6).long()}, ValueError, r"\[S, T, H\] wit"),
    "padded and offsets": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"hidden must be packed \[N, H\]"),
    "a list": ({"hidden": [[0.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "unshifted": ({"labels": torch.zeros(2, 4).long()}, ValueError, "labels must be shifted"),
    "float labels": ({"labels": torch.zeros(2, 3)}, TypeError, "labels must hold integers"),
    "token of no row": ({"labels": torch.full((2, 3), 20)}, ValueError, "20"),
}
OFFSETS: dict[str, tuple[Any, type[Exception], str]] = {
    "one offset": (torch.tensor([0]), ValueError, r"cu_seqlens must be \[S \+ 1\].*got shape \[1\].*cumsum"),
    "a matrix": (torch.tensor([[0, 6]]), ValueError, r"cu_seqlens must be \[S \+ 1\].*got shape \[1, 2\]"),
    "does not start at 0": (torch.tensor([1, 6]), ValueError, "must rise from 0 to the 6 rows"),
    "does not end at N": (torch.tensor([0, 3, 5]), ValueError, "must rise from 0 to the 6 rows"),
    "falls": (torch.tensor([0, 7, 6]), ValueError, "must rise"),
    "floats": (torch.tensor([0.0, 6.0]), TypeError, "integer tensor of offsets"),
    "a list": ([0, 6], TypeError, "integer tensor of offsets.*got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    arguments, error, message = BAD[name]
    plain = {"hidden": torch.zeros(2, 3, 8), "weight": torch.zeros(20, 8), "labels": torch.zeros(2, 3).long()}
    with pytest.raises(error, match=message):
        sequence_logprobs(**{**plain, **arguments})


@pytest.mark.parametrize("name", OFFSETS)
def test_bad_offsets(name: str) -> None:
    offsets, error, message = OFFSETS[name]
    with pytest.raises(error, match=message):
        sequence_logprobs(torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(6).long(), cu_seqlens=offsets)
