"""A whole solve of the multilayer perceptron's cell in one launch, forward, or backward in its Jacobian."""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..reference.activations import Activation
from ..reference.record import Record, accumulate_dtype
from .launch import launch, next_power_of_2, precision
from .mlp import Norm

MOST_WIDTH = 256
"""The widest state of a solve in one launch."""
MOST_HISTORY = 8
"""The longest history there."""
SAMPLES = 16
"""Samples of a program there: the least number of rows that a matrix product takes."""


@dataclass(frozen=True)
class Layer:
    """The cell that a whole solve iterates: `act(z Wᵀ + u)`, or `act(z Wᵀ + u) Vᵀ`, and a LayerNorm after it.

    weight: W `[N, N]`, or `[H, N]` with output. u: `[B, N]` or `[B, H]`. output: V `[N, H]` or None.
    """

    weight: Tensor
    u: Tensor
    activation: Activation
    output: Tensor | None
    norm: Norm | None


@dataclass(frozen=True)
class Linearised:
    """The same cell's Jacobian J at a state, for `x ↦ x J + g`.

    weight, output, gain: as in `Layer`; gain `[N]` is the LayerNorm's. slope: `act′(a)` `[B, N]` or `[B, H]`.
    normal: `[B, N]`, the LayerNorm's normalised value, and inverse `[B, 1]`, its 1/σ in the accumulation
    dtype, as `norm` gives them; None without one.
    """

    weight: Tensor
    output: Tensor | None
    slope: Tensor
    gain: Tensor | None
    normal: Tensor | None
    inverse: Tensor | None
    shift: Tensor


@dataclass(frozen=True)
class Rule:
    """How to solve: Anderson's numbers (history 1: Picard) and when to stop; as in `td.Anderson`, `solve`."""

    history: int
    mixing: float
    ridge: float
    relative_ridge: bool
    tol: float
    max_steps: int
    relative: bool


def mlp_solve_fits(z0: Tensor, cell: Layer | Linearised, rule: Rule) -> bool:
    """Whether such a solve can be done in one launch: width at most 256, history at most 8."""
    width = cell.weight.shape[1]
    return (
        z0.dim() == 2
        and z0.shape[1] == width <= MOST_WIDTH
        and rule.history <= MOST_HISTORY
        and (cell.output is not None or cell.weight.shape[0] == width)
    )


def mlp_solve(
    z0: Tensor, cell: Layer | Linearised, rule: Rule, trace: bool = False
) -> tuple[Tensor, Record, Tensor | None]:
    """The fixed point of each sample from z0 `[B, N]`, B ≥ 1, in one launch; not differentiable.

    Each sample takes the iterates that the general loop takes, up to rounding, and stops by itself.

    Returns the best iterates `[B, N]`, the record, and with `trace` the residuals `[max_steps, B]`, of which
    a stopped sample repeats its last.
    """
    batch, width = z0.shape
    history = min(rule.history, rule.max_steps)
    lanes = next_power_of_2(history)
    x = z0.clone(memory_format=torch.contiguous_format)
    record = Record(batch, rule.tol, x.device)
    best = x.clone()
    wide = accumulate_dtype(x.dtype)
    nothing, no_sums = x.new_empty(1), x.new_empty(1, dtype=wide)
    small = record.data.new_empty
    weight = cell.weight.contiguous()
    output = weight if cell.output is None else cell.output.contiguous()
    adjoint = isinstance(cell, Linearised)
    if isinstance(cell, Linearised):
        shift, slope, name = cell.shift.contiguous(), cell.slope.contiguous(), "tanh"
        normal = nothing if cell.normal is None else cell.normal.contiguous()
        inverse = no_sums if cell.inverse is None else cell.inverse.contiguous()
        gain, offset, epsilon = nothing if cell.gain is None else cell.gain.contiguous(), nothing, 0.0
        normed = cell.gain is not None
        scratch = torch.empty_like(x)
    else:
        shift, slope, name = cell.u.contiguous(), nothing, cell.activation.name
        normal, inverse, scratch = nothing, no_sums, nothing
        normed = cell.norm is not None
        gain = nothing if cell.norm is None else cell.norm.gain.contiguous()
        offset = nothing if cell.norm is None else cell.norm.offset.contiguous()
        epsilon = 0.0 if cell.norm is None else cell.norm.epsilon
    traced = small(rule.max_steps if trace else 1, batch)
    launch(
        _kernels().mlp_solve_kernel,
        (-(-batch // SAMPLES),),
        x,
        best,
        x.new_empty(history, batch, width),
        x.new_empty(history, batch, width),
        small(batch, history, history),
        small(batch, lanes),
        record.data,
        traced,
        weight,
        output,
        shift,
        slope,
        gain,
        offset,
        normal,
        inverse,
        scratch,
        batch,
        rule.max_steps,
        ADJOINT=adjoint,
        WIDTH=width,
        HIDDEN=0 if cell.output is None else weight.shape[0],
        ACTIVATION=name,
        NORM=normed,
        EPSILON=epsilon,
        HISTORY=history,
        LANES=lanes,
        MIXING=rule.mixing,
        RELATIVE=rule.relative,
        RIDGE=rule.ridge,
        RELATIVE_RIDGE=rule.relative_ridge,
        TRACE=trace,
        SAMPLES=SAMPLES,
        BLOCK=max(16, next_power_of_2(width)),
        BLOCK_K=16 if x.dtype == torch.float64 else 32,
        BLOCK_H=16 if x.dtype == torch.float64 else 32,
        num_warps=4 if width <= 32 else 8,
        **precision(x.dtype),
    )
    if not trace:
        return best, record, None
    step = torch.arange(rule.max_steps, device=x.device)[:, None]
    return best, record, torch.where(step < record.steps, traced, record.residual)


@cache
def _kernels() -> ModuleType:
    from ..kernels import mlp_solve

    return mlp_solve
