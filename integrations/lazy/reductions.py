"""What reduces the vocabulary of lazy logits: here the product runs.

All of it is made of five numbers a row, each differentiable: an entry, a log-probability, the log-sum-exp, the mean and
the expectation under softmax. Cross-entropy, entropy and the rest are plain torch on those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.backends import uncast
from orpo_kernels.integrations.lazy.nodes import ReduceNode
from orpo_kernels.integrations.lazy.registry import handles, is_vocab, made, position
from orpo_kernels.integrations.lazy.stand_in import LazyLogits
from orpo_kernels.integrations.lazy.symbols import Map, Term, Terms, View

WIDEST_GATHER = 64  # entries of a row that are taken as dot products; for more of them a product is no dearer


def _number(x: LazyLogits, operation: str, value: Tensor, terms: Callable[[Tensor], Terms]) -> Tensor:
    """A result in the accumulation dtype."""
    view = x.view_of
    view.root.site.report.chains[" > ".join((*view.chain, operation))] += 1
    if not _follows(x):
        return value
    out: Tensor = ReduceNode.apply(x, value, terms)
    return out


def _follows(x: LazyLogits) -> bool:
    """Whether a gradient of what is asked of x may come back."""
    return torch.is_grad_enabled() and x.requires_grad


def _spread(view: View, rows: Tensor, values: Tensor, *, by: float = 1) -> Tensor:
    """Values at rows ``[k]``, times a number, as a vector over the root's rows."""
    out = torch.zeros(view.root.rows.shape, dtype=view.root.acc, device=rows.device)
    return out.index_add_(0, rows.reshape(-1), values.reshape(-1).to(out.dtype), alpha=by)


def _entries(x: LazyLogits, operation: str, rows: Tensor, ids: Tensor) -> Tensor:
    """Logits at ``rows``, ``ids`` of one shape."""
    view, flat = x.view_of, (rows.reshape(-1), ids.reshape(-1))
    if view.root.hints is not None or ids.numel() == rows.numel():
        view.root.hint(*flat)

    def terms(g: Tensor) -> Terms:
        return {view.mapping.key: Term(view.mapping, entries=((*flat, g.reshape(-1)),))}

    return _number(x, operation, view.root.entries(view.mapping, *flat).view(rows.shape), terms)


def _logps(x: LazyLogits, operation: str, rows: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities at ``rows``, ``ids`` of one shape."""
    view, flat = x.view_of, (rows.reshape(-1), ids.reshape(-1))
    table = view.root.table(view.mapping)

    def terms(g: Tensor) -> Terms:
        g = g.reshape(-1).to(view.root.acc)
        return {view.mapping.key: Term(view.mapping, softmax=_spread(view, flat[0], g, by=-1), entries=((*flat, g),))}

    return _number(x, operation, table.logps_of(*flat, follows=_follows(x)).view(rows.shape), terms)


def _lse(x: LazyLogits, operation: str, mapping: Map | None = None) -> Tensor:
    """Log-sum-exp of each row."""
    view = x.view_of
    mapping = mapping or view.mapping
    rows = view.rows.reshape(-1)
    half = view.root.table_of_half(mapping)
    table = half or view.root.table(mapping)
    if view.family is not None:
        table.expect(view.family.reshape(-1))

    def terms(g: Tensor) -> Terms:
        return {mapping.key: Term(mapping, softmax=_spread(view, rows, g))}

    lse = table.moment(rows, "lse2") if half else table.lse(rows, follows=_follows(x))
    return _number(x, operation, lse.view(view.rows.shape), terms)


def _mean(x: LazyLogits, operation: str) -> Tensor:
    """Mean logit of each row."""
    view = x.view_of
    rows = view.rows.reshape(-1)

    def terms(g: Tensor) -> Terms:
        return {view.mapping.key: Term(view.mapping, constant=_spread(view, rows, g) / view.mapping.vocab)}

    return _number(x, operation, view.root.means(view.mapping, rows).view(view.rows.shape), terms)


def _expected(x: LazyLogits, operation: str, *, log: bool = False) -> Tensor:
    """``sum_v p_v z_v`` of each row, or with ``log`` ``sum_v p_v log p_v``."""
    view = x.view_of
    rows, table = view.rows.reshape(-1), view.root.table(view.mapping)
    if view.family is not None:
        table.expect(view.family.reshape(-1))
    follows = _follows(x)
    values = -table.moment(rows, "entropy", follows=follows) if log else table.moment(rows, "expected", follows=follows)
    expected = table.moment(rows, "expected") if log and follows else values
    own = 0.0 if log else 1.0  # the derivatives differ by that of the log-sum-exp

    def terms(g: Tensor) -> Terms:
        softmax = _spread(view, rows, g.reshape(-1).to(expected.dtype) * (own - expected))
        return {view.mapping.key: Term(view.mapping, softmax=softmax, weighted=_spread(view, rows, g))}

    return _number(x, operation, values.view(view.rows.shape), terms)


def _check(x: LazyLogits, ids: Tensor, error: type[Exception], message: str) -> None:
    """Raise where an id is no token, as torch does: on a GPU some time later."""
    vocab = x.view_of.mapping.vocab
    if x.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < vocab)).all())
    elif ids.numel():
        low, high = (int(each) for each in ids.aminmax())
        if low < 0 or high >= vocab:
            raise error(message.format(low if low < 0 else high))


def taken(x: LazyLogits, operation: str, rows: Tensor, ids: Tensor) -> Any:
    """What a stand-in has at ``rows``, ``ids`` of one shape, in its dtype."""
    view, ids = x.view_of, ids.long()
    error = RuntimeError if operation == "gather" else IndexError  # as torch has them
    size = f"dimension {x.dim() - 1} with size {view.mapping.vocab}"
    _check(x, ids, error, "index {} is out of bounds for " + size)
    if view.kind == "logits":
        return _entries(x, operation, rows, ids).to(x.dtype)
    if view.kind in ("log_probs", "probs"):
        found = _logps(x, operation, rows, ids)
        if view.kind == "probs" or view.factor != 1:
            # A product also by 1, as exp keeps its result, which somebody may change in place.
            found = (found.exp() if view.kind == "probs" else found) * view.factor
        return found.to(x.dtype)
    return NotImplemented


@handles("gather")
def _gather(x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    if not isinstance(x, LazyLogits) or isinstance(index, LazyLogits) or x.view_of.vocab_dim != -1:
        return NotImplemented
    if not is_vocab(x, dim) or index.shape[-1] > WIDEST_GATHER or index.dim() != x.dim():
        return NotImplemented
    if any(size > own for size, own in zip(index.shape[:-1], x.shape[:-1], strict=True)):
        return NotImplemented
    rows = x.view_of.rows
    if index.shape[:-1] != rows.shape:
        rows = rows[tuple(slice(0, size) for size in index.shape[:-1])]
    return taken(x, "gather", rows.unsqueeze(-1).expand(index.shape), index)


@handles("take_along_dim")
def _take_along_dim(x: Any, indices: Any, dim: Any = None) -> Any:
    if not isinstance(x, LazyLogits) or dim is None or indices.dim() != x.dim() or not is_vocab(x, dim):
        return NotImplemented
    lead = torch.broadcast_shapes(indices.shape[:-1], x.shape[:-1])
    if lead != x.shape[:-1]:
        return NotImplemented
    # Which torch takes modulo the dimension, as gather does not.
    return _gather(x, dim, indices.remainder(x.shape[-1]).expand(*lead, indices.shape[-1]))


@handles("logsumexp")
def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or not is_vocab(x, dim) or view.kind not in ("logits", "log_probs"):
        return NotImplemented
    if view.kind == "logits":
        lse = _lse(x, "logsumexp")
    else:  # of f * log p: lse(f z) - f lse(z)
        mapping = view.mapping.times(view.factor)
        if mapping is None:
            return NotImplemented
        own = _lse(x, "logsumexp")
        lse = _lse(x, "logsumexp", mapping) - view.factor * own
    out = (lse.unsqueeze(-1) if keepdim else lse).to(x.dtype)
    if keepdim and view.kind == "logits":
        of = weakref.ref(view.root), view.rows, view.mapping, out._version
        out._orpo_lse_of = of  # type: ignore[attr-defined]
    return out


def _row_means(x: LazyLogits, operation: str) -> Tensor | None:
    """Mean over the vocabulary of what x stands for, in the accumulation dtype."""
    view = x.view_of
    if view.kind == "logits":
        return _mean(x, operation)
    if view.kind == "log_probs":
        return (_mean(x, operation) - _lse(x, operation)) * view.factor
    if view.kind == "probs_log_probs":
        return _expected(x, operation, log=True) * (view.factor / view.mapping.vocab)
    if view.kind == "probs_logits":
        return _expected(x, operation) * (view.factor / view.mapping.vocab)
    return None


def _summed(x: Any, operation: str, dim: Any, keepdim: bool, dtype: torch.dtype | None, average: bool) -> Any:
    if not isinstance(x, LazyLogits) or x.view_of.vocab_dim != -1:
        return NotImplemented
    if isinstance(dim, tuple | list) and sorted(position(d, x.dim()) for d in dim) == list(range(x.dim())):
        dim = None if not keepdim else dim
    everything = dim is None or dim == ()
    if not everything and not is_vocab(x, dim):
        return NotImplemented
    means = _row_means(x, operation)
    if means is None:
        return NotImplemented
    if everything:
        out = means.mean() if average else means.sum() * x.view_of.mapping.vocab
        out = out.reshape([1] * x.dim()) if keepdim else out
    else:
        out = means if average else means * x.view_of.mapping.vocab
        out = out.unsqueeze(-1) if keepdim else out
    return out.to(dtype or x.dtype)


@handles("mean", "nanmean")
def _mean_of(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _summed(x, "mean", dim, keepdim, dtype, True)


@handles("sum", "nansum")
def _sum_of(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _summed(x, "sum", dim, keepdim, dtype, False)


def _top(x: LazyLogits, operation: str) -> Tensor | None:
    """Where each row's largest logit is."""
    view = x.view_of
    if view.kind not in ("logits", "log_probs", "probs") or view.factor <= 0:
        return None
    table = view.root.table(view.mapping)
    if view.family is not None:
        table.expect(view.family.reshape(-1))
    view.root.site.report.chains[" > ".join((*view.chain, operation))] += 1
    return table.moment(view.rows.reshape(-1), "argmax", follows=False).view(view.rows.shape)


@handles("argmax")
def _argmax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim is None or x.view_of.vocab_dim != -1 or not is_vocab(x, dim):
        return NotImplemented
    found = _top(x, "argmax")
    return NotImplemented if found is None else found.unsqueeze(-1) if keepdim else found


@handles("max")
def _max(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(x, LazyLogits) or not isinstance(dim, int) or x.view_of.vocab_dim != -1 or not is_vocab(x, dim):
        return NotImplemented
    found = _top(x, "max")
    if found is None:
        return NotImplemented
    largest = taken(x, "max", x.view_of.rows, found)
    if keepdim:
        largest, found = largest.unsqueeze(-1), found.unsqueeze(-1)
    return torch.return_types.max((largest, found))


@handles("amax")
def _amax(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    found = _max(x, dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim, keepdim)
    return found if found is NotImplemented else found[0]


@handles("topk")
def _topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    view = x.view_of
    if view.vocab_dim != -1 or not is_vocab(x, dim) or not largest or view.factor <= 0:
        return NotImplemented
    if view.kind not in ("logits", "log_probs", "probs") or k > min(WIDEST_GATHER, view.mapping.vocab):
        return NotImplemented
    rows = view.rows.reshape(-1)
    ids = torch.empty((rows.numel(), k), dtype=torch.int64, device=rows.device)
    with torch.no_grad(), uncast(x.device):
        for of, logits in view.root.logits(view.mapping, rows):
            ids[of] = logits.topk(k, -1, sorted=sorted).indices
    view.root.count(rows.numel())
    ids = ids.view(*view.rows.shape, k)
    found = taken(x, "topk", view.rows.unsqueeze(-1).expand(ids.shape), ids)
    return torch.return_types.topk((found, ids))


@handles("cross_entropy", "cross_entropy_loss")
def _cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    view = x.view_of if isinstance(x, LazyLogits) else None
    if view is None or view.kind != "logits" or size_average is not None or reduce is not None:
        return NotImplemented
    return _token_losses(x, "cross_entropy", target, weight, ignore_index, reduction, label_smoothing)


@handles("nll_loss")
def _nll_loss(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    view = x.view_of if isinstance(x, LazyLogits) else None
    if view is None or view.kind != "log_probs" or view.factor != 1 or size_average is not None or reduce is not None:
        return NotImplemented
    return _token_losses(x, "nll_loss", target, weight, ignore_index, reduction, 0.0)


def _token_losses(
    x: LazyLogits, name: str, target: Any, weight: Any, ignore: int, reduction: str, smoothing: float
) -> Any:
    view = x.view_of
    place = x.dim() - 1 if view.vocab_dim == -1 else view.vocab_dim
    if isinstance(target, LazyLogits) or target.is_floating_point() or weight is not None:
        return NotImplemented
    if (
        place != (0 if x.dim() == 1 else 1)
        or target.shape != view.rows.shape
        or reduction not in ("mean", "sum", "none")
    ):
        return NotImplemented
    flat = target.reshape(-1)
    kept = torch.nonzero(flat != ignore).view(-1)
    rows, ids = view.rows.reshape(-1)[kept], flat[kept]
    _check(x, ids, IndexError, "Target {} is out of bounds.")
    losses = -_logps(x, name, rows, ids)
    if smoothing:
        some = made(x, view._replace(rows=rows, vocab_dim=-1))
        uniform = _lse(some, name) - _mean(some, name)
        losses = (1 - smoothing) * losses + smoothing * uniform
    if reduction == "none":
        return losses.new_zeros(flat.shape).index_copy(0, kept, losses).view(target.shape).to(x.dtype)
    return (losses.mean() if reduction == "mean" else losses.sum()).to(x.dtype)


@handles("kl_div")
def _kl_div(
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """Against a plain distribution: its entropy is its own, and the cross term is a sum over tokens ``t * log p``."""
    view = x.view_of if isinstance(x, LazyLogits) else None
    if view is None or isinstance(target, LazyLogits) or view.kind != "log_probs" or view.factor != 1:
        return NotImplemented
    if reduction not in ("sum", "batchmean", "mean") or target.shape != x.shape or target.requires_grad:
        return NotImplemented
    if view.vocab_dim != -1 or size_average is not None or reduce is not None:
        return NotImplemented
    rows = view.rows.reshape(-1)
    flat = target.reshape(rows.numel(), view.mapping.vocab)
    losses = torch.zeros(rows.numel(), dtype=view.root.acc, device=rows.device)
    with torch.no_grad(), uncast(x.device):
        for of, logits in view.root.logits(view.mapping, rows):
            losses[of] = F.kl_div(
                logits.log_softmax(-1), flat[of].to(logits), reduction="none", log_target=log_target
            ).sum(-1)
    view.root.count(rows.numel())

    def terms(g: Tensor) -> Terms:
        probs = flat.exp() if log_target else flat
        return view.terms_of_dense((-probs * g.reshape(-1, 1)).reshape(x.shape))

    total = _number(x, "kl_div", losses, terms).sum()
    by = {"sum": 1, "batchmean": x.shape[0], "mean": x.numel()}[reduction]
    return (total / by).to(torch.promote_types(x.dtype, target.dtype))
