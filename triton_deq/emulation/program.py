"""A kernel's PTX as Python, and its programs run on it: warp by warp, in an order that chance decides."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from . import arithmetic, tensor_cores
from .arithmetic import Array
from .memory import Fault, Memory, SharedMemory
from .traffic import Traffic
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

    """

    def __init__(self, ptx: str):
        head, _, rest = ptx.partition("\n{")
        self._parameters = re.findall(r"\.param[^,)]*?(\w+_param_\d+)", head)
        texts, labels, tables = _cut(rest.partition("\n}")[0])
        translator = Translator(tables)
        chunks, starts = _chunks(texts, labels, translator)
        scope = {**vars(arithmetic), **vars(tensor_cores), "K": translator.constants}
        self._chunks = [_function(lines, starts, scope) for lines in chunks]
        self._rank = _reverse_postorder(
            [_successors(number, chunks, starts) for number in range(len(chunks))]
        )

    def run(
        self,
        grid: Sequence[int],
        values: Sequence[Any],
        shared: int,
        warps: int,
        memory: Memory,
        seed: int,
        traffic: Traffic | None = None,
    ) -> None:
        """All programs of a grid, one after another in an order of the seed's.

        values: of the parameters, NumPy scalars. shared: bytes of shared memory. traffic: counts them.

        Raises:
            Fault: an access outside of the tensors or not aligned, a barrier that not all warps reach, lanes
                that part where all are needed.
        """
        chance = random.Random(seed)
        # Behind those that were given Triton has places for scratch memory, which is not read.
        parameters = {name: np.asarray(value) for name, value in zip(self._parameters, values, strict=False)}
        places = list(product(*(range(count) for count in grid)))
        chance.shuffle(places)
        with np.errstate(all="ignore"):
            for place in places:
                own = SharedMemory(shared, traffic)
                held = [
                    Warp(number, place, tuple(grid), parameters, memory, own, chance)
                    for number in range(warps)
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


def _cut(body: str) -> tuple[list[str], dict[int, list[str]], dict[str, list[str]]]:
    """The instructions; labels, by the number of the instruction behind; the labels of each table."""
    body = re.sub(r"//[^\n]*|\.loc\b[^\n]*", "", body)
    body = re.sub(r"(,|\.branchtargets)\s*\n\s*", r"\1 ", body)
    texts: list[str] = []
    labels: dict[int, list[str]] = {}
    tables: dict[str, list[str]] = {}
    for raw in re.split(r"[;\n]", body):
        text = raw.strip()
        table = re.match(r"(\$\w+):\s*\.branchtargets\s+(.*)$", text)
        if table:
            tables[table[1]] = [each.strip() for each in table[2].split(",")]
            continue
        label = re.match(r"(\$\w+):\s*(.*)$", text)
        if label:
            text = label[2]
            if not label[1].startswith("$L__tmp"):  # the debugger's
                labels.setdefault(len(texts), []).append(label[1])
        text = text.removeprefix("{").lstrip()  # a scope, of registers that no others are named like
        if text.strip("}") and not text.startswith("."):
            texts.append(text)
    return texts, labels, tables


def _chunks(
    texts: list[str], labels: dict[int, list[str]], translator: Translator
) -> tuple[list[list[str]], dict[str, int]]:
    """Lines of Python for each chunk, and which chunk begins with a label."""
    chunks: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    for number, text in enumerate(texts):
        names = labels.get(number, [])
        if names and chunks[-1]:
            chunks.append([])
        starts |= dict.fromkeys(names, len(chunks) - 1)
        lines, ends = translator.lines(text)
        chunks[-1] += lines
        if ends:
            chunks.append([])
    return chunks, starts


_BRANCH = re.compile(r"w\.branch\(LABEL\((\S+?)\), (.*)\)$")


def _function(lines: list[str], starts: dict[str, int], scope: dict[str, Any]) -> Chunk:
    lines = [_BRANCH.sub(lambda found: f"w.branch({starts[found[1]]}, {found[2]})", line) for line in lines]
    source = "\n    ".join(["def chunk(w):", "R = w.registers", "X = w.writable()", *lines])
    found: dict[str, Any] = {}
    exec(source, scope, found)
    chunk: Chunk = found["chunk"]
    return chunk


def _successors(number: int, chunks: list[list[str]], starts: dict[str, int]) -> list[int]:
    """Where a warp may go from a chunk: to its branches' targets, and on, unless all lanes leave."""
    branches = [found for line in chunks[number] if (found := _BRANCH.match(line))]
    last = chunks[number][-1] if chunks[number] else ""
    leaves = last.startswith("w.branch(") and last.endswith(", None)")
    on = [number + 1] if number + 1 < len(chunks) and not leaves else []
    return [starts[branch[1]] for branch in branches] + on


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
