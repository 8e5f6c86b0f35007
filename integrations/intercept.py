"""One ordinary call of a model with its head intercepted, and the call that asks a model what it does to its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orpo_kernels.integrations.adapters import stock_logits
from orpo_kernels.integrations.detours import detour, is_compiled, watch
from orpo_kernels.integrations.hf_head import PROBES, Reading, probes, read
from orpo_kernels.integrations.trainer import Site
from orpo_kernels.settings import Head

CHECKED_ROWS = 8


class Batch(NamedTuple):
    """Sequences stacked chosen first, with labels shifted, so that ``labels[s, t]`` is what position t predicts."""

    inputs: dict[str, Any]  # of the model
    answer: Tensor  # [2P, T]
    nll: Tensor  # [P, T]
    ignore_index: int
    averaged: slice = slice(None, -1)  # positions over which a trainer logs mean logits
    reference_logps: Tensor | None = None  # [2P], for an objective that needs them
    margins: Tensor | None = None  # [P]


class Call(ABC):
    """One ordinary call of a model with its head intercepted, in this thread."""

    def __init__(self, site: Site, batch: Batch) -> None:
        self.site, self.batch = site, batch
        self.calls, self.returned = 0, False
        self.refusal: str | None = None

    @property
    def vocab(self) -> int:
        """What the head makes of each position, before a model leaves columns out."""
        head: Any = self.site.head
        return int(head.out_features)

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        # The last hook of the head sees what those of wrappers made of its output; the first of the model comes before
        # theirs, which then find the loss in the output that they prepare for backward.
        stays = is_compiled(model)
        with (
            watch(self.site.head, self._after_head, stays=stays),
            watch(self.site.base, self._after_base, first=True, stays=stays),
            detour(self.site.head, self._at_head, stays=stays),
        ):
            output = model(**self.batch.inputs)
        if self.calls == 0:
            self.refusal = "its forward did not call its head"
        return output

    @abstractmethod
    def at_head(self, hidden: Tensor) -> Tensor:
        """What the head returns for its input ``[2P, T, H]``: ``[1, n, V]``, because no loss is made of its logits."""

    @abstractmethod
    def after_head(self, output: Tensor) -> None:
        """The head has returned, and its hooks have seen what."""

    @abstractmethod
    def after_base(self, output: Any) -> None:
        """The model has returned."""

    def _at_head(self, input: Tensor) -> Tensor:
        self.calls += 1
        weight = getattr(self.site.head, "base_layer", self.site.head).weight
        if self.calls > 1:
            self.refusal = "its forward called its head more than once"
        elif input.shape[:-1] != self.batch.answer.shape:
            of, every = list(input.shape[:-1]), list(self.batch.answer.shape)
            self.refusal = f"its forward called its head on {of} of {every} positions"
        elif hasattr(weight, "full_tensor") or weight.dim() != 2 or weight.numel() == 0:
            self.refusal = f"its head's weight is sharded inside the head's own forward (here {list(weight.shape)})"
        if self.refusal is not None:
            return input.new_zeros(1, 1, self.vocab)
        return self.at_head(input)

    def _after_head(self, output: Tensor) -> None:
        if self.refusal is None:
            self.after_head(output)

    def _after_base(self, output: Any) -> None:
        if self.calls:
            self.returned = True
            if self.refusal is None:
                self.after_base(output)


class Question(Call):
    """Asks a model what it does to its logits, in a call without gradients: its head returns probes.

    Behind the probes the model's own logits of a few tokens go through the rest of its forward.
    """

    def asked_of(self, model: nn.Module) -> Reading | str:
        """What the model does, or why it cannot be told."""
        self.tracks = torch.is_grad_enabled()
        device = self.batch.answer.device
        # The batch that is trained on draws the random numbers it would have drawn.
        forked = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
        # Its shapes come once: nothing is compiled for them.
        eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
        try:
            with forked, torch.no_grad(), eager:
                self.run(model)
        except Exception as error:
            if self.calls == 0 or self.returned or isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"its forward fails on logits of other rows than it gave its head ({type(error).__name__}: {error})"
            return self.refusal or what
        return self.refusal or self.reading

    def at_head(self, hidden: Tensor) -> Tensor:
        labels = self.batch.answer.reshape(-1)
        places = torch.nonzero(labels != self.batch.ignore_index).view(-1)
        places = places[:: max(1, len(places) // CHECKED_ROWS)][:CHECKED_ROWS]
        self.labels = labels[places]
        own, self.rows, of_rows = stock_logits(self.site.head, hidden.reshape(-1, hidden.shape[-1])[places])
        self.eps = _rounding_of(own, self.rows, of_rows)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.given = torch.cat([probes(self.vocab, dtype, hidden.device), own.to(dtype)])
        torch.set_grad_enabled(self.tracks)  # so that trained parameters behind the head show
        return self.given[None].clone()  # models write into their logits

    def after_head(self, output: Tensor) -> None:
        """The probes go on as they are."""

    def after_base(self, output: Any) -> None:
        torch.set_grad_enabled(False)
        logits = output.logits
        if logits.dim() != 3 or logits.shape[:2] != (1, len(self.given)):
            self.refusal = f"it makes logits {list(logits.shape)} of its head's output {[1, *self.given.shape]}"
            return
        reading = read(self.given[:PROBES], logits[0, :PROBES])
        if isinstance(reading, str):
            self.refusal = reading
        else:
            self.reading, self.logits = reading, logits[0, PROBES:]


@torch.no_grad()
def _rounding_of(logits: Tensor, rows: Tensor, head: Head) -> float:
    """How the head's product rounds, relative to its size: what a few columns in float64 say, at least the dtype's eps.

    Float32 products are TF32's or bfloat16's where a program allows that.
    """
    columns = torch.arange(0, logits.shape[-1], max(1, logits.shape[-1] // 64), device=logits.device)
    exact = rows.double() @ head.weight[columns].double().T
    if head.bias is not None:
        exact += head.bias[columns].double()
    error = (logits[:, columns].double() - exact).abs().max() if len(rows) else torch.zeros(())
    size = logits.double().square().mean().sqrt() if len(rows) else torch.ones(())
    return max(torch.finfo(logits.dtype).eps, (error / size.clamp(min=1e-30)).item())
