"""The floor: the products that no exact implementation can leave out, alone, on the target rows.

They can be cut in chunks of rows, in slices of the vocabulary that stay in a cache, or not at all, and dw can read z by
columns or a copy that is transposed already. Which is fastest depends on the machine and on the number of targets, of
which an odd one is slow for the copy on a GPU. The floor is the fastest, chosen before anything is timed with it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness.measure import in_turn
from benchmarks.problems.inputs import Problem

# Rows of a chunk and tokens of a slice. A GPU needs larger ones for full speed, and on it each chunk of rows writes a
# gradient of the head that a real accumulation would have to read as well.
ROWS = {"cpu": (1024,), "cuda": (8192,)}
TOKENS = {"cpu": (2048, 8192), "cuda": (16384,)}
WHOLE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # of logits that are not cut at all; a machine that races has as much

Step = Callable[[], None]


def products(phase: str, *, trains: bool) -> int:
    """How many a call has, whose head trains or is frozen."""
    return 1 if phase == "forward" else 3 if trains else 2


def cuts(problem: Problem, phase: str, forwards: int = 1) -> Iterator[tuple[str, Step]]:
    """Every cut of the products, by name. Each is built, with its buffers, when it is asked for. ``forwards``: how many
    models are asked for logits, the one that trains and perhaps a reference."""
    rows, weight = problem.target_rows().detach(), problem.weight.detach()
    n, vocab, device = rows.shape[0], weight.shape[0], rows.device.type
    count = products(phase, trains=problem.weight.requires_grad)
    sizes = [(f"{chunk} rows", chunk, vocab) for chunk in ROWS[device] if chunk < n]
    sizes += [(f"{tokens} tokens", n, tokens) for tokens in TOKENS[device] if tokens < vocab]
    if n <= min(ROWS[device]) or n * vocab * rows.element_size() <= WHOLE_BYTES[device]:
        sizes.append(("whole", n, vocab))
    for name, chunk, tokens in sizes:
        yield name, _step(rows, weight, count, forwards, chunk, tokens, transposed=count == 3)
        if count == 3:
            yield f"{name}, z by columns", _step(rows, weight, count, forwards, chunk, tokens, transposed=False)


def build_floor(problem: Problem, phase: str, forwards: int = 1) -> tuple[str, Step]:
    """The fastest cut and its name; of the others no buffer is kept."""
    best: tuple[float, str, Step] = (float("inf"), "", lambda: None)
    if not len(problem.target_rows()):
        raise ValueError(f"a floor needs a target, got labels {tuple(problem.targets.shape)} without one")
    for name, step in cuts(problem, phase, forwards):
        (times,) = in_turn([step], problem.device, repeats=2, warm_up=1)
        if min(times) < best[0]:
            best = (min(times), name, step)
    return best[1:]


def _step(
    rows: Tensor, weight: Tensor, products: int, forwards: int, chunk: int, tokens: int, *, transposed: bool
) -> Step:
    """``z = h W^T``, ``dh = z W`` and ``dw = z^T h``, the first one, two or all three, per chunk and slice. It is a
    floor, not a rival: nothing is allocated or accumulated within, and ``transposed`` gives dw a factor of its own,
    since no implementation has both layouts for nothing, but one may have either."""
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    logits = rows.new_empty(chunk * tokens)
    copy = rows.new_empty(chunk * tokens if transposed else 0).normal_()

    def step() -> None:
        for h, grad_h in zip(rows.split(chunk), grad_rows.split(chunk), strict=True):
            for w, grad_w in zip(weight.split(tokens), grad_weight.split(tokens), strict=True):
                count, width = h.shape[0], w.shape[0]
                z = logits[: count * width].view(count, width)
                for _ in range(forwards):
                    torch.mm(h, w.T, out=z)
                if products > 1:
                    torch.mm(z, w, out=grad_h)
                if products > 2:
                    torch.mm(copy[: count * width].view(width, count) if transposed else z.T, h, out=grad_w)

    return step
