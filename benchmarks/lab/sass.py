"""What a GEMM's epilogue costs a thread, counted in the assembly that the chip runs (SASS).

A thread's way from one matrix instruction to the next, or to the end, either passes exponentials or does not: the
difference is what a tile's last step runs beyond its other steps. Of the ways through an exponential the shortest
counts, so a branch that few tiles take (a label in the tile, the end of the vocabulary) and a barrier's second try do
not.
"""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PRODUCT = re.compile(r"U?[A-Z]*MMA\b")  # HMMA, HGMMA, UTCHMMA
EXPONENTIAL = re.compile(r"MUFU\.EX2")
END = re.compile(r"EXIT")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([^\s;]+)(.*?);", re.MULTILINE)

Graph = Mapping[int, list[int]]  # from an instruction to those that may come next, or before


class Code(NamedTuple):
    """A kernel's instructions by their place in it."""

    names: list[str]
    ahead: Graph
    back: Graph

    def places(self, pattern: re.Pattern[str]) -> set[int]:
        return {place for place, name in enumerate(self.names) if pattern.match(name)}


def listing(cubin: Path, cuobjdump: Path) -> str:
    return subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> Code:
    """``cuobjdump``'s listing of one kernel."""
    lines = LINE.findall(text)
    places = {int(address, 16): place for place, (address, *_) in enumerate(lines)}
    ahead: dict[int, list[int]] = {}
    back: dict[int, list[int]] = {place: [] for place in range(len(lines))}
    for place, (_, guard, name, operands) in enumerate(lines):
        then = [place + 1] if place + 1 < len(lines) else []
        if name.startswith("BRA"):
            *conditions, target = operands.split(",")  # a condition may stand before the target, or guard the whole
            then = [places[int(target, 16)], *(then if guard or conditions else [])]
        elif name.startswith("EXIT") and not guard:
            then = []
        ahead[place] = then
        for other in then:
            back[other].append(place)
    return Code([name for _, _, name, _ in lines], ahead, back)


def epilogue(code: Code) -> int:
    """Instructions of a thread's epilogue; ValueError where no exponential lies behind a product."""
    products, exponentials = code.places(PRODUCT), code.places(EXPONENTIAL)
    ends = products | code.places(END)
    ways = []
    for place in exponentials:
        before, after = _steps(code.back, place, products), _steps(code.ahead, place, ends)
        firsts = [(before[end], end) for end in products & before.keys()]
        lasts = [(after[end], end) for end in ends & after.keys()]
        if firsts and lasts:
            (up, first), (down, last) = min(firsts), min(lasts)
            ways.append((up + down, first, last))
    if not ways:
        raise ValueError("no exponential lies behind a product: expected the listing of a GEMM with an epilogue")
    steps, first, last = min(ways)
    return steps - _steps(code.ahead, first, ends | exponentials).get(last, 0)


def _steps(graph: Graph, start: int, until: set[int]) -> dict[int, int]:
    """Fewest steps from ``start`` to every instruction, through none of ``until``."""
    steps: dict[int, int] = {}
    front = [(start, 0)]
    for place, taken in front:  # grows as it goes: breadth first
        for other in graph[place]:
            if other not in steps:
                steps[other] = taken + 1
                if other not in until:
                    front.append((other, taken + 1))
    return steps
