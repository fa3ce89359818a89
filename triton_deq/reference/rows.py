"""What the references do with the rows of some samples only, and with sums near over- or underflow."""

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
