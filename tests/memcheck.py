"""What a sanitizer does on a GPU, and what none does there, in Triton's interpreter.

Bounds: no kernel touches what it was not given. A read beyond a tensor whose value nobody uses is right in
every result, and a fault on a GPU where nothing is mapped behind the tensor.

Races: programs of a launch run in any order, and so do the warps of a program between two barriers. In the
interpreter they do not, so that each access is held here against those before: of other programs, and of
other lanes of its own program since the last `tl.debug_barrier`, if it has several warps. A tile of fewer
entries than there are threads is held by several of them, of which one stores and all load. In a larger one
the same place is taken for the same thread's; tests/test_inspection.py asks compiled kernels whether it is.
"""

import linecache
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from triton_deq import kernels
from triton_deq.ops.launch import tensors_of

KERNELS = str(Path(kernels.__file__).parent)
EITHER_WAY = (
    ("primitives.py", "LIMIT"),
    ("primitives.py", "STEPS"),
    ("anderson.py", "gram_ptr"),
    ("broyden.py", "matrix_ptr"),
    ("broyden.py", "squares_ptr"),
)
"""Stores that may come before a load or after it: their value is not used, or is what is worked out then.

The limit of divergence is worked out, from what all programs have, where it is still 0. Steps are counted by
the one thread that stores them. Of a Gram matrix, Broyden's matrix and his squares what a step renews comes
from registers.
"""
BEHIND_A_SUM = (
    ("primitives.py", "STATUS"),
    ("primitives.py", "BEST"),
    ("primitives.py", "AWAY"),
    ("anderson.py", "COUNT"),
    ("broyden.py", "COUNT"),
)
"""Stores of what the program has loaded, behind a sum for which all its warps wait.

That no load of them stands behind its barrier and no store before is read from compiled kernels, too.
"""
SEVERAL, ATOMIC = -2, -3


class OutOfBounds(Exception):
    """An address outside every tensor of the launch."""


class Race(Exception):
    """Two accesses that nothing orders, of which one is a store."""


class Shadow:
    """What has happened to each byte of a launch's tensors; an element is known by its first."""

    def __init__(self, name: str, args: list[Any], threads: int):
        storages = [each.untyped_storage() for each in tensors_of(args)]
        extents = sorted({(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages})
        self.begins, self.ends = np.array(extents, np.uint64).reshape(-1, 2).T
        sizes = (self.ends - self.begins).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.name, self.threads = name, threads
        self.program, self.phase, self.sites = -1, 0, [""]
        self.tiles: dict[tuple[int, ...], int] = {}
        # Who wrote and who read, then of the last store and load: the phase, the lane, the tile, the place.
        self.writer, self.reader = (np.full(self.offsets[-1], -1) for _ in range(2))
        self.stored, self.loaded = (np.full((4, self.offsets[-1]), -1) for _ in range(2))
        self.bits = np.zeros(self.offsets[-1], np.uint64)  # that were stored

    def begin_program(self) -> None:
        self.program += 1
        self.phase += 1

    def accessed(self, pointers: Any, mask: Any, what: str) -> tuple[Any, Any, tuple[int, ...]]:
        """(where in the shadow, lanes, shape of the tile) of an access, all within the tensors."""
        present = np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)
        at = pointers.data.reshape(-1)[present].astype(np.uint64)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        place = np.searchsorted(self.begins, at, side="right") - 1
        bad = (place < 0) | (at + np.uint64(size) > self.ends[np.maximum(place, 0)])
        if bad.any():
            beyond = int(at[bad][0]) - int(self.ends[max(int(place[bad][0]), 0)])
            raise OutOfBounds(f"{self.name} {what} {beyond} bytes behind a tensor, {bad.sum()} lanes in all")
        index = self.offsets[place] + (at - self.begins[place]).astype(np.int64)
        return index, np.flatnonzero(present), pointers.data.shape

    def load(self, index: Any, lanes: Any, tile: tuple[int, ...]) -> None:
        writer, reader = self.writer[index], self.reader[index]
        others = (writer != -1) & (writer != self.program)
        self.refuse("another program writes", others, self.stored, index, EITHER_WAY)
        unwritten = self.elsewhere(self.stored, index, lanes, tile)
        self.refuse("another warp may not have written", unwritten, self.stored, index, EITHER_WAY)
        self.reader[index] = np.where((reader == -1) | (reader == self.program), self.program, SEVERAL)
        phase, lane, shape, _ = self.loaded[:, index]
        again = (phase == self.phase) & ((lane != lanes) | (shape != self.tiles.get(tile, -1)))
        self.note(self.loaded, index, np.where(again, -1, lanes), tile)

    def store(self, index: Any, lanes: Any, tile: tuple[int, ...], bits: Any) -> None:
        for who, log in ((self.writer[index], self.stored), (self.reader[index], self.loaded)):
            others = (who != -1) & (who != self.program)
            self.refuse("another program touches", others, log, index, EITHER_WAY)
        unread = self.elsewhere(self.loaded, index, lanes, tile)
        self.refuse("another warp may not have read", unread, self.loaded, index, EITHER_WAY + BEHIND_A_SUM)
        others = self.elsewhere(self.stored, index, lanes, tile) & (bits != self.bits[index])
        self.refuse("another warp writes otherwise", others, self.stored, index, ())
        self.writer[index], self.bits[index] = self.program, bits
        self.note(self.stored, index, lanes, tile)

    def atomic(self, index: Any, lanes: Any, tile: tuple[int, ...]) -> None:
        for who, log in ((self.writer[index], self.stored), (self.reader[index], self.loaded)):
            others = (who != -1) & (who != ATOMIC)
            self.refuse("another program touches", others, log, index, ())
        self.writer[index] = ATOMIC
        self.note(self.stored, index, lanes, tile)

    def elsewhere(self, log: Any, index: Any, lanes: Any, tile: tuple[int, ...]) -> Any:
        """Where the access in the log is of this phase, and may be of another warp than the one now."""
        phase, lane, shape, _ = log[:, index]
        here = (lane == lanes) & (shape == self.tiles.get(tile, -1)) & (math.prod(tile) >= self.threads)
        return (phase == self.phase) & ~here & (self.threads > 32)

    def note(self, log: Any, index: Any, lanes: Any, tile: tuple[int, ...]) -> None:
        self.sites.append(_site())
        shape = self.tiles.setdefault(tile, len(self.tiles))
        log[:, index] = np.stack(np.broadcast_arrays(self.phase, lanes, shape, len(self.sites) - 1))

    def refuse(self, how: str, bad: Any, log: Any, index: Any, allowed: tuple[tuple[str, str], ...]) -> None:
        for other in np.unique(log[3, index[bad]]):
            sites = here, there = _site(), self.sites[other]
            stores = [site for site in sites if "tl.store(" in site]
            if not any(site.startswith(file) and name in site for site in stores for file, name in allowed):
                raise Race(f"{self.name}, at\n    {here}\n  what {how} at\n    {there}")


def _site() -> str:
    """The line of a kernel that is being interpreted."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(KERNELS):
        frame = frame.f_back
    if frame is None:
        return "a kernel of a test"
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


@contextmanager
def checked() -> Iterator[None]:
    """While entered, interpreted launches may only touch what they were given, and may not race."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    shadow: Shadow | None = None
    call, take_in = GridExecutor.__call__, GridExecutor._init_args_hst
    begin, barrier = InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_barrier
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, threads = InterpreterBuilder.create_atomic_rmw, 0

    def calling(self, *args, **kwargs):
        nonlocal threads
        threads = 32 * kwargs.get("num_warps", 4)
        return call(self, *args, **kwargs)

    def taking_in(self, args, kwargs):
        nonlocal shadow
        found = take_in(self, args, kwargs)
        shadow = Shadow(self.fn.__name__, found[0], threads)
        return found

    def beginning(self, *place):
        shadow.begin_program()
        return begin(self, *place)

    def waiting(self, *args, **options):
        shadow.phase += 1
        return barrier(self, *args, **options)

    def loading(self, pointers, mask, *rest, **options):
        shadow.load(*shadow.accessed(pointers, mask, "reads"))
        return load(self, pointers, mask, *rest, **options)

    def storing(self, pointers, value, mask, *rest, **options):
        index, lanes, tile = shadow.accessed(pointers, mask, "writes")
        values = np.broadcast_to(value.data, pointers.data.shape).reshape(-1)[lanes]
        bits = values.view(f"u{values.itemsize}").astype(np.uint64)
        shadow.store(index, lanes, tile, bits)
        return store(self, pointers, value, mask, *rest, **options)

    def adding(self, operation, pointers, value, mask, *rest, **options):
        shadow.atomic(*shadow.accessed(pointers, mask, "adds to"))
        return atomic(self, operation, pointers, value, mask, *rest, **options)

    with (
        mock.patch.object(GridExecutor, "__call__", calling),
        mock.patch.object(GridExecutor, "_init_args_hst", taking_in),
        mock.patch.multiple(
            InterpreterBuilder,
            set_grid_idx=beginning,
            create_barrier=waiting,
            create_masked_load=loading,
            create_masked_store=storing,
            create_atomic_rmw=adding,
        ),
    ):
        yield


@contextmanager
def backwards() -> Iterator[None]:
    """While entered, interpreted programs run from the last to the first."""
    from triton.runtime.interpreter import InterpreterBuilder

    begin = InterpreterBuilder.set_grid_idx

    def beginning(self, *place):
        return begin(self, *(count - 1 - at for count, at in zip(self.grid_dim, place, strict=True)))

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", beginning):
        yield
