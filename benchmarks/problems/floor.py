"""The floor: the products that no exact implementation can leave out, alone, on the scored rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import Phase
from benchmarks.inputs import Problem

# Rows of one chunk: large enough for full speed, small enough that the logits of a chunk fit. A GPU needs more of them,
# and on it each chunk writes a gradient of the head that a real accumulation would have to read as well.
CHUNK = {"cpu": 1024, "cuda": 8192}


def build_floor(problem: Problem, phase: Phase) -> Callable[[], None]:
    """Per chunk of rows ``z = h W^T``; with gradients ``dh = z W``; for a trainable head ``dw = z^T h``.

    Outputs are allocated once, outside what is timed, and nothing is accumulated: it is a floor, not a rival.
    """
    rows, weight = problem.scored_rows().detach(), problem.weight.detach()
    step_rows = CHUNK[rows.device.type]
    logits = rows.new_empty((min(step_rows, rows.shape[0]), weight.shape[0]))
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    gradients, trainable = phase == "full", problem.weight.requires_grad

    def step() -> None:
        for start in range(0, rows.shape[0], step_rows):
            chunk = slice(start, start + step_rows)
            z = logits[: rows[chunk].shape[0]]
            torch.mm(rows[chunk], weight.T, out=z)
            if gradients:
                torch.mm(z, weight, out=grad_rows[chunk])
                if trainable:
                    torch.mm(z.T, rows[chunk], out=grad_weight)

    return step
