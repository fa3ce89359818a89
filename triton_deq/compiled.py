"""The solvers' steps on a CPU, compiled by Numba: the kernels' formulas, one sample after another.

The formulas stand in triton_deq/reference/anderson.py and broyden.py. Python calls one C function for each
solver and dtype with the address of a `Call`: where the state's buffers are, and the rule of the step. A
large state's samples are dealt out to PyTorch's own threads, by the OpenMP library that PyTorch has loaded:
those keep spinning between PyTorch's operators, and threads of a second pool would wait for them.

All of it is one file, without names from others, because Numba keeps compiled functions on disk until the
file of the function changes, whatever becomes of what it calls.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from . import openmp
from .reference.anderson import AndersonState
from .reference.broyden import BroydenState

# Rows of a solve's record; these numbers and the limits are those of triton_deq/reference.
STATUS, COUNT, RESIDUAL, BEST, LIMIT, TOLERANCE, STEPS = range(7)
FIELDS = 7
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


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Numba's version of a function: compiled at its first call, read from disk in the next process."""
    return _kept(numba.njit, function, {"nogil": True, "error_model": "numpy", **options})


def vectorised(function: Callable[..., Any]) -> Any:
    """`compiled`, with sums in an order that suits a CPU's vectors; NaN and infinity keep their meaning."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def _kept(decorator: Callable[..., Any], function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """The decorated function, kept on disk unless there is no folder for that."""
    try:
        return decorator(cache=True, **options)(function)
    except RuntimeError:
        return decorator(**options)(function)


# Threads

# What compiled code calls OpenMP by; without one it never does, but each must have a value.
_nobody = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
for name in ("omp_get_thread_num", "omp_get_num_threads"):
    address = ctypes.cast(getattr(openmp.LIBRARY, name, _nobody), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"triton_deq_{name}", address)
_thread = types.ExternalFunction("triton_deq_omp_get_thread_num", types.intc())
_threads = types.ExternalFunction("triton_deq_omp_get_num_threads", types.intc())


# Calls


class Call(ctypes.Structure):
    """What the compiled code is told.

    Addresses of f's value, of the state's buffers, and of a counter for each thread; sizes; the number of
    the step and its rule; and sums over the batch, which phase `SUMMED` writes.
    """

    buffers: ClassVar[tuple[str, ...]]

    def __init__(self, state: Any, slots: int) -> None:
        batch, entries = state.x.shape
        threads = max(min(openmp.threads_for(batch), batch * entries * slots // GRAIN), 1)
        super().__init__(batch=batch, entries=entries, slots=slots, threads=threads)
        buffers = {name: getattr(state, name) for name in self.buffers}
        for name, buffer in {**buffers, "record": state.record.data}.items():
            assert buffer.is_contiguous(), name
            setattr(self, name, buffer.data_ptr())
        self._counters = (ctypes.c_int64 * self.threads)()
        self.going = ctypes.addressof(self._counters)
        self._address = ctypes.addressof(self)
        self._step, self._function = _entry(type(self), state.x.dtype)

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
        if self.threads == 1 or phases == SUMMED:
            self._step(self._address)
        else:
            openmp.LIBRARY.GOMP_parallel(self._function, self._address, self.threads, 0)


def _fields(buffers: tuple[str, ...], numbers: str, reals: str) -> list[tuple[str, Any]]:
    whole = *buffers, *f"fx record going batch entries slots threads phases step {numbers}".split()
    return [(name, ctypes.c_int64) for name in whole] + [(name, ctypes.c_double) for name in reals.split()]


class AndersonCall(Call):
    buffers = ("x", "best", "residuals", "iterates", "gram", "dots")
    _fields_ = _fields(
        buffers, "relative over_batch relative_ridge last", "mixing ridge residual_sq value_sq"
    )


class BroydenCall(Call):
    buffers = ("x", "best", "moves", "changes", "matrix", "squares", "dots")
    _fields_ = _fields(buffers, "relative over_batch last", "residual_sq value_sq")


@cache
def _entry(kind: type[Call], dtype: torch.dtype) -> tuple[Callable[[int], None], int]:
    """What takes a step, told the address of a call, for states of this dtype; and its own address."""
    function = {
        (AndersonCall, torch.float32): anderson_float32,
        (AndersonCall, torch.float64): anderson_float64,
        (BroydenCall, torch.float32): broyden_float32,
        (BroydenCall, torch.float64): broyden_float64,
    }[kind, dtype]
    signature = types.void(types.CPointer(numba.from_dtype(np.dtype(kind))))
    entry = _kept(partial(numba.cfunc, signature), function, {})
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.address), entry.address


def anderson_float32(call):
    _anderson(numba.carray(call, 1)[0], np.float32)


def anderson_float64(call):
    _anderson(numba.carray(call, 1)[0], np.float64)


def broyden_float32(call):
    _broyden(numba.carray(call, 1)[0], np.float32)


def broyden_float64(call):
    _broyden(numba.carray(call, 1)[0], np.float64)


@intrinsic
def _pointer(_, address):
    """The address as one that Numba reads from."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@compiled
def _array(address, shape, dtype):
    return numba.carray(_pointer(address), shape, dtype)


@compiled
def _share(call):
    """This thread's number, its first sample, and the one after its last."""
    if call.threads == 1:
        return 0, 0, call.batch
    # There may be fewer threads than asked for.
    thread, threads = np.int64(_thread()), np.int64(_threads())
    return thread, thread * call.batch // threads, (thread + 1) * call.batch // threads


def _readable(fx: Tensor) -> Tensor:
    """f's value as a tensor whose entries stand at its address, one after the other, as they are."""
    fx = fx.contiguous()
    if type(fx) in (Tensor, torch.nn.Parameter) and not fx.is_neg():
        return fx
    return torch.empty(fx.shape, dtype=fx.dtype, device="cpu").copy_(fx)


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
    fx = _array(call.fx, (batch, entries), dtype)
    x, best = _array(call.x, (batch, entries), dtype), _array(call.best, (batch, entries), dtype)
    residuals = _array(call.residuals, (history, batch, entries), dtype)
    iterates = _array(call.iterates, (history, batch, entries), dtype)
    gram = _array(call.gram, (batch, history, history), np.float64)
    dots = _array(call.dots, (batch, history + 1), np.float64)
    record = _array(call.record, (FIELDS, batch), np.float64)
    going = _array(call.going, call.threads, np.int64)

    step, slot = call.step, call.step % history
    if call.phases == SUMMED:
        call.residual_sq, call.value_sq = _batch_squares(record, dots[:, slot], dots[:, history])
        return
    landed = fx.ctypes.data == iterates[slot].ctypes.data  # f has left its value where it belongs
    matrix, scale, weights = np.empty((history, history)), np.empty(history), np.empty(history)
    slots = np.empty(history, np.int64)
    thread, first, end = _share(call)
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
    fx = _array(call.fx, (batch, entries), dtype)
    x, best = _array(call.x, (batch, entries), dtype), _array(call.best, (batch, entries), dtype)
    moves = _array(call.moves, (slots, batch, entries), dtype)
    changes = _array(call.changes, (slots, batch, entries), dtype)
    gram = _array(call.matrix, (batch, slots, slots), np.float64)
    squares = _array(call.squares, (batch, slots), np.float64)
    dots = _array(call.dots, (batch, 3, slots + 1), np.float64)
    record = _array(call.record, (FIELDS, batch), np.float64)
    going = _array(call.going, call.threads, np.int64)

    step, slot, newest = call.step, call.step % slots, (call.step - 1) % slots
    if call.phases == SUMMED:
        call.residual_sq, call.value_sq = _batch_squares(record, dots[:, 0, slots], dots[:, 1, slots])
        return
    landed = fx.ctypes.data == changes[slot].ctypes.data  # f has left its value where it belongs
    wide = np.empty((3, BLOCK))
    matrix, weights, used = np.empty((slots, slots)), np.empty(slots), np.empty(slots, np.int64)
    weights[0], used[0] = 1, slot  # the open slot, which holds f(x)
    thread, first, end = _share(call)
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
        useful = _pair_weights(gram[b], squares[b], dots[b, 0], used[1 : count + 1], matrix, weights[1:])
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
