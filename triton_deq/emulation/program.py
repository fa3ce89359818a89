"""A kernel's PTX as Python, and its programs run on it: warp by warp, in an order that chance decides."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from . import arithmetic, tensor_cores
from .arithmetic import Array
from .memory import Fault, Memory
from .translation import END, Translator
from .warp import Warp

SWITCH = 0.3
"""How likely it is that another warp goes on after an access to memory."""

Chunk = Callable[[Warp], None]


class Program:
    """What one PTX entry does.

    It is cut into chunks, functions of a warp that end where other warps may see what was done, or where the
    lanes may part. Lanes that have parted run one chunk at a time, the first of theirs in reverse postorder
    of the graph of chunks: so those ahead wait where the ways meet again.

    parameters: their names and sizes in bytes, in order.
    """

    def __init__(self, ptx: str):
        head, _, rest = ptx.partition("\n{")
        body = rest.partition("\n}")[0]
        listed = re.findall(r"\.param\s+\.\w(\d+)[^,)]*?(\w+_param_\d+)", head)
        self.parameters = [(name, int(bits) // 8) for bits, name in listed]
        texts, labels, tables = _cut(body)
        translator = Translator(tables)
        scope = {**vars(arithmetic), **vars(tensor_cores), "K": translator.constants}
        self._chunks: list[Chunk] = []
        starts: dict[str, int] = {}
        pieces: list[list[str]] = [[]]
        for number, text in enumerate(texts):
            if pieces[-1] and number in labels.values():
                pieces.append([])
            starts |= {name: len(pieces) - 1 for name, place in labels.items() if place == number}
            lines, ends = translator.lines(text)
            pieces[-1] += lines
            if ends:
                pieces.append([])
        starts |= {name: len(pieces) - 1 for name, place in labels.items() if place >= len(texts)}
        successors = []
        for number, lines in enumerate(pieces):
            lines = [re.sub(r"LABEL\((\S+?)\)", lambda match: str(starts[match[1]]), line) for line in lines]
            self._chunks.append(_function(lines, scope))
            jumps = [re.match(r"w\.branch\((\d+), (.*)\)$", line) for line in lines]
            targets = [int(jump[1]) for jump in jumps if jump and int(jump[1]) != END]
            goes_on = not (jumps and jumps[-1] and jumps[-1][2] == "None")
            successors.append(targets + [number + 1] * (goes_on and number + 1 < len(pieces)))
        self._rank = _reverse_postorder(successors)

    def run(
        self, grid: Sequence[int], values: Sequence[Any], shared: int, warps: int, memory: Memory, seed: int
    ) -> None:
        """All programs of a grid, one after another in an order of the seed's.

        values: of the parameters, NumPy scalars. shared: bytes of shared memory.

        Raises:
            Fault: an access outside of the tensors or not aligned, a barrier that not all warps reach, lanes
                that part where all are needed.
        """
        chance = random.Random(seed)
        parameters = {
            name: np.asarray(value) for (name, _), value in zip(self.parameters, values, strict=False)
        }
        places = list(product(*(range(count) for count in grid)))
        chance.shuffle(places)
        with np.errstate(all="ignore"):
            for place in places:
                own = Memory.shared(shared)
                soon = lambda: chance.random() < 0.5  # noqa: E731
                held = [
                    Warp(number, place, tuple(grid), parameters, memory, own, soon) for number in range(warps)
                ]
                self._run_warps(held, chance)

    def _run_warps(self, warps: list[Warp], chance: random.Random) -> None:
        going = list(warps)
        while going:
            if all(warp.waiting for warp in going):
                if len(going) < len(warps):
                    raise Fault("some warps wait at a barrier, and others have ended without coming to it")
                for warp in going:
                    warp.waiting = False
            warp = chance.choice([each for each in going if not each.waiting])
            while not warp.waiting:
                if not self._run_chunk(warp):
                    going.remove(warp)
                    break
                if chance.random() < SWITCH:
                    break

    def _run_chunk(self, warp: Warp) -> bool:
        """The next chunk of a warp, for the lanes that are there; False where it has ended."""
        apart = isinstance(warp.at, np.ndarray)
        number = int(min(warp.at, key=self._rank.__getitem__)) if apart else warp.at
        if number >= len(self._chunks):
            return False
        warp.lanes = warp.at == number if apart else None
        warp.following = number + 1
        self._chunks[number](warp)
        if not apart:
            warp.at = warp.following
            return True
        assert warp.lanes is not None
        at: Array = np.where(warp.lanes, warp.following, warp.at)
        warp.at = int(at[0]) if np.all(at == at[0]) else at
        return True


def _cut(body: str) -> tuple[list[str], dict[str, int], dict[str, list[str]]]:
    """The instructions; the number of the one that follows a label; the labels of each table."""
    body = re.sub(r"//[^\n]*|\.loc\b[^\n]*", "", body)
    body = re.sub(r"(,|\.branchtargets)\s*\n\s*", r"\1 ", body)
    texts: list[str] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    for raw in re.split(r"[;\n]", body):
        text = raw.strip()
        text = re.sub(r"^\{\s*(?=\.reg|$)", "", text).removesuffix("}") if "{" not in text[1:] else text
        table = re.match(r"(\$\w+):\s*\.branchtargets\s+(.*)$", text)
        if table:
            tables[table[1]] = [each.strip() for each in table[2].split(",")]
            continue
        label = re.match(r"(\$\w+):\s*(.*)$", text)
        if label:
            labels[label[1]], text = len(texts), label[2]
        if text and not text.startswith("."):
            texts.append(text)
    return texts, labels, tables


def _function(lines: list[str], scope: dict[str, Any]) -> Chunk:
    source = "\n    ".join(["def chunk(w):", "R = w.registers", "X = w.writable()", *lines])
    found: dict[str, Any] = {}
    exec(source, scope, found)
    chunk: Chunk = found["chunk"]
    return chunk


def _reverse_postorder(successors: list[list[int]]) -> "_Ranks":
    """Each chunk's place in it."""
    seen, order = {0}, []
    path: list[tuple[int, Iterator[int]]] = [(0, iter(successors[0]))]
    while path:
        number, rest = path[-1]
        following = next((each for each in rest if each not in seen), None)
        if following is None:
            order.append(number)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(successors[following])))
    return _Ranks({number: place for place, number in enumerate(reversed(order))})


class _Ranks(dict[int, int]):
    """What has ended comes last."""

    def __missing__(self, number: int) -> int:
        return END
