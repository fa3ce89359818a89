"""Anderson mixing in PyTorch, and the state that the kernels share.

With `G_i = f(x_i) − x_i` over the last m iterates of a sample:

    α  = argmin ‖Σ α_i G_i‖² + λ Σ w_i α_i²   subject to   Σ α_i = 1
    x⁺ = Σ α_i (x_i + β G_i)

`w_i = ‖G_i‖²` for a relative ridge λ, 1 for an absolute one. Source: Walker & Ni, "Anderson
Acceleration for Fixed-Point Iterations", SIAM J. Numer. Anal. 49 (2011), eq. 2.2; β is the mixing.
A relative ridge follows the scale of each residual, so it neither drowns the small residuals near
convergence nor depends on the units of z.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .record import Record, accumulate_dtype

WEIGHT_LIMIT = 1e4
"""Σ|α| beyond which the weights amplify rounding more than they help: take a plain step instead."""


LEAST_SQUARE = 1e-200
"""What ‖G_i‖² counts as at least, so that a residual of zero has a finite scale."""


@dataclass
class AndersonState:
    """Everything a solve keeps, for B samples of N entries and m history slots.

    x: `[B, N]`, the iterate that f is evaluated at.
    best: `[B, N]`, each sample's iterate with the lowest residual.
    residuals, iterates: `[m, B, N]` rings of `G_i` and of `x_i + β G_i`. Step k uses slot k mod m.
    gram: `[B, m, m]` float64, `G_i · G_j`; a step renews one row and column.
    dots: `[B, P, ≥ m+1]` partial sums over P parts of a sample: the new Gram row, then ‖f‖² in column m.
    before: `[FIELDS, B]`, the record as it was before the present step (kernels only).
    active: `[max_steps]` int32, 1 where any sample went on after that step (kernels only).
    spare: `[B, N]`, where the reference mixes while some samples are frozen.
    """

    x: Tensor
    best: Tensor
    residuals: Tensor
    iterates: Tensor
    gram: Tensor
    dots: Tensor
    record: Record
    before: Tensor
    active: Tensor
    spare: Tensor

    @property
    def history(self) -> int:
        return self.residuals.shape[0]


def anderson_start(x: Tensor, history: int, tol: float, max_steps: int) -> AndersonState:
    """The state before the first step from `x` `[B, N]`, contiguous, which becomes the state's own.

    Both rings are kept in the accumulation dtype: rounding them to bf16 would cost the reference its truth.
    """
    batch, entries = x.shape
    history = min(history, max_steps)
    ring = (history, batch, entries)
    wide = accumulate_dtype(x.dtype)
    return AndersonState(
        x=x,
        best=x.clone(),
        residuals=x.new_empty(ring, dtype=wide),
        iterates=x.new_empty(ring, dtype=wide),
        gram=x.new_zeros((batch, history, history), dtype=torch.float64),
        dots=x.new_zeros((batch, 1, history + 1), dtype=torch.float64),
        record=Record(batch, tol, torch.device("cpu")),
        before=torch.empty(0, dtype=torch.float64, device=x.device),
        active=torch.empty(0, dtype=torch.int32, device=x.device),
        spare=x.new_empty((batch, entries), dtype=wide),
    )


def anderson_residual(state: AndersonState, fx: Tensor, step: int, mixing: float) -> None:
    """Write `G = f − x` and `x + β G` into this step's slot, and the new Gram row and ‖f‖² into `dots`.

    fx: `[B, N]`, f at `state.x`.
    """
    wide = state.residuals.dtype
    history, slot, filled = state.history, step % state.history, min(step + 1, state.history)
    x, fx = state.x.to(wide), fx.to(wide)

    residual = torch.sub(fx, x, out=state.residuals[slot])
    if mixing == 1:
        state.iterates[slot].copy_(fx)
    else:
        torch.lerp(x, fx, mixing, out=state.iterates[slot])

    row = torch.bmm(residual[:, None, :], state.residuals[:filled].permute(1, 2, 0))
    state.dots[:, :, :filled] = row
    state.dots[:, 0, history] = torch.linalg.vector_norm(fx, dim=1).double().square()


def anderson_advance(
    state: AndersonState,
    step: int,
    *,
    relative: bool,
    over_batch: bool,
    ridge: float,
    relative_ridge: bool,
    last: bool,
) -> bool:
    """Judge every sample, keep the best iterates, and move the samples that go on to their next iterate.

    `last` says that no evaluation of f follows, so there is no next iterate to compute.
    Returns whether any sample goes on.
    """
    history, slot, record = state.history, step % state.history, state.record
    filled = min(step + 1, history)
    row, value_sq = state.dots[:, 0, :history], state.dots[:, 0, history]
    state.gram[:, slot, :] = row
    state.gram[:, :, slot] = row

    count = np.minimum(record.count.numpy() + 1, history)
    valid = _valid_slots(count, slot, filled).to(row.device) if count.min() < filled else None
    weights, mixed = anderson_weights(state.gram[:, :filled, :filled], valid, slot, ridge, relative_ridge)

    # The one read of the device in a step.
    residual_sq, value_sq, mixed = torch.stack((row[:, slot], value_sq, mixed)).cpu().numpy()
    improved, moving = record.judge(step, residual_sq, value_sq, relative=relative, over_batch=over_batch)
    np.copyto(record.count.numpy(), np.where(mixed > 0, count, 1), where=moving)

    _assign(state.best, state.x, improved)
    if moving.any() and not last:
        weights = weights[:, None, :].to(state.iterates.dtype)
        ring = state.iterates[:filled].transpose(0, 1)
        whole = moving.all() and state.x.dtype == ring.dtype
        target = state.x if whole else state.spare
        torch.bmm(weights, ring, out=target[:, None, :])
        if not whole:
            _assign(state.x, state.spare, moving)
    return bool(moving.any())


def anderson_weights(
    gram: Tensor, valid: Tensor | None, slot: int, ridge: float, relative_ridge: bool
) -> tuple[Tensor, Tensor]:
    """Solve for α `[B, m]` from the Gram matrices `[B, m, m]` float64; differentiable.

    The Gram matrix is first scaled to a unit diagonal, so the solve sees no units. A residual of zero
    makes its iterate take all the weight.

    valid: `[B, m]`, the slots that may take part; None for all. slot: the newest one.
    Returns α, zero in slots that are not valid, and a mask `[B]`: False where the solve was of no use
    and α is a plain step from the newest slot.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=LEAST_SQUARE).rsqrt()
    damping = ridge if relative_ridge else ridge * scale.square()
    if valid is not None:
        gram = torch.where(valid[:, :, None] & valid[:, None, :], gram, 0)
        scale = torch.where(valid, scale, 0)
        damping = torch.where(valid, damping, 1)

    matrix = gram * scale[:, :, None] * scale[:, None, :]
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    weights = scale * torch.cholesky_solve(scale[:, :, None], factor)[..., 0]
    weights = weights / weights.sum(-1, keepdim=True)

    # A comparison that NaN fails, and a sum that it spoils.
    mixed = (weights.abs().sum(-1) + WEIGHT_LIMIT * failed) <= WEIGHT_LIMIT
    plain = torch.zeros_like(weights[0])
    plain[slot] = 1
    return torch.where(mixed[:, None], weights, plain), mixed


def _valid_slots(count: NDArray[np.float64], slot: int, filled: int) -> Tensor:
    """`[B, filled]`: slots whose age is below each sample's count."""
    age = (slot - np.arange(filled)) % filled
    return torch.from_numpy(age < count[:, None])


def _assign(target: Tensor, source: Tensor, mask: NDArray[np.bool_]) -> None:
    """`target[mask] = source[mask]` for rows."""
    if mask.all():
        target.copy_(source)
    elif mask.any():
        chosen = torch.from_numpy(mask).to(target.device)[:, None]
        torch.where(chosen, source.to(target.dtype), target, out=target)
