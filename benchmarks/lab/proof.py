"""The kernels' proof: a small call of every kind and in every form against float64, and what cures one that fails.

``python -m benchmarks.lab.proof cuda`` only makes the calls, a process for each core, which fills Triton's cache with
what they launch: what the race and a training run launch too, as no batch compiles anything new.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from benchmarks.accuracy import FACTOR, GRAD_FLOOR, VALUE_FLOOR, relative_error
from benchmarks.harness import isolate, machine
from benchmarks.harness.measure import UnsupportedError, measured
from benchmarks.harness.record import Row
from benchmarks.lab.tune import Candidate, Form
from benchmarks.problems.cases import IGNORE, STATES, States
from benchmarks.problems.inputs import WEIGHT_STD, make_hidden
from orpo_kernels import linear_logprobs, orpo_loss, preference_loss, reference
from orpo_kernels.backends import kernels
from orpo_kernels.backends.kernels.configs import Config, Tile, arch_of, config, gluon_lacks
from orpo_kernels.backends.triton_backend import TritonBackend
from orpo_kernels.objectives import SimPO

TASK, MODULE = "proof", "benchmarks.lab.proof"
LARGE = {"pairs": 4, "length": 70, "times": 13}  # more tiles of E than a chip has multiprocessors
TOY = {"pairs": 3, "length": 4, "times": 1}
BISECTION = 0.4  # of the time for the proof, at most
REFERENCES: dict[Any, Callable[..., Any]] = {
    orpo_loss: reference.orpo_loss,
    linear_logprobs: reference.linear_logprobs,
    preference_loss: reference.preference_loss,
}


@dataclass(frozen=True)
class Kind:
    """What inputs and options of a call may be, as far as it changes what is launched."""

    dtype: str = "bfloat16"
    features: int = 128
    vocab: int = 1000  # or a multiple
    bias: bool = False
    frozen: tuple[str, ...] = ()
    form: str | None = None  # of the GEMM of E; None takes the chip's
    room: float | None = None  # workspace, as a share of the bytes of E for every position
    states: States = STATES["trained-like"]
    function: Callable[..., Any] = orpo_loss
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def capped(self) -> bool:
        return "softcap" in self.options

    def config(self, arch: str) -> Config:
        row = config(arch, getattr(torch, self.dtype))
        return row if self.form is None else row._replace(form=self.form)  # type: ignore[arg-type]

    def chosen(self, arch: str) -> tuple[str, Tile]:
        """The form and the tile of such a call on a chip."""
        aligned = self.features * getattr(torch, self.dtype).itemsize % 16 == 0
        settings: dict[str, Any] = {"mapped": aligned, "biased": self.bias, "capped": self.capped}
        return self.config(arch).choose(features=self.features, **settings)

    def workspace(self, labels: Tensor, vocab: int) -> int | None:
        itemsize = 2 if self.dtype == "bfloat16" else 4  # of E
        return None if self.room is None else max(int(self.room * labels.numel() * vocab * itemsize), 1)


CAP = {"softcap": 30.0}
# A head's usual kinds first, then what may trip a launch.
KINDS = {
    "bfloat16": Kind(),
    "float16": Kind("float16"),
    "float32": Kind("float32"),
    "softcap": Kind(options=CAP),
    "bias": Kind(bias=True),
    "wide": Kind(features=4096),
    "wide with a softcap": Kind(features=4096, options=CAP),
    "pointers": Kind(form="pointer"),
    "Gluon": Kind(form="gluon"),
    "Gluon, float16, a softcap and a bias": Kind("float16", form="gluon", bias=True, options=CAP),
    "library": Kind(form="library"),
    "rows that no tensor map describes": Kind(features=99, vocab=1001),
    "an odd vocabulary": Kind(vocab=1001),
    "rows that overflow": Kind(states=States("overflow", noise=25.0, margin=None)),
    "frozen head": Kind(frozen=("weight",)),
    "frozen hidden states": Kind(frozen=("hidden",)),
    "no gradient": Kind(frozen=("weight", "hidden")),
    "E computed again": Kind(room=0.0),
    "groups of pairs": Kind(room=0.45),
    "log-probabilities": Kind(function=linear_logprobs),
    "an objective in torch": Kind(function=preference_loss, options={"objective": SimPO()}),
    "mean over sequences": Kind(options={"nll_reduction": "sequence"}),
}


@dataclass(frozen=True)
class Given:
    """Inputs of a call, as leaves."""

    hidden: Tensor  # [2P, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [2P, T]

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}

    def double(self) -> "Given":
        def cast(leaf: Tensor | None) -> Any:
            return None if leaf is None else leaf.detach().double().requires_grad_(leaf.requires_grad)

        return replace(self, hidden=cast(self.hidden), weight=cast(self.weight), bias=cast(self.bias))


class _Cramped(TritonBackend):
    """With so little scratch that small inputs are cut as large ones are."""

    least_scratch = 1 << 16


def given(kind: Kind, device: torch.device, pairs: int, length: int, times: int) -> Given:
    """The same numbers for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, vocab = getattr(torch, kind.dtype), kind.vocab * times

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, WEIGHT_STD, generator=generator)

    weight, bias = normal(vocab, kind.features), normal(vocab) if kind.bias else None
    labels = torch.randint(vocab, (2 * pairs, length), generator=generator, device=device)
    dropped = torch.rand(labels.shape, generator=generator, device=device) > 0.7
    labels[:, 1:][dropped[:, 1:]] = IGNORE  # every sequence keeps its first
    hidden = make_hidden(weight, labels, kind.states, kind.options.get("softcap"), generator)
    grads = [name not in kind.frozen for name in ("hidden", "weight")]
    bias = bias if bias is None else bias.requires_grad_()
    return Given(hidden.requires_grad_(grads[0]), weight.requires_grad_(grads[1]), bias, labels)


def outputs(kind: Kind, of: Given, function: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
    """What a call returns, and the gradients of it."""
    out = function(of.hidden, of.weight, of.labels, bias=of.bias, **kind.options, **options)
    value = out["loss"] if isinstance(out, dict) else out if isinstance(out, Tensor) else out.loss
    upstream = torch.ones_like(value) if value.dim() == 0 else torch.arange(value.numel(), device=value.device)
    scalar = (value * upstream.view_as(value) / upstream.numel()).sum()
    grads = torch.autograd.grad(scalar, list(of.leaves.values())) if of.leaves else ()
    return {"value": value.detach(), **dict(zip(of.leaves, grads, strict=True))}


def ours(kind: Kind, of: Given, row: Config) -> dict[str, Tensor]:
    room = kind.workspace(of.labels, of.weight.shape[0])
    return outputs(kind, of, kind.function, backend=_Cramped(config=row), workspace_bytes=room)


def kinds(arch: str) -> dict[str, Kind]:
    """What can run on a chip: the interpreter multiplies float32 alone, slowly, and knows no Gluon."""
    if arch != "interpreter":
        return KINDS
    found: dict[str, Kind] = {}
    for name, kind in KINDS.items():
        small = replace(kind, dtype="float32", features=min(kind.features, 128))
        if kind.form != "gluon" and small not in found.values():
            found[name] = small
    return found


def rows(arch: str) -> list[Row]:
    """What is to be proven, the calls of a form next to each other and the chip's own form first."""
    asked = [row_of(kind, name, *kind.chosen(arch)) for name, kind in kinds(arch).items()]
    forms = list(dict.fromkeys(row.provider for row in asked))
    return sorted(asked, key=lambda row: forms.index(row.provider))


def row_of(kind: Kind, name: str, form: str, tile: Tile, change: str = "") -> Row:
    return Row(name, dtype=kind.dtype, provider=form, task=TASK, setting=change, figures=tile._asdict())


def run(device: torch.device, seconds: float, process: Callable[..., list[Row]] = isolate.process) -> list[Row]:
    """An answer to each kind; then, where one form alone fails, to the first kind that fails in it with one thing
    changed at a time."""
    end = time.time() + seconds
    share, options = seconds * (1 - BISECTION), {"device": device.type}
    arch, together = arch_of(device), attrgetter("provider")
    found = isolate.run(MODULE, rows(arch), options, together=together, seconds=share, fair=True)
    suspect = one_that_fails(found)
    if suspect is None:
        return found
    wanted = changed(suspect, arch)
    for index, (row, environment) in enumerate(wanted):
        until = time.time() + (end - time.time()) / (len(wanted) - index)
        found += process(MODULE, [row], {**options, "until": until}, 0, environment)
    return found


def verdict(found: Sequence[Row]) -> tuple[Literal["ok", "failed", "not reached"], str]:
    """Of all kinds of call, in words."""
    asked, tried = ([row for row in found if bool(row.setting) == changed] for changed in (False, True))
    good, bad = sum(map(holds, asked)), [row for row in asked if fails(row)]
    said = [
        f"{good} of {len(asked)} kinds of call hold",
        *(f"{row.case} ({row.provider}) is {row.status}" for row in bad),
    ]
    if tried:
        cures = ", ".join(row.setting for row in tried if holds(row))
        said.append(f"of {len(tried)} changes to the first of them, these cure it: {cures or 'none'}")
    return "failed" if bad else "ok" if good else "not reached", "; ".join(said)


def holds(row: Row) -> bool:
    return row.status == "ok"


def fails(row: Row) -> bool:
    return row.status in ("wrong", "failed")


def one_that_fails(found: Sequence[Row]) -> Row | None:
    """The first call that fails, if all that do have one form and another form holds."""
    bad = [row for row in found if fails(row)]
    forms = {row.provider for row in bad}
    others = any(holds(row) and row.provider not in forms for row in found)
    return bad[0] if len(forms) == 1 and others else None


def changed(row: Row, arch: str) -> list[tuple[Row, dict[str, str]]]:
    """The same call with one thing changed: another form, the tile's settings, the assembler; and its environment."""
    name, form, tile = row.case, row.provider, tile_of(row)
    kind = kinds(arch)[name]
    made = partial(row_of, kind, name)
    found: list[tuple[Row, dict[str, str]]] = []
    if form != "pointer":
        pointers = kind.config(arch)
        found.append((made("pointer", pointers.pointer_capped if kind.capped else pointers.pointer, "pointers"), {}))
    tiles = {
        "not flattened": tile._replace(flatten=False),
        "one program a multiprocessor": tile._replace(programs=1),
        "two stages": tile._replace(stages=min(tile.stages, 2)),
        "tiles in their own order": tile._replace(group_v=1),
    }
    found += [(made(form, other, change), {}) for change, other in tiles.items() if other != tile]
    found.append((made(form, tile, "assembled without optimisation"), {"DISABLE_PTXAS_OPT": "1"}))
    for assembler in sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))[:1]:
        found.append((made(form, tile, f"assembled by {assembler}"), {"TRITON_PTXAS_PATH": str(assembler)}))
    return found


def tile_of(row: Row) -> Tile:
    return Tile(*(row.figures[name] for name in Tile._fields))


def measure(rows: Sequence[Row], *, device: str, until: float) -> Iterator[Row]:
    """Each against float64, in one process up to the first error, after which a GPU's process is worth nothing."""
    place = torch.device(device)
    about = machine.about(place)
    for row in rows:
        if time.time() > until:
            return
        found = measured(row.with_(**about), _measure, place)
        yield found
        if found.status == "failed":
            return


def _measure(row: Row, device: torch.device) -> Row:
    arch = arch_of(device)
    kind = kinds(arch)[row.case]
    if row.provider == "gluon" and (lacks := gluon_lacks()):
        raise UnsupportedError(lacks)
    if not row.setting and kind.form not in (None, row.provider):
        raise UnsupportedError(f"{arch} has no tile for the form {kind.form}")
    candidate = Candidate(cast(Form, row.provider), tile_of(row), kind.capped)
    inputs = given(kind, device, **size(device))
    true = outputs(kind, inputs.double(), REFERENCES[kind.function])
    naive = outputs(kind, inputs, REFERENCES[kind.function])
    found = ours(kind, inputs, candidate.config() if row.setting else kind.config(arch))
    errors, bad = {}, []
    for name, truth in true.items():
        mine, theirs = relative_error(found[name], truth), relative_error(naive[name], truth)
        floor = (VALUE_FLOOR if name == "value" else GRAD_FLOOR)[inputs.hidden.dtype]
        errors[f"{name} error"], errors[f"{name} naive error"] = mine, theirs
        if not mine <= max(FACTOR * theirs, floor):  # nor is NaN
            bad.append(f"{name} has error {mine:.1e}, the naive implementation's is {theirs:.1e}")
    row = row.with_(figures={**row.figures, **errors})
    return row.with_(status="wrong" if bad else "ok", reason="; ".join(bad))


def size(device: torch.device) -> dict[str, int]:
    return LARGE if device.type == "cuda" else TOY


def binaries() -> int:
    """Kernels that this process has compiled, or found in Triton's cache."""
    from triton.runtime.jit import JITFunction

    modules = [kernels.exp_gemm, kernels.rows, kernels.pairs, *([] if gluon_lacks() else [kernels.exp_gemm_gluon])]
    functions = (value for module in modules for value in vars(module).values() if isinstance(value, JITFunction))
    return sum(len(cache[0]) for function in functions for cache in function.device_caches.values())


def _start(device: str, name: str) -> int:
    """How many kernels a kind of call adds. What fails is for the proof to say."""
    place, before = torch.device(device), binaries()
    arch = arch_of(place)
    kind = kinds(arch)[name]
    with suppress(Exception):
        ours(kind, given(kind, place, **size(place)), kind.config(arch))
    return binaries() - before


def main(device: str) -> None:
    started = time.perf_counter()
    wanted = [row.case for row in rows(arch_of(torch.device(device)))]
    added = isolate.everywhere(partial(_start, device), wanted)
    print(f"{len(wanted)} kinds of call, {sum(added)} kernels in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
