"""The Anderson step as an op: the reference, its compiled form for a CPU, or two kernels, on one state.

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

from ..reference import anderson as reference
from ..reference.anderson import AndersonState
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

__all__ = [
    "AndersonState",
    "anderson_advance",
    "anderson_fits",
    "anderson_landing",
    "anderson_residual",
    "anderson_restart",
    "anderson_select",
    "anderson_squares",
    "anderson_start",
    "anderson_step",
]


WARPS, STEP_WARPS = 4, 8
"""Of a program at most: one that takes half a step of a part of a sample, one that takes a whole step of all.

Whatever is loaded is loaded before the first sum, so that memory is waited for once; and each part's program
solves for the weights anew, while sums of more warps take longer.
"""
PROGRAMS = 4096
"""Of a launch, about: several times what a large GPU holds at once, so that few wait for the last of them."""
RESIDENT = 3
"""Programs of the second half of a step that a multiprocessor holds at once: each of 4 warps with 168
registers a thread, for six slots in float32. Each begins with the sample's whole solve for its weights."""
WARP_ENTRIES, WARP_BYTES = 256, 8192
"""Of a sample at most, and of all slots of a ring: 64 registers a thread; a whole step takes two rings."""


def anderson_start(x: Tensor, history: int, tol: float, max_steps: int, backend: str) -> AndersonState:
    """The state of a solve from `x` `[B, N]`, B and N at least 1, any strides; see `AndersonState`."""
    x = x.clone(memory_format=torch.contiguous_format)
    if backend != "triton":
        state = reference.anderson_start(x, history, tol, max_steps)
        if backend == "numba":
            state.dots = state.dots.double()
        return state
    batch, entries = x.shape
    history = min(history, max_steps)
    record = Record(batch, tol, x.device)
    parts = _cut(x, history).parts
    return AndersonState(
        x=x,
        best=torch.empty_like(x),
        residuals=x.new_empty((history, batch, entries)),
        iterates=x.new_empty((history, batch, entries)),
        gram=x.new_zeros((batch, history, history), dtype=torch.float64),
        dots=x.new_empty((batch, parts, _lanes(history)), dtype=torch.float64),
        record=record,
        before=torch.empty_like(record.data),
        active=torch.zeros(cycle_length(history), dtype=torch.int32, device=x.device),
        spare=x.new_empty(0),
        other=torch.empty_like(x),
    )


def anderson_step(
    state: AndersonState,
    fx: Tensor,
    step: int,
    *,
    mixing: float,
    relative: bool,
    over_batch: bool,
    ridge: float,
    relative_ridge: bool,
    last: bool,
    backend: str,
) -> int | Tensor:
    """A whole step, in one launch where a sample fits one program and need not wait for the others.

    Returns what `anderson_advance` does.
    """
    rule: dict[str, Any] = {
        "relative": relative,
        "over_batch": over_batch,
        "ridge": ridge,
        "relative_ridge": relative_ridge,
        "last": last,
    }
    if backend == "numba":
        return _compiled().anderson_step(state, fx, step, mixing=mixing, **rule)
    if backend == "reference" or over_batch or not anderson_fits(state.x, state.history):
        anderson_residual(state, fx, step, mixing, backend)
        return anderson_advance(state, step, **rule, backend=backend)
    fx = fx.contiguous()
    tick, filled = step % len(state.active), min(step + 1, state.history)

    def make() -> Again:
        batch, entries = state.x.shape
        constants = _constants(state, next_power_of_2(entries))
        return launch(
            _kernels().anderson_step_kernel,
            (batch,),
            fx,
            state.x,
            state.other,
            next_place(state, step),
            state.best,
            state.residuals,
            state.iterates,
            state.gram,
            state.record.data,
            state.active,
            batch,
            entries,
            tick,
            (step + 1) % len(state.active),
            step % state.history,
            filled,
            int(stays(state, step)),
            int(last),
            MIXING=mixing,
            LANDED=_landed(state, fx, step),
            RELATIVE=relative,
            RIDGE=ridge,
            RELATIVE_RIDGE=relative_ridge,
            **constants,
        )

    alike = fx.data_ptr(), filled, last, mixing, relative, ridge, relative_ridge
    launch_at(("step", tick), alike, state.launched, make)
    turn(state, step, last)
    return state.active[tick]


def anderson_fits(x: Tensor, history: int) -> bool:
    """Whether a sample of the state x `[B, N]` fits one program of the kernel that takes a whole step."""
    return x.shape[1] <= _most(x, history, STEP_WARPS)


def anderson_landing(state: AndersonState, step: int) -> Tensor | None:
    """Where f may leave its value in this step, `[B, N]`; None where the ring has another dtype."""
    return state.landings[step % state.history] if state.iterates.dtype == state.x.dtype else None


def _landed(state: AndersonState, fx: Tensor, step: int) -> bool:
    """Whether f has left its value there."""
    iterates = state.iterates
    return fx.data_ptr() == iterates.data_ptr() + step % state.history * iterates.stride(0) * fx.itemsize


def anderson_restart(state: AndersonState, x: Tensor, tol: float) -> None:
    """Put the state back to before the first step, from another x `[B, N]`, in the memory that it has."""
    turn_back(state)
    state.x.copy_(x)
    state.record.reset(tol)
    state.gram.zero_()
    state.active.zero_()


def anderson_select(state: AndersonState, samples: Tensor, backend: str) -> AndersonState:
    """The state of these samples alone; samples: int64, on the state's device."""
    x = state.x[samples]
    parts = 1 if backend != "triton" else _cut(x, state.history).parts
    return replace(
        state,
        x=x,
        best=state.best[samples],
        other=state.other[samples] if len(state.other) else state.other,
        residuals=state.residuals[:, samples],
        iterates=state.iterates[:, samples],
        gram=state.gram[samples.to(state.gram.device)],
        dots=state.dots.new_zeros((len(samples), parts, *state.dots.shape[2:])),
        record=state.record.select(samples),
        before=state.before[..., : len(samples)].contiguous(),
        spare=state.spare[: len(samples)],
    )


def anderson_residual(state: AndersonState, fx: Tensor, step: int, mixing: float, backend: str) -> None:
    """`G = f(x) − x` and `x + β G` into the history, and the new row of the Gram matrix into `state.dots`.

    fx: `[B, N]`, of the state's dtype, any strides.
    """
    if backend == "reference":
        return reference.anderson_residual(state, fx, step, mixing)
    if backend == "numba":
        return _compiled().anderson_residual(state, fx, step, mixing)
    fx = fx.contiguous()
    slot, filled = step % state.history, min(step + 1, state.history)

    def make() -> Again:
        cut = _cut(state.x, state.history)
        return launch(
            _kernels().anderson_residual_kernel,
            (len(state.x), cut.parts),
            fx,
            state.x,
            state.residuals,
            state.iterates,
            state.dots,
            state.record.data,
            state.before,
            *state.x.shape,
            cut.parts,
            cut.chunk,
            slot,
            filled,
            MIXING=mixing,
            LANDED=_landed(state, fx, step),
            **_constants(state, cut.block),
            # Of six slots ptxas would take a few more, and a multiprocessor hold three programs instead of
            # four. Fewer slots take less by themselves, and of seven some would be spilled.
            **(at_most(128) if state.history == 6 and state.x.dtype == torch.float32 else {}),
        )

    place = "residual", step % len(state.active)
    launch_at(place, (fx.data_ptr(), filled, mixing), state.launched, make)
    return None


def anderson_squares(
    state: AndersonState, step: int, backend: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`‖f(x) − x‖²` and `‖f(x)‖²` of each sample, float64 `[B]` on the host, after `anderson_residual`."""
    newest, history = step % state.history, state.history
    on_host = backend == "reference"
    sums = reference.anderson_sums(state, step)[0] if on_host else state.dots.sum(1).cpu().numpy()
    return sums[:, newest], sums[:, history]


def anderson_advance(
    state: AndersonState,
    step: int,
    *,
    relative: bool,
    over_batch: bool,
    ridge: float,
    relative_ridge: bool,
    last: bool,
    backend: str,
) -> int | Tensor:
    """Judge every sample, keep the best iterates, mix the next ones; see the reference for the formula.

    Returns how many samples go on: a number, or a one-element tensor on the device that nobody has waited
    for yet.
    """
    if backend != "triton":
        on_host = reference if backend == "reference" else _compiled()
        return on_host.anderson_advance(
            state,
            step,
            relative=relative,
            over_batch=over_batch,
            ridge=ridge,
            relative_ridge=relative_ridge,
            last=last,
        )
    tick = step % len(state.active)

    def make() -> Again:
        cut = _cut(state.x, state.history)
        own = _own_cut(state.x, state.history)
        return launch(
            _kernels().anderson_advance_kernel,
            (len(state.x), own.parts),
            state.x,
            state.other,
            next_place(state, step),
            state.best,
            state.iterates,
            state.dots,
            state.gram,
            state.record.data,
            state.before,
            state.active,
            *state.x.shape,
            cut.parts,
            own.chunk,
            tick,
            (step + 1) % len(state.active),
            step % state.history,
            int(stays(state, step)),
            int(last),
            PARTS=next_power_of_2(cut.parts),
            RELATIVE=relative,
            OVER_BATCH=over_batch,
            RIDGE=ridge,
            RELATIVE_RIDGE=relative_ridge,
            **_constants(state, cut.block),
        )

    alike = last, relative, over_batch, ridge, relative_ridge
    launch_at(("advance", tick), alike, state.launched, make)
    turn(state, step, last)
    return state.active[tick]


def _cut(x: Tensor, history: int) -> Partition:
    """Of a sample into the parts that the first half of a step adds up, each by itself."""
    batch, entries = x.shape
    return partition(batch, entries, _most(x, history, WARPS), PROGRAMS)


def _own_cut(x: Tensor, history: int) -> Partition:
    """Of a sample into the parts that the second half mixes, which need not be those."""
    return in_few_waves(x, _most(x, history, WARPS), RESIDENT, PROGRAMS)


def _constants(state: AndersonState, block: int) -> dict[str, Any]:
    """The compile-time constants that all kernels share, and how many warps a block takes."""
    history = state.history
    return {
        "HISTORY": history,
        "LANES": _lanes(history),
        "BLOCK": block,
        "WIDE": wide_dtype(state.x.dtype),
        "num_warps": max(1, min(STEP_WARPS, block // _most(state.x, history, 1))),
    }


def _most(x: Tensor, history: int, warps: int) -> int:
    """How many entries of a sample so many warps hold at most, with all slots of a ring in registers."""
    return warps * max(1, min(WARP_ENTRIES, WARP_BYTES // (_lanes(history) * max(x.element_size(), 4))))


def _lanes(history: int) -> int:
    """A power of 2 with room for the dot products and ‖f‖²."""
    return next_power_of_2(history + 1)


@cache
def _compiled() -> ModuleType:
    from ..compiled import steps

    return steps


@cache
def _kernels() -> ModuleType:
    from ..kernels import anderson

    return anderson
