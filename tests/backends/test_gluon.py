"""The Gluon form: its source under an emulation, as Gluon has no interpreter, and when it is chosen."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from benchmarks.lab.compile import recording
from orpo_kernels.backends import kernels
from orpo_kernels.backends.kernels import Chunk, Out
from orpo_kernels.backends.kernels.configs import GLUON_VERSIONS, config, gluon_lacks
from orpo_kernels.backends.triton_backend import TritonBackend, _new_exp_logits
from orpo_kernels.settings import Head
from tests.backends import gluon_emulation

pytestmark = pytest.mark.skipif(bool(gluon_lacks()), reason=gluon_lacks() or "Gluon is there")
SOURCE = Path(__file__).parents[2] / "orpo_kernels" / "backends" / "kernels" / "exp_gemm_gluon.py"
WIDTH = 256  # tokens of a tile


def emulated(
    module: ModuleType,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float | None = None,
    bias: bool = False,
    features: int = 328,  # six steps, the last of eight features, over four stages
    stored: bool = True,
    summed: bool = True,
    seed: int = 0,
) -> None:
    """E and sums of a slice of an odd number of tokens against an odd number of rows, checked against float64."""
    generator = torch.Generator().manual_seed(seed)
    n, vocab, tokens = 203, 900, slice(40, 817)
    size = tokens.stop - tokens.start
    hidden, weight = (torch.randn(m, features, generator=generator).to(dtype) / 4 for m in (n, vocab))
    biases = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    ids = torch.randint(vocab, (n,), generator=generator)
    head, shift = Head(weight, biases, 0.7, softcap), torch.randn(n, generator=generator)
    exp_logits = _new_exp_logits(n, size, hidden).fill_(math.nan) if stored else None
    sums, logit_sums = torch.full((2, -(-size // WIDTH), n), math.nan)
    out = Out(exp_logits, sums if summed else None, None if softcap is None else logit_sums)
    launched: list[Any] = []
    with recording(lambda _, args, meta: launched.append((args, meta))):
        tile = config("sm_90", dtype).gluon
        assert tile is not None
        module.exp_gemm_gluon(tile, Chunk(hidden, ids, head, shift), tokens, out)
    gluon_emulation.run(module, *launched[0], seed)

    logits = hidden.double() @ weight[tokens].double().T
    logits = (logits + (0.0 if biases is None else biases[tokens].double())) * 0.7
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    mine = ids[:, None] == torch.arange(tokens.start, tokens.stop)
    exps = (logits - shift[:, None].double()).exp().masked_fill(mine, 0.0)
    if exp_logits is not None:
        slope = 1.0 if softcap is None else 1 - (logits / softcap) ** 2
        error = (exp_logits.double() - exps * slope).abs() / exps.clamp(min=1e-30)
        assert error.max() <= torch.finfo(exp_logits.dtype).eps + 1e-4
    for found, terms in ((out.sums, exps), (out.logit_sums, logits)):
        if found is not None:
            padded = torch.nn.functional.pad(terms, (0, -size % WIDTH))
            torch.testing.assert_close(found.T.double(), padded.unflatten(1, (-1, WIDTH)).sum(2), rtol=1e-4, atol=1e-2)


def in_orders(orders: int, module: ModuleType, **options: Any) -> None:
    """In some of the orders in which the partitions may run."""
    for seed in range(orders):
        emulated(module, seed=seed, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"bias": True},
        {"softcap": 3.0, "bias": True, "dtype": torch.float16},
        {"dtype": torch.float16},
        {"stored": False},
        {"summed": False},
        {"features": 64},
        {"features": 8, "softcap": 3.0},
    ],
    ids=str,
)
def test_entries_and_sums(options: dict[str, Any]) -> None:
    in_orders(2, kernels.exp_gemm_gluon, **options)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(step // STAGES & 1) ^ 1)", "step // STAGES & 1)"),  # the producer waits for what was never read
        ("mbarrier.wait(ready.index(stage), step // STAGES & 1)", "mbarrier.wait(ready.index(stage), 0)"),
        ("mbarrier.init(free.index(stage), count=2)", "mbarrier.init(free.index(stage), count=1)"),
        ("free.index((step + STAGES - 1) % STAGES), pred=feature > 0)", "free.index(stage))"),  # while it is read
        ("        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))\n", ""),  # a tile's last step is never free
        ("a_bufs.index(2 * stage + WHICH)", "a_bufs.index(2 * stage)"),
        ("use_acc=feature > 0", "use_acc=False"),
        ("[row + ROWS, feature]", "[row, feature]"),
        ("tma.store_wait(1)", "tma.store_wait(2)"),
        ("    if exp_logits_desc is not None:\n        tma.store_wait(0)\n", ""),
        ("                fence_async_shared()\n", ""),
        ("if special:", "if False:"),
    ],
)
def test_the_emulation_notices(right: str, wrong: str, tmp_path: Path) -> None:
    text, file = SOURCE.read_text(), tmp_path / "changed.py"
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("changed", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError):
        in_orders(4, module)


def test_it_runs_where_it_is_asked_for() -> None:
    """By the same door as any form; another version of triton or another chip gets the Triton form, and says why."""
    hidden, head = torch.ones(4, 64, dtype=torch.bfloat16), Head(torch.ones(100, 64, dtype=torch.bfloat16))
    assert config("sm_90", torch.bfloat16).form == "tma"
    asked = config("sm_90", torch.bfloat16)._replace(form="gluon")
    said = TritonBackend(config=asked).form(hidden, head)
    assert said == "form gluon, tiles of 128 x 256 x 64 in 8 warps"
    with mock.patch.object(triton, "__version__", "3.5.1"):
        said = TritonBackend(config=asked).form(hidden, head)
    assert said.startswith("form tma")
    assert f"triton is 3.5.1, the form gluon is for {' and '.join(GLUON_VERSIONS)}" in said
    elsewhere = TritonBackend(config=config("sm_80", torch.bfloat16)._replace(form="gluon")).form(hidden, head)
    assert elsewhere.startswith("form pointer")
    assert "no gluon tile" in elsewhere
