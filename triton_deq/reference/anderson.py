"""Anderson mixing in PyTorch, and the state that the kernels share.

With `G_i = f(x_i) − x_i` over the last m iterates of a sample:

    α  = argmin ‖Σ α_i G_i‖² + λ Σ w_i α_i²   subject to   Σ α_i = 1
    x⁺ = Σ α_i (x_i + β G_i)

`w_i = ‖G_i‖²` for a relative ridge λ, 1 for an absolute one. Source: Walker & Ni, "Anderson
Acceleration for Fixed-Point Iterations", SIAM J. Numer. Anal. 49 (2011), eq. 2.2; β is the mixing.
A relative ridge follows the scale of each residual, so it neither drowns the small residuals near
convergence nor depends on the units of z.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .buffers import fresh
from .record import COUNT, Record, accumulate_dtype
from .rows import assign, first, keep_best, part, regular, runs, unsafe

WEIGHT_LIMIT = 1e4
"""Σ|α| beyond which the weights amplify rounding more than they help: take a plain step instead."""

LEAST_SQUARE = 1e-200
"""What ‖G_i‖² counts as at least, so that a residual of zero has a finite scale."""


class Views(NamedTuple):
    """Views of a state's buffers: making one costs as much as an operator on a small state.

    residuals: `[B, N]`, each slot. residuals_of: `[B, N, m]`, each sample's ring; iterates_of:
    `[B, m, N]`. dots: `[B, m+1]`. products, value_sq: `[B, 1, m]` and `[B]`, its parts. gram: in NumPy.
    weights: `[B, 1, m]` on the host, to mix with, and the same in NumPy.
    dots_on_host: `dots` in NumPy, where they are on the host.
    """

    residuals: tuple[Tensor, ...]
    residuals_of: Tensor
    iterates_of: Tensor
    dots: Tensor
    products: Tensor
    value_sq: Tensor
    gram: NDArray[np.float64]
    weights: tuple[Tensor, NDArray[Any]]
    dots_on_host: NDArray[Any] | None


@dataclass
class AndersonState:
    """Everything a solve keeps, for B samples of N entries and m history slots.

    x: `[B, N]`, the iterate that f is evaluated at. The reference lets x and best change roles.
    best: `[B, N]`, each sample's iterate with the lowest residual; see ops/places.py for the kernels.
    residuals, iterates: `[m, B, N]` rings of `G_i` and of `x_i + β G_i`. Step k uses slot k mod m.
    gram: `[B, m, m]` float64, `G_i · G_j`; a step renews one row and column. On the host in the reference.
    dots: the new Gram row, then ‖f‖² in column m. Kernels: float64 `[B, P, ≥ m+1]`, partial sums over P
        parts of a sample. Reference: `[B, 1, m+1]` in the accumulation dtype. Compiled: the same in float64.
    before: `[FIELDS, B]`, the record as it was before the present step (kernels only).
    active: `[cycle]` int32, how many samples went on after step k, in k mod cycle (kernels only).
    spare: `[B, N]`, where the reference mixes if x has a narrower dtype than the rings; else empty.
    other: `[B, N]`, the iterate before, and where the next one goes (kernels only).
    turned: whether x and other have changed places (kernels only).
    sums: `anderson_sums` of this step, once it was asked for (reference only).
    whole: that every sample which goes on may use all slots that are filled (reference only).
    launched: by place in the cycle, what was launched there and how to do it again (kernels); compiled: what
        its steps are told.
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
    other: Tensor
    turned: bool = False
    sums: tuple[NDArray[np.float64], bool] | None = None
    whole: bool = False
    launched: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def history(self) -> int:
        return self.residuals.shape[0]

    @cached_property
    def landings(self) -> tuple[Tensor, ...]:
        """`[B, N]`, each slot of the iterates: where f may leave its value."""
        return self.iterates.unbind()

    @cached_property
    def views(self) -> Views:
        """For the reference, which gives a state no other buffers but x and best."""
        weights = torch.empty(len(self.x), 1, self.history, dtype=self.iterates.dtype, device="cpu")
        return Views(
            residuals=self.residuals.unbind(),
            residuals_of=self.residuals.permute(1, 2, 0),
            iterates_of=self.iterates.transpose(0, 1),
            dots=self.dots[:, 0],
            products=self.dots[:, :, : self.history],
            value_sq=self.dots[:, 0, self.history],
            gram=self.gram.numpy(),
            weights=(weights, weights[:, 0].numpy()),
            dots_on_host=self.dots[:, 0].numpy() if self.dots.device.type == "cpu" else None,
        )


def anderson_start(x: Tensor, history: int, tol: float, max_steps: int) -> AndersonState:
    """The state before the first step from `x` `[B, N]`, contiguous, which becomes the state's own.

    Both rings are kept in the accumulation dtype: rounding them to bf16 would cost the reference its truth.
    """
    batch, entries = x.shape
    history = min(history, max_steps)
    wide = accumulate_dtype(x.dtype)
    # In one piece, so that the allocator keeps it for the next solve instead of giving back fresh pages.
    residuals, iterates = fresh((2, history, batch, entries), wide, x.device)
    return AndersonState(
        x=x,
        best=x.clone(),
        residuals=residuals,
        iterates=iterates,
        gram=torch.zeros((batch, history, history), dtype=torch.float64, device="cpu"),
        dots=x.new_zeros((batch, 1, history + 1), dtype=wide),
        record=Record(batch, tol, torch.device("cpu")),
        before=torch.empty(0, dtype=torch.float64, device=x.device),
        active=torch.empty(0, dtype=torch.int32, device=x.device),
        spare=x.new_empty((batch if x.dtype != wide else 0, entries), dtype=wide),
        other=x.new_empty((0, entries)),
        whole=True,
    )


def anderson_residual(state: AndersonState, fx: Tensor, step: int, mixing: float) -> None:
    """Write `G = f − x` and `x + β G` into this step's slot, and the new Gram row and ‖f‖² into `dots`.

    fx: `[B, N]`, f at `state.x`.
    """
    wide, history, views = state.residuals.dtype, state.history, state.views
    slot, filled = step % history, min(step + 1, history)
    residual, iterate = views.residuals[slot], state.landings[slot]
    x, fx = (tensor if tensor.dtype == wide else tensor.to(wide) for tensor in (state.x, fx))

    torch.sub(fx, x, out=residual)
    torch.linalg.vector_norm(fx, dim=1, out=views.value_sq).square_()
    if mixing != 1:  # over fx, where f has left it in this slot
        torch.lerp(x, fx, mixing, out=iterate)
    elif fx.data_ptr() != iterate.data_ptr():  # else f has left it there
        iterate.copy_(fx)

    if history == 1:
        torch.linalg.vector_norm(residual, dim=1, out=views.dots[:, 0]).square_()
    else:  # A row times a matrix: inside a solve the other orientation took longer.
        row = torch.bmm(residual[:, None], first(filled, views.residuals_of))
        first(filled, views.products).copy_(row)
    state.sums = None


def anderson_sums(state: AndersonState, step: int) -> tuple[NDArray[np.float64], bool]:
    """`[B, m + 1]` float64 on the host: the new Gram row, then ‖f‖² in column m; what `dots` holds.

    The second says that the squares are `regular`.
    """
    if state.sums is None:
        views, slot = state.views, step % state.history
        dots = views.dots_on_host if views.dots_on_host is not None else views.dots.cpu().numpy()
        sums = dots.astype(np.float64)
        fine = regular(sums[:, slot :: state.history - slot])  # columns slot and m
        if not fine:
            _sum_again(state, sums, slot, min(step + 1, state.history))
        state.sums = sums, fine
    return state.sums


def anderson_advance(
    state: AndersonState,
    step: int,
    *,
    relative: bool,
    over_batch: bool,
    ridge: float,
    relative_ridge: bool,
    last: bool,
) -> int:
    """Judge every sample, keep the best iterates, and move the samples that go on to their next iterate.

    `last` says that no evaluation of f follows, so there is no next iterate to compute.
    Returns how many samples go on.
    """
    slot = step % state.history
    sums, fine = anderson_sums(state, step)
    improved, moving = state.record.judge(
        sums[:, slot], sums[:, state.history], relative=relative, over_batch=over_batch, regular=fine
    )
    keep_best(state, improved, moving)
    going = int(np.count_nonzero(moving))
    if going and not last:
        anderson_mix(state, step, moving, ridge, relative_ridge)
    return going


def anderson_mix(
    state: AndersonState, step: int, moving: NDArray[np.bool_], ridge: float, relative_ridge: bool
) -> None:
    """Take in this step's Gram row, and move the samples of the mask `[B]` to their next iterate."""
    history, slot, record, views = state.history, step % state.history, state.record, state.views
    filled, gram, used = min(step + 1, history), views.gram, record.rows[COUNT]
    row = anderson_sums(state, step)[0][:, :history]
    gram[:, slot, :] = row
    gram[:, :, slot] = row
    if history == 1:
        np.copyto(used, 1, where=moving)
        return assign(state.x, state.landings[0].to(state.x.dtype), moving)

    count: Any = filled if state.whole else np.minimum(used + 1, history)
    valid = None if state.whole else _valid_slots(count, slot, filled)
    weights, mixed = _host_weights(gram[:, :filled, :filled], valid, slot, ridge, relative_ridge)
    np.copyto(used, count if mixed is None else np.where(mixed, count, 1), where=moving)
    if mixed is not None or not state.whole:
        state.whole = bool((used[moving] == filled).all())

    ring = first(filled, views.iterates_of, dim=1)
    alpha, on_host = views.weights
    np.copyto(on_host[:, :filled], weights)
    alpha = first(filled, alpha).to(ring.device)
    target = state.x if state.x.dtype == ring.dtype else state.spare
    for rows in runs(moving):
        torch.bmm(part(alpha, rows), part(ring, rows), out=part(target, rows)[:, None])
        if target is not state.x:
            state.x[rows] = target[rows]
    return None


def _sum_again(state: AndersonState, dots: NDArray[np.float64], slot: int, filled: int) -> None:
    """Replace sums of float32 squares near over- or underflow by sums in float64."""
    if state.residuals.dtype == torch.float64:
        return
    squares = dots[:, slot :: state.history - slot]  # columns slot and m
    for sample in unsafe(squares, state.record):
        if squares[sample, 0] == 0 and not state.residuals[slot, sample].any():
            continue  # truly zero
        ring = state.residuals[:filled, sample].double()
        value = state.x[sample].double() + ring[slot]
        dots[sample, :filled] = (ring @ ring[slot]).cpu().numpy()
        dots[sample, state.history] = value.square().sum().item()


def _host_weights(
    gram: NDArray[np.float64],
    valid: NDArray[np.bool_] | None,
    slot: int,
    ridge: float,
    relative_ridge: bool,
) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
    """`anderson_weights` in NumPy, whose small operations cost a third of PyTorch's.

    None for the mask says that it is True everywhere.
    """
    with np.errstate(all="ignore"):
        scale = 1 / np.sqrt(np.maximum(gram.diagonal(0, 1, 2), LEAST_SQUARE))
        damping = ridge if relative_ridge else ridge * scale * scale
        if valid is not None:
            gram = np.where(valid[:, :, None] & valid[:, None, :], gram, 0)
            scale = np.where(valid, scale, 0)
            damping = np.where(valid, damping, 1)
        matrix = gram * scale[:, :, None]
        matrix *= scale[:, None, :]
        size = len(matrix[0])
        matrix.reshape(len(matrix), -1)[:, :: size + 1] += damping  # the diagonal, as a view
        weights: NDArray[Any]
        try:
            weights = np.linalg.solve(matrix, scale[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:  # one singular sample fails them all
            weights = torch.linalg.solve_ex(*map(torch.from_numpy, (matrix, scale))).result.numpy()
        weights *= scale
        total = np.add.reduce(weights, axis=1, keepdims=True)  # 1 / min αᵀ G α, so positive
        weights /= total
        # Comparisons that NaN fails.
        if np.minimum.reduce(total, axis=None) > 0 and np.abs(weights).max() * size <= WEIGHT_LIMIT:
            return weights, None
        mixed = (total[:, 0] > 0) & (np.abs(weights).sum(axis=1) <= WEIGHT_LIMIT)
    weights[~mixed] = np.arange(size) == slot
    return weights, mixed


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


def _valid_slots(count: NDArray[np.float64], slot: int, filled: int) -> NDArray[np.bool_]:
    """`[B, filled]`: slots whose age is below each sample's count."""
    age = (slot - np.arange(filled)) % filled
    return age < count[:, None]
