"""The losses over pairs that are raced: a member of the family each, from log-probabilities to its scalar.

``compose`` of ``reference.linear_logprobs`` in float64 is the truth that all are checked against, Liger's and TRL's own
code among them. DPO and KTO meet a reference model: everybody gets its hidden states and computes its
log-probabilities within the call, as TRL does by default and Liger in any case. KTO's estimate of the KL costs everyone
one more forward over answers of other prompts, so it is given.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.cases import BETA, IGNORE, OBJECTIVE_TASKS
from benchmarks.problems.inputs import Problem
from orpo_kernels.objectives import CPO, DPO, KTO, ORPO, PairLogps, PairTerms, SimPO

OBJECTIVES: dict[str, Any] = {
    "loss": ORPO(BETA),
    **dict(zip(OBJECTIVE_TASKS, (ORPO(BETA), CPO(BETA), SimPO(), DPO(BETA), KTO(BETA)), strict=True)),
}
AGAINST_REFERENCE = tuple(task for task, objective in OBJECTIVES.items() if isinstance(objective, DPO | KTO))
KL = 10.0


def posed(problem: Problem, task: str) -> Problem:
    """With the NLL that the task's loss has beside it: of prompt and answer for ORPO, of answers for CPO, else none."""
    objective = OBJECTIVES.get(task)
    if objective is None or isinstance(objective, ORPO):
        return problem
    nll_labels = torch.full_like(problem.labels, IGNORE)
    if isinstance(objective, CPO):
        nll_labels[: len(nll_labels) // 2] = problem.labels.chunk(2)[0]
    return replace(problem, nll_labels=nll_labels)


def desirable(problem: Problem) -> Tensor:
    """``[2P]``, KTO's labels of answers: the chosen ones."""
    return torch.arange(len(problem.labels), device=problem.device) < len(problem.labels) // 2


def compose(task: str, problem: Problem, logps: Tensor, reference_logps: Tensor | None = None) -> Tensor:
    """The loss from log-probabilities ``[2P, T]`` of ``problem.targets``, and from the reference model's for those of
    ``AGAINST_REFERENCE``: what the user of a fused head writes."""
    objective, in_answer, in_nll = OBJECTIVES[task], problem.labels != IGNORE, problem.nll_labels != IGNORE
    sums, lengths = torch.where(in_answer, logps, 0.0).sum(-1), in_answer.sum(-1)
    given = None if reference_logps is None else torch.where(in_answer, reference_logps, 0.0).sum(-1)
    if isinstance(objective, KTO):
        return objective.of_answers(sums, given, desirable(problem), KL).mean()  # type: ignore[arg-type]
    found = objective(PairLogps(*sums.chunk(2), *lengths.chunk(2), *(() if given is None else given.chunk(2))))
    loss: Tensor = (found.loss if isinstance(found, PairTerms) else found).mean()
    nll = -torch.where(in_nll, logps, 0.0).sum() / in_nll.sum().clamp(min=1)
    return loss + getattr(objective, "nll_weight", 0.0) * nll
