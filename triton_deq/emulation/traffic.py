"""What the accesses of a launch cost a GPU: sectors of memory, and turns of the banks of shared memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .arithmetic import Array

SECTOR = 32
"""Bytes that the L2 cache gives or takes at least."""
BANKS, WORD = 32, 4
"""Of shared memory: each bank has one word for a warp in a turn."""


@dataclass
class Traffic:
    """What warps ask of memory, added up over launches of one kernel.

    Attributes:
        launches: how many.
        sectors: of 32 bytes, that the accesses of a warp touch, each access by itself.
        least_sectors: as many as the bytes of each access need at least.
        turns: of the banks of shared memory, of which each serves a warp with a word in a turn; an access of
            8 or 16 bytes a lane goes by 16 or 8 lanes.
        least_turns: as many as there were without conflicts.
    """

    launches: int = 0
    sectors: int = 0
    least_sectors: int = 0
    turns: int = 0
    least_turns: int = 0

    def touch(self, addresses: Array, width: int) -> None:
        """One access of a warp to memory, `width` bytes for each lane."""
        places = np.unique(addresses)
        self.sectors += len(np.unique(places // SECTOR))
        self.least_sectors += -(-len(places) * width // SECTOR)

    def take_turns(self, addresses: Array, width: int) -> None:
        """One access of a warp to shared memory."""
        lanes = max(BANKS * WORD // max(width, WORD), 1)
        for begin in range(0, len(addresses), lanes):
            words = addresses[begin : begin + lanes, None] // WORD + np.arange(max(width // WORD, 1))
            banks = np.bincount(np.unique(words) % BANKS)
            self.turns += int(banks.max())
            self.least_turns += 1


_open: list[dict[str, Traffic]] = []


@contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """What the emulated launches within ask of memory, by the kernel's name.

    Example: how many sectors a kernel touches for each that it needs::

        with emulation.counted() as traffic:
            kernel[grid](x, out, 4096)
        print(traffic["kernel"].sectors / traffic["kernel"].least_sectors)
    """
    found: dict[str, Traffic] = {}
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)


@contextmanager
def of_launch(name: str) -> Iterator[Traffic | None]:
    """What counts one launch of a kernel; None where nobody asks."""
    if not _open:
        yield None
        return
    traffic = Traffic(launches=1)
    yield traffic
    for found in _open:
        total = found.setdefault(name, Traffic())
        for field, value in vars(traffic).items():
            setattr(total, field, getattr(total, field) + value)
