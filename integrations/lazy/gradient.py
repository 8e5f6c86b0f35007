"""What a consumer sees and what it sends back, as symbols: maps from the head's output to values, and gradients.

A gradient of logits ``[rows, V]`` is a sum of ``Term``: per row a coefficient of softmax(z), of softmax(z) * z and of
every token alike, single entries, and dense gradients where something asked for the logits themselves. All rows are
those of the root, so a term means the same at every view: on its way through views only its claimed shape changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.settings import Head


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
        """Without vectors of zeros: ``logits.sum() * 0`` asks for a gradient and no product."""

        def kept(vector: Tensor | None) -> Tensor | None:
            return vector if vector is not None and vector.any() else None

        softmax, weighted, constant = kept(self.softmax), kept(self.weighted), kept(self.constant)
        return replace(self, softmax=softmax, weighted=weighted, constant=constant)

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
