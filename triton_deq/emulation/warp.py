"""One warp of a program: its registers, which of its lanes are where, and what its lanes do together."""

import random
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import Array
from .memory import Fault, Memory, SharedMemory
from .tensor_cores import LANES, dealt, gathered, turned
from .warpgroup import Products, Registers


class Copy(NamedTuple):
    """A `cp.async` that is under way: `size` bytes for each lane, zeros for those that read none."""

    target: Array
    source: Array
    size: int
    reads: Array
    lanes: Array | None
    what: str


class Partly:
    """Registers of which an instruction writes some lanes."""

    def __init__(self, registers: Registers, lanes: Array):
        self._registers, self._lanes = registers, lanes

    def __setitem__(self, name: str, value: Array) -> None:
        before = self._registers.get(name)
        if before is None:
            before = np.full(32, 0xA5).astype(value.dtype)  # nothing has written the other lanes
        self._registers[name] = np.where(self._lanes, value, before)


class Warp:
    """Lanes that run the same chunk of a kernel, until they part.

    number: the warp's in its program. program, grid: which one of how many, in x, y and z.
    chance: decides of each asynchronous copy whether it is done at once or when it is waited for.

    `at` is the chunk where all lanes are, or an array with that of each; `following` becomes the next one.
    """

    def __init__(
        self,
        number: int,
        program: tuple[int, ...],
        grid: tuple[int, ...],
        parameters: dict[str, Array],
        memory: Memory,
        shared: SharedMemory,
        chance: random.Random,
    ):
        self.registers = Registers()
        self.thread = (32 * number + LANES).astype(np.uint32)
        self.program, self.grid = (np.array(each, dtype=np.uint32) for each in (program, grid))
        self.parameters, self.memory, self.shared = parameters, memory, shared
        self.lanes: Array | None = None  # those that are active; None for all
        self.at: Any = 0
        self.following: Any = 0
        self.waiting = False
        self.products = Products(number, self.registers, shared, chance)
        self._chance = chance
        self._copies: list[Copy] = []
        self._groups: list[list[Copy]] = []

    def active(self, guard: Array | None) -> Array | None:
        """The lanes for which an instruction with this predicate is carried out; None for all of them."""
        if guard is None:
            return self.lanes
        lanes = guard if self.lanes is None else guard & self.lanes
        return None if lanes.all() else lanes

    def writable(self, guard: Array | None = None) -> Registers | Partly:
        lanes = self.active(guard)
        return self.registers if lanes is None else Partly(self.registers, lanes)

    def branch(self, target: int, guard: Array | None) -> None:
        lanes = self.active(guard)
        if lanes is None:
            self.following = target
        elif lanes.any():
            self.following = np.where(lanes, target, self.following)

    def together(self, what: str) -> None:
        if self.lanes is not None:
            raise Fault(
                f"{what} by lanes {np.flatnonzero(self.lanes).tolist()} alone, while others are elsewhere"
            )

    def wait_at_barrier(self, what: str) -> None:
        self.together(what)
        self.waiting = True

    def shuffled(self, value: Array, source: Array, what: str) -> Array:
        """What the lanes `source` have of a register."""
        self.together(what)
        return value[source & 31]

    def reduced(self, value: Array, function: Any, what: str) -> Array:
        self.together(what)
        return np.full(32, function.reduce(value), value.dtype)

    def load_matrices(self, addresses: Array, count: int, transposed: bool, what: str) -> list[Array]:
        """The registers of `ldmatrix`, each with two numbers of 16 bits of a matrix, whose rows are 16 bytes.

        addresses: those of matrix i's rows come from lanes 8 i on.
        """
        self.together(what)
        registers = []
        for number in range(count):
            words = self.shared.load(addresses[8 * number : 8 * number + 8], 4, 4, None, what)
            rows = np.stack(words, -1)
            registers.append(dealt(turned(rows) if transposed else rows))
        return registers

    def store_matrices(self, addresses: Array, registers: list[Array], transposed: bool, what: str) -> None:
        """The other way, `stmatrix`."""
        self.together(what)
        for number, register in enumerate(registers):
            rows = gathered(register)
            words = list((turned(rows) if transposed else rows).T)
            self.shared.store(addresses[8 * number : 8 * number + 8], 4, words, None, what)

    def add_to_memory(self, addresses: Array, values: Array, guard: Array | None, what: str) -> Array:
        """One lane after another; what was there before each."""
        before = np.zeros(32, np.uint32)
        lanes = self.active(guard)
        for lane in LANES if lanes is None else np.flatnonzero(lanes):
            before[lane] = self.memory.add(int(addresses[lane]), int(values[lane]), what)
        return before

    def copy_later(
        self, target: Array, source: Array, size: int, reads: Array, guard: Array | None, what: str
    ) -> None:
        lanes = self.active(guard)
        if not np.isin(reads, (0, size)).all():
            raise NotImplementedError(f"{what} with less than a whole copy")
        copy = Copy(target, source, size, reads > 0, lanes, what)
        if self._chance.random() < 0.5:
            self._carry_out(copy)
        else:
            self._copies.append(copy)

    def commit_copies(self) -> None:
        self._groups.append(self._copies)
        self._copies = []

    def wait_for_copies(self, but: int) -> None:
        """For all groups but the last ones."""
        while len(self._groups) > but:
            for copy in self._groups.pop(0):
                self._carry_out(copy)

    def _carry_out(self, copy: Copy) -> None:
        lanes = copy.reads if copy.lanes is None else copy.reads & copy.lanes
        words = self.memory.load(copy.source, 4, copy.size // 4, lanes, copy.what)
        self.shared.copy_in(copy.target, words, copy.lanes, copy.what)
