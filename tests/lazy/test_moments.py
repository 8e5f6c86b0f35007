"""The statistics of rows that lazy logits are answered from, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels.backends import Backend, Grads, Moments, Part, acc_dtype
from orpo_kernels.backends.torch_backend import TorchBackend
from orpo_kernels.settings import Head
from tests.cases import FACTOR, VALUE_FLOOR

MASKED = -torch.inf


def formulas(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expectation and mean of the logits, lse(2z), and the logits, as full logits in the head's dtype give them."""
    bias = None if head.bias is None else head.bias.to(head.weight)
    logits = head.cap((F.linear(hidden, head.weight, bias) * head.logit_scale).to(acc_dtype(hidden.dtype)))
    probs = torch.log_softmax(logits, -1).exp()
    finite = logits.masked_fill(logits == MASKED, 0)
    return (probs * finite).sum(-1), logits.mean(-1), torch.logsumexp(2 * logits, -1), logits


def assert_moments(found: Moments, hidden: Tensor, head: Head) -> None:
    assert found.expected is not None
    assert found.mean is not None
    assert found.argmax is not None
    assert found.lse2 is not None
    dtype = hidden.dtype
    exact = Head(head.weight.double(), None if head.bias is None else head.bias.double(), *head[2:])
    expected, mean, lse2, logits = formulas(hidden.double(), exact)
    naive_expected, naive_mean, naive_lse2, naive = formulas(hidden, head)
    size = logits.masked_fill(logits == MASKED, 0).abs().amax(-1)
    # Capped logits are differences of values of the cap's size, so tiny ones are rounded as those are.
    floor = VALUE_FLOOR[dtype] * size.clamp(min=head.softcap or 1)
    for name, ours, theirs, true, factor in (
        ("expected", found.expected, naive_expected, expected, 1),
        ("mean", found.mean, naive_mean, mean, 1),
        ("lse2", found.lse2, naive_lse2, lse2, 2),  # of twice the logits
    ):
        masked = true == MASKED
        assert torch.equal(ours == MASKED, masked), name
        error, other = ((x.double() - true).masked_fill(masked, 0).abs() for x in (ours, theirs))
        assert (error <= FACTOR * other.max() + factor * floor).all(), (
            f"{name}: {error.max():.2e}, naive {other.max():.2e}"
        )
    assert found.argmax.dtype == torch.int64
    lead = logits.amax(-1) - logits.gather(-1, found.argmax[:, None])[:, 0]
    assert (lead <= floor + FACTOR * (naive.double() - logits).masked_fill(logits == MASKED, 0).abs().amax(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 300),
    features=st.integers(1, 12),
    size=st.sampled_from([1e-3, 1.0, 1.0, 30.0, 1e4]),
    softcap=st.sampled_from([None, None, 3.0, 50.0]),
    scale=st.sampled_from([1.0, 0.25]),
    bias=st.sampled_from(["", "normal", "masked"]),
    store=st.booleans(),
    seed=st.integers(0, 100),
)
@example(rows=3, vocab=20, features=4, size=1e4, softcap=None, scale=1.0, bias="masked", store=False, seed=0)
def test_moments_are_the_formulas(
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    features: int,
    size: float,
    softcap: float | None,
    scale: float,
    bias: str,
    store: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight = (normal(rows, features) * size).to(dtype), normal(vocab, features).to(dtype)
    added = None if not bias else normal(vocab)
    if added is not None and bias == "masked":
        added[normal(vocab) > 0.5] = MASKED
        added[0] = 0
    head = Head(weight, None if added is None else added.to(dtype), scale, softcap)
    if softcap is not None and bias == "masked":
        head = head._replace(bias=added.clamp(min=-1e3).to(dtype))  # whose tanh is no number below -softcap
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    part = Part(hidden, torch.arange(rows), ids, head, 1 << 16, moments=("expected", "mean", "argmax", "lse2"))
    backend = TorchBackend()
    found = backend.forward(part, Grads(None, None, None), store=store).moments
    assert found is not None
    assert_moments(found, hidden, head)
    assert_moments(Backend.moments(backend, part), hidden, head)
