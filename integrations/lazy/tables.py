"""What is known of the rows of a head's call under one map of its values, and what waits there for backward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.backends import Found, Grads, Moments, Part, grad_dtype, uncast
from orpo_kernels.integrations.lazy.symbols import Map
from orpo_kernels.plan import DEFAULT_WORKSPACE, Plan, choose
from orpo_kernels.settings import Head, Needs
from orpo_kernels.targets import Sizes

if TYPE_CHECKING:
    from orpo_kernels.integrations.lazy.rows import Root

WATCHED = 8  # backward passes that are looked at to learn how a loss masks


class Pass(NamedTuple):
    """n rows that were computed with their way back prepared."""

    rows: Tensor  # [n], of the root
    part: Part  # of these rows alone
    found: Found
    waiting: Tensor  # [n, H], where d logp / d hidden may wait
    plan: Plan


class Known:
    """Of which rows something is known."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.mask = torch.zeros(rows, dtype=torch.bool, device=device)
        self.count = 0  # of them, so that nobody waits for a GPU to hear that all are

    @property
    def whole(self) -> bool:
        return self.count == self.mask.numel()

    def missing(self, rows: Tensor) -> Tensor:
        """Those of ``rows [k]`` that are not known, each once and rising."""
        if self.whole:
            return rows[:0]
        wanted = torch.zeros_like(self.mask).index_fill_(0, rows, True)
        return torch.nonzero(wanted & ~self.mask if self.count else wanted).view(-1)

    def add(self, missing: Tensor) -> None:
        self.mask.index_fill_(0, missing, True)
        self.count += missing.numel()


def put(every: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``every [N, ...]`` with ``values [n, ...]`` at ``rows [n]``, each once and rising: N of them are all."""
    return values if rows.shape[0] == every.shape[0] else every.index_copy_(0, rows, values)


def take(every: Tensor, rows: Tensor) -> Tensor:
    """``every [N, ...]`` at such ``rows [n]``."""
    return every if rows.shape[0] == every.shape[0] else every[rows]


class Table:
    """What is known of the rows of a root under one map."""

    def __init__(self, root: Root, mapping: Map) -> None:
        n = root.rows.numel()
        self._root, self.mapping = weakref.ref(root), mapping  # weak, as the root owns its tables
        self.known = Known(n, root.device)
        self.ids = torch.zeros(n, dtype=torch.int64, device=root.device)
        self.logps = torch.zeros(n, dtype=root.acc, device=root.device)
        self.lses = torch.zeros_like(self.logps)
        self.passes: list[Pass] = []
        self.family: Tensor | None = None
        self._moments: dict[str, tuple[Tensor, Known]] = {}  # by name: values, and of which rows

    @property
    def root(self) -> Root:
        root = self._root()
        assert root is not None  # who asks has it from there
        return root

    def logps_of(self, rows: Tensor, ids: Tensor, *, follows: bool = True) -> Tensor:
        """Log-probabilities of ``ids [k]`` at ``rows [k]``; ``follows`` as in ``compute``."""
        self.compute(rows, ids, follows=follows)
        logps, labels = self.logps[rows], self.ids[rows]
        if not torch.equal(labels, ids):  # rows whose log-sum-exp another label has brought
            other = labels != ids
            rows, ids = rows[other], ids[other]
            logps[other] = self.root.entries(self.mapping, rows, ids) - self.lses[rows]
        return logps

    def expect(self, rows: Tensor) -> None:
        """Rows that will be asked for piece by piece: computed together with the first of them."""
        if not self.known.whole and not self.known.mask[rows].all():
            self.family = rows

    def lse(self, rows: Tensor, *, follows: bool = True) -> Tensor:
        """Log-sum-exp at ``rows [k]``; ``follows`` as in ``compute``."""
        self.compute(rows, follows=follows)
        return self.lses[rows]

    def moment(self, rows: Tensor, name: str, *, follows: bool = True) -> Tensor:
        """A field of ``Moments`` at ``rows [k]``, computed with their log-sum-exp or, the first time, after it."""
        if not rows.numel():
            self.root.meet()
            return (self.ids if name == "argmax" else self.logps)[rows]
        wanted = "expected" if name == "entropy" else name
        self.root.site.moments.setdefault(self.mapping.kind, set()).add(wanted)
        self.compute(rows, follows=follows)
        known = self._moments[name][1] if name in self._moments else Known(self.known.mask.numel(), rows.device)
        missing = known.missing(rows)
        if missing.numel():
            part = self.part(missing)._replace(moments=(wanted,))
            with torch.no_grad(), uncast(part.hidden.device):
                self._keep(missing, self.root.site.select(part.hidden).moments(part))
            self.root.count(missing.numel())
        return self._moments[name][0][rows]

    def part(self, rows: Tensor, head: Head | None = None, scratch: int = DEFAULT_WORKSPACE) -> Part:
        """These rows ``[n]`` of the root and their labels, by themselves."""
        hidden, ids = take(self.root.hidden_of(self.mapping), rows), take(self.ids, rows)
        return Part(hidden, self.root.rows[: rows.numel()], ids, head or self.root.head(self.mapping), scratch)

    def _keep(self, rows: Tensor, found: Moments) -> None:
        for name, some in found._asdict().items():
            if some is not None:
                if name not in self._moments:
                    of = self.known.mask
                    self._moments[name] = some.new_zeros(of.shape), Known(of.numel(), of.device)
                values, known = self._moments[name]
                self._moments[name] = put(values, rows, some), known
                known.add(rows)

    def compute(self, rows: Tensor, ids: Tensor | None = None, *, follows: bool = True) -> None:
        """One product for the rows that are not known yet, or what prepares their way back too.

        Without ``follows`` no gradient comes back from who asks. Where another consumer has asked for gradients before,
        the rows that it left out, as a loss leaves out the prompt that an accuracy counts, hardly get one later.
        """
        root = self.root
        if ids is not None:
            root.hint(rows, ids)
        root.meet()
        if self.known.whole:
            return
        if self.family is not None:
            rows, self.family = torch.cat([rows, self.family]), None
        missing = self.known.missing(rows)
        if missing.numel() == 0:
            return
        prepare, filler = follows or not self.passes, root.site.filler
        if root.hints is None:
            self._pass(missing, prepare)
            return
        hints = take(root.hints, missing)
        self.ids = put(self.ids, missing, hints.clamp(0, self.mapping.vocab - 1))
        if filler is None or not prepare:
            self._pass(missing, prepare)
            return
        # What will be masked needs its value, as the loss reads it, and no way back.
        for some, gradient in ((hints != filler, True), (hints == filler, False)):
            self._pass(missing[some], gradient)

    def unprepared(self, rows: Tensor) -> Tensor:
        """Those of ``rows [k]`` whose way back no pass has prepared, each once and rising."""
        if sum(each.rows.numel() for each in self.passes) == self.known.mask.numel():
            return rows[:0]
        prepared = Known(self.known.mask.numel(), rows.device)
        for each in self.passes:
            prepared.add(each.rows)
        return prepared.missing(rows)

    def watch(self, g: Tensor) -> None:
        """Learn from the gradient ``[rows]`` of log-probabilities which token stands where the loss masks."""
        site, hints = self.root.site, self.root.hints
        if site.filler is not None or hints is None or site.watched == WATCHED:
            return
        site.watched += 1
        masked = self.known.mask & (g == 0)
        token = hints[masked].mode().values if masked.any() else hints.new_tensor(-1)
        of = (hints == token) & self.known.mask
        if token >= 0 and of.sum() * 16 >= len(of) and not (of & ~masked).any():
            site.filler = int(token)

    def _pass(self, missing: Tensor, prepare: bool) -> None:
        """A product for rows ``[n]`` that are not known, with their way back where it is to be prepared."""
        root, n = self.root, missing.numel()
        if n == 0:
            return
        part = self.part(missing)
        backend, limit = root.site.select(part.hidden), root.site.workspace_bytes or DEFAULT_WORKSPACE
        plan = choose(
            root.needs if prepare else Needs(False, False, False),
            Sizes((n,), (n, 0), 0, 0, 0, False, n),
            vocab=part.head.vocab,
            features=part.head.features,
            trained=root.trained,
            dtype=part.hidden.dtype,
            workspace_bytes=max(limit - root.stored, 1),
            backend=backend,
            splits=False,
        )
        # A trainable head whose E does not fit is computed again in backward: the rows that have a gradient.
        prepared, store = plan.name in ("frozen", "store"), plan.name == "store"
        waiting = torch.empty_like(part.hidden, dtype=grad_dtype(part.hidden.dtype)) if prepared else None
        part = part._replace(scratch=plan.scratch_budget, moments=root.site.moments.get(self.mapping.kind, ()))
        with torch.no_grad(), uncast(part.hidden.device):
            try:
                found = backend.forward(part, Grads(waiting, None, None), store=store)
            except Exception as error:
                root.site.fall_back(backend, error)
                found = root.site.select(part.hidden).forward(part, Grads(waiting, None, None), store=store)
        root.stored += plan.stored_bytes
        root.count(n * (1 + (plan.name == "frozen")))
        self.known.add(missing)
        labels = root.entries(self.mapping, missing, part.ids) if found.labels is None else found.labels
        self.logps = put(self.logps, missing, found.logps)
        self.lses = put(self.lses, missing, labels - found.logps)
        if found.moments is not None:
            self._keep(missing, found.moments)
        if waiting is not None:
            self.passes.append(Pass(missing, part, found._replace(moments=None), waiting, plan))
        root.site.report.plans[plan.name] = plan
