"""Memory for the buffers of a solve: on a host its pages outlive the solve, and serve the next ones."""

import math
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which NumPy asks for huge pages."""

CACHE_LINE = 64

KEPT = 1 << 30
"""Bytes of buffers that are kept for the next solves: new pages may cost more than what is done there."""

_given_up: dict[int, NDArray[np.uint8]] = {}
"""By identity, in the order in which they were given up."""


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
