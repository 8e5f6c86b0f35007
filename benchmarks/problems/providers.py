"""The field: one function per way to compute the same thing, a new competitor among them.

Most give log-probabilities ``step() -> [2P, T]`` of ``problem.targets``, or ``[N]`` of the target positions alone, and
the task makes a scalar of them: the loss, or their sum under a random upstream gradient. Who computes the loss at once
does that instead. A library that takes flat rows gets the target rows alone, its strongest use and what its user would
write; one that takes the padded batch (Liger, the naive way of Hugging Face models) gets that.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.measure import UnsupportedError
from benchmarks.problems.cases import BETA, IGNORE
from benchmarks.problems.chains import CHAINS
from benchmarks.problems.floor import ROWS
from benchmarks.problems.inputs import Problem
from orpo_kernels import explain, linear_logprobs, orpo_loss, reference
from orpo_kernels.integrations import fuse

Step = Callable[[], Tensor]  # one forward
Build = Callable[[Problem], Step]


@dataclass(frozen=True)
class Provider:
    """A named way. Building it does what a user does once, the step what a training step does."""

    name: str
    package: str  # whose version is recorded
    logprobs: Build | None
    loss: Build | None = None
    logits: Build | None = None  # what a model returns, for losses that read it

    def build(self, problem: Problem, task: str) -> Step:
        """A step whose result is the task's scalar; UnsupportedError where it cannot compute this problem here."""
        if task in CHAINS:
            if self.logits is None:
                raise UnsupportedError(f"{self.name} gives no logits for a loss to read")
            logits, chain = self.logits(problem), CHAINS[task]
            return lambda: chain(logits(), problem)
        if task == "loss" and self.loss is not None:
            return self.loss(problem)
        if self.logprobs is None:
            raise UnsupportedError(f"{self.name} computes the loss at once and gives no log-probabilities")
        logprobs, scalar = self.logprobs(problem), objective(problem, task)
        return lambda: scalar(logprobs())


def objective(problem: Problem, task: str) -> Callable[[Tensor], Tensor]:
    """From log-probabilities, padded or of the target positions alone, to the task's scalar."""
    scored = problem.targets != IGNORE
    upstream = problem.upstream()
    if task == "logprobs":
        flat = upstream[scored]
        return lambda logps: (logps * (flat if logps.dim() == 1 else upstream)).sum()

    def loss(logps: Tensor) -> Tensor:
        if logps.dim() == 1:
            logps = logps.new_zeros(scored.shape).masked_scatter(scored, logps)
        return compose(logps, problem)

    return loss


def compose(logps: Tensor, problem: Problem) -> Tensor:
    """The loss from log-probabilities ``[2P, T]`` of ``problem.targets``: what the user of a fused head writes."""
    in_answer, in_nll = problem.labels != IGNORE, problem.nll_labels != IGNORE
    means = torch.where(in_answer, logps, 0.0).sum(-1) / in_answer.sum(-1)
    nll = -torch.where(in_nll, logps, 0.0).sum() / in_nll.sum()
    chosen, rejected = means.chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return nll - BETA * F.logsigmoid(log_odds).mean()


def _stock(problem: Problem) -> Step:
    """A model's last lines: the head, and a softcap where it has one."""
    cap = problem.softcap

    def logits() -> Tensor:
        out = F.linear(problem.hidden, problem.weight)
        return out if cap is None else torch.tanh(out / cap) * cap

    return logits


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


def _liger(problem: Problem, *, compiled: bool) -> Step:
    """Liger's semantics are the reference's: nll_target sums over its chosen half and divides by that half's labels,
    means of answers are per sequence, the odds term is a mean over pairs. One difference, not seen here: it divides by
    an empty answer's count without a guard."""
    if problem.softcap is not None:
        raise UnsupportedError("LigerFusedLinearORPOLoss has no softcap")
    loss = _import("liger_kernel.chunked_loss").LigerFusedLinearORPOLoss(beta=BETA, compiled=compiled)
    inputs = problem.weight, problem.hidden, problem.labels, None, problem.nll_labels
    return lambda: cast(Tensor, loss(*inputs)[0])


def _cce(problem: Problem, *, impl: str) -> Step:
    if problem.device.type == "cpu":
        raise UnsupportedError(
            "cut-cross-entropy's kernels need a GPU; its CPU path is torch.compile of the plain loss"
        )
    nll = _import("cut_cross_entropy").linear_cross_entropy
    inputs = problem.hidden, problem.weight, problem.targets
    options = {"softcap": problem.softcap, "ignore_index": IGNORE, "reduction": "none", "impl": impl}
    return lambda: -nll(*inputs, **options).float()


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
    """TRL's fused head, as its own trainers add it. It compacts to the target rows on a GPU and not on a CPU."""
    model: Any = _HeadOnly(problem)
    _import("trl.trainer.utils").add_fused_lm_head(model)
    return lambda: model(hidden=problem.hidden, shift_labels=problem.targets, fused_lm_head=True).log_probs


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
    def bound(function: Callable[..., Any], problem: Problem, ids: Tensor, **options: Any) -> Callable[[], Any]:
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

    def loss(problem: Problem) -> Step:
        step = bound(orpo_loss, problem, problem.labels, nll_labels=problem.nll_labels, beta=BETA)
        return lambda: step().loss

    return Provider(name, "orpo_kernels", lambda problem: bound(linear_logprobs, problem, problem.targets), loss)


def _import(module: str) -> ModuleType:
    """An optional competitor's module. Its absence is a reason; an error inside it is not."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or module.split(".")[0] != missing.name.split(".")[0]:
            raise
        raise UnsupportedError(f"{missing.name} is not installed") from missing


NAIVE = Provider("naive", "torch", _naive, logits=_stock)
BACKENDS = {"cpu": "torch", "cuda": "triton"}  # what "auto" takes there

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        NAIVE,
        Provider("naive_scored", "torch", _naive_scored),
        Provider("compiled", "torch", _compiled),
        Provider("liger", "liger-kernel", None, partial(_liger, compiled=True)),
        Provider("liger_eager", "liger-kernel", None, partial(_liger, compiled=False)),
        Provider("cce", "cut-cross-entropy", partial(_cce, impl="cce_exact")),
        Provider("cce_filtered", "cut-cross-entropy", partial(_cce, impl="cce")),
        Provider("trl_fused", "trl", _trl_fused),
        Provider("torch_lce", "torch", _torch_lce),
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


def default_names(device: str, task: str = "loss") -> tuple[str, ...]:
    """Of the loss all but the backend that "auto" takes on such a device anyway, which would be measured twice."""
    if task in CHAINS:
        return LOGITS
    left_out = (f"ours_{BACKENDS[device]}", "lazy")
    return LOGPROBS if task == "logprobs" else tuple(name for name in NAMES if name not in left_out)
