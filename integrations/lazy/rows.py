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

from orpo_kernels.backends import Backend, Grads, acc_dtype, select, slices, uncast
from orpo_kernels.integrations.lazy.report import Report
from orpo_kernels.integrations.lazy.symbols import Map, Term
from orpo_kernels.integrations.lazy.tables import Table
from orpo_kernels.plan import DEFAULT_WORKSPACE
from orpo_kernels.settings import Head, Needs

SPARSE_ROWS = 1024  # rows of the head gathered at once


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
        # Weight and bias, once gathered after the head's forward.
        self.again: tuple[Tensor, Tensor | None] | None = None
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
        self.hints.index_copy_(0, rows, ids)

    def table(self, mapping: Map) -> Table:
        key = mapping.key
        if key not in self.tables:
            self.tables[key], twice = Table(self, mapping), mapping.times(2.0)
            if twice is not None and twice.key in self.tables:  # from the next batch on one pass is for both
                self.site.moments.setdefault(mapping.kind, set()).add("lse2")
        return self.tables[key]

    def table_of_half(self, mapping: Map) -> Table | None:
        """That of half the values, which some consumer reads too: its log-sum-exps of twice its values are these."""
        half = None if mapping.key in self.tables else mapping.times(0.5)
        if half is None:
            return None
        known = half.key in self.tables or "lse2" in self.site.moments.get(half.kind, ())
        return self.table(half) if known else None

    def head(self, mapping: Map, weights: tuple[Tensor, Tensor | None] | None = None) -> Head:
        """The map from ``hidden_of(mapping)`` to the values."""
        weight, bias = weights or self.weights()
        if mapping.vocab < weight.shape[0]:
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
        with torch.no_grad(), uncast(self.device):
            terms = [term.trimmed() for term in terms]
            spread = [term for term in terms if term.softmax is not None]
            if len(spread) <= 1 and all(term.is_sparse for term in terms):
                return Sparse(self, weights).backward(terms)
            return Dense(self, weights).backward(terms)


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
