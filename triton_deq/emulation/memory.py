"""The memory of a launch: of the tensors that it was given, and a program's shared memory."""

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from .arithmetic import Array
from .traffic import Traffic

FIRST = 4096
"""Nothing lies below, and NumPy takes no array at address 0."""


class Fault(Exception):
    """What a GPU would fault at, or leave undefined."""


class Memory:
    """Bytes by address. spans: from where to where there are any. traffic: counts the accesses, if given."""

    def __init__(
        self, raw: Array, first: int, spans: Iterable[tuple[int, int]], traffic: Traffic | None = None
    ):
        self._traffic = traffic
        self._first = first
        self._views = {size: raw[: len(raw) // size * size].view(f"u{size}") for size in (1, 2, 4, 8)}
        begins, ends = np.array(sorted(spans) or [(0, 0)], dtype=np.int64).T
        self._begins, self._ends = begins, ends

    @classmethod
    def of_tensors(cls, tensors: Iterable[Any], traffic: Traffic | None = None) -> "Memory":
        """That of this process, of which nothing else may be touched."""
        spans = set()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                spans.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        whole = (ctypes.c_uint8 * ((1 << 47) - 2 * FIRST)).from_address(FIRST)
        return cls(np.ctypeslib.as_array(whole), FIRST, spans, traffic)

    def load(self, addresses: Array, size: int, count: int, lanes: Array | None, what: str) -> list[Array]:
        """`count` numbers of `size` bytes one after another, from each lane's address; of others zeros."""
        if lanes is not None and not lanes.any():
            return [np.zeros(len(addresses), f"u{size}")] * count
        places = self._visited(addresses, size, count, lanes, what)
        if lanes is None:
            return [self._views[size][places + i] for i in range(count)]
        places = np.where(lanes, places, places[lanes][0])
        return [np.where(lanes, self._views[size][places + i], 0) for i in range(count)]

    def store(self, addresses: Array, size: int, values: list[Array], lanes: Array | None, what: str) -> None:
        if lanes is not None and not lanes.any():
            return
        places = self._visited(addresses, size, len(values), lanes, what)
        for i, value in enumerate(values):
            if lanes is None:
                self._views[size][places + i] = value
            else:
                self._views[size][places[lanes] + i] = value[lanes]

    def add(self, address: int, value: int, what: str) -> int:
        """Add to one number of 32 bits, and give what was there."""
        (place,) = self._visited(np.array([address]), 4, 1, None, what)
        before = int(self._views[4][place])
        self._views[4][place] = (before + value) & 0xFFFFFFFF
        return before

    def _visited(self, addresses: Array, size: int, count: int, lanes: Array | None, what: str) -> Array:
        """`_places` of an access that counts."""
        places = self._places(addresses, size, count, lanes, what)
        if self._traffic is not None:
            self._count(self._traffic, addresses if lanes is None else addresses[lanes], size * count)
        return places

    def _places(self, addresses: Array, size: int, count: int, lanes: Array | None, what: str) -> Array:
        """The addresses as indices, if all of these bytes are there and lie as they must."""
        addresses = addresses.astype(np.int64)
        wanted = addresses if lanes is None else addresses[lanes]
        width = size * count
        span = self._begins.searchsorted(wanted, "right") - 1
        inside = (span >= 0) & (wanted + width <= self._ends[span])
        if not inside.all():
            raise Fault(
                f"{what} is outside of every tensor and of shared memory, at {hex(wanted[~inside][0])}"
            )
        if (wanted & (width - 1)).any():
            raise Fault(f"{what} is at an address that is no multiple of its {width} bytes")
        return (addresses - self._first) // size

    def _count(self, traffic: Traffic, addresses: Array, width: int) -> None:
        traffic.touch(addresses, width)


class SharedMemory(Memory):
    """A program's. What nothing has written is NaN, whatever it is read as.

    Tensor cores that read it by themselves, those of `wgmma`, may see what threads have stored only behind a
    `fence.proxy.async`. Of what asynchronous copies have written the same is true on paper; compilers before
    Triton 3.7.1 have no fence there, and GPUs of sm_90 were not seen to need one.
    """

    def __init__(self, size: int, traffic: Traffic | None = None):
        size = -(-size // 16) * 16
        super().__init__(np.full(size, 0xFF, np.uint8), 0, [(0, size)], traffic)
        self._stored = np.zeros(size, bool)

    def store(self, addresses: Array, size: int, values: list[Array], lanes: Array | None, what: str) -> None:
        super().store(addresses, size, values, lanes, what)
        begins = addresses if lanes is None else addresses[lanes]
        self._stored[begins[:, None] + np.arange(size * len(values))] = True

    def copy_in(self, addresses: Array, words: list[Array], lanes: Array | None, what: str) -> None:
        """What an asynchronous copy has brought."""
        super().store(addresses, 4, words, lanes, what)

    def fence(self) -> None:
        """What was stored until now may be read by tensor cores."""
        self._stored[:] = False

    def load_matrix(self, addresses: Array, size: int, what: str) -> Array:
        """Entries of `size` bytes, by tensor cores, which have a way of their own to the banks."""
        entries = self._views[size][self._places(addresses.ravel(), size, 1, None, what)]
        if self._stored[addresses].any():
            raise Fault(
                f"{what} reads what threads have stored in shared memory, without a fence.proxy.async between"
            )
        return entries.reshape(addresses.shape)

    def _count(self, traffic: Traffic, addresses: Array, width: int) -> None:
        traffic.take_turns(addresses, width)
