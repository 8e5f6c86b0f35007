"""What a consumer sees and what it sends back, as symbols: views of maps of the head's output, and gradients.

A gradient of logits ``[rows, V]`` is a sum of ``Term``: per row a coefficient of softmax(z), of softmax(z) * z and of
every token alike, single entries, and dense gradients where something asked for the logits themselves. All rows are
those of the root, so a term means the same at every view: on its way through views only its claimed shape changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import uncast
from orpo_kernels.settings import Head

if TYPE_CHECKING:
    from orpo_kernels.integrations.lazy.rows import Root


class Map(NamedTuple):
    """Values ``row_scale * cap(scale * (a + bias))`` of the first ``vocab`` columns of the head's output ``a``."""

    vocab: int
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # [vocab], without a gradient
    row_scale: Tensor | None = None  # [rows] of the root, accumulation dtype; without a bias and a softcap
    biased: bool = False  # whether the head has a bias of its own

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two batches have in common."""
        return self.vocab, self.scale, self.softcap, self.bias is None, self.row_scale is None

    @property
    def key(self) -> tuple[Any, ...]:
        return *self[:3], id(self.bias), id(self.row_scale)

    def times(self, factor: float) -> Map | None:
        """The values times a number, or None where no map is that."""
        if not 0 < factor < float("inf"):
            return None
        return self._replace(scale=self.scale * factor, softcap=None if self.softcap is None else self.softcap * factor)

    def times_rows(self, factor: Tensor) -> Map | None:
        """The values times a number for each row of the root ``[rows]``."""
        if self.biased or self.bias is not None or self.softcap is not None:
            return None
        return self._replace(row_scale=factor if self.row_scale is None else self.row_scale * factor)

    def tanh(self) -> Map | None:
        if self.softcap is not None or self.row_scale is not None:
            return None
        return self._replace(softcap=1.0)

    def plus(self, bias: Tensor) -> Map | None:
        """The values and a number for each token ``[vocab]``."""
        if self.softcap is not None or self.row_scale is not None:
            return None
        bias = bias / self.scale
        return self._replace(bias=bias if self.bias is None else self.bias + bias)

    def narrowed(self, vocab: int) -> Map:
        return self._replace(vocab=vocab, bias=None if self.bias is None else self.bias[:vocab])

    def of_raw(self, raw: Tensor, rows: Tensor) -> Tensor:
        """Values of the head's output ``raw [n, V]`` of root rows ``[n]``."""
        raw = raw[:, : self.vocab]
        if self.bias is not None:
            raw = raw + self.bias.to(raw)
        values = Head(raw, None, self.scale, self.softcap).cap(raw * self.scale)
        return values if self.row_scale is None else values * self.row_scale[rows, None]

    def to_raw(self, grad: Tensor, values: Tensor | None, rows: Tensor) -> Tensor:
        """From ``d loss / d values`` to ``d loss / d raw``; the values are needed under a softcap."""
        if self.row_scale is not None:
            grad = grad * self.row_scale[rows, None]
        if self.softcap is not None:
            assert values is not None  # asked for by Term.needs_logits
            grad = grad * (1 - (values / self.softcap) ** 2)
        return grad * self.scale


@dataclass(frozen=True)
class DenseGrad:
    """A gradient of values that were computed: of ``kind`` at ``rows [k]``, ``grad [k, V]``."""

    kind: str
    factor: float
    rows: Tensor
    grad: Tensor

    def of_logits(self, values: Tensor | None) -> Tensor:
        """``d loss / d z [k, V]`` from the logits of the same rows."""
        grad = self.grad * self.factor
        if self.kind == "logits":
            return grad
        assert values is not None  # asked for by Term.needs_logits
        logps = torch.log_softmax(values, -1)
        probs = logps.exp()
        if self.kind == "log_probs":
            return grad - probs * grad.sum(-1, keepdim=True)
        if self.kind == "probs":
            inner = grad
        elif self.kind == "probs_log_probs":
            inner = grad * (logps + 1)
        else:  # p z, whose second factor has a gradient of its own
            inner = grad * values
            return probs * (inner - (probs * inner).sum(-1, keepdim=True)) + grad * probs
        return probs * (inner - (probs * inner).sum(-1, keepdim=True))


Entries = tuple[Tensor, Tensor, Tensor]  # rows, ids, d loss / d z, [k] each


@dataclass(frozen=True)
class Term:
    """A gradient of the values of one map. ``[rows]`` of the root, or None for nothing."""

    mapping: Map
    softmax: Tensor | None = None  # times p = softmax(z)
    weighted: Tensor | None = None  # times p * z
    constant: Tensor | None = None  # of every token
    entries: tuple[Entries, ...] = ()
    dense: tuple[DenseGrad, ...] = ()

    @property
    def is_sparse(self) -> bool:
        """Whether it needs no tile of logits as they are."""
        bent = self.constant is not None and self.mapping.softcap is not None
        return self.weighted is None and not self.dense and not bent

    @property
    def needs_logits(self) -> bool:
        bent = self.mapping.softcap is not None
        return (
            self.softmax is not None or self.weighted is not None or bent or any(d.kind != "logits" for d in self.dense)
        )

    def __add__(self, other: Term) -> Term:
        return Term(
            self.mapping,
            _add(self.softmax, other.softmax),
            _add(self.weighted, other.weighted),
            _add(self.constant, other.constant),
            self.entries + other.entries,
            self.dense + other.dense,
        )

    def times(self, factor: Any) -> Term:
        """The gradient times a number or a scalar tensor."""
        return Term(
            self.mapping,
            None if self.softmax is None else self.softmax * factor,
            None if self.weighted is None else self.weighted * factor,
            None if self.constant is None else self.constant * factor,
            tuple((rows, ids, values * factor) for rows, ids, values in self.entries),
            tuple(replace(each, grad=each.grad * factor) for each in self.dense),
        )

    def trimmed(self) -> Term:
        """Without vectors of zeros: ``logits.sum() * 0`` asks for a gradient and no product.

        Those of softmax are left, as whoever multiplies by it looks for the rows that are not 0 anyway.
        """

        def kept(vector: Tensor | None) -> Tensor | None:
            return vector if vector is not None and vector.any() else None

        return Term(self.mapping, self.softmax, kept(self.weighted), kept(self.constant), self.entries, self.dense)

    def touched(self, n: int) -> Tensor:
        """``[n]`` bool: the root's rows that have a gradient."""
        vectors = [v != 0 for v in (self.softmax, self.weighted, self.constant) if v is not None]
        device = self._device()
        found = torch.stack(vectors).any(0) if vectors else torch.zeros(n, dtype=torch.bool, device=device)
        for rows in (*(rows for rows, _, _ in self.entries), *(each.rows for each in self.dense)):
            found[rows] = True
        return found

    def any_nan(self) -> Tensor:
        """Whether a number of it is NaN."""
        parts = [self.softmax, self.weighted, self.constant, *(values for _, _, values in self.entries)]
        parts += [each.grad for each in self.dense]
        found = [part.isnan().any() for part in parts if part is not None]
        return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool)

    def _device(self) -> torch.device:
        if self.entries:
            return self.entries[0][0].device
        return self.dense[0].rows.device if self.dense else torch.device("cpu")

    def add_to(self, total: Tensor, raw: Tensor | None, rows: Tensor, place: Tensor, start: int) -> None:
        """Add ``d loss / d raw`` to ``total [n, V]`` of root rows ``[n]``, which stand at ``place`` less ``start``."""
        values = None if raw is None else self.mapping.of_raw(raw, rows)
        grad = total.new_zeros(total.shape[0], self.mapping.vocab)
        if self.softmax is not None or self.weighted is not None:
            assert values is not None  # asked for by needs_logits
            probs = torch.softmax(values, -1)
            if self.softmax is not None:
                grad += probs * self.softmax[rows, None]
            if self.weighted is not None:
                # A masked token's logit is -inf, and its probability 0.
                grad += probs * values.clamp(min=torch.finfo(values.dtype).min) * self.weighted[rows, None]
        if self.constant is not None:
            grad += self.constant[rows, None]

        def here(of: Tensor) -> Tensor:
            at = place[of] - start
            return torch.nonzero((at >= 0) & (at < rows.numel())).view(-1)

        for entry_rows, ids, entry in self.entries:
            some = here(entry_rows)
            at = place[entry_rows[some]] - start
            grad.index_put_((at, ids[some]), entry[some].to(grad.dtype), accumulate=True)
        for each in self.dense:
            some = here(each.rows)
            at = place[each.rows[some]] - start
            own = replace(each, rows=at, grad=each.grad[some].to(grad.dtype))
            grad.index_add_(0, at, own.of_logits(None if values is None else values[at]))
        total[:, : self.mapping.vocab] += self.mapping.to_raw(grad, values, rows)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


Terms = dict[Any, Term]


def added(a: Terms, b: Terms) -> Terms:
    """The sum of two gradients."""
    out = dict(a)
    for key, term in b.items():
        out[key] = out[key] + term if key in out else term
    return out


class View(NamedTuple):
    """What a stand-in stands for: ``factor * kind(values of a map)`` at ``rows``."""

    root: Root
    rows: Tensor  # of the root, int64; the stand-in's shape without the vocabulary
    mapping: Map
    dtype: torch.dtype
    kind: str = "logits"  # or log_probs, probs, probs_log_probs (p * log p), probs_logits (p * z)
    factor: float = 1.0  # 1 for logits, whose factor is the map's
    vocab_dim: int = -1  # where the vocabulary stands, -1 or an index
    cut: bool = False  # whether its memory would hold more tokens of each row
    packed: bool = False  # whether it would lie in memory in the order of its dimensions, the vocabulary not last
    family: Tensor | None = None  # rows of what this is one of many pieces of: they are computed together
    chain: tuple[str, ...] = ()  # operations so far, for the report
    graph: object = None  # shared by views that autograd follows from one to another

    @property
    def shape(self) -> torch.Size:
        lead, vocab, at = self.rows.shape, self.mapping.vocab, self.vocab_dim
        return torch.Size((*lead, vocab) if at == -1 else (*lead[:at], vocab, *lead[at:]))

    def after(self, operation: str, **changes: Any) -> View:
        """The view that an operation makes of this one."""
        chain = self.chain if self.chain[-1:] == (operation,) else (*self.chain, operation)
        return self._replace(chain=chain, **changes)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def same_rows(self, other: View) -> bool:
        """Whether both have the same rows of the same root under the same map."""
        same = self.root is other.root and self.mapping.key == other.mapping.key
        return same and (self.rows is other.rows or torch.equal(self.rows, other.rows))

    def dense(self) -> Tensor:
        """What this stands for, computed; no view of anything, so that it may be changed in place."""
        root = self.root
        strides = [stride * self.mapping.vocab for stride in torch.empty_like(self.rows).stride()]
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        rows = self.rows.permute(order).reshape(-1)
        strides.insert(len(strides) if self.vocab_dim == -1 else self.vocab_dim, 1)
        out = torch.empty_strided(self.shape, strides, dtype=self.dtype, device=rows.device)
        flat = out.movedim(self.vocab_dim, -1).permute(*order, -1).view(rows.numel(), self.mapping.vocab)
        with torch.no_grad(), uncast(rows.device):
            for of, logits in root.logits(self.mapping, rows):
                flat[of] = (_of_kind(self.kind, logits) * self.factor).to(self.dtype)
        root.count(rows.numel())
        return torch.empty_like(out, memory_format=torch.contiguous_format).copy_(out) if self.packed else out

    def slots(self) -> Tensor:
        """Where in memory each row would stand, as ``rows``: to compare with views that share it."""
        rows = self.rows
        places = torch.arange(rows.untyped_storage().nbytes() // rows.itemsize, device=rows.device)
        return places.as_strided(rows.shape, rows.stride(), rows.storage_offset()).contiguous()

    def terms_of_dense(self, grad: Tensor) -> Terms:
        """A dense gradient of the stand-in's shape."""
        if self.vocab_dim != -1:
            grad = grad.movedim(self.vocab_dim, -1)
        dense = DenseGrad(self.kind, self.factor, self.rows.reshape(-1), grad.reshape(-1, self.mapping.vocab))
        return {self.mapping.key: Term(self.mapping, dense=(dense,))}


def _of_kind(kind: str, logits: Tensor) -> Tensor:
    if kind == "logits":
        return logits
    logps = torch.log_softmax(logits, -1)
    if kind == "log_probs":
        return logps
    probs = logps.exp()
    lowest = torch.finfo(logits.dtype).min  # a masked token: 0 times -inf
    if kind == "probs":
        return probs
    return probs * (logps if kind == "probs_log_probs" else logits).clamp(min=lowest)
