"""The field: one function per way to compute the same loss. A new competitor is one function here.

All compute ``NLL(prompt + chosen) + 0.1 * mean softplus(-log_odds(answers))`` of the same padded batch, as a scalar
that ``backward`` works on. Where a library takes flat rows it gets the scored rows alone, which is its strongest use
and what its user would write; where it takes the padded batch (Liger, the naive way of Hugging Face models) it gets
that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orpo_kernels
from benchmarks.cases import BETA, IGNORE
from benchmarks.floor import CHUNK
from benchmarks.inputs import Problem
from benchmarks.machine import version
from orpo_kernels import reference
from orpo_kernels.backends import available, by_preference, select
from orpo_kernels.objective import OddsRatio

Step = Callable[[], Tensor]  # one forward: the scalar loss
Build = Callable[[Problem], Step]


class UnsupportedError(Exception):
    """This provider cannot compute this problem here; the message is the reason."""


@dataclass(frozen=True)
class Provider:
    """A named way to compute the loss. ``build`` does what a user does once, the step what a training step does."""

    name: str
    package: str  # whose version is recorded
    build: Build

    def version(self) -> str:
        """The version installed, or "" where it is not."""
        return version(self.package)


def compose(logps: Tensor, problem: Problem) -> Tensor:
    """The loss from log-probabilities ``[2P, T]`` of ``problem.targets``: what the user of a fused head writes."""
    in_answer, in_nll = problem.labels != IGNORE, problem.nll_labels != IGNORE
    means = torch.where(in_answer, logps, 0.0).sum(-1) / in_answer.sum(-1)
    nll = -torch.where(in_nll, logps, 0.0).sum() / in_nll.sum()
    chosen, rejected = means.chunk(2)
    return nll + OddsRatio(BETA)(chosen, rejected).loss.mean()


def compose_scored(logps: Tensor, problem: Problem) -> Tensor:
    """``compose`` for log-probabilities ``[N]`` of the scored positions alone."""
    scored = problem.targets != IGNORE
    return compose(logps.new_zeros(scored.shape).masked_scatter(scored, logps), problem)


def _naive(problem: Problem) -> Step:
    """Hugging Face's way: logits of all positions in the dtype, one log-softmax in float32.

    ``reference.orpo_loss`` is the judge and multiplies by the head up to three times, so it would be a slow opponent;
    this is its log-probabilities once.
    """

    def step() -> Tensor:
        logps = reference.linear_logprobs(problem.hidden, problem.weight, problem.targets, softcap=problem.softcap)
        return compose(logps, problem)

    return step


def _naive_scored(problem: Problem) -> Step:
    """The naive loss on the scored rows alone: what two lines of indexing give without any library."""
    targets = problem.targets[problem.targets != IGNORE]

    def step() -> Tensor:
        logps = reference.linear_logprobs(problem.scored_rows(), problem.weight, targets, softcap=problem.softcap)
        return compose_scored(logps, problem)

    return step


def _compiled(problem: Problem) -> Step:
    """torch.compile of the naive loss."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logps = reference.linear_logprobs(hidden, weight, targets, softcap=problem.softcap)
        return compose(logps, problem)

    fast = torch.compile(loss, dynamic=False)
    return lambda: fast(problem.hidden, problem.weight, problem.targets)


def _liger(compiled: bool) -> Build:
    def build(problem: Problem) -> Step:
        if problem.softcap is not None:
            raise UnsupportedError("LigerFusedLinearORPOLoss has no softcap")
        loss = _import("liger_kernel.chunked_loss").LigerFusedLinearORPOLoss(beta=BETA, compiled=compiled)

        def step() -> Tensor:
            # Liger's semantics are the reference's: nll_target sums over its chosen half and divides by that half's
            # labels, means of answers are per sequence, the odds term is a mean over pairs. One difference, not seen
            # here: it divides by an empty answer's count without a guard.
            out, _ = loss(problem.weight, problem.hidden, problem.labels, None, problem.nll_labels)
            total: Tensor = out
            return total

        return step

    return build


def _cce(impl: str) -> Build:
    def build(problem: Problem) -> Step:
        if problem.device.type == "cpu":
            raise UnsupportedError(
                "cut-cross-entropy's kernels need a GPU; its CPU path is torch.compile of the plain loss"
            )
        linear_cross_entropy = _import("cut_cross_entropy").linear_cross_entropy

        def step() -> Tensor:
            nll = linear_cross_entropy(
                problem.hidden,
                problem.weight,
                problem.targets,
                softcap=problem.softcap,
                ignore_index=IGNORE,
                reduction="none",
                impl=impl,
            )
            return compose(-nll.float(), problem)

        return step

    return build


class _HeadOnly(nn.Module):
    """As much of a causal language model as TRL's fused head asks for, around hidden states that are already there."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.config = SimpleNamespace(final_logit_softcapping=problem.softcap)
        self.config.get_text_config = lambda: self.config
        self.head = SimpleNamespace(weight=problem.weight, bias=None)

    def forward(self, **_: Any) -> None:
        raise NotImplementedError("only the fused head is called")

    def base_model(self, hidden: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head


def _trl_fused(problem: Problem) -> Step:
    """TRL's fused head, as its own trainers add it. It compacts to the scored rows on a GPU and not on a CPU."""
    model = _HeadOnly(problem)
    _import("trl.trainer.utils").add_fused_lm_head(model)

    def step() -> Tensor:
        out = model(hidden=problem.hidden, shift_labels=problem.targets, fused_lm_head=True)
        return compose(out.log_probs, problem)

    return step


def _torch_lce(problem: Problem) -> Step:
    """torch's chunked linear cross-entropy, unreduced, which takes the odds term's gradient per token."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnsupportedError(f"torch {torch.__version__} has no linear_cross_entropy")
    if problem.softcap is not None:
        raise UnsupportedError("F.linear_cross_entropy has no softcap")
    # The floor's chunk: the default picks chunks of 32 to 128 rows at these sizes, which made it ten times slower here.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK[problem.device.type])
    targets = problem.targets[problem.targets != IGNORE]

    def step() -> Tensor:
        nll = F.linear_cross_entropy(problem.scored_rows(), problem.weight, targets, reduction="none", options=options)
        return compose_scored(-nll.float(), problem)

    return step


def _ours(backend: str, *, lean: bool = False) -> Build:
    def build(problem: Problem) -> Step:
        # On a CPU one byte holds no E, so the planner has to recompute it: the leanest plan, at one product more. On a
        # GPU slices of E are memory like any other, and 1 GiB is what they are promised to fit.
        workspace_bytes = None if not lean else 1 if problem.device.type == "cpu" else 1 << 30
        try:
            select(backend, problem.device, problem.hidden.dtype)
        except ValueError as refusal:
            raise UnsupportedError(str(refusal)) from refusal

        def step() -> Tensor:
            return orpo_kernels.orpo_loss(
                problem.hidden,
                problem.weight,
                problem.labels,
                nll_labels=problem.nll_labels,
                beta=BETA,
                softcap=problem.softcap,
                backend=backend,
                workspace_bytes=workspace_bytes,
            ).loss

        return step

    return build


def _import(module: str) -> ModuleType:
    """An optional competitor's module. Its absence is a reason; an error inside it is not."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or module.split(".")[0] != missing.name.split(".")[0]:
            raise
        raise UnsupportedError(f"{missing.name} is not installed") from missing


NAIVE = Provider("naive", "torch", _naive)

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        NAIVE,
        Provider("naive_scored", "torch", _naive_scored),
        Provider("compiled", "torch", _compiled),
        Provider("liger", "liger-kernel", _liger(compiled=True)),
        Provider("liger_eager", "liger-kernel", _liger(compiled=False)),
        Provider("cce", "cut-cross-entropy", _cce("cce_exact")),
        Provider("cce_filtered", "cut-cross-entropy", _cce("cce")),
        Provider("trl_fused", "trl", _trl_fused),
        Provider("torch_lce", "torch", _torch_lce),
        Provider("ours", "orpo_kernels", _ours("auto")),
        Provider("ours_recompute", "orpo_kernels", _ours("auto", lean=True)),
        *(Provider(f"ours_{backend.name}", "orpo_kernels", _ours(backend.name)) for backend in available()),
    )
}

FLOOR = "floor"  # a name beside the providers: the products alone, see floor.py
NAMES: tuple[str, ...] = (FLOOR, *PROVIDERS)


def default_names(device: torch.device) -> tuple[str, ...]:
    """All but the backend that "auto" takes on such a device anyway, which would be measured twice."""
    return tuple(name for name in NAMES if name != f"ours_{by_preference(device)[0].name}")
