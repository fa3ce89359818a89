"""What the references do with the rows of some samples only, and with sums near over- or underflow."""

import math
import weakref
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .record import Record

SLICE = 4096
"""Copying one more slice costs about as much as passing over this many entries."""

BLOCK = 1 << 19
"""Entries of a state that stay in a core's cache from one operator to the next."""

SAFE = (1e-30, 1e30)
"""Sums of float32 squares outside this range are taken again in float64."""

EVERY = slice(None)
"""What `runs` gives for all samples."""

LARGE = 1 << 22
"""Bytes from which NumPy asks for huge pages."""

CACHE_LINE = 64

KEPT = 1 << 30
"""Bytes of buffers that are kept for the next solves: new pages may cost more than what is done there."""

_given_up: dict[int, NDArray[np.uint8]] = {}
"""By identity, in the order in which they were given up."""


class HasBest(Protocol):
    """A state with the iterate and the best so far, both `[B, N]`."""

    x: Tensor
    best: Tensor


def keep_best(state: HasBest, improved: NDArray[np.bool_], moving: NDArray[np.bool_]) -> None:
    """`best[improved] = x[improved]`, leaving x as it is where a sample does not go on."""
    if np.count_nonzero(improved) == len(improved):  # the two buffers change roles, so that nothing is copied
        state.x, state.best = state.best, state.x
        for rows in runs(~moving):
            state.x[rows] = state.best[rows]
    else:
        assign(state.best, state.x, improved)


def assign(target: Tensor, source: Tensor, mask: NDArray[np.bool_]) -> None:
    """`target[mask] = source[mask]` for rows."""
    slices = runs(mask)
    if len(slices) * SLICE > target.numel():
        torch.where(torch.from_numpy(mask).to(target.device)[:, None], source, target, out=target)
    else:
        for rows in slices:
            target[rows] = source[rows]


def runs(mask: NDArray[np.bool_]) -> list[slice]:
    """The samples of a mask as slices, so that what is left out is neither read nor written."""
    chosen = np.count_nonzero(mask)  # a third of the cost of mask.all()
    if chosen == len(mask):
        return [EVERY]
    if chosen == 0:
        return []
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [slice(*pair) for pair in edges.reshape(-1, 2).tolist()]


def part(tensor: Tensor, rows: slice) -> Tensor:
    """`tensor[rows]`, but no view of all of it, which would cost as much as an operator on a small state."""
    return tensor if rows is EVERY else tensor[rows]


def first(slots: int, tensor: Tensor, dim: int = 2) -> Tensor:
    """The first slots along a dimension, likewise."""
    return tensor if slots == tensor.shape[dim] else tensor.narrow(dim, 0, slots)


def block_size(batch: int, entries: int) -> int:
    """How many samples of one state fit into BLOCK entries; at least two, for two cores to share."""
    return min(batch, max(BLOCK // entries, 2))


def blocks(mask: NDArray[np.bool_], size: int) -> list[slice]:
    """All samples in slices of `size`, without those slices of which the mask has none."""
    if len(mask) <= size:
        return [slice(0, len(mask))] if mask.any() else []
    found = [slice(start, min(start + size, len(mask))) for start in range(0, len(mask), size)]
    return [rows for rows in found if mask[rows].any()]


def regular(squares: NDArray[np.float64]) -> bool:
    """Whether all sums of squares are finite, above 0, and far from the limits of float32."""
    return np.minimum.reduce(squares, axis=None) > SAFE[0] and np.maximum.reduce(squares, axis=None) < SAFE[1]


def unsafe(squares: NDArray[np.float64], record: Record) -> NDArray[np.intp]:
    """The running samples of which a float32 sum of squares, of `[B, ...]`, is near a limit of float32."""
    safe = ((squares > SAFE[0]) & (squares < SAFE[1])).all(axis=1)
    return np.flatnonzero(record.running & ~safe)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a buffer, with whatever is in it.

    A large one on the host is NumPy's, which asks for huge pages: the faults of small ones cost more than the
    first pass over the ring of a solver. It begins where a cache line does, as PyTorch's own memory. What is
    given up is kept, the last KEPT bytes of it, for one that needs at least half as much.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _fitting(size + CACHE_LINE)
    start = -memory.ctypes.data % CACHE_LINE
    lent = memory[start : start + size]
    weakref.finalize(lent, _give_up, memory).atexit = False  # PyTorch holds it as long as a tensor does
    return torch.from_numpy(lent).view(dtype).view(shape)


def _fitting(needed: int) -> NDArray[np.uint8]:
    """Of what was given up, the last that fits; else new memory."""
    for key, memory in reversed(list(_given_up.items())):  # a copy, for other threads take from it as well
        if needed <= memory.size <= 2 * needed and _given_up.pop(key, None) is not None:
            return memory
    return np.empty(needed, np.uint8)


def _give_up(memory: NDArray[np.uint8]) -> None:
    if memory.size > KEPT:
        return
    _given_up[id(memory)] = memory
    kept = 0
    for key, each in reversed(list(_given_up.items())):
        kept += each.size
        if kept > KEPT:
            _given_up.pop(key, None)
