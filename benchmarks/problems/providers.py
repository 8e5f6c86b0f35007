"""The field: one function per way to compute the same thing, a new competitor among them.

Most give log-probabilities ``step() -> [2P, T]`` of ``problem.targets``, or ``[N]`` of the target positions alone, and
the task makes a scalar of them: the loss, or their sum under a random upstream gradient. Who computes the loss at once
does that instead. A library that takes flat rows gets the target rows alone, its strongest use and what its user would
write; one that takes the padded batch (Liger, the naive way of Hugging Face models) gets that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.measure import UnsupportedError
from benchmarks.problems.cases import BETA, IGNORE, OBJECTIVE_TASKS
from benchmarks.problems.chains import CHAINS
from benchmarks.problems.floor import ROWS
from benchmarks.problems.inputs import Problem
from benchmarks.problems.objectives import AGAINST_REFERENCE, OBJECTIVES, compose
from benchmarks.problems.released import Step, cce, liger, quack, stock, trl, trl_fused
from orpo_kernels import explain, linear_logprobs, orpo_loss, preference_loss, reference
from orpo_kernels.integrations import fuse
from orpo_kernels.objectives import KTO, ORPO

Build = Callable[[Problem], Step]


@dataclass(frozen=True)
class Provider:
    """A named way. Building it does what a user does once, the step what a training step does."""

    name: str
    package: str  # whose version is recorded
    logprobs: Build | None
    loss: Callable[[Problem, str], Step] | None = None  # of a task of OBJECTIVES
    logits: Build | None = None  # what a model returns, for losses that read it
    chains: Mapping[str, Build] = field(default_factory=dict)  # those of CHAINS that it computes at once

    def build(self, problem: Problem, task: str) -> Step:
        """A step whose result is the task's scalar; UnsupportedError where it cannot compute this problem here."""
        if task in self.chains:
            return self.chains[task](problem)
        if task in CHAINS:
            if self.logits is None:
                raise UnsupportedError(f"{self.name} gives no logits for a loss to read")
            logits, chain = self.logits(problem), CHAINS[task]
            return lambda: chain(logits(), problem)
        if task in OBJECTIVES and self.loss is not None:
            return self.loss(problem, task)
        if self.logprobs is None:
            raise UnsupportedError(f"{self.name} computes the loss at once and gives no log-probabilities")
        logprobs, scalar = self.logprobs(problem), objective(problem, task)
        if task not in AGAINST_REFERENCE:
            return lambda: scalar(logprobs())
        of_reference = torch.no_grad()(self.logprobs(problem.of_reference()))
        return lambda: scalar(logprobs(), of_reference())


def objective(problem: Problem, task: str) -> Callable[..., Tensor]:
    """From log-probabilities, padded or of the target positions alone, to the task's scalar; the reference model's
    follow the policy's where the task has one."""
    scored = problem.targets != IGNORE
    upstream = problem.upstream()
    if task == "logprobs":
        flat = upstream[scored]
        return lambda logps: (logps * (flat if logps.dim() == 1 else upstream)).sum()

    def padded(logps: Tensor) -> Tensor:
        return logps if logps.dim() > 1 else logps.new_zeros(scored.shape).masked_scatter(scored, logps)

    return lambda *logps: compose(task, problem, *map(padded, logps))


def _lazy(problem: Problem) -> Step:
    """The same lines around a fused head."""
    head = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False, device="meta")
    del head.weight
    head.weight = problem.weight  # a leaf as it is, so that its gradient is found where the others' are
    model = fuse(nn.ModuleList([head]), head=head)
    cap = problem.softcap

    def logits() -> Tensor:
        out: Tensor = model[0](problem.hidden)
        return out if cap is None else torch.tanh(out / cap) * cap

    return logits


def _naive(problem: Problem) -> Step:
    """Hugging Face's way: logits of all positions in the dtype, one log-softmax in float32. ``reference.orpo_loss``
    multiplies by the head up to three times, so it would be a slow opponent."""
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    return lambda: reference.linear_logprobs(hidden, weight, targets, softcap=problem.softcap)


def _naive_scored(problem: Problem) -> Step:
    """The naive way on the target rows alone: what two lines of indexing give without any library."""
    targets = problem.targets[problem.targets != IGNORE]
    return lambda: reference.linear_logprobs(problem.target_rows(), problem.weight, targets, softcap=problem.softcap)


def _compiled(problem: Problem) -> Step:
    """torch.compile of the naive way."""
    fast = torch.compile(lambda *inputs: reference.linear_logprobs(*inputs, softcap=problem.softcap), dynamic=False)
    return lambda: fast(problem.hidden, problem.weight, problem.targets)


def _torch_lce(problem: Problem) -> Step:
    """torch's chunked linear cross-entropy, unreduced, which takes a gradient per token."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnsupportedError(f"torch {torch.__version__} has no linear_cross_entropy")
    if problem.softcap is not None:
        raise UnsupportedError("F.linear_cross_entropy has no softcap")
    # The floor's chunk: the default picks chunks of 32 to 128 rows at these sizes, which made it ten times slower here.
    chunk = nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS[problem.device.type][0])
    targets = problem.targets[problem.targets != IGNORE]
    options: dict[str, Any] = {"reduction": "none", "options": chunk}
    return lambda: -F.linear_cross_entropy(problem.target_rows(), problem.weight, targets, **options).float()


def _ours(name: str, backend: str, *, lean: bool = False) -> Provider:
    def bound(function: Callable[..., Any], problem: Problem, ids: Tensor, **options: Any) -> Callable[..., Any]:
        inputs = problem.hidden, problem.weight, ids
        # On a CPU one byte holds no E, so the planner has to recompute it: the leanest plan, at one product more. On a
        # GPU slices of E are memory like any other, and 1 GiB is what they are promised to fit.
        room = None if not lean else 1 if problem.device.type == "cpu" else 1 << 30
        options |= {"softcap": problem.softcap, "backend": backend, "workspace_bytes": room}
        try:
            explain(function, *inputs, **options)
        except ValueError as refusal:
            raise UnsupportedError(str(refusal)) from refusal
        return partial(function, *inputs, **options)

    def logprobs(problem: Problem) -> Step:
        return bound(linear_logprobs, problem, problem.targets)

    def loss(problem: Problem, task: str) -> Step:
        objective = OBJECTIVES[task]
        if task == "loss":
            step = bound(orpo_loss, problem, problem.labels, nll_labels=problem.nll_labels, beta=BETA)
            return lambda: step().loss
        if isinstance(objective, KTO):  # of answers that have no partner, so of log-probabilities
            return Provider(name, "orpo_kernels", logprobs).build(problem, task)
        options = {"nll_labels": problem.nll_labels} if isinstance(objective, ORPO) else {}
        step = bound(preference_loss, problem, problem.labels, objective=objective, **options)
        if task not in AGAINST_REFERENCE:
            return lambda: step().loss
        of_reference = torch.no_grad()(bound(linear_logprobs, problem.of_reference(), problem.labels))
        return lambda: step(reference_logps=of_reference().sum(-1)).loss

    return Provider(name, "orpo_kernels", logprobs, loss)


NAIVE = Provider("naive", "torch", _naive, logits=stock)
BACKENDS = {"cpu": "torch", "cuda": "triton"}  # what "auto" takes there

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        NAIVE,
        Provider("naive_scored", "torch", _naive_scored),
        Provider("compiled", "torch", _compiled),
        Provider("liger", "liger-kernel", None, partial(liger, compiled=True)),
        Provider("liger_eager", "liger-kernel", None, partial(liger, compiled=False)),
        Provider("cce", "cut-cross-entropy", partial(cce, impl="cce_exact")),
        Provider("cce_filtered", "cut-cross-entropy", partial(cce, impl="cce")),
        Provider("trl_fused", "trl", trl_fused),
        Provider("trl", "trl", None, trl),
        Provider("torch_lce", "torch", _torch_lce),
        Provider("quack", "quack-kernels", None, chains={"sft": quack}),
        _ours("ours", "auto"),
        Provider("lazy", "orpo_kernels", None, logits=_lazy),
        _ours("ours_recompute", "auto", lean=True),
        *(_ours(f"ours_{backend}", backend) for backend in ("triton", "torch")),
    )
}

FLOOR = "floor"  # a name beside the providers: the products alone, see floor.py
NAMES: tuple[str, ...] = (FLOOR, *PROVIDERS)
LOGPROBS = (FLOOR, "naive", "trl_fused", "cce", "torch_lce", "ours")  # one of each kind
LOGITS = (FLOOR, "naive", "lazy")
RELEASED = (FLOOR, "naive", "liger", "liger_eager", "trl", "ours")


def default_names(device: str, task: str = "loss") -> tuple[str, ...]:
    """Of the loss all but the backend that "auto" takes on such a device anyway, which would be measured twice."""
    if task in CHAINS:
        return (*LOGITS, *(name for name, provider in PROVIDERS.items() if task in provider.chains))
    if task in OBJECTIVE_TASKS:
        return RELEASED
    left_out = (f"ours_{BACKENDS[device]}", "lazy", "trl", "quack")  # TRL's own is naive, with all that it logs
    return LOGPROBS if task == "logprobs" else tuple(name for name in NAMES if name not in left_out)
