"""Every chain of the catalogue, fused and stock: values, gradients, what was materialised, how often the head ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orpo_kernels.integrations import fusion_report
from tests.lazy.chains import CHAINS, MODULES, Batch, Chain, Result, make_batch
from tests.lazy.tiny import DTYPES, KINDS, Tiny, compare, step

BATCH = make_batch()
SOURCES = {"catalogue.py", *(Path(str(module.__file__)).name for module in MODULES)}
# A count of products is a sum of fractions of rows.
ROUNDING = 1e-6

every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# A chain that needs the full logits says so; that it does is asserted from the report.
pytestmark = pytest.mark.filterwarnings("ignore:orpo_kernels. .*full logits")


def assert_lazy(model: Tiny, chain: Chain) -> None:
    """Nothing was materialised, or it is said where: in the line of the catalogue that asked for it."""
    report = fusion_report(model)
    assert report.fused
    assert report.refusal is None
    if chain.lazy:
        assert report.materialised == []
        assert report.chains
    for record in report.materialised:
        name, _, line = record.where.rpartition(":")
        assert Path(name).name in SOURCES, record
        assert int(line) > 0
        assert record.operation
        assert record.count > 0
        assert record.bytes > 0


@every_chain
@every_kind
@every_dtype
def test_fused_is_stock(chain: Chain, kind: str, dtype: torch.dtype) -> None:
    """One pass answers every statistic; its backward recomputes once and gives two gradients."""
    model, forward = compare(chain.run, BATCH, kind, dtype)
    assert_lazy(model, chain)
    report = fusion_report(model)
    assert report.calls == 1
    if chain.lazy:
        assert forward <= 1 + ROUNDING
        assert report.products <= 4 + ROUNDING


@every_chain
def test_frozen_head(chain: Chain) -> None:
    """Without a gradient for the weight one product less; log-probabilities alone leave the backward none to redo."""
    model, _ = compare(chain.run, BATCH, "bias", torch.float64, frozen=True)
    assert_lazy(model, chain)
    if chain.lazy:
        assert fusion_report(model).products <= (2 if chain.logprobs else 3) + ROUNDING


@every_chain
def test_without_gradient(chain: Chain) -> None:
    """A reference model, or an evaluation: one product, whatever is asked."""

    def quiet(logits: Tensor, batch: Batch) -> Result:
        return Result(None, chain.run(logits, batch).values)

    with torch.no_grad():
        model, _ = compare(quiet, BATCH, "softcap", torch.float64)
    assert_lazy(model, chain)
    if chain.lazy:
        assert fusion_report(model).products <= 1 + ROUNDING


@every_chain
def test_other_batch(chain: Chain) -> None:
    """Other weights, other labels; and a report that was emptied has nothing of the batch before."""
    model, _ = compare(chain.run, make_batch(seed=1), "bias", torch.float32, seed=1)
    report = fusion_report(model)
    report.reset()
    assert (report.calls, report.products, report.chains, report.materialised) == (0, 0, {}, [])
    step(model, chain.run, BATCH)
    assert_lazy(model, chain)


def test_catalogue_is_told_apart() -> None:
    """Chains of one stack differ, every chain gives a number, and lazy ones are the rule."""
    assert len(CHAINS) >= 50
    assert sum(chain.lazy for chain in CHAINS.values()) >= 0.8 * len(CHAINS)
    for chain in CHAINS.values():
        outcome = step(Tiny("bias", torch.float64), chain.run, BATCH)
        assert outcome.values, chain.name
        assert chain.stack
        assert all(torch.isfinite(value.double()).all() for value in outcome.values.values()), chain.name
