"""The solvers' steps: the kernels' formulas, one sample after another.

The formulas stand in triton_deq/reference/anderson.py and broyden.py. A large state's samples are dealt out
to threads; a sample is one thread's, so that the bits do not depend on how many there are.
"""

import ctypes
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from torch import Tensor

from .. import openmp
from ..backend import lies_at_its_address
from ..reference.anderson import AndersonState
from ..reference.broyden import BroydenState
from .calls import Call, array, compiled, fields, share, vectorised

# Rows of a solve's record; these numbers and the limits are those of triton_deq/reference.
STATUS, COUNT, RESIDUAL, BEST, LIMIT, TOLERANCE, STEPS = range(7)
FIELDS = 8
CONVERGED, RUNNING, DIVERGED, NONFINITE = range(4)
DIVERGENCE = 1e6
WEIGHT_LIMIT = 1e4
LEAST_SQUARE = 1e-200

GRAIN = 1 << 14
"""How many entries of a history are worth a thread."""

BLOCK = 1024
"""How many entries of a sample are taken at a time: what is read again is still in the first cache."""

EVALUATED, SUMMED, ADVANCED = 1, 2, 4
"""Phases of a step: f's value is taken in; sums over the batch; samples are judged, and go on."""


# Calls


def anderson_float32(call):
    _anderson(numba.carray(call, 1)[0], np.float32)


def anderson_float64(call):
    _anderson(numba.carray(call, 1)[0], np.float64)


def broyden_float32(call):
    _broyden(numba.carray(call, 1)[0], np.float32)


def broyden_float64(call):
    _broyden(numba.carray(call, 1)[0], np.float64)


class StepCall(Call):
    """A step's call.

    Addresses of f's value, of the state's buffers, and of a counter for each thread; sizes; the number of
    the step and its rule; and sums over the batch, which phase `SUMMED` writes.
    """

    buffers: ClassVar[tuple[str, ...]]

    def __init__(self, state: Any, slots: int) -> None:
        batch, entries = state.x.shape
        super().__init__(batch=batch, entries=entries, slots=slots)
        self._dtype = state.x.dtype
        self._threads = max(min(openmp.threads_for(batch), batch * entries * slots // GRAIN), 1)
        buffers = {name: getattr(state, name) for name in self.buffers}
        for name, buffer in {**buffers, "record": state.record.data}.items():
            assert buffer.is_contiguous(), name
            setattr(self, name, buffer.data_ptr())
        self._counters = (ctypes.c_int64 * self._threads)()
        self.going = ctypes.addressof(self._counters)

    @classmethod
    def of(cls, state: Any, slots: int) -> Any:
        """The state's call, made once."""
        call = state.launched.get("call")
        if call is None:
            call = state.launched["call"] = cls(state, slots)
        return call

    def run(self, phases: int) -> int:
        """Take these phases; returns how many samples go on."""
        if phases & ADVANCED and self.over_batch:  # no sample can be judged before all are evaluated
            if phases & EVALUATED:
                self._run(EVALUATED)
            self._run(SUMMED)
            phases = ADVANCED
        self._run(phases)
        return sum(self._counters)

    def _run(self, phases: int) -> None:
        self.phases = phases
        self.run_on(self._dtype, 1 if phases == SUMMED else self._threads)


def _fields(buffers: tuple[str, ...], numbers: str, reals: str) -> list[tuple[str, Any]]:
    whole = *buffers, "fx record going batch entries slots phases step", numbers
    return fields(" ".join(whole), reals)


class AndersonCall(StepCall):
    buffers = ("x", "best", "residuals", "iterates", "gram", "dots")
    functions = anderson_float32, anderson_float64
    _fields_ = _fields(
        buffers, "relative over_batch relative_ridge last", "mixing ridge residual_sq value_sq"
    )


class BroydenCall(StepCall):
    buffers = ("x", "best", "moves", "changes", "matrix", "squares", "dots")
    functions = broyden_float32, broyden_float64
    _fields_ = _fields(buffers, "relative over_batch last", "residual_sq value_sq")


def _readable(fx: Tensor) -> Tensor:
    """f's value as a tensor whose entries stand at its address, one after the other, as they are."""
    fx = fx.contiguous()
    return fx if lies_at_its_address(fx) else torch.empty(fx.shape, dtype=fx.dtype, device="cpu").copy_(fx)


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
    fx, call = _readable(fx), AndersonCall.of(state, state.history)
    call.fx, call.step, call.mixing = fx.data_ptr(), step, mixing
    call.relative, call.over_batch, call.last = relative, over_batch, last
    call.ridge, call.relative_ridge = ridge, relative_ridge
    return call.run(EVALUATED | ADVANCED)


def anderson_residual(state: AndersonState, fx: Tensor, step: int, mixing: float) -> None:
    """As the reference's."""
    fx, call = _readable(fx), AndersonCall.of(state, state.history)
    call.fx, call.step, call.mixing = fx.data_ptr(), step, mixing
    call.run(EVALUATED)


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
    call = AndersonCall.of(state, state.history)
    call.step, call.relative, call.over_batch, call.last = step, relative, over_batch, last
    call.ridge, call.relative_ridge = ridge, relative_ridge
    return call.run(ADVANCED)


@compiled
def _anderson(call, dtype):
    batch, entries, history = call.batch, call.entries, call.slots
    fx = array(call.fx, (batch, entries), dtype)
    x, best = array(call.x, (batch, entries), dtype), array(call.best, (batch, entries), dtype)
    residuals = array(call.residuals, (history, batch, entries), dtype)
    iterates = array(call.iterates, (history, batch, entries), dtype)
    gram = array(call.gram, (batch, history, history), np.float64)
    dots = array(call.dots, (batch, history + 1), np.float64)
    record = array(call.record, (FIELDS, batch), np.float64)
    going = array(call.going, call.threads, np.int64)

    step, slot = call.step, call.step % history
    if call.phases == SUMMED:
        call.residual_sq, call.value_sq = _batch_squares(record, dots[:, slot], dots[:, history])
        return
    landed = fx.ctypes.data == iterates[slot].ctypes.data  # f has left its value where it belongs
    matrix, scale, weights = np.empty((history, history)), np.empty(history), np.empty(history)
    slots = np.empty(history, np.int64)
    thread, first, end = share(call.threads, batch)
    going[thread] = 0
    for b in range(first, end):
        if record[STATUS, b] != RUNNING:
            continue
        if call.phases & EVALUATED:
            filled = min(step + 1, history)
            _anderson_residual(b, fx, x, residuals, iterates, dots, slot, filled, call.mixing, landed)
        if not call.phases & ADVANCED:
            continue

        improved, moving = _judge(record, b, dots[b, slot], dots[b, history], call)
        if improved:
            _copy(x[b], best[b])
        going[thread] += moving
        if not moving or call.last:
            continue
        gram[b, slot, :] = dots[b, :history]
        gram[b, :, slot] = dots[b, :history]
        count = min(int(record[COUNT, b]) + 1, history)
        for age in range(count):
            slots[age] = (slot - age) % history
        mixed = _mixing_weights(
            gram[b], slots[:count], call.ridge, call.relative_ridge, matrix, scale, weights
        )
        if not mixed:
            count, weights[0] = 1, 1.0
        record[COUNT, b] = count
        _combine(b, x, iterates, weights, slots[:count])


@compiled
def _anderson_residual(b, fx, x, residuals, iterates, dots, slot, filled, mixing, landed):
    """`G = f − x` and `x + β G` of sample b into their slot, and the new Gram row and ‖f‖² into `dots`."""
    history = len(residuals)
    threes = filled - filled % 3
    dots[b, :filled] = 0
    dots[b, history] = 0
    for start in range(0, x.shape[1], BLOCK):
        end = start + BLOCK
        newest = residuals[slot, b, start:end]
        dots[b, history] += _residual_of(fx[b, start:end], x[b, start:end], newest)
        if mixing != 1:
            _mix(fx[b, start:end], x[b, start:end], mixing, iterates[slot, b, start:end])
        elif not landed:
            _copy(fx[b, start:end], iterates[slot, b, start:end])
        for j in range(0, threes, 3):
            rows = residuals[j, b, start:end], residuals[j + 1, b, start:end], residuals[j + 2, b, start:end]
            sums = _three_dots(newest, *rows)
            dots[b, j] += sums[0]
            dots[b, j + 1] += sums[1]
            dots[b, j + 2] += sums[2]
        for j in range(threes, filled):
            dots[b, j] += _dot(newest, residuals[j, b, start:end])


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
    """As the reference's."""
    fx, call = _readable(fx), BroydenCall.of(state, state.slots)
    call.fx, call.step = fx.data_ptr(), step
    call.run(EVALUATED)


def broyden_advance(state: BroydenState, step: int, *, relative: bool, over_batch: bool, last: bool) -> int:
    """As the reference's."""
    call = BroydenCall.of(state, state.slots)
    call.step, call.relative, call.over_batch, call.last = step, relative, over_batch, last
    return call.run(ADVANCED)


@compiled
def _broyden(call, dtype):
    batch, entries, slots = call.batch, call.entries, call.slots
    fx = array(call.fx, (batch, entries), dtype)
    x, best = array(call.x, (batch, entries), dtype), array(call.best, (batch, entries), dtype)
    moves = array(call.moves, (slots, batch, entries), dtype)
    changes = array(call.changes, (slots, batch, entries), dtype)
    gram = array(call.matrix, (batch, slots, slots), np.float64)
    squares = array(call.squares, (batch, slots), np.float64)
    dots = array(call.dots, (batch, 3, slots + 1), np.float64)
    record = array(call.record, (FIELDS, batch), np.float64)
    going = array(call.going, call.threads, np.int64)

    step, slot, newest = call.step, call.step % slots, (call.step - 1) % slots
    if call.phases == SUMMED:
        call.residual_sq, call.value_sq = _batch_squares(record, dots[:, 0, slots], dots[:, 1, slots])
        return
    landed = fx.ctypes.data == changes[slot].ctypes.data  # f has left its value where it belongs
    wide = np.empty((3, BLOCK))
    matrix, scale, weights = np.empty((slots, slots)), np.empty(slots), np.empty(slots)
    used = np.empty(slots, np.int64)
    weights[0], used[0] = 1, slot  # the open slot, which holds f(x)
    thread, first, end = share(call.threads, batch)
    going[thread] = 0
    for b in range(first, end):
        if record[STATUS, b] != RUNNING:
            continue
        if call.phases & EVALUATED:
            _broyden_residual(b, fx, x, moves, changes, dots, step, landed, wide)
        if not call.phases & ADVANCED:
            continue

        improved, moving = _judge(record, b, dots[b, 0, slots], dots[b, 1, slots], call)
        if improved:
            _copy(x[b], best[b])
        if step > 0:  # also of a sample that stops: what it leaves is an estimate of its Jacobian
            gram[b, newest, :] = -dots[b, 2, :slots]
            gram[b, :, newest] = dots[b, 1, :slots]
            squares[b, newest] = dots[b, 2, slots]
        going[thread] += moving
        if not moving or call.last:
            continue
        count, pairs = 0, int(record[COUNT, b])
        for age in range(1, pairs + 1):
            j = (slot - age) % slots
            if squares[b, j] > LEAST_SQUARE:
                count += 1
                used[count] = j
        useful = _pair_weights(
            gram[b], squares[b], dots[b, 0], used[1 : count + 1], matrix, scale, weights[1:]
        )
        record[COUNT, b] = min(pairs + 1, slots - 1) if useful else 1
        _combine(b, x, changes, weights, used[: count + 1] if useful else used[:1])


@compiled
def _broyden_residual(b, fx, x, moves, changes, dots, step, landed, wide):
    """Close sample b's newest pair, open the next, and the sums of this step into `dots`.

    wide: [3, BLOCK] float64, to work in
    """
    slots = len(moves)
    slot, newest, filled = step % slots, (step - 1) % slots, min(step + 1, slots)
    dots[b, :, :filled] = 0
    dots[b, :, slots] = 0
    for start in range(0, x.shape[1], BLOCK):
        end = start + BLOCK
        f, at = fx[b, start:end], x[b, start:end]
        residual, move, curvature = wide[0, : len(at)], wide[1, : len(at)], wide[2, : len(at)]
        squares = _difference(f, at, residual)
        dots[b, 0, slots] += squares[0]
        dots[b, 1, slots] += squares[1]
        if step > 0:  # else there is no pair yet
            dots[b, 2, slots] += _close(
                f, at, moves[newest, b, start:end], changes[newest, b, start:end], move, curvature
            )
            for j in range(filled):
                if j != slot:
                    s, phi = moves[j, b, start:end], changes[j, b, start:end]
                    right, column, row = _pair_products(s, phi, residual, curvature, move)
                    dots[b, 0, j] += right
                    dots[b, 1, j] += column
                    dots[b, 2, j] += row
        _copy(at, moves[slot, b, start:end])
        if not landed:
            _copy(f, changes[slot, b, start:end])


@compiled
def _pair_weights(gram, squares, right, used, matrix, scale, weights):
    """One sample's c for the pairs `used` into `weights`; returns whether they are of use.

    matrix: [m+1, m+1] and scale: [m+1], to work in
    """
    size = len(used)
    for i in range(size):
        scale[i] = 1 / np.sqrt(squares[used[i]])
    for i in range(size):
        for j in range(size):
            matrix[i, j] = gram[used[i], used[j]] * scale[i] * scale[j]
        weights[i] = right[used[i]] * scale[i]
    _solve(matrix, weights, size)
    length = 0.0
    for i in range(size):
        weights[i] *= scale[i]
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
def _combine(b, x, rows, weights, slots):
    """`x = Σ weight_i · rows[slot_i]` of sample b."""
    count = len(slots)
    threes = count - count % 3
    for start in range(0, x.shape[1], BLOCK):
        end = start + BLOCK
        out = x[b, start:end]
        out[:] = 0
        for i in range(0, threes, 3):
            _add_three(
                out,
                weights[i : i + 3],
                rows[slots[i], b, start:end],
                rows[slots[i + 1], b, start:end],
                rows[slots[i + 2], b, start:end],
            )
        for i in range(threes, count):
            _add_scaled(out, weights[i], rows[slots[i], b, start:end])


@compiled
def _judge(record, b, residual_sq, value_sq, call):
    """Write a running sample's fate into its column of the record, as `Record.judge`.

    Returns whether its present iterate is its best, and whether it goes on.
    """
    finite = np.isfinite(residual_sq) and np.isfinite(value_sq)
    norm, scale = np.sqrt(residual_sq), np.sqrt(value_sq)
    if call.over_batch:
        norm, scale = np.sqrt(call.residual_sq), np.sqrt(call.value_sq)
    record[STEPS, b] += 1
    if record[LIMIT, b] == 0:  # the first step
        record[LIMIT, b] = DIVERGENCE * (norm + scale)
    if not finite:
        record[STATUS, b] = NONFINITE
        return False, False

    residual = norm
    if call.relative:
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
    """`out = f − x`; returns `‖f‖²`."""
    square = 0.0
    for i in range(len(x)):
        out[i] = fx[i] - x[i]
        square += np.float64(fx[i]) * np.float64(fx[i])
    return square


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
def _three_dots(a, b, c, d):
    """`a · b`, `a · c` and `a · d`, for which a is read and converted once."""
    first, second, third = 0.0, 0.0, 0.0
    for i in range(len(a)):
        value = np.float64(a[i])
        first += value * np.float64(b[i])
        second += value * np.float64(c[i])
        third += value * np.float64(d[i])
    return first, second, third


@vectorised
def _difference(fx, x, out):
    """`out = f − x`, in float64; returns `‖f − x‖²` and `‖f‖²`."""
    residual_sq, value_sq = 0.0, 0.0
    for i in range(len(x)):
        value = np.float64(fx[i])
        out[i] = value - np.float64(x[i])
        residual_sq += out[i] * out[i]
        value_sq += value * value
    return residual_sq, value_sq


@vectorised
def _close(fx, x, move, change, wide_move, curvature):
    """Close the pair: `s = x − s`, `φ = f − φ`; s and `s − φ` also in float64; returns `‖s‖²`."""
    square = 0.0
    for i in range(len(x)):
        move[i] = x[i] - move[i]
        change[i] = fx[i] - change[i]
        wide_move[i] = move[i]
        curvature[i] = wide_move[i] - np.float64(change[i])
        square += wide_move[i] * wide_move[i]
    return square


@vectorised
def _pair_products(move, change, residual, curvature, newest):
    """`s_i · g`, `s_i · (s_p − φ_p)` and `s_p · φ_i`, p being the newest pair."""
    right, column, row = 0.0, 0.0, 0.0
    for i in range(len(move)):
        value = np.float64(move[i])
        right += value * residual[i]
        column += value * curvature[i]
        row += newest[i] * np.float64(change[i])
    return right, column, row


@vectorised
def _copy(row, out):
    """`out = row`"""
    for i in range(len(out)):
        out[i] = row[i]


@vectorised
def _add_scaled(out, weight, row):
    """`out += weight · row`"""
    weight = out.dtype.type(weight)
    for i in range(len(out)):
        out[i] += weight * row[i]


@vectorised
def _add_three(out, weights, a, b, c):
    """`out += weight_1 · a + weight_2 · b + weight_3 · c`, for which out is read and written once."""
    u, v, w = out.dtype.type(weights[0]), out.dtype.type(weights[1]), out.dtype.type(weights[2])
    for i in range(len(out)):
        out[i] += u * a[i] + v * b[i] + w * c[i]
