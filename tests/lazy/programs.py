"""Random programs on logits, as lines of Python, run on stock logits and on a fused head's side by side."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from orpo_kernels.integrations import fuse
from orpo_kernels.integrations.lazy.stand_in import LazyLogits

Draw = Callable[..., Any]

# What lazy logits may refuse where stock ones do not: each is a change in place that cannot be followed.
REFUSALS = (
    "changed lazy logits in place, and this view of them, which was taken before, would have to follow",
    "single logits of a token, taken as logits[..., token], were changed in place and are gone with their gradient",
    "would change lazy logits in place, and a view in full of them that was taken before could not follow",
)
# What stock torch forbids although the values are clear; lazy logits may go on.
FORBIDDEN = ("inplace", "in-place", "in place", "view size is not compatible")

LARGEST = 1e4  # values beyond it are left out: what a tolerance is relative to stays near the results
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.2}  # times the largest value of a program


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (numbers(seed, *shape) * 0.3).exp().to(dtype)


def masked(seed: int, *shape: int) -> Tensor:
    """Zeros, and -inf for some but the first."""
    out = torch.where(numbers(seed, *shape) > 1, -torch.inf, 0.0).double()
    out[..., 0] = 0
    return out


def flags(seed: int, *shape: int) -> Tensor:
    return numbers(seed, *shape) > -0.3


def ids(seed: int, below: int, *shape: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, below: int, *shape: int, ignore: int = -100) -> Tensor:
    return ids(seed, below, *shape).where(flags(seed + 1, *shape), ignore)


def hooked(x: Tensor) -> Tensor:
    """Scaled, as a hook on a view is lost in stock torch where that is changed in place."""
    x = x * 1.0
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 0.5)
    return x


TOOLS = {"torch": torch, "F": F, "inf": float("inf")} | {
    tool.__name__: tool for tool in (numbers, positive, masked, flags, ids, labels, hooked)
}


@dataclass(frozen=True)
class Setting:
    """A head and the hidden states of one call."""

    lead: tuple[int, ...] = (2, 3)
    vocab: int = 12
    features: int = 4
    bias: bool = False
    frozen: str = ""  # hidden or weight: what has no gradient
    workspace_bytes: int | None = None

    def make(self, fused: bool) -> tuple[Tensor, list[Tensor]]:
        """The logits, and what autograd tracks."""
        hidden = numbers(0, *self.lead, self.features)
        model = nn.Module()
        model.head = nn.Linear(self.features, self.vocab, bias=self.bias, dtype=torch.float64)
        with torch.no_grad():
            model.head.weight.copy_(numbers(1, self.vocab, self.features) * 0.7)
            if self.bias:
                model.head.bias.copy_(numbers(2, self.vocab))
        hidden.requires_grad_(self.frozen != "hidden")
        model.head.weight.requires_grad_(self.frozen != "weight")
        if fused:
            fuse(model, model.head, workspace_bytes=self.workspace_bytes)
        tracked = [x for x in (hidden, *model.head.parameters()) if x.requires_grad]
        return model.head(hidden), tracked


SETTINGS = st.builds(
    Setting,
    lead=st.sampled_from([(2, 3), (1, 4), (3, 1), (1, 1), (5,), (2, 2, 2)]),
    vocab=st.integers(12, 20),
    features=st.integers(4, 6),
    bias=st.booleans(),
    frozen=st.sampled_from(["", "", "", "weight", "hidden"]),
    workspace_bytes=st.sampled_from([None, None, 1, 2000]),
)


class Both:
    """The variables of a program on stock logits, on lazy ones, and what became of its lines."""

    def __init__(self, setting: Setting, counts: Counter[str] | None = None) -> None:
        self.setting, self.lines = setting, []
        self.counts = Counter[str]() if counts is None else counts
        self.stock, self.stock_tracked = setting.make(False)
        self.lazy, self.lazy_tracked = setting.make(True)
        assert isinstance(self.lazy, LazyLogits)
        self.of_stock: dict[str, Any] = {**TOOLS, "z": self.stock}
        self.of_lazy: dict[str, Any] = {**TOOLS, "z": self.lazy}
        self.over = False

    def run(self, line: str) -> None:
        """One line on both; what it raises on one it must raise on the other."""
        if self.over:
            return
        expected = _execute(line, self.of_stock)
        if isinstance(expected, RuntimeError) and any(word in str(expected) for word in FORBIDDEN):
            self.counts["forbidden"] += 1
            return
        self.lines.append(line)
        got = _execute(line, self.of_lazy)
        self.counts["lines"] += 1
        if expected is None and isinstance(got, RuntimeError) and any(text in str(got) for text in REFUSALS):
            self.counts["refused"] += 1
            self.over = True
            return
        every = [each() for each in self.lazy.view_of.root.views]
        if sum(isinstance(x, LazyLogits) and x.shown for x in every) > 1 and not re.match(r"v\d+ = ", line):
            self.over = True  # two views in full of the same memory are not one, and cannot follow each other
            return
        if (expected is None) != (got is None):
            raise AssertionError(f"{self}\nstock: {expected!r}\nlazy: {got!r}") from got
        name = line.split(" ")[0]
        if expected is not None:
            self.counts["raised"] += 1
        elif name in self.of_stock:
            self._same_kind(name)
            value = self.of_stock[name]
            finite = value.data[value.data.isfinite()] if isinstance(value, Tensor) else torch.empty(0)
            if finite.numel() and finite.is_floating_point() and finite.abs().max() > LARGEST:
                self.over = True

    def _same_kind(self, name: str) -> None:
        a, b = self.of_stock[name], self.of_lazy[name]
        if not isinstance(a, Tensor):
            assert type(a) is type(b), f"{self}\n{name}: {type(a)} and {type(b)}"
            assert not isinstance(a, bool | int | tuple) or a == b, f"{self}\n{name}: {a} and {b}"
            return
        seen = [(tuple(x.shape), x.dtype, x.requires_grad, x.dim(), x.numel()) for x in (a, b)]
        assert seen[0] == seen[1], f"{self}\n{name}: {seen[0]} and {seen[1]}"
        if not isinstance(b, LazyLogits):
            self._close(name, a, b)

    def _scale(self) -> tuple[float, float]:
        """A tolerance, and the largest value so far."""
        found, size = TOLERANCE[torch.float64], 1.0
        for x in self.of_stock.values():
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                found = max(found, TOLERANCE[x.dtype])
                size = max(size, x.data.double().nan_to_num(0, 0, 0).abs().max().item())
        return found, size

    def _close(self, name: str, a: Tensor, b: Tensor, size: float = 1.0) -> None:
        tolerance, largest = self._scale()
        a, b = a.data, b.detach()
        if a.dtype.is_floating_point:
            a, b = a.double(), b.double()
            b = b.where(~a.isnan(), torch.nan)  # 0 times -inf, which lazy logits know to be 0
            error = (a - b).abs().where(a != b, 0).nan_to_num(0) if a.numel() else torch.zeros(1)
            same = torch.equal(a.isnan(), b.isnan()) and error.max() <= tolerance * largest * size
        else:
            same = torch.equal(a, b)
        assert same, f"{self}\n{name}:\n{a}\n{b}"

    def finish(self, seed: int = 0, parts: int = 1) -> None:
        """Compare every value, and the gradients of a loss made of them all, in so many backward passes."""
        losses = [torch.zeros((), dtype=torch.float64)] * parts, [torch.zeros((), dtype=torch.float64)] * parts
        if self.over:
            return
        leaves: list[str] = []
        names = [name for name, x in self.of_stock.items() if isinstance(x, Tensor) and name in self.of_lazy]
        for at, name in enumerate(names):
            a, b = self.of_stock[name], self.of_lazy[name]
            weights = numbers(seed + at, *a.shape)
            used = a.requires_grad and (at + seed) % 3 != 1 and bool(a.data.isfinite().all())
            parts_of = []
            for x in (a, b):
                try:
                    shown = torch.tensor(x.detach().tolist(), dtype=x.dtype).reshape(x.shape)
                    parts_of.append((shown, (x.double() * weights).sum() if used else None))
                except RuntimeError as error:
                    known = FORBIDDEN if x is a else REFUSALS
                    if not any(text in str(error) for text in known):
                        raise
                    self.counts["forbidden" if x is a else "refused"] += 1
                    break
            else:
                self._close(name, parts_of[0][0], parts_of[1][0])
                if used and a.is_leaf:
                    leaves.append(name)
                for loss, (_, part) in zip(losses, parts_of, strict=True):
                    if part is not None:
                        loss[at % parts] = loss[at % parts] + part
        for loss, other in zip(*losses, strict=True):
            if not loss.requires_grad:
                continue
            try:
                loss.backward(retain_graph=True)
            except RuntimeError as error:
                if any(word in str(error) for word in FORBIDDEN):
                    self.counts["forbidden backward"] += 1
                    return
                raise
            other.backward(retain_graph=True)
        for name in leaves:
            a, b = (variables[name].grad for variables in (self.of_stock, self.of_lazy))
            try:
                self._close(f"gradient of {name}", a, b.reshape(a.shape), max(1.0, a.abs().max().item()))
            except RuntimeError as error:
                if "known of logits alone" not in str(error):
                    raise
                self.counts["refused"] += 1
        for of, a, b in zip(("first", "second", "third"), self.stock_tracked, self.lazy_tracked, strict=False):
            if a.grad is None or b.grad is None:
                assert a.grad is None or not a.grad.any(), f"{self}\nno gradient of the {of} tensor"
                continue
            if a.grad.isfinite().all():
                self.counts["gradients"] += 1
                self._close(f"gradient of the {of} tensor", a.grad, b.grad, max(1.0, a.grad.abs().max().item()))

    def __str__(self) -> str:
        return f"{self.setting}\n" + "\n".join(self.lines)


def _execute(line: str, variables: dict[str, Any]) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(line, variables)
        except Exception as error:
            return error
    return None


def check(setting: Setting, lines: str | Iterable[str], parts: int = 1) -> Both:
    """Run a program that is given as text."""
    both = Both(setting)
    for line in lines.strip().split("\n") if isinstance(lines, str) else lines:
        both.run(line.strip())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.finish(parts=parts)
    return both
