"""A stand-in looked at, copied, stored, and outliving the weights it was made with."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orpo_kernels.integrations import fusion_report, unfuse
from tests.lazy.catalogue import BATCH as ROWS
from tests.lazy.catalogue import LENGTH, VOCAB
from tests.lazy.chains import make_batch
from tests.lazy.test_robustness import dense, logits_of, pair, same
from tests.lazy.tiny import Tiny, fused

BATCH = make_batch()
pytestmark = pytest.mark.filterwarnings("ignore:orpo_kernels. .*full logits")


def test_looked_at() -> None:
    """Nothing that only describes a tensor computes it."""
    stock, model = pair()
    expected, logits = stock(BATCH.ids).logits, model(BATCH.ids).logits
    assert torch.is_tensor(logits)
    assert isinstance(logits, Tensor)
    assert not hasattr(logits, "__dataclass_fields__")
    assert not hasattr(logits, "no_such_thing")
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "is_leaf",
        "layout",
        "is_cuda",
        "itemsize",
    ):
        assert getattr(logits, name) == getattr(expected, name), name
    for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "get_device"):
        assert getattr(logits, name)() == getattr(expected, name)(), name
    assert logits.size(-1) == VOCAB
    assert len(logits) == len(expected)
    assert logits.grad_fn is not None
    assert hash(logits) == hash(logits)
    assert logits in {logits}
    assert fusion_report(model).products == 0
    assert fusion_report(model).materialised == []


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda z: str({"logits": z}), lambda z: f"{z!r}"])
def test_printing_computes_nothing(show: Callable[[Any], str]) -> None:
    _, model = pair()
    outputs = model(BATCH.ids)
    text = show(outputs.logits)
    assert str(tuple(outputs.logits.shape)).strip("()") in text
    assert "64" in str(outputs)
    assert len(text) < 500
    assert fusion_report(model).products == 0


def test_pointers_are_real_or_refused() -> None:
    """A pointer of zero handed to a kernel would crash the process."""
    _, logits = logits_of()
    try:
        pointer, refusal = logits.data_ptr(), ""
    except RuntimeError as error:
        pointer, refusal = 0, str(error)
    assert pointer != 0 or len(refusal) > 20


@pytest.mark.parametrize("name", ["share_memory_", "pin_memory", "set_", "resize_", "storage", "untyped_storage"])
def test_storage_is_safe(name: str) -> None:
    """No segmentation fault, no storage that holds nothing: real numbers or an error."""
    _, logits = logits_of()
    arguments = {"resize_": (2, 2), "set_": (torch.zeros(2, dtype=torch.float64),)}.get(name, ())
    before = dense(logits.detach())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(logits.detach(), name)(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        found = error
    if isinstance(found, Exception):
        assert len(str(found)) > 20
    elif name.endswith("storage"):
        assert found.nbytes() == before.numel() * 8
        assert found.data_ptr() != 0
    same(dense(logits.detach()), before)


def test_copies_stand_alone() -> None:
    """A pickle holds numbers, not the head; a deep copy shares nothing."""
    expected, logits = logits_of()
    blob = pickle.dumps(logits.detach())
    buffer = io.BytesIO()
    torch.save({"logits": logits.detach()}, buffer)
    buffer.seek(0)
    found = [pickle.loads(blob), torch.load(buffer, weights_only=True)["logits"]]
    found += [copy.deepcopy(logits.detach()), copy.copy(logits.detach())]
    for value in found:
        same(dense(value), expected.detach())
    assert type(found[0]) is Tensor
    assert type(found[1]) is Tensor
    for value in logits_of():
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(value)  # a plain tensor on the graph refuses as well


def test_equality_and_hash() -> None:
    expected, logits = logits_of()
    assert logits.equal(logits)
    assert torch.allclose(logits, expected)
    assert bool((logits == logits).all())


# ---- Time passes


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seen", [False, True], ids=["never looked at", "looked at before"])
def test_logits_after_an_optimiser_step(optimizer: type[torch.optim.Optimizer], seen: bool) -> None:
    """The numbers of the weights they were made with, or an error: never those of the new weights."""
    found = []
    for model in pair():
        step = optimizer(model.parameters(), lr=0.5)
        logits = model(BATCH.ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH.ids[:, 1:].flatten())
        entropy = None
        if seen:
            probabilities = logits.detach().softmax(-1)
            entropy = (logits.logsumexp(-1) - (probabilities * logits).sum(-1)).detach()
        loss.backward()
        step.step()
        found.append((logits, entropy, model))
    (expected, before, _), (logits, ours, model) = found
    for ask in (
        lambda z: z.detach().logsumexp(-1),
        lambda z: z.detach().argmax(-1),
        lambda z: z.detach().sort().values,
    ):
        try:
            answer = ask(logits)
        except RuntimeError as error:
            answer = str(error)
        if isinstance(answer, str):
            assert "step" in answer
        else:
            same(answer, ask(expected))
    if seen:
        same(ours, before)
    # The next batch is new and right.
    stock = Tiny("bias", torch.float64)
    stock.load_state_dict(model.state_dict())
    same(model(BATCH.ids).logits.logsumexp(-1), stock(BATCH.ids).logits.logsumexp(-1))


def test_training_ten_steps() -> None:
    losses: list[list[float]] = []
    for model in pair("softcap"):
        step = torch.optim.AdamW(model.parameters(), lr=0.05)
        losses.append([])
        for _ in range(10):
            logits = model(BATCH.ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH.ids[:, 1:].flatten())
            loss.backward()
            step.step()
            step.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_unfused_is_stock() -> None:
    stock, model = pair()
    assert fused(model) is model
    assert unfuse(model) is model
    logits = model(BATCH.ids).logits
    assert type(logits) is Tensor
    assert logits.equal(stock(BATCH.ids).logits)
    assert not fusion_report(model).fused


def test_a_warning_names_the_line() -> None:
    """Once for an operation and a place, however often it runs."""
    _, model = pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(BATCH.ids).logits.sort(-1)
    ours = [str(warning.message) for warning in caught if "orpo_kernels" in str(warning.message)]
    assert len(ours) == 1
    assert "sort" in ours[0]
    (record,) = fusion_report(model).materialised
    assert "test_lifetime.py" in record.where
    assert record.count == 3
    assert record.bytes == ROWS * LENGTH * VOCAB * 8
