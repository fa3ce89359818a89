"""What a warp waits for, followed through the machine code of an NVIDIA kernel, without a GPU.

Since Volta every instruction says after how many clocks the next one may issue, which of six scoreboards it
sets free when its result has arrived or its operands have been read, and for which of them it waits. So with
a latency for each kind of instruction a warp's clock can be followed, as if it were alone. That is a model:
programs that share a multiprocessor fill each other's waits, and memory under load takes longer. What it
tells is how long a launch of few programs takes at least, and how much of it is one wait after another.

Not in it: the time of asynchronous copies and of matrix products by warp groups, whose waits name no
scoreboard; the slow paths of divisions and roots, which are calls; fetching the code.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .sass import SCOREBOARDS, Instruction

LATENCIES = {
    "LDG": 700,
    "ATOMG": 700,
    "LDS": 30,
    "LDSM": 33,
    "HMMA": 33,
    "SHFL": 25,
    "F2F": 25,
}
"""Clocks until a result is there, of what takes longer than others; a global load under load.

Of an idle H100 Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking" (arXiv 2402.13499), measured 479 for global memory, 263 for L2, 29 for shared memory.
"""
OTHERS = 20
OPERANDS_READ = 12
BARRIER = 40
"""Clocks at a barrier, of a program whose warps all come at the same time."""


@dataclass(frozen=True)
class Stretch:
    """A stretch of code, followed once from its first instruction to its last.

    memory: how many times it waits for global memory, of which several loads may be one.
    """

    instructions: int
    clocks: int
    memory: int
    barriers: int
    shuffles: int


@dataclass(frozen=True)
class CodePath:
    """A kernel from its first instruction to its exit, no branch taken, and one turn of each of its loops."""

    whole: Stretch
    loops: tuple[Stretch, ...]


def follow(code: Sequence[Instruction]) -> CodePath:
    """Follow one warp along the code of a kernel."""
    exits = [i for i, each in enumerate(code) if each.kind == "EXIT"]
    # Behind it stand the slow paths. Some kernels have exits with a predicate alone.
    end = next((i for i in exits if not code[i].predicate), exits[-1])
    main = code[: end + 1]
    return CodePath(_stretch(main), tuple(_stretch(main[begin : last + 1]) for begin, last in _loops(main)))


def _loops(code: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    """The first and the last instruction of each, as they end: an inner one before the one around it."""
    places = {each.address: i for i, each in enumerate(code)}
    for i, each in enumerate(code):
        if each.kind == "BRA":
            target = places.get(int(each.operands.split()[-1], 16), i)
            if target < i:
                yield target, i


def _stretch(code: Sequence[Instruction]) -> Stretch:
    clock = memory = 0
    free, loading = [0] * SCOREBOARDS, [False] * SCOREBOARDS
    for each in code:
        awaited = [board for board in range(SCOREBOARDS) if each.waits >> board & 1]
        last = max(awaited, key=free.__getitem__, default=0)
        if awaited and free[last] > clock:
            memory += loading[last] and free[last] - clock > LATENCIES["LDG"] // 4
            clock = free[last]
        if each.kind == "BAR":
            clock += BARRIER
        arrived = clock + LATENCIES.get(each.kind, OTHERS)
        for board, when in ((each.read, clock + OPERANDS_READ), (each.write, arrived)):
            if board is not None and when > free[board]:
                free[board], loading[board] = when, each.kind in ("LDG", "ATOMG")
        clock += max(1, each.stall)
    count = Counter(each.kind for each in code)
    return Stretch(len(code), clock, memory, count["BAR"], count["SHFL"])
