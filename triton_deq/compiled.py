"""The solvers' steps on a CPU, compiled by Numba: the kernels' formulas, one sample after another.

For states so small that a step by PyTorch's operators is mostly their overhead; see `backend.choose_step`.
The formulas stand in triton_deq/reference/anderson.py and broyden.py. One thread: PyTorch's threads keep
spinning between its operators, and those of a second pool would wait for them.

All of it is one file, without names from others, because Numba keeps compiled functions on disk until the
file of the function changes, whatever becomes of what it calls.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from .reference.anderson import AndersonState
from .reference.broyden import BroydenState

# Rows of a solve's record; these numbers and the limits are those of triton_deq/reference.
STATUS, COUNT, RESIDUAL, BEST, LIMIT, TOLERANCE, STEPS = range(7)
CONVERGED, RUNNING, DIVERGED, NONFINITE = range(4)
DIVERGENCE = 1e6
WEIGHT_LIMIT = 1e4
LEAST_SQUARE = 1e-200


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Numba's version of a function: compiled at its first call, read from disk in the next process."""
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in
        return numba.njit(**options)(function)


def vectorised(function: Callable[..., Any]) -> Any:
    """`compiled`, with sums in an order that suits a CPU's vectors; NaN and infinity keep their meaning."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


# Anderson


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
) -> int:
    """`anderson_residual`, then `anderson_advance`, in one call: a small state waits mostly for calls."""
    arrays = state.arrays
    return _anderson_step(
        fx.numpy(),
        arrays.x,
        arrays.best,
        arrays.residuals,
        arrays.iterates,
        arrays.dots,
        arrays.gram,
        arrays.record,
        step,
        mixing,
        relative,
        over_batch,
        ridge,
        relative_ridge,
        last,
    )


def anderson_residual(state: AndersonState, fx: Tensor, step: int, mixing: float) -> None:
    """As the reference's; fx: contiguous."""
    arrays = state.arrays
    _anderson_residual(
        fx.numpy(),
        arrays.x,
        arrays.residuals,
        arrays.iterates,
        arrays.dots,
        arrays.record,
        step,
        mixing,
    )


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
    """As the reference's."""
    arrays = state.arrays
    return _anderson_advance(
        arrays.x,
        arrays.best,
        arrays.iterates,
        arrays.dots,
        arrays.gram,
        arrays.record,
        step,
        relative,
        over_batch,
        ridge,
        relative_ridge,
        last,
    )


@compiled
def _anderson_residual(fx, x, residuals, iterates, dots, record, step, mixing):
    """fx, x: [B, N]    residuals, iterates: [m, B, N]    dots: [B, m+1]    record: [FIELDS, B]"""
    history = len(residuals)
    slot, filled = step % history, min(step + 1, history)
    landed = fx.ctypes.data == iterates[slot].ctypes.data  # f has left its value where it belongs
    for b in range(len(x)):
        if record[STATUS, b] != RUNNING:
            continue
        newest = residuals[slot, b]
        dots[b, slot], dots[b, history] = _residual_of(fx[b], x[b], newest)
        if mixing != 1:
            _mix(fx[b], x[b], mixing, iterates[slot, b])
        elif not landed:
            _copy(fx[b], iterates[slot, b])
        for j in range(filled):
            if j != slot:
                dots[b, j] = _dot(newest, residuals[j, b])


@compiled
def _anderson_advance(
    x, best, iterates, dots, gram, record, step, relative, over_batch, ridge, relative_ridge, last
):
    """x, best: [B, N]    iterates: [m, B, N]    dots: [B, m+1]    gram: [B, m, m]    record: [FIELDS, B]"""
    history = len(iterates)
    slot = step % history
    matrix, scale, weights = np.empty((history, history)), np.empty(history), np.empty(history)
    slots = np.empty(history, np.int64)
    of_batch = _batch_squares(record, dots[:, slot], dots[:, history])
    going = 0
    for b in range(len(x)):
        if record[STATUS, b] != RUNNING:
            continue
        improved, moving = _judge(record, b, dots[b, slot], dots[b, history], of_batch, relative, over_batch)
        if improved:
            _copy(x[b], best[b])
        going += moving
        if not moving or last:
            continue

        gram[b, slot, :] = dots[b, :history]
        gram[b, :, slot] = dots[b, :history]
        count = min(int(record[COUNT, b]) + 1, history)
        for age in range(count):
            slots[age] = (slot - age) % history
        mixed = _mixing_weights(gram[b], slots[:count], ridge, relative_ridge, matrix, scale, weights)
        record[COUNT, b] = count if mixed else 1
        _set_scaled(x[b], weights[0] if mixed else 1.0, iterates[slot, b])
        for age in range(1, count if mixed else 1):
            _add_scaled(x[b], weights[age], iterates[slots[age], b])
    return going


@compiled
def _anderson_step(
    fx,
    x,
    best,
    residuals,
    iterates,
    dots,
    gram,
    record,
    step,
    mixing,
    relative,
    over_batch,
    ridge,
    relative_ridge,
    last,
):
    _anderson_residual(fx, x, residuals, iterates, dots, record, step, mixing)
    return _anderson_advance(
        x, best, iterates, dots, gram, record, step, relative, over_batch, ridge, relative_ridge, last
    )


@compiled
def _mixing_weights(gram, slots, ridge, relative_ridge, matrix, scale, weights):
    """One sample's α for these slots into `weights`; returns whether the solve was of use.

    matrix: [m, m] and scale: [m], to work in
    """
    size = len(slots)
    for i in range(size):
        scale[i] = weights[i] = 1 / np.sqrt(max(gram[slots[i], slots[i]], LEAST_SQUARE))
    for i in range(size):
        for j in range(size):
            matrix[i, j] = gram[slots[i], slots[j]] * scale[i] * scale[j]
        matrix[i, i] += ridge if relative_ridge else ridge * scale[i] * scale[i]
    _solve(matrix, weights, size)

    total = 0.0  # 1 / min αᵀ G α, so positive
    for i in range(size):
        weights[i] *= scale[i]
        total += weights[i]
    length = 0.0
    for i in range(size):
        weights[i] /= total
        length += abs(weights[i])
    return total > 0 and length <= WEIGHT_LIMIT  # false for NaN


# Broyden


def broyden_residual(state: BroydenState, fx: Tensor, step: int) -> None:
    """As the reference's; fx: contiguous."""
    arrays = state.arrays
    _broyden_residual(fx.numpy(), arrays.x, arrays.moves, arrays.changes, arrays.dots, arrays.record, step)


def broyden_advance(state: BroydenState, step: int, *, relative: bool, over_batch: bool, last: bool) -> int:
    """As the reference's."""
    arrays = state.arrays
    return _broyden_advance(
        arrays.x,
        arrays.best,
        arrays.changes,
        arrays.dots,
        arrays.matrix,
        arrays.squares,
        arrays.record,
        step,
        relative,
        over_batch,
        last,
    )


@compiled
def _broyden_residual(fx, x, moves, changes, dots, record, step):
    """fx, x: [B, N]    moves, changes: [m+1, B, N]    dots: [B, 3, m+2]    record: [FIELDS, B]"""
    slots = len(moves)
    slot, newest, filled = step % slots, (step - 1) % slots, min(step + 1, slots)
    landed = fx.ctypes.data == changes[slot].ctypes.data  # f has left its value where it belongs
    residual, curvature = np.empty_like(x[0]), np.empty_like(x[0])
    for b in range(len(x)):
        if record[STATUS, b] != RUNNING:
            continue
        dots[b, 0, slots], dots[b, 1, slots] = _residual_of(fx[b], x[b], residual)
        if step > 0:  # else there is no pair yet
            move, change = moves[newest, b], changes[newest, b]
            dots[b, 2, slots] = _close(fx[b], x[b], move, change, curvature)
            for j in range(filled):
                if j != slot:
                    products = _pair_products(moves[j, b], changes[j, b], residual, curvature, move)
                    dots[b, 0, j], dots[b, 1, j], dots[b, 2, j] = products
        _copy(x[b], moves[slot, b])
        if not landed:
            _copy(fx[b], changes[slot, b])


@compiled
def _broyden_advance(x, best, changes, dots, gram, squares, record, step, relative, over_batch, last):
    """x, best: [B, N]    changes: [m+1, B, N]    dots: [B, 3, m+2]    gram: [B, m+1, m+1], M
    squares: [B, m+1]    record: [FIELDS, B]
    """
    slots = len(changes)
    slot, newest = step % slots, (step - 1) % slots
    matrix, weights = np.empty((slots, slots)), np.empty(slots)
    used = np.empty(slots, np.int64)
    of_batch = _batch_squares(record, dots[:, 0, slots], dots[:, 1, slots])
    going = 0
    for b in range(len(x)):
        if record[STATUS, b] != RUNNING:
            continue
        improved, moving = _judge(
            record, b, dots[b, 0, slots], dots[b, 1, slots], of_batch, relative, over_batch
        )
        if improved:
            _copy(x[b], best[b])
        if step > 0:  # also of a sample that stops: what it leaves is an estimate of its Jacobian
            gram[b, newest, :] = -dots[b, 2, :slots]
            gram[b, :, newest] = dots[b, 1, :slots]
            squares[b, newest] = dots[b, 2, slots]
        going += moving
        if not moving or last:
            continue

        count, pairs = 0, int(record[COUNT, b])
        for age in range(1, pairs + 1):
            j = (slot - age) % slots
            if squares[b, j] > LEAST_SQUARE:
                used[count] = j
                count += 1
        useful = _pair_weights(gram[b], squares[b], dots[b, 0], used[:count], matrix, weights)
        record[COUNT, b] = min(pairs + 1, slots - 1) if useful else 1
        _copy(changes[slot, b], x[b])  # the open slot holds f(x)
        if useful:
            for i in range(count):
                _add_scaled(x[b], weights[i], changes[used[i], b])
    return going


@compiled
def _pair_weights(gram, squares, right, used, matrix, weights):
    """One sample's c for the pairs `used` into `weights`; returns whether they are of use.

    matrix: [m+1, m+1], to work in
    """
    size = len(used)
    for i in range(size):
        for j in range(size):
            matrix[i, j] = gram[used[i], used[j]] / np.sqrt(squares[used[i]]) / np.sqrt(squares[used[j]])
        weights[i] = right[used[i]] / np.sqrt(squares[used[i]])
    _solve(matrix, weights, size)
    length = 0.0
    for i in range(size):
        weights[i] /= np.sqrt(squares[used[i]])
        length += abs(weights[i])
    return length <= WEIGHT_LIMIT  # false for NaN


# Both


@compiled
def _batch_squares(record, residual_sq, value_sq):
    """`‖f(z) − z‖²` and `‖f(z)‖²` over all running finite samples, from those of each, `[B]`."""
    residual_total, value_total = 0.0, 0.0
    for b in range(len(residual_sq)):
        if record[STATUS, b] == RUNNING and np.isfinite(residual_sq[b]) and np.isfinite(value_sq[b]):
            residual_total += residual_sq[b]
            value_total += value_sq[b]
    return residual_total, value_total


@compiled
def _judge(record, b, residual_sq, value_sq, of_batch, relative, over_batch):
    """Write a running sample's fate into its column of the record, as `Record.judge`.

    Returns whether its present iterate is its best, and whether it goes on.
    """
    finite = np.isfinite(residual_sq) and np.isfinite(value_sq)
    norm, scale = np.sqrt(residual_sq), np.sqrt(value_sq)
    if over_batch:
        norm, scale = np.sqrt(of_batch[0]), np.sqrt(of_batch[1])
    record[STEPS, b] += 1
    if record[LIMIT, b] == 0:  # the first step
        record[LIMIT, b] = DIVERGENCE * (norm + scale)
    if not finite:
        record[STATUS, b] = NONFINITE
        return False, False

    residual = norm
    if relative:
        residual = 0.0 if norm == 0 else norm / scale
    record[RESIDUAL, b] = residual
    improved = residual < record[BEST, b]
    if improved:
        record[BEST, b] = residual
    if residual <= record[TOLERANCE, b]:
        record[STATUS, b] = CONVERGED
    elif not norm <= record[LIMIT, b]:
        record[STATUS, b] = DIVERGED
    return improved, record[STATUS, b] == RUNNING


@compiled
def _solve(matrix, right, size):
    """Solve the leading size × size system by elimination with row pivoting; the solution replaces `right`.

    A singular matrix gives entries that are not finite.
    """
    for k in range(size):
        pivot = k
        for i in range(k + 1, size):
            if abs(matrix[i, k]) > abs(matrix[pivot, k]):
                pivot = i
        if pivot != k:
            for j in range(k, size):
                matrix[k, j], matrix[pivot, j] = matrix[pivot, j], matrix[k, j]
            right[k], right[pivot] = right[pivot], right[k]
        inverse = 1 / matrix[k, k]
        for i in range(k + 1, size):
            factor = matrix[i, k] * inverse
            for j in range(k + 1, size):
                matrix[i, j] -= factor * matrix[k, j]
            right[i] -= factor * right[k]
    for k in range(size - 1, -1, -1):
        for j in range(k + 1, size):
            right[k] -= matrix[k, j] * right[j]
        right[k] /= matrix[k, k]


# Loops over the entries of one sample. Sums are taken in float64, which neither overflows nor underflows for
# squares of any float32.


@vectorised
def _residual_of(fx, x, out):
    """`out = f − x`; returns `‖f − x‖²` and `‖f‖²`."""
    residual_sq, value_sq = 0.0, 0.0
    for i in range(len(x)):
        out[i] = fx[i] - x[i]
        residual_sq += np.float64(out[i]) * np.float64(out[i])
        value_sq += np.float64(fx[i]) * np.float64(fx[i])
    return residual_sq, value_sq


@vectorised
def _mix(fx, x, mixing, out):
    """`out = x + β (f − x)`"""
    beta = x.dtype.type(mixing)
    for i in range(len(x)):
        out[i] = x[i] + beta * (fx[i] - x[i])


@vectorised
def _dot(a, b):
    """`a · b`"""
    total = 0.0
    for i in range(len(a)):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@vectorised
def _close(fx, x, move, change, curvature):
    """Close the pair: `s = x − s`, `φ = f − φ`, and `curvature = s − φ`; returns `‖s‖²`."""
    square = 0.0
    for i in range(len(x)):
        move[i] = x[i] - move[i]
        change[i] = fx[i] - change[i]
        curvature[i] = move[i] - change[i]
        square += np.float64(move[i]) * np.float64(move[i])
    return square


@vectorised
def _pair_products(move, change, residual, curvature, newest):
    """`s_i · g`, `s_i · (s_p − φ_p)` and `s_p · φ_i`, p being the newest pair."""
    right, column, row = 0.0, 0.0, 0.0
    for i in range(len(move)):
        right += np.float64(move[i]) * np.float64(residual[i])
        column += np.float64(move[i]) * np.float64(curvature[i])
        row += np.float64(newest[i]) * np.float64(change[i])
    return right, column, row


@vectorised
def _copy(row, out):
    """`out = row`"""
    for i in range(len(out)):
        out[i] = row[i]


@vectorised
def _set_scaled(out, weight, row):
    """`out = weight · row`"""
    weight = out.dtype.type(weight)
    for i in range(len(out)):
        out[i] = weight * row[i]


@vectorised
def _add_scaled(out, weight, row):
    """`out += weight · row`"""
    weight = out.dtype.type(weight)
    for i in range(len(out)):
        out[i] += weight * row[i]
