"""Rows of logits that are not there: their statistics, each computed once, and the one backward product of them all.

A ``Root`` stands behind every tensor that one call of a head gave rise to. Consumers ask it for log-probabilities,
log-sum-exps, means and expectations of some rows under some ``Map``; the first to ask for a row pays a product for it,
and what comes out is kept, a few numbers a row. Gradients come back as ``symbols.Term``: coefficients of softmax(z)
and of single entries. Only then, when all consumers have said theirs, does the head multiply backward, once, the rows
whose coefficients are not all zero.

Products of the head's size: one without gradients, two with the head frozen, three where E of all rows fits the
workspace, else four.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orpo_kernels.backends import Backend, Found, Grads, Moments, Part, acc_dtype, grad_dtype, select, slices
from orpo_kernels.integrations.lazy.report import Report
from orpo_kernels.integrations.lazy.symbols import Map, Term
from orpo_kernels.plan import DEFAULT_WORKSPACE, Plan, choose
from orpo_kernels.settings import Head, Needs
from orpo_kernels.targets import Sizes

SPARSE_ROWS = 1024  # rows of the head gathered at once
WATCHED = 8  # backward passes that are looked at to learn how a loss masks


class Site:
    """A fused head: what outlives its calls."""

    def __init__(self, module: nn.Module, backend: str, workspace_bytes: int | None) -> None:
        self.module, self.backend, self.workspace_bytes = module, backend, workspace_bytes
        self.report = Report()
        self.moments: dict[Any, set[str]] = {}  # by map, which were wanted: later passes form them in passing
        self.filler: int | None = None  # the token that a loss gathers where it masks afterwards, once that is known
        self.watched = 0  # backward passes that were looked at for it

    def select(self, hidden: Tensor) -> Backend:
        return select(self.backend, hidden.device, hidden.dtype)

    def fall_back(self, failed: Backend, error: Exception) -> None:
        """Go on with the torch backend where the one that suits the device failed.

        Raises:
            Exception: the error, where no other backend may be taken.
        """
        if self.backend != "auto" or failed.name == "torch" or isinstance(error, torch.OutOfMemoryError):
            raise error
        self.backend = "torch"
        self.report.note(f"goes on with the torch backend, after {type(error).__name__}: {error}")


class Inputs:
    """The tensors of a head's call, unknown to autograd."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.versions = _version(self.hidden), _version(self.weight)


def _whole(parameter: Any) -> Tensor:
    """A parameter's tensor, from all ranks where only a part of it is here."""
    if hasattr(parameter, "full_tensor"):
        whole: Tensor = parameter.full_tensor()
        return whole
    if hasattr(parameter, "ds_id") and parameter.numel() == 0:
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Column(NamedTuple):
    """A token's logits of some rows, which in eager torch would be a view: a change of one is a change of both."""

    tensor: weakref.ref[Tensor]  # of the shape of ``slots``
    kept: Tensor  # its memory, which tells of a change when it is gone
    version: int  # of the tensor as it was given out
    memory: int  # that would be shared, an address
    slots: Tensor  # of it
    token: int


_roots: weakref.WeakValueDictionary[int, Root] = weakref.WeakValueDictionary()


class Root:
    """One call of a head on ``hidden [rows, H]``.

    Stand-ins own its inputs, and so does the head's node until backward has freed what it saved. A loss that somebody
    keeps with its graph, as ``total += loss``, then holds no hidden states, as with the stock head.
    """

    node: Callable[[], Any] | None = None  # a weak reference to the head's node, where there is one

    def __init__(
        self, site: Site, inputs: Inputs, needs: Needs, *, sequences: int, trainable: bool, tail: Tensor | None = None
    ) -> None:
        trained = inputs.weight if tail is None else tail  # as ``Head.trained``
        self.trained, self.trained_dtype = trained.shape[1], trained.dtype
        self.site, self.needs, self.sequences, self.trainable = site, needs, sequences, trainable
        self._inputs = weakref.ref(inputs)
        hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
        self.rows = torch.arange(hidden.shape[0], device=hidden.device)
        self.dtype, self.device = hidden.dtype, hidden.device
        self.acc = acc_dtype(hidden.dtype)
        self.hints: Tensor | None = None  # [rows], a label that was asked for, the best shift of its row, or -1
        self.tables: dict[Any, Table] = {}
        self.views: list[weakref.ref[Tensor]] = []
        self.expired = False
        self.stored = 0  # bytes of E that wait for backward
        self.in_memory = False  # whether something of it was computed in full, and so can be changed by views of that
        self.columns: list[Column] = []
        self._means: dict[int, Tensor] = {}  # by the number of columns, [rows]
        self.again: tuple[Tensor, Tensor | None] | None = (
            None  # weight and bias, once gathered after the head's forward
        )
        self.identity = Map(weight.shape[0], biased=bias is not None)
        _roots[id(self)] = self

    def held(self) -> Inputs | None:
        """The tensors of the call, or None where nothing holds them any more."""
        inputs, node = self._inputs(), None if self.node is None else self.node()
        if inputs is None and node is not None:
            # Kept for the node's backward: what checkpoint saves may be unpacked once.
            inputs = node.unpacked = Inputs(*node.saved_tensors)
            self._inputs = weakref.ref(inputs)
        return inputs

    def inputs(self) -> Inputs:
        """The tensors of the call.

        Raises:
            RuntimeError: backward has freed them, or hidden was changed in place.
        """
        inputs = self.held()
        if inputs is None:
            raise RuntimeError("orpo_kernels: the graph of these logits was freed: pass retain_graph=True to backward")
        if _version(inputs.hidden) != inputs.versions[0]:
            raise RuntimeError(
                "orpo_kernels: these logits were not computed yet, and the hidden states they are made of were changed "
                "in place since: compute what is needed of them before, or unfuse(model)"
            )
        return inputs

    @property
    def hidden(self) -> Tensor:
        return self.inputs().hidden

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The head's tensors of the call, gathered again where a wrapper has taken their memory back.

        Raises:
            RuntimeError: they have changed since.
        """
        inputs = self.inputs()
        weight = inputs.weight
        live: Any = self.site.module.weight
        sharded = self._is_gone(weight)  # again, after the head's forward
        changed = not sharded and _version(weight) != inputs.versions[1]
        if self.expired or (changed and weight.data_ptr() == live.data_ptr()):
            raise RuntimeError(
                "orpo_kernels: these logits were not computed yet, and their head's weight has changed since the "
                "forward (an optimiser's step): compute what is needed of them before, or unfuse(model)"
            )
        return self._whole_again(weight.dtype) if sharded else (weight, inputs.bias)

    def meet(self) -> None:
        """Gather a weight that was sharded again, which takes all ranks: what each of them has to compute differs."""
        inputs = self.held()
        if inputs is not None and not self.expired and self._is_gone(inputs.weight):
            self._whole_again(inputs.weight.dtype)

    def _whole_again(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self.again is None:
            self.again = self._gathered(dtype)
        return self.again

    def _is_gone(self, weight: Tensor) -> bool:
        """Whether a wrapper has taken its memory (FSDP) or put nothing in its place (DeepSpeed ZeRO-3)."""
        return weight.shape[0] != self.identity.vocab or weight.untyped_storage().nbytes() == 0

    def _gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias as they are gathered now, or, where they are not, from all ranks."""
        live = [each for each in (self.site.module.weight, self.site.module.bias) if each is not None]
        whole: list[Any] = [_whole(each).detach().to(dtype) for each in live]
        if not self._is_gone(whole[0]) and whole[0].shape[1] == self.hidden.shape[1]:  # no adapters beside it
            return whole[0], whole[1] if len(whole) > 1 else None
        raise RuntimeError(
            "orpo_kernels: logits are asked for something after their head's weight was sharded, and it cannot be "
            "gathered again: compute it before, or unfuse(model)"
        )

    def hint(self, rows: Tensor, ids: Tensor) -> None:
        """These ``ids [k]`` are what a loss wants to know of ``rows [k]``."""
        if self.hints is None:
            self.hints = torch.full_like(self.rows, -1)
        self.hints[rows] = ids

    def table(self, mapping: Map) -> Table:
        key, twice = mapping.key, mapping.times(2.0)
        if key not in self.tables:
            self.tables[key] = Table(self, mapping)
            if twice is not None and twice.key in self.tables:  # from the next batch on one pass is for both
                self.site.moments.setdefault(mapping.kind, set()).add("lse2")
        return self.tables[key]

    def table_of_half(self, mapping: Map) -> Table | None:
        """That of half the values, which some consumer reads too: its log-sum-exps of twice its values are these."""
        half = mapping.times(0.5)
        if half is None or mapping.key in self.tables:
            return None
        known = half.key in self.tables or "lse2" in self.site.moments.get(half.kind, ())
        return self.table(half) if known else None

    def head(self, mapping: Map, weights: tuple[Tensor, Tensor | None] | None = None) -> Head:
        """The map from ``hidden_of(mapping)`` to the values."""
        weight, bias = weights or self.weights()
        weight, bias = weight[: mapping.vocab], None if bias is None else bias[: mapping.vocab]
        if mapping.bias is not None:
            bias = mapping.bias.to(weight) if bias is None else bias + mapping.bias.to(bias)
        return Head(weight, bias, mapping.scale, mapping.softcap)

    def hidden_of(self, mapping: Map) -> Tensor:
        """Hidden rows; a scale of each row goes into them, as it passes through a head without bias and softcap."""
        if mapping.row_scale is None:
            return self.hidden
        return (self.hidden * mapping.row_scale[:, None]).to(self.hidden.dtype)

    def entries(self, mapping: Map, rows: Tensor, ids: Tensor) -> Tensor:
        """Values at ``rows [k]``, ``ids [k]``, in the accumulation dtype: dot products, not products of the head."""
        head, hidden = self.head(mapping), self.hidden_of(mapping)
        out = torch.empty(ids.shape, dtype=self.acc, device=ids.device)
        for of in slices(ids.numel(), SPARSE_ROWS):
            out[of] = (hidden[rows[of]].to(self.acc) * head.weight[ids[of]].to(self.acc)).sum(-1)
        if head.bias is not None:
            out += head.bias[ids].to(self.acc)
        return head.cap(out * head.logit_scale)

    def means(self, mapping: Map, rows: Tensor) -> Tensor:
        """Mean over the vocabulary of each row; a product only under a softcap."""
        if mapping.softcap is not None:
            return self.table(mapping).moment(rows, "mean")
        if mapping.vocab not in self._means:  # of every row at once: there is hardly anything cheaper
            self._means[mapping.vocab] = self._means_of_head(mapping.vocab)
        means = self._means[mapping.vocab][rows]
        if mapping.bias is not None:
            means = means + mapping.bias.mean(dtype=torch.float64).to(self.acc)
        means = means * mapping.scale
        return means if mapping.row_scale is None else means * mapping.row_scale[rows]

    def _means_of_head(self, vocab: int) -> Tensor:
        """Mean over its first columns of what the head returns, ``[rows]``."""
        weight, bias = self.weights()
        mean_weight = self.site.select(self.hidden).mean_weight(weight[:vocab])
        means = torch.empty(self.rows.shape, dtype=self.acc, device=self.device)
        for of in slices(self.rows.numel(), SPARSE_ROWS):
            torch.mv(self.hidden[of].to(self.acc), mean_weight, out=means[of])
        return means if bias is None else means + bias[:vocab].mean(dtype=torch.float64).to(self.acc)

    def logits(self, mapping: Map, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Values of ``rows [k]``, some rows at a time, ``[n, V]`` in the accumulation dtype."""
        head, hidden = self.head(mapping), self.hidden_of(mapping)
        for of in slices(rows.numel(), self.tile_rows(head.vocab, 3)):
            yield of, head.logits(hidden[rows[of]])

    def tile_rows(self, vocab: int, tiles: int) -> int:
        """Rows of so many tiles of logits that the workspace holds."""
        room = self.site.workspace_bytes or DEFAULT_WORKSPACE
        return max(room // (tiles * vocab * self.acc.itemsize), 8)

    def count(self, products: float) -> None:
        self.site.report.products += products / max(self.rows.numel(), 1)

    def unpacked(self, node: Any) -> Inputs:
        """The tensors of the call in its node's backward, where they are checked to be as they were."""
        found = node.unpacked
        if found is None:
            found = Inputs(*node.saved_tensors)
            if self._inputs() is None:
                self._inputs = weakref.ref(found)
        node.unpacked = None
        return found

    def backward(self, terms: Sequence[Term], inputs: Inputs) -> Grads:
        """The gradients of hidden, weight and bias for the sum of the terms."""
        from orpo_kernels.integrations.lazy.products import Dense, Sparse

        weights = inputs.weight, inputs.bias
        if self._is_gone(inputs.weight):  # what was saved is unpacked once, and that may be before it is gathered
            weights = self._gathered(inputs.weight.dtype)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            terms = [term.trimmed() for term in terms]
            spread = [term for term in terms if term.softmax is not None]
            if len(spread) <= 1 and all(term.is_sparse for term in terms):
                return Sparse(self, weights).backward(terms)
            return Dense(self, weights).backward(terms)


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
        """Those of ``rows [k]`` that are not known, each once."""
        wanted = torch.zeros_like(self.mask)
        wanted[rows] = True
        return torch.nonzero(wanted & ~self.mask).view(-1)

    def add(self, missing: Tensor) -> None:
        self.mask[missing] = True
        self.count += missing.numel()


class Table:
    """What is known of the rows of a root under one map."""

    def __init__(self, root: Root, mapping: Map) -> None:
        n = root.rows.numel()
        self._root, self.mapping = weakref.ref(root), mapping  # weak, as the root owns its tables
        self.known = Known(n, root.device)
        self.ids = torch.zeros(n, dtype=torch.int64, device=root.device)
        self.logps, self.labels = torch.zeros((2, n), dtype=root.acc, device=root.device)
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
        logps = self.logps[rows]
        other = self.ids[rows] != ids
        if other.any():  # a row whose log-sum-exp another label has brought
            rows, ids = rows[other], ids[other]
            logps[other] = self.root.entries(self.mapping, rows, ids) - (self.labels[rows] - self.logps[rows])
        return logps

    def expect(self, rows: Tensor) -> None:
        """Rows that will be asked for piece by piece: computed together with the first of them."""
        if not self.known.whole and not self.known.mask[rows].all():
            self.family = rows

    def lse(self, rows: Tensor, *, follows: bool = True) -> Tensor:
        """Log-sum-exp at ``rows [k]``; ``follows`` as in ``compute``."""
        self.compute(rows, follows=follows)
        return self.labels[rows] - self.logps[rows]

    def moment(self, rows: Tensor, name: str, *, follows: bool = True) -> Tensor:
        """A field of ``Moments`` at ``rows [k]``, computed with their log-sum-exp or, the first time, after it."""
        self.root.meet()
        if not rows.numel():
            return (self.ids if name == "argmax" else self.logps)[rows]
        wanted = "expected" if name == "entropy" else name
        self.root.site.moments.setdefault(self.mapping.kind, set()).add(wanted)
        self.compute(rows, follows=follows)
        known = self._moments[name][1] if name in self._moments else Known(self.known.mask.numel(), rows.device)
        missing = rows[:0] if known.whole else known.missing(rows)
        if missing.numel():
            part = self.part(missing)._replace(moments=(wanted,))
            with torch.no_grad(), torch.autocast(part.hidden.device.type, enabled=False):
                self._keep(missing, self.root.site.select(part.hidden).moments(part))
            self.root.count(missing.numel())
        return self._moments[name][0][rows]

    def part(self, rows: Tensor, head: Head | None = None, scratch: int = DEFAULT_WORKSPACE) -> Part:
        """These rows ``[n]`` of the root and their labels, by themselves."""
        hidden, every = self.root.hidden_of(self.mapping), self.root.rows
        if rows.numel() < every.numel():
            hidden = hidden[rows]
        return Part(hidden, every[: rows.numel()], self.ids[rows], head or self.root.head(self.mapping), scratch)

    def _keep(self, rows: Tensor, found: Moments) -> None:
        for name, some in found._asdict().items():
            if some is not None:
                if name not in self._moments:
                    of = self.known.mask
                    self._moments[name] = some.new_zeros(of.shape), Known(of.numel(), of.device)
                values, known = self._moments[name]
                values[rows] = some
                known.add(rows)

    @torch.no_grad()
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
        hints = root.hints[missing]
        self.ids[missing] = hints.clamp(0, self.mapping.vocab - 1)
        if filler is None or not prepare:
            self._pass(missing, prepare)
            return
        # What will be masked needs its value, as the loss reads it, and no way back.
        for some, gradient in ((hints != filler, True), (hints == filler, False)):
            self._pass(missing[some], gradient)

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
        waiting = torch.zeros_like(part.hidden, dtype=grad_dtype(part.hidden.dtype)) if prepared else None
        part = part._replace(scratch=plan.scratch_budget, moments=root.site.moments.get(self.mapping.kind, ()))
        with torch.autocast(part.hidden.device.type, enabled=False):
            try:
                found = backend.forward(part, Grads(waiting, None, None), store=store)
            except Exception as error:
                root.site.fall_back(backend, error)
                found = root.site.select(part.hidden).forward(part, Grads(waiting, None, None), store=store)
        root.stored += plan.stored_bytes
        root.count(n * (1 + (plan.name == "frozen")))
        self.known.add(missing)
        self.logps[missing] = found.logps
        self.labels[missing] = root.entries(self.mapping, missing, part.ids)
        if found.moments is not None:
            self._keep(missing, found.moments)
        if waiting is not None:
            self.passes.append(Pass(missing, part, found._replace(moments=None), waiting, plan))
        root.site.report.plans[plan.name] = str(plan)


def expire(optimiser: Any, *_: Any) -> None:
    """An optimiser is about to step: what is not computed yet of the heads it trains never will be.

    An optimiser may train copies of the weights, flat, sharded or in another precision, which are no plain parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    copies = any(type(p) is not nn.Parameter or hasattr(p, "_is_flat_param") for p in parameters)
    trained = {id(parameter) for parameter in parameters}
    for each in _roots.valuerefs():
        root = each()
        if root is not None and root.trainable:
            own = any(id(parameter) in trained for parameter in root.site.module.parameters())
            root.expired = root.expired or own or copies
