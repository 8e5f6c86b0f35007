"""Every chain of the catalogue, fused and stock: values, gradients, what was materialised, how often the head ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orpo_kernels.integrations import fusion_report
from tests.lazy.chains import CHAINS, MODULES, Batch, Chain, Result, make_batch
from tests.lazy.tiny import DTYPES, KINDS, Tiny, compare, fused, second_step, step

BATCH = make_batch()
SOURCES = {"catalogue.py", *(Path(str(module.__file__)).name for module in MODULES)}
# A count of products is a sum of fractions of rows.
ROUNDING = 1e-6

every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
every_kind = pytest.mark.parametrize("kind", KINDS)
# In 16 bits stock's error is taken of six models, which all chains together make slow.
SLOW = {torch.bfloat16: [pytest.mark.slow]}
every_dtype = pytest.mark.parametrize(
    "dtype", [pytest.param(each, marks=SLOW.get(each, []), id=str(each).removeprefix("torch.")) for each in DTYPES]
)
# A chain that needs the full logits says so; that it does is asserted from the report.
pytestmark = pytest.mark.filterwarnings("ignore:orpo_kernels. .*full logits")


def lazy(chain: Chain, kind: str) -> bool:
    return chain.lazy and kind not in chain.unless


def assert_lazy(model: Tiny, chain: Chain) -> None:
    """Nothing was materialised, or it is said where: in the line of the catalogue that asked for it."""
    report = fusion_report(model)
    assert report.fused
    assert report.refusal is None
    if lazy(chain, model.kind):
        assert report.materialised == []
        assert report.chains
    for record in report.materialised:
        name, _, line = record.where.rpartition(":")
        assert Path(name).name in SOURCES, record
        assert int(line) > 0
        assert record.operation
        assert record.count > 0
        assert record.bytes > 0


def quiet(chain: Chain) -> Callable[[Tensor, Batch], Result]:
    return lambda logits, batch: Result(None, chain.run(logits, batch).values)


@every_chain
@every_kind
@every_dtype
def test_fused_is_stock(chain: Chain, kind: str, dtype: torch.dtype) -> None:
    model = compare(chain.run, BATCH, kind, dtype)
    assert fusion_report(model).calls == 1
    assert_lazy(model, chain)


@every_chain
def test_fused_is_stock_with_a_frozen_head(chain: Chain) -> None:
    assert_lazy(compare(chain.run, BATCH, "bias", torch.float64, frozen=True), chain)


@every_chain
def test_fused_is_stock_without_gradient(chain: Chain) -> None:
    with torch.no_grad():
        assert_lazy(compare(quiet(chain), BATCH, "softcap", torch.float64), chain)


@every_chain
def test_another_batch_and_other_weights(chain: Chain) -> None:
    assert_lazy(compare(chain.run, make_batch(seed=1), "bias", torch.float32, seed=1), chain)


LAZY = [(chain, kind) for chain in CHAINS.values() for kind in KINDS if lazy(chain, kind)]


@pytest.mark.parametrize(("chain", "kind"), LAZY, ids=[f"{chain.name}-{kind}" for chain, kind in LAZY])
def test_products(chain: Chain, kind: str) -> None:
    """Of the second step: the first has shown which statistics the loss takes of one pass.

    One pass forward; backward two products, and one more where E does not wait or is not all a gradient needs.
    """
    model = fused(Tiny(kind, torch.float64))
    forward, both = second_step(model, chain.run, BATCH)
    assert forward <= chain.passes + ROUNDING
    assert both <= (3 if chain.logprobs and chain.passes == 1 else 3 + chain.passes) + ROUNDING
    model.lm_head.requires_grad_(False)
    _, both = second_step(model, chain.run, BATCH)
    assert both <= (2 if chain.logprobs and chain.passes == 1 else 4) + ROUNDING
    with torch.no_grad():
        forward, both = second_step(model, quiet(chain), BATCH)
    assert forward == both <= chain.passes + ROUNDING


def test_catalogue_is_told_apart() -> None:
    """Chains of one stack differ, every chain gives a number, and lazy ones are the rule."""
    assert len(CHAINS) >= 50
    assert sum(chain.lazy for chain in CHAINS.values()) >= 0.8 * len(CHAINS)
    for chain in CHAINS.values():
        outcome = step(Tiny("bias", torch.float64), chain.run, BATCH)
        assert outcome.values, chain.name
        assert chain.stack
        assert all(torch.isfinite(value.double()).all() for value in outcome.values.values()), chain.name


def test_report_is_emptied() -> None:
    model = fused(Tiny("bias", torch.float64))
    for name in ("trl_orpo", "trl_gkd"):
        step(model, CHAINS[name].run, BATCH)
    report = fusion_report(model)
    assert report.calls == 2
    assert report.products > 4
    assert report.chains
    assert [record.operation for record in report.materialised]
    report.reset()
    assert (report.calls, report.products, report.chains, report.materialised) == (0, 0, {}, [])
    assert report.fused
