"""The backward products of one call of a head, for the sum of all its consumers' gradients.

``Sparse`` leaves the products to the backend, ``Dense`` takes tiles of logits as they are, in plain torch: an entropy's
gradient, a dense one, and several temperatures at once are its cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_kernels.backends import Cost, Grads, grad_dtype, slices
from orpo_kernels.integrations.lazy.rows import SPARSE_ROWS, Root
from orpo_kernels.integrations.lazy.symbols import Map, Term
from orpo_kernels.integrations.lazy.tables import Table, put, take
from orpo_kernels.plan import DEFAULT_WORKSPACE
from orpo_kernels.settings import Head

SMALLEST_GROUP = 64  # rows whose E is held in backward, however little the workspace is


class _Sums:
    """Where the gradients of a root add up."""

    def __init__(self, root: Root, weights: tuple[Tensor, Tensor | None]) -> None:
        self.root, (self.weight, self.bias) = root, weights
        dtype = grad_dtype(root.hidden.dtype)
        self.hidden = torch.zeros_like(root.hidden, dtype=dtype) if root.needs.hidden else None
        # The head's are as large as it is, and most are written by a backend, so nothing is in them yet.
        shape, of_weight = (self.weight.shape[0], root.trained), grad_dtype(root.trained_dtype)
        self.grad_weight = self.weight.new_empty(shape, dtype=of_weight) if root.needs.weight else None
        self.share = root.trained / self.weight.shape[1]  # of a product of the head's size, the weight's gradient's
        self.grad_bias = torch.empty_like(self.bias, dtype=dtype) if root.needs.bias and self.bias is not None else None

    def zero(self, first: int = 0) -> None:
        """Set the head's gradients to 0 from token ``first`` on."""
        for grad in self.grads[1:]:
            if grad is not None and first < grad.shape[0]:
                grad[first:].zero_()

    def widen(self) -> None:
        """Let several parts of the head's gradients meet in the accumulation dtype; nothing is in them yet."""
        if self.grad_weight is not None:
            self.grad_weight = torch.empty_like(self.grad_weight, dtype=self.root.acc)
        if self.grad_bias is not None:
            self.grad_bias = torch.empty_like(self.grad_bias, dtype=self.root.acc)

    @property
    def grads(self) -> Grads:
        return Grads(self.hidden, self.grad_weight, self.grad_bias)

    def add_entries(self, mapping: Map, rows: Tensor, ids: Tensor, values: Tensor) -> None:
        """For ``values [k] = d loss / d z`` at single entries."""
        head = self.root.head(mapping, (self.weight, self.bias))
        columns = self.grads.columns(self.root.hidden_of(mapping))
        if mapping.softcap is not None:
            values = values * head.slope_of_capped(self.root.entries(mapping, rows, ids))
        values = values * mapping.scale
        for of in slices(ids.numel(), SPARSE_ROWS):
            each, row, token = values[of, None], rows[of], ids[of]
            if self.hidden is not None:
                own = each if mapping.row_scale is None else each * mapping.row_scale[row, None]
                self.hidden.index_add_(0, row, (own * head.weight[token]).to(self.hidden.dtype))
            if self.grad_weight is not None:
                self.grad_weight.index_add_(0, token, (each * columns[row]).to(self.grad_weight.dtype))
        if self.grad_bias is not None:
            own = values if mapping.row_scale is None else values * mapping.row_scale[rows]
            self.grad_bias.index_add_(0, ids, own.to(self.grad_bias.dtype))

    def add_constant(self, mapping: Map, constant: Tensor) -> None:
        """For ``constant [rows] = d loss / d z`` of every token alike, without a softcap: a product of rank one."""
        head = self.root.head(mapping, (self.weight, self.bias))
        values = constant * mapping.scale
        if mapping.row_scale is not None:
            values = values * mapping.row_scale
        if self.hidden is not None:
            total = self.root.site.select(head.weight).mean_weight(head.weight) * head.vocab
            self.hidden += (values[:, None] * total).to(self.hidden.dtype)
        if self.grad_weight is not None:
            columns = self.grads.columns(self.root.hidden).to(values.dtype)
            self.grad_weight[: head.vocab] += (values @ columns).to(self.grad_weight.dtype)
        if self.grad_bias is not None:
            self.grad_bias[: head.vocab] += values.sum().to(self.grad_bias.dtype)


class Sparse(_Sums):
    """Terms of softmax under one map, of entries and of constants: the products are the backend's."""

    def backward(self, terms: Sequence[Term]) -> Grads:
        if all(term.softmax is None for term in terms):
            self.zero()
        for term in sorted(terms, key=lambda term: term.softmax is None):  # the backend writes, the others add
            entries = list(term.entries)
            if term.softmax is not None:
                entries = self._softmax(self.root.table(term.mapping), term.softmax, entries)
            for rows, ids, values in entries:
                self.add_entries(term.mapping, rows, ids, values)
            if term.constant is not None:
                self.add_constant(term.mapping, term.constant)
        return self.grads

    def _softmax(
        self, table: Table, softmax: Tensor, entries: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``softmax [rows]`` times p, as the gradient of log-probabilities of the table's labels; what is left of it.

        For a log-probability's own gradient nothing is left, exactly.
        """
        wanted = torch.nonzero(softmax).view(-1)
        if not wanted.numel():
            self.zero()
            return entries
        table.compute(wanted)
        left = softmax.clone()
        others = []
        for rows, ids, values in entries:
            ours = table.ids[rows]
            if not torch.equal(ours, ids):
                some = torch.nonzero((ours != ids) & (values != 0)).view(-1)
                if some.numel():
                    others.append((rows[some], ids[some], values[some]))
                    values = values.index_fill(0, some, 0)
            left.index_add_(0, rows, values.to(left.dtype))
        some = torch.nonzero(left).view(-1)
        if some.numel():
            others.append((some, table.ids[some], left[some]))
        table.watch(softmax)
        g, head = -softmax, self.root.head(table.mapping, (self.weight, self.bias))
        rest = table.unprepared(wanted)
        hidden, limit = self.root.hidden_of(table.mapping), self.root.site.workspace_bytes or DEFAULT_WORKSPACE
        backend = self.root.site.select(hidden)

        def cost(n: int) -> Cost:
            return backend.cost(n, head.vocab, head.features, hidden.dtype, limit, store=True)

        # Group by group, so that E of a group fits the workspace and is used twice.
        size = rest.numel()
        while size > SMALLEST_GROUP and cost(size).stored + cost(size).scratch > limit:
            size = -(-size // 2)
        groups = list(slices(rest.numel(), size)) if size else []
        # Labels that became known after the rows were computed: what the backend writes for the old ones is taken back
        # by entries, and what is left would be the difference of two roundings.
        if len(groups) + len(table.passes) > 1 or others:
            self.widen()
        into = Grads(None, *(None if grad is None else grad[: head.vocab] for grad in self.grads[1:]))
        written = False
        while table.passes:
            each = table.passes.pop(0)
            into = into._replace(hidden=each.waiting if self.hidden is not None else None)
            part = each.part._replace(head=head)
            backend.backward(part, each.found, take(g, each.rows), into, accumulate=written)
            self._add_hidden(table.mapping, each.rows, each.waiting)
            written = True
            self.root.count(each.rows.numel() * (0 if each.plan.name == "frozen" else 1 + self.share))
            del each  # and E with it
        self.root.stored = 0
        for of in groups:
            rows = rest[of]
            part = table.part(rows, head, cost(rows.numel()).budget)
            waiting = torch.empty_like(part.hidden, dtype=grad_dtype(part.hidden.dtype))
            into = into._replace(hidden=waiting if self.hidden is not None else None)
            found = backend.forward(part, into, store=True)
            backend.backward(part, found, g[rows], into, accumulate=written)
            self._add_hidden(table.mapping, rows, waiting)
            written = True
            of_weight = self.share * (self.grad_weight is not None)
            self.root.count(rows.numel() * (1 + (self.hidden is not None) + of_weight))
            del found  # and E with it, before the next group's is allocated
        self.zero(head.vocab if written else 0)
        return others

    def _add_hidden(self, mapping: Map, rows: Tensor, grad: Tensor) -> None:
        if self.hidden is not None:
            if mapping.row_scale is not None:
                grad = grad * mapping.row_scale[rows, None]
            self.hidden = put(self.hidden, rows, grad.to(self.hidden.dtype))


class Dense(_Sums):
    """Any terms: tiles of whole rows of logits, in plain torch."""

    def backward(self, terms: Sequence[Term]) -> Grads:
        rows = torch.nonzero(torch.stack([term.touched(self.root.rows.numel()) for term in terms]).any(0)).view(-1)
        place = torch.full_like(self.root.rows, -1)
        place[rows] = torch.arange(rows.numel(), device=rows.device)
        self.zero()
        head = Head(self.weight, self.bias)
        needs_logits = any(term.needs_logits for term in terms)
        dtype = torch.float32 if self.weight.dtype == torch.float16 else self.weight.dtype
        sums = [None if grad is None else grad.to(self.root.acc) for grad in self.grads[1:]]
        for of in slices(rows.numel(), self.root.tile_rows(head.vocab, 6)):
            some = rows[of]
            hidden = self.root.hidden[some]
            raw = head.logits(hidden) if needs_logits else None
            total = torch.zeros((some.numel(), head.vocab), dtype=self.root.acc, device=some.device)
            for term in terms:
                term.add_to(total, raw, some, place, of.start)
            total_c, hidden_c = total.to(dtype), hidden.to(dtype)
            if self.hidden is not None:
                self.hidden[some] = (total_c @ self.weight.to(dtype)).to(self.hidden.dtype)
            if sums[0] is not None:
                sums[0] += total_c.T @ self.grads.columns(hidden_c)
            if sums[1] is not None:
                sums[1] += total.sum(0)
        for grad, found in zip(self.grads[1:], sums, strict=True):
            if grad is not None and found is not None:
                grad.copy_(found)
        of_weight = self.share * (self.grad_weight is not None)
        self.root.count(rows.numel() * (needs_logits + (self.hidden is not None) + of_weight))
        for table in self.root.tables.values():
            table.passes.clear()
        return self.grads
