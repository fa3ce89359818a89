"""What a solver knows of each sample: the decisions that every solver takes alike."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..status import RUNNING, Status

# Rows of `Record.data`; kernels/primitives.py holds the same numbers.
STATUS, COUNT, RESIDUAL, BEST, LIMIT, TOLERANCE, STEPS, AWAY = range(8)
FIELDS = 8

DIVERGENCE = 1e6
"""A sample has diverged when its residual exceeds this many times the scale of its first step."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over entries of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Record:
    """One float64 row per fact, one column per sample, so that a kernel needs a single pointer.

    It lies on the GPU for the kernels, and on the CPU for the reference, which decides there.
    `data` is `[FIELDS, B]`. The properties are views of its rows, each `[B]`:

    - `status`: a `Status`; RUNNING until the sample stops
    - `count`: how many of the newest history slots the sample may use
    - `residual`: of the newest iterate; `best`: the lowest so far
    - `limit`: the absolute residual beyond which the sample has diverged; 0 until the first step
    - `tolerance`: where it has converged
    - `steps`: evaluations of f until it stopped
    - `away`: 1 while its best iterate is still where it was evaluated, the one before the newest (kernels)
    """

    _before: tuple[float, Tensor] | None = None

    def __init__(self, batch: int, tol: float, device: torch.device):
        self.data = torch.empty(FIELDS, batch, dtype=torch.float64, device=device)
        self._fill(tol)

    def reset(self, tol: float) -> None:
        """As before the first step: what is often reset keeps a copy of that, which is one operator."""
        if self._before is not None and self._before[0] == tol:
            self.data.copy_(self._before[1])
            return
        self._fill(tol)
        self._before = tol, self.data.clone()

    def _fill(self, tol: float) -> None:
        # NumPy's small operations cost less than PyTorch's, but it cannot see a tensor without memory.
        on_host = self.data.device.type == "cpu" and type(self.data) is torch.Tensor
        rows: Any = self.data.numpy() if on_host else self.data
        rows[:] = 0
        rows[STATUS] = float(RUNNING)
        rows[RESIDUAL] = rows[BEST] = torch.inf
        # tol = 0 means "take every step", also past a residual that is exactly zero.
        rows[TOLERANCE] = tol if tol > 0 else -1.0

    @cached_property
    def rows(self) -> tuple[NDArray[np.float64], ...]:
        """The rows of `data` as NumPy arrays; `data` must be on the host."""
        return tuple(self.data.numpy())

    @property
    def running(self) -> NDArray[np.bool_]:
        """`[B]`: which samples have not stopped; `data` must be on the host."""
        # Comparing with an enum would cost more than the comparison.
        return self.rows[STATUS] == float(RUNNING)

    def on_host(self) -> "Record":
        """This record, or a copy of it on the host."""
        record = Record.__new__(Record)
        record.data = self.data.cpu()
        return record

    def select(self, samples: Tensor) -> "Record":
        """A copy of these samples' columns."""
        record = Record.__new__(Record)
        record.data = self.data[:, samples.to(self.data.device)]
        return record

    status = property(lambda self: self.data[STATUS])
    count = property(lambda self: self.data[COUNT])
    residual = property(lambda self: self.data[RESIDUAL])
    best = property(lambda self: self.data[BEST])
    limit = property(lambda self: self.data[LIMIT])
    tolerance = property(lambda self: self.data[TOLERANCE])
    steps = property(lambda self: self.data[STEPS])
    away = property(lambda self: self.data[AWAY])

    def judge(
        self,
        residual_sq: NDArray[np.float64],
        value_sq: NDArray[np.float64],
        *,
        relative: bool,
        over_batch: bool,
        regular: bool = False,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Take in `‖f(z) − z‖²` and `‖f(z)‖²`, both `[B]`, and decide each sample's status.

        Runs on the host, in NumPy, whose small operations cost a third of PyTorch's; `data` must be there.
        regular: that all squares are finite and above 0. Then, while all samples go on, there is less to ask.

        Returns two masks `[B]`: `improved`, the samples whose present iterate is their best, and `moving`,
        those that go on to another iterate.
        """
        status, _, held, best, limit, tolerance, steps, _ = self.rows
        running = self.running
        if regular and not over_batch and np.count_nonzero(running) == len(running):
            norm = np.sqrt(residual_sq)
            residual = norm / np.sqrt(value_sq) if relative else norm
            improved, moving = residual < best, (residual > tolerance) & (norm <= limit)
            if np.count_nonzero(moving) == len(moving):
                np.copyto(held, residual)
                np.minimum(best, residual, out=best)
                steps += 1
                return improved, moving

        counted = running & np.isfinite(residual_sq) & np.isfinite(value_sq)
        if over_batch:  # one norm for all; a sample that is not finite must not spoil it
            residual_sq = np.broadcast_to(residual_sq[counted].sum(), counted.shape)
            value_sq = np.broadcast_to(value_sq[counted].sum(), counted.shape)

        with np.errstate(all="ignore"):
            norm, scale = np.sqrt(residual_sq), np.sqrt(value_sq)
            residual = norm / (scale + (norm == 0)) if relative else norm  # 0 where f(z) = z = 0
            if np.count_nonzero(limit) < len(limit):  # the first step
                np.copyto(limit, DIVERGENCE * (norm + scale), where=limit == 0)
            improved = counted & (residual < best)
            moving = counted & (residual > tolerance) & (norm <= limit)

        np.copyto(held, residual, where=counted)
        np.copyto(best, residual, where=improved)
        steps += running
        if np.count_nonzero(moving) < len(moving):
            converged = counted & (residual <= tolerance)
            status[converged] = Status.CONVERGED
            status[counted & ~converged & ~moving] = Status.DIVERGED
            status[running & ~counted] = Status.NONFINITE
        return improved, moving
