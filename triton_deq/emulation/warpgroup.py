"""`wgmma`, by which four warps multiply matrices in shared memory while they go on.

Each warp of four has 16 of 64 rows of the result, so it can be followed by itself. Until it waits, its
accumulators are the tensor cores'; what is in flight is carried out at once or at the wait, as chance has it.
"""

import random
from typing import NamedTuple

import numpy as np

from .arithmetic import Array
from .memory import Fault, SharedMemory
from .tensor_cores import LANES, SIZES, accumulated, described_addresses, entries_of, left_of

NOTHING = np.zeros(32, np.uint32)


class Registers(dict[str, Array]):
    """By name, one number for each lane.

    in_flight: accumulators, by name, that are the tensor cores' for now.
    """

    def __init__(self) -> None:
        self.in_flight: dict[str, Array] = {}

    def __missing__(self, name: str) -> Array:
        if name in self.in_flight:
            raise Fault(f"register %{name} is read before wgmma.wait_group, and wgmma may yet write it")
        raise Fault(f"register %{name} is read, and nothing has written it")


class Product(NamedTuple):
    """One `wgmma.mma_async` that is under way: `D = A B + D`.

    names: D's registers. adds: whether to what they hold, not to zeros. left: A, if it was in registers, else
    its descriptor; right: B's descriptor. along_k: of each, whether entries along k are neighbours.
    """

    kind: str
    k: int
    names: list[str]
    adds: bool
    left: Array | int
    right: int
    along_k: tuple[bool, bool]
    what: str


class Products:
    """Those of one warp, of the given number in its program."""

    def __init__(self, number: int, registers: Registers, shared: SharedMemory, chance: random.Random):
        self._rows = 16 * (number % 4) + np.arange(16)
        self._registers, self._shared, self._chance = registers, shared, chance
        self._fenced = False
        self._groups: list[list[Product]] = [[]]  # the last one is not committed yet
        self._waiting: list[Product] = []

    def fence(self) -> None:
        """What the warp has done to its registers comes before the products that follow."""
        self._fenced = True

    def begin(
        self,
        kind: str,
        k: int,
        names: list[str],
        a: list[Array],
        b: Array,
        adds: Array,
        along_k: tuple[bool, bool],
        what: str,
    ) -> None:
        """a: the registers of A, or one with its descriptor; the rest as in `Product`."""
        if not self._fenced:
            raise Fault(f"{what} without a wgmma.fence behind the last use of its registers")
        for name in names:
            if name not in self._registers.in_flight:
                held = self._registers[name] if adds.all() else self._registers.get(name, NOTHING)
                self._registers.pop(name, None)
                self._registers.in_flight[name] = held
        left = left_of(kind, 16, k, a) if len(a) > 1 else _common(a[0], what)
        product = Product(kind, k, names, bool(adds.all()), left, _common(b, what), along_k, what)
        self._groups[-1].append(product)
        self._waiting.append(product)
        if self._chance.random() < 0.5:
            self._carry_out(len(self._waiting))

    def commit(self) -> None:
        self._groups.append([])

    def wait(self, but: int) -> None:
        """For all groups but the last ones; registers of those that are done are the warp's again."""
        ended = self._groups[: max(len(self._groups) - 1 - but, 0)]
        self._groups = self._groups[len(ended) :]
        going = [product for group in self._groups for product in group]
        self._carry_out(len(self._waiting) - len(going))
        for name in self._registers.in_flight.keys() - {name for each in going for name in each.names}:
            if name in self._registers:
                raise Fault(f"register %{name} is written before wgmma.wait_group, while it is wgmma's")
            self._registers[name] = self._registers.in_flight.pop(name)
            self._fenced = False

    def _carry_out(self, count: int) -> None:
        """The first ones of those that wait."""
        count = max(count, 0)
        for product in self._waiting[:count]:
            left, names = product.left, product.names
            if isinstance(left, int):
                left = self._matrix(left, self._rows, product, product.along_k[0])
            columns = np.arange(2 * len(names))
            right = self._matrix(product.right, columns, product, product.along_k[1]).T
            held = [self._registers.in_flight[name] if product.adds else NOTHING for name in names]
            found = accumulated(left, right, held)
            self._registers.in_flight.update(zip(names, found, strict=True))
        del self._waiting[:count]

    def _matrix(self, descriptor: int, rows: Array, product: Product, along_k: bool) -> Array:
        size = SIZES[product.kind]
        addresses = described_addresses(descriptor, rows, product.k, size, along_k)
        return entries_of(self._shared.load_matrix(addresses, size, product.what), product.kind)


def _common(register: Array, what: str) -> int:
    if (register != register[0]).any():
        other = LANES[register != register[0]][0]
        raise Fault(f"{what} has another descriptor in lane {other} than in the first")
    return int(register[0])
