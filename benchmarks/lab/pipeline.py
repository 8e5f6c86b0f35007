"""A cycle model of one multiprocessor in the GEMM of E: who waits for whom, and what a tile takes beyond its products.

Consumers issue matrix instructions and then run a tile's epilogue; a stage is loaded again when all that share it have
read it. What a form takes is compared with the tensor cores' own time, which is what a plain product takes at best, so
the model assumes a main loop as good as the library's. It knows nothing of bandwidths, clocks or power. ``python -m
benchmarks.lab.pipeline`` prints the figures of docs/kernels.md.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.problems.cases import CASES

QUANTUM = 8  # cycles that are taken together
PEAK = 2048  # multiply-adds of bfloat16 a cycle (H100: 989 TFLOP/s of 132 multiprocessors at 1.83 GHz)
EXPONENTIALS = 16  # special functions a cycle
ISSUE = 4 * 32  # instructions of a thread a cycle
LATENCY = 800  # cycles from a free stage to its next operands, out of L2
DRAIN = 300  # cycles of an epilogue that no other shortens: the last product, the first exponential, the store
TILES, WARM_UP = 12, 2
HEADS = ("llama3-8b", "qwen2.5-7b", "gemma2-2b", "qwen2.5-0.5b")
ROWS, COLUMNS = 128, 256  # what a multiprocessor holds at a time
SPECIAL = {False: 1, True: 3}  # exponentials and roots an entry, without and with a softcap


class Form(NamedTuple):
    """How a multiprocessor's tile is shared out."""

    consumers: int
    step: int  # features
    stages: int
    shared: bool  # whether consumers read the same stages
    instructions: tuple[float, float]  # of a thread for an entry of E, without and with a softcap (docs/compiled.md)


FORMS = {
    "tma": Form(1, 64, 3, True, (6.0, 18.0)),  # two warpgroups in step are one consumer
    "tma, two programs": Form(2, 64, 3, False, (6.0, 18.3)),
    "gluon": Form(2, 64, 4, True, (4.8, 17.4)),
    "gluon, steps of 32": Form(2, 32, 8, True, (4.8, 17.4)),
}


@dataclass
class Consumer:
    issued: int = 0  # steps, over all tiles
    done: int = 0
    ended: int = 0  # tiles
    work: float = 0.0  # left of an epilogue, in cycles of the units that consumers share
    drain: float = 0.0  # left of what they do not

    def released(self, steps: int) -> int:
        """Steps whose stages it has given back: the last but one issued, and a tile's last when it is done."""
        return self.done if self.done % steps == 0 else min(self.done, max(self.issued - 1, 0))


def cycles(form: Form, features: int, *, capped: bool) -> float:
    """Of a tile of ROWS x COLUMNS, in the steady state."""
    steps, entries = -(-features // form.step), ROWS * COLUMNS / form.consumers
    product = entries * form.step / PEAK
    work = entries * max(SPECIAL[capped] / EXPONENTIALS, form.instructions[capped] / ISSUE)
    consumers, now = [Consumer() for _ in range(form.consumers)], 0.0
    groups = [consumers] if form.shared else [[consumer] for consumer in consumers]
    loads: list[list[float]] = [[] for _ in groups]  # when each step's operands are there
    queue: deque[Consumer] = deque()  # products in the order they were issued, the first of them running
    left, begun = product, 0.0
    while min(consumer.ended for consumer in consumers) < TILES:
        for group, loaded in zip(groups, loads, strict=True):
            while len(loaded) < form.stages + min(consumer.released(steps) for consumer in group):
                loaded.append(now + LATENCY)
            for consumer in group:
                tile_done = consumer.issued == (consumer.ended + 1) * steps
                outstanding = consumer.issued - consumer.done
                if tile_done and not outstanding and not consumer.drain:
                    consumer.work, consumer.drain = work, DRAIN
                elif not tile_done and outstanding < 2 and _there(loaded, consumer.issued, now):
                    consumer.issued += 1
                    queue.append(consumer)
        busy = [consumer for consumer in consumers if consumer.work > 0]
        for consumer in consumers:
            if consumer.work > 0:
                consumer.work -= QUANTUM / len(busy)
            elif consumer.drain:
                consumer.drain = max(consumer.drain - QUANTUM, 0.0)
                consumer.ended += not consumer.drain
        if queue:
            left -= QUANTUM
            if left <= 0:
                queue.popleft().done += 1
                left += product
        now += QUANTUM
        if not begun and min(consumer.ended for consumer in consumers) == WARM_UP:
            begun = now
    return (now - begun) / (TILES - WARM_UP)


def _there(loaded: list[float], step: int, now: float) -> bool:
    return step < len(loaded) and loaded[step] <= now


def ratio(name: str, features: int, *, capped: bool) -> float:
    """Of a form's time to that of the tensor cores alone."""
    return cycles(FORMS[name], features, capped=capped) / (ROWS * COLUMNS * features / PEAK)


def main() -> None:
    for head in HEADS:
        case = CASES[head]
        found = {name: ratio(name, case.features, capped=case.softcap is not None) for name in FORMS}
        print(f"{head}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
