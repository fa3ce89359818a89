"""The Broyden step as an op: the reference, its compiled form for a CPU, or two kernels, on one state.

Not differentiable: a solve runs without gradients, and `triton_deq.gradients` gives its derivative.
"""

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..reference import broyden as reference
from ..reference.broyden import BroydenState, broyden_adjoint, slots_for
from ..reference.record import Record
from .launch import (
    Again,
    Partition,
    at_most,
    cycle_length,
    in_few_waves,
    launch,
    launch_at,
    next_power_of_2,
    partition,
    wide_dtype,
)
from .places import next_place, stays, turn, turn_back

BLOCK_BYTES = 4096
"""Of one state at a time, 16-bit ones as if of 32: products with a pair hold three of them in float64."""
RESIDENT = 2
"""Programs of the second half of a step that a multiprocessor holds at once: each of 4 warps with up to 255
registers a thread. Each begins with the sample's whole solve for its coefficients."""

__all__ = [
    "BroydenState",
    "broyden_adjoint",
    "broyden_advance",
    "broyden_landing",
    "broyden_residual",
    "broyden_restart",
    "broyden_select",
    "broyden_squares",
    "broyden_start",
]


def broyden_start(x: Tensor, memory: int, tol: float, max_steps: int, backend: str) -> BroydenState:
    """The state of a solve from `x` `[B, N]`, B and N at least 1, any strides; see `BroydenState`."""
    x = x.clone(memory_format=torch.contiguous_format)
    if backend != "triton":
        return reference.broyden_start(x, memory, tol, max_steps)
    batch, entries = x.shape
    slots = slots_for(memory, max_steps)
    record = Record(batch, tol, x.device)
    parts = _cut(x).parts
    return BroydenState(
        x=x,
        best=torch.empty_like(x),
        moves=x.new_empty((slots, batch, entries)),
        changes=x.new_empty((slots, batch, entries)),
        matrix=x.new_zeros((batch, slots, slots), dtype=torch.float64),
        squares=x.new_zeros((batch, slots), dtype=torch.float64),
        dots=x.new_empty((batch, parts, 3, next_power_of_2(slots + 1)), dtype=torch.float64),
        record=record,
        before=torch.empty_like(record.data),
        active=torch.zeros(cycle_length(slots), dtype=torch.int32, device=x.device),
        spare=x.new_empty(0),
        other=torch.empty_like(x),
    )


def broyden_landing(state: BroydenState, step: int) -> Tensor | None:
    """Where f may leave its value in this step, `[B, N]`; None where the ring has another dtype."""
    return state.landings[step % state.slots] if state.changes.dtype == state.x.dtype else None


def _landed(state: BroydenState, fx: Tensor, step: int) -> bool:
    """Whether f has left its value there."""
    changes = state.changes
    return fx.data_ptr() == changes.data_ptr() + step % state.slots * changes.stride(0) * fx.itemsize


def broyden_restart(state: BroydenState, x: Tensor, tol: float) -> None:
    """Put the state back to before the first step, from another x `[B, N]`, in the memory that it has."""
    turn_back(state)
    state.x.copy_(x)
    state.record.reset(tol)
    state.matrix.zero_()
    state.squares.zero_()
    state.active.zero_()


def broyden_select(state: BroydenState, samples: Tensor, backend: str) -> BroydenState:
    """The state of these samples alone; samples: int64, on the state's device."""
    x = state.x[samples]
    parts = 1 if backend != "triton" else _cut(x).parts
    return replace(
        state,
        x=x,
        best=state.best[samples],
        other=state.other[samples] if len(state.other) else state.other,
        moves=state.moves[:, samples],
        changes=state.changes[:, samples],
        matrix=state.matrix[samples.to(state.matrix.device)],
        squares=state.squares[samples.to(state.squares.device)],
        dots=state.dots.new_zeros((len(samples), parts, *state.dots.shape[2:])),
        record=state.record.select(samples),
        before=state.before[..., : len(samples)].contiguous(),
        spare=state.spare[: len(samples)],
    )


def broyden_residual(state: BroydenState, fx: Tensor, step: int, backend: str) -> None:
    """The newest pair `s`, `φ` into the rings, and this step's sums into `state.dots`.

    fx: `[B, N]`, of the state's dtype, any strides.
    """
    if backend == "reference":
        return reference.broyden_residual(state, fx, step)
    if backend == "numba":
        return _compiled().broyden_residual(state, fx, step)
    fx = fx.contiguous()
    slot, filled = step % state.slots, min(step, state.slots)

    def make() -> Again:
        cut = _cut(state.x)
        return launch(
            _kernels().broyden_residual_kernel,
            (len(state.x), cut.parts),
            fx,
            state.x,
            state.moves,
            state.changes,
            state.dots,
            state.record.data,
            state.before,
            *state.x.shape,
            cut.parts,
            cut.chunk,
            slot,
            (step - 1) % state.slots,
            filled,
            LANDED=_landed(state, fx, step),
            **_constants(state),
        )

    place = "residual", step % len(state.active)
    launch_at(place, (fx.data_ptr(), filled), state.launched, make)
    return None


def broyden_squares(
    state: BroydenState, step: int, backend: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`‖f(x) − x‖²` and `‖f(x)‖²` of each sample, float64 `[B]` on the host, after `broyden_residual`."""
    on_host = backend == "reference"
    sums = reference.broyden_sums(state, step)[0] if on_host else state.dots.sum(1).cpu().numpy()
    return sums[:, 0, state.slots], sums[:, 1, state.slots]


def broyden_advance(
    state: BroydenState, step: int, *, relative: bool, over_batch: bool, last: bool, backend: str
) -> int | Tensor:
    """Judge every sample, keep the best iterates, take the next step; see the reference for the formula.

    Returns how many samples go on: a number, or a one-element tensor on the device that nobody has waited
    for yet.
    """
    if backend != "triton":
        on_host = reference if backend == "reference" else _compiled()
        return on_host.broyden_advance(state, step, relative=relative, over_batch=over_batch, last=last)
    tick = step % len(state.active)

    def make() -> Again:
        cut = _cut(state.x)
        own = _own_cut(state.x)
        return launch(
            _kernels().broyden_advance_kernel,
            (len(state.x), own.parts),
            state.x,
            state.other,
            next_place(state, step),
            state.best,
            state.changes,
            state.dots,
            state.matrix,
            state.squares,
            state.record.data,
            state.before,
            state.active,
            *state.x.shape,
            cut.parts,
            own.chunk,
            tick,
            (step + 1) % len(state.active),
            step % state.slots,
            (step - 1) % state.slots,
            int(stays(state, step)),
            int(last),
            PARTS=next_power_of_2(cut.parts),
            RELATIVE=relative,
            OVER_BATCH=over_batch,
            **_constants(state, 8 if state.slots > 31 else None),  # which hold M, 64 × 64 in float64 then
            **at_most(255),  # no bound: ptxas would spill some for the sake of more programs than RESIDENT
        )

    launch_at(("advance", tick), (last, relative, over_batch), state.launched, make)
    turn(state, step, last)
    return state.active[tick]


def _constants(state: BroydenState, warps: int | None = None) -> dict[str, Any]:
    """The compile-time constants that both kernels share, and the warps.

    A block has an entry at least for each thread: of one that two warps hold, one could store it anew before
    the other has loaded it.
    """
    block = _cut(state.x).block
    warps = warps or max(1, min(4, block // 32))
    return {
        "SLOTS": state.slots,
        "LANES": state.dots.shape[-1],
        "BLOCK": max(block, 32 * warps),
        "WIDE": wide_dtype(state.x.dtype),
        "num_warps": warps,
    }


def _cut(x: Tensor) -> Partition:
    """Of a sample into the parts that the first half of a step adds up, each by itself."""
    batch, entries = x.shape
    return partition(batch, entries, _most(x))


def _own_cut(x: Tensor) -> Partition:
    """Of a sample into the parts that the second half mixes, which need not be those."""
    return in_few_waves(x, _most(x), RESIDENT)


def _most(x: Tensor) -> int:
    """How many entries of a sample a program takes at a time."""
    return BLOCK_BYTES // max(x.element_size(), 4)


@cache
def _compiled() -> ModuleType:
    from ..compiled import steps

    return steps


@cache
def _kernels() -> ModuleType:
    from ..kernels import broyden

    return broyden
