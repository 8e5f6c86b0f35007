"""Whatever else Python and torch do to a tensor: the numbers of plain logits, or an error that says what to do."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.lazy.catalogue import BATCH as ROWS
from tests.lazy.catalogue import LENGTH, VOCAB
from tests.lazy.chains import make_batch
from tests.lazy.tiny import Tiny, fused

BATCH = make_batch()
pytestmark = pytest.mark.filterwarnings("ignore:orpo_kernels. .*full logits")


def pair(kind: str = "bias", dtype: torch.dtype = torch.float64) -> tuple[Tiny, Tiny]:
    return Tiny(kind, dtype), fused(Tiny(kind, dtype))


def logits_of(kind: str = "bias") -> tuple[Tensor, Tensor]:
    """Plain ones, and a stand-in for the same."""
    stock, ours = pair(kind)
    return stock(BATCH.ids).logits, ours(BATCH.ids).logits


def same(one: Any, other: Any) -> None:
    """Entries of the order of one, in float64: twelve digits leave four for the order of sums."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def right_or_refused(operation: Callable[[Tensor], Any], kind: str = "bias", *, refusable: bool = False) -> None:
    """The stand-in gives what plain logits give, values and gradients: never another number.

    ``refusable``: it may raise instead, with a sentence. Where plain logits raise, so does it.
    """
    stock, ours = pair(kind)
    expected_logits, logits = stock(BATCH.ids).logits, ours(BATCH.ids).logits
    expected, found = (_attempt(_read, operation, root) for root in (expected_logits, logits))
    root = _attempt(dense, logits)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"plain logits raise {expected!r}"
        return
    for refusal in (found, root):
        if isinstance(refusal, Exception):
            assert refusable, repr(refusal)
            assert isinstance(refusal, RuntimeError)
            assert len(str(refusal)) > 20, "a refusal says why"
            return
    for (one, values), (other, true) in zip(found, expected, strict=True):
        assert one.shape == other.shape == values.shape
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad
        same(values, true)
    # The root as well: an operation in place that was dropped shows here.
    same(root, dense(expected_logits))
    backward = _attempt(_backward, [one for one, _ in expected], expected_logits)
    if isinstance(backward, Exception):
        return  # what was changed in place had been saved: stock has no gradient to compare with
    _backward([one for one, _ in found], logits)
    for (name, one), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10, msg=f"{name}: {one.grad - other.grad}")


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _read(operation: Callable[[Tensor], Any], logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What an operation returns, and the numbers of it."""
    return [(tensor, dense(tensor)) for tensor in _tensors(operation(logits))]


def _backward(tensors: list[Tensor], root: Tensor) -> None:
    losses = [tensor.square().sum() for tensor in tensors if tensor.requires_grad]
    (sum(losses) + root[:, 2:5].logsumexp(-1).sum()).backward()


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]


def dense(tensor: Tensor) -> Tensor:
    """Dense numbers, by an operation that is not answered lazily."""
    with torch.no_grad():
        return torch.stack([tensor, tensor])[0]


# ---- Indexing

INDICES: dict[str, Any] = {
    "an integer": 1,
    "a negative integer": -1,
    "a slice": slice(1, 3),
    "a step": (slice(None), slice(None, None, 2)),
    "an empty slice": slice(2, 2),
    "everything": slice(None),
    "an ellipsis": ...,
    "ellipsis and vocabulary": (..., 5),
    "vocabulary slice": (..., slice(0, 40)),
    "vocabulary step": (..., slice(0, 40, 3)),
    "vocabulary list": (..., [1, 5, 5]),
    "none": None,
    "none inside": (slice(None), None, 2),
    "one entry": (0, 1, 2),
    "position": (slice(None), -1),
    "position kept": (slice(None), slice(-1, None)),
    "list of sequences": [2, 0],
    "list with repeats": [2, 2, 0],
    "empty list": [],
    "empty list and ellipsis": ([], ...),  # a batch without rejected answers, in TRL 0.24's KTO
    "empty vocabulary list": (..., []),
    "list and slice": ([0, 2], slice(1, 4)),
    "two lists": ([0, 2], [3, 4]),
    "lists apart": ([0, 2], slice(None), [3, 4]),
    "three lists": ([0, 2], [3, 4], [5, 6]),
    "mask of sequences": BATCH.desirable,
    "mask of positions": BATCH.mask,
    "empty mask": torch.zeros_like(BATCH.mask),
    "mask in a dimension": (slice(None), torch.arange(LENGTH) % 3 == 0),
    "mask of entries": torch.arange(ROWS * LENGTH * VOCAB).view(ROWS, LENGTH, VOCAB) % 7 == 0,
    "tensor": torch.tensor([1, -1]),
    "matrix": torch.tensor([[0, 1], [2, 3]]),
    "scalar tensor": torch.tensor(2),
    "row and column": (torch.arange(ROWS), torch.arange(ROWS) + 2),
    "labels": (torch.arange(ROWS)[:, None], torch.arange(LENGTH)[None], BATCH.ids),
    "true": True,
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_indexing(index: Any) -> None:
    right_or_refused(lambda logits: logits[index])
    right_or_refused(lambda logits: logits.log_softmax(-1)[index])


@pytest.mark.parametrize("index", [ROWS, -ROWS - 1, (0, LENGTH), (0, 0, VOCAB), (0, 0, 0, 0), 1.5])
def test_wrong_index(index: Any) -> None:
    """The same exception that a plain tensor raises."""
    for logits in logits_of():
        with pytest.raises((IndexError, TypeError)):
            logits[index]


# ---- In place

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "div_": lambda z: z.div_(0.7),
    "mul_": lambda z: z.mul_(0.7),
    "mul_ by a column": lambda z: z.mul_(BATCH.token_temperature.unsqueeze(-1)),
    "mul_ by a row": lambda z: z.mul_(torch.linspace(0.5, 1, VOCAB, dtype=z.dtype)),
    "neg_": lambda z: z.neg_(),
    "operator /=": lambda z: operator.itruediv(z, 1.3),
    "operator *=": lambda z: operator.imul(z, 1.3),
    "operator +=": lambda z: operator.iadd(z, 1.3),
    "operator -=": lambda z: operator.isub(z, 1.3),
    "div_ of a slice": lambda z: z[:, 2:5].div_(0.7),
    "div_ of a slice of a slice": lambda z: z[:, :-1][:, -4:].div_(0.7),
    "div_ of a sequence": lambda z: z[1].div_(0.7),
    "div_ of a view": lambda z: z.view(-1, VOCAB).div_(0.7),
    "div_ of a flat half": lambda z: z.view(-1, VOCAB)[:13].div_(0.7),
    "div_ of a copy by mask": lambda z: z[BATCH.mask].div_(0.7),
    "div_ of a transpose": lambda z: z.transpose(1, 2).div_(0.7),
    "div_ of vocabulary": lambda z: z[..., :7].div_(0.7),
    "div_ of a clone": lambda z: z.clone().div_(0.7),
    "div_ of contiguous": lambda z: z.contiguous().div_(0.7),
    "div_ of the same dtype": lambda z: z.to(z.dtype).div_(0.7),
    "div_ of float": lambda z: z.float().div_(0.5),
    "div_ of detach": lambda z: z.detach().div_(0.7),
    "div_ of data": lambda z: z.data.div_(0.7),
    "div_ of overlapping slices": lambda z: (z[:, :6].div_(0.7), z[:, 3:].mul_(0.5)),
    "div_ of a chunk": lambda z: z[:, : LENGTH // 2].div_(0.7),
    "setitem": lambda z: operator.setitem(z, (slice(None), 1), 0.0),
    "setitem of vocabulary": lambda z: operator.setitem(z, (..., [1, 2]), -50.0),
    "setitem by mask": lambda z: operator.setitem(z, BATCH.mask, 0.5),
    "setitem of a tensor": lambda z: operator.setitem(z, 0, torch.ones(LENGTH, VOCAB, dtype=z.dtype)),
    "masked_fill_": lambda z: z.masked_fill_(BATCH.mask.unsqueeze(-1), 0.0),
    "copy_": lambda z: z.copy_(torch.ones_like(BATCH.reference_logits)),
    "zero_": lambda z: z.zero_(),
    "fill_": lambda z: z.fill_(2.0),
    "add_": lambda z: z.add_(0.5),
    "add_ of a tensor": lambda z: z.add_(BATCH.reference_logits),
    "sub_": lambda z: z.sub_(0.5),
    "clamp_": lambda z: z.clamp_(-1, 1),
    "tanh_": lambda z: z.div_(5.0).tanh_().mul_(5.0),
    "exp_": lambda z: z.exp_(),
    "softcap in place": lambda z: z.div_(5).tanh_().mul_(5),
    "out=": lambda z: torch.mul(z.detach(), 2.0, out=z.detach()),
    "index_fill_": lambda z: z.index_fill_(0, torch.tensor([1]), 0.0),
    "squeeze_": lambda z: z[:1].squeeze_(0),
    "unsqueeze_": lambda z: z[:1].unsqueeze_(0),
    "transpose_": lambda z: z[:1].transpose_(0, 1),
}


# What cannot be followed: two views that both change what they share, and changes of a shape.
REFUSED = {"div_ of overlapping slices", "out=", "squeeze_", "unsqueeze_", "transpose_"}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("kind", ["bias", "softcap"])
def test_in_place(name: str, kind: str) -> None:
    """The effect is seen through the root and through what is returned; it is never dropped."""

    def apply(logits: Tensor) -> list[Tensor]:
        found = IN_PLACE[name](logits)
        return _tensors(found) if found is not None else [logits]

    right_or_refused(apply, kind, refusable=name in REFUSED)


@pytest.mark.parametrize("operation", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_in_place_without_gradient(operation: Callable[[Tensor], Any]) -> None:
    """Past autograd, of logits on the graph, with a statistic and a view taken before: right or refused."""

    @torch.no_grad()
    def apply(logits: Tensor) -> list[Tensor]:
        before = logits.logsumexp(-1)
        view = logits[:, 1:7]
        operation(logits)
        return [before, logits.logsumexp(-1), view.argmax(-1), view.logsumexp(-1)]

    right_or_refused(apply, refusable=True)


def test_gradient_of_what_was_read_before_a_change() -> None:
    """Stock refuses where an operation had saved what was changed, and gives the old gradient where it had not."""
    found = []
    for model in pair():
        logits = model(BATCH.ids).logits
        kept = logits.log_softmax(-1)[..., 3].sum()
        with torch.no_grad():
            logits.div_(2.0)
        kept.backward()
        found.append(model.lm_head.weight.grad)
    same(found[1], found[0])


# ---- Leaving torch, and being looked at


LEAVING: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda z: torch.from_numpy(z.detach().numpy().copy()),
    "numpy forced": lambda z: torch.from_numpy(z.numpy(force=True).copy()),
    "array": lambda z: torch.from_numpy(__import__("numpy").asarray(z.detach()).copy()),
    "tolist": lambda z: torch.tensor(z.tolist(), dtype=torch.float64),
    "tolist of a row": lambda z: torch.tensor(z[0, 1].tolist(), dtype=torch.float64),
    "item": lambda z: torch.tensor(z[0, 1, 2].item(), dtype=torch.float64),
    "float()": lambda z: torch.tensor(float(z.detach()[0, 1, 2]), dtype=torch.float64),
    "bool()": lambda z: torch.tensor(bool(z[0, 1, 2] > 0)),
    "iteration": lambda z: torch.stack([row.logsumexp(-1) for row in z]),
    "torch.tensor": lambda z: z.detach().clone(),
    "torch.as_tensor": lambda z: torch.as_tensor(z) * 1.5,
    "dlpack": lambda z: torch.from_dlpack(z.detach()).clone(),
    "cpu": lambda z: z.cpu() + 0.5,
    "type_as": lambda z: z.type_as(torch.zeros((), dtype=torch.float64)).logsumexp(-1),
    "new_zeros": lambda z: z.new_zeros(3),
    "zeros_like": lambda z: torch.zeros_like(z),
    "cat with plain": lambda z: torch.cat([z, BATCH.reference_logits]),
    "stack": lambda z: torch.stack([z, z]),
    "where": lambda z: torch.where(BATCH.mask.unsqueeze(-1), z, 0.0),
    "masked_fill": lambda z: z.masked_fill(BATCH.mask.unsqueeze(-1), -5.0),
    "masked_select": lambda z: z.masked_select(BATCH.mask.unsqueeze(-1)),
    "sort": lambda z: z.sort(-1).values,
    "cumsum": lambda z: z.softmax(-1).cumsum(-1),
    "matmul": lambda z: z.softmax(-1) @ torch.ones(VOCAB, 3, dtype=z.dtype),
    "einsum": lambda z: torch.einsum("btv,v->bt", z, torch.arange(VOCAB, dtype=z.dtype)),
    "norm": lambda z: z.norm(),
    "std": lambda z: z.std(-1),
    "pad": lambda z: F.pad(z, (0, 3)),
    "pad of positions": lambda z: F.pad(z, (0, 0, 0, 1)),
    "log_softmax over positions": lambda z: z.log_softmax(1),
    "mean over positions": lambda z: z.mean(1),
    "sum over sequences": lambda z: z.sum(0),
    "class weights": lambda z: F.cross_entropy(
        z.view(-1, VOCAB), BATCH.ids.view(-1), weight=torch.linspace(1, 2, VOCAB, dtype=z.dtype)
    ),
    "soft targets": lambda z: F.cross_entropy(z.view(-1, VOCAB), BATCH.reference_logits.softmax(-1).view(-1, VOCAB)),
    "comparison": lambda z: (z > 0).sum(),
    "difference of two": lambda z: (z - z * 0.5).logsumexp(-1),
    "ufunc chain": lambda z: (z.exp() / z.exp().sum(-1, keepdim=True)).log(),
    "reversed operands": lambda z: 2.0 - 3.0 * z,
    "power": lambda z: z**2,
    "reciprocal": lambda z: 1.0 / (z.exp() + 1.0),
    "expand": lambda z: z[:1].expand(3, -1, -1),
    "repeat": lambda z: z.repeat(2, 1, 1),
    "roll": lambda z: z.roll(1, 1),
    "flip": lambda z: z.flip(1),
    "unfold": lambda z: z.unfold(1, 3, 2),
    "gather of rows": lambda z: z.gather(1, BATCH.ids[:, :3, None].remainder(LENGTH).expand(-1, -1, VOCAB)),
    "vmap": lambda z: torch.vmap(lambda row: row.logsumexp(-1))(z),
}


@pytest.mark.parametrize("operation", LEAVING.values(), ids=LEAVING.keys())
def test_anything_else(operation: Callable[[Tensor], Any]) -> None:
    right_or_refused(operation)
    right_or_refused(operation, "softcap")


def test_multinomial_samples_the_same() -> None:
    samples = []
    for logits in logits_of():
        torch.manual_seed(0)
        samples.append(torch.multinomial(logits.softmax(-1).view(-1, VOCAB), 2))
    assert samples[0].equal(samples[1])
