"""Anderson's mixing weights from a Gram matrix, and the slots of a ring that they mix.

The formula stands in triton_deq/reference/anderson.py. A sample's few weights are what everything else in a
step waits for, so a short history's are worked out by every thread for itself; systems.py has the other ways.
"""

import triton
import triton.language as tl

from .primitives import LEAST_SQUARE, WEIGHT_LIMIT, pick
from .systems import balance, diagonal_of, entry_of, load_matrix, renew, solve, solve_spd_scalars

IN_SCALARS = tl.constexpr(8)
"""Up to how many slots a system is solved in scalars, whose number grows with the square of theirs."""


@triton.jit
def is_among(j, slot, count, HISTORY: tl.constexpr):
    """Whether ring slot j is among the `count` newest, `slot` being the newest."""
    return (slot - j + HISTORY) % HISTORY < count


@triton.jit
def load_slots(ring_ptr, stride, inside, slot, count, HISTORY: tl.constexpr, OLDER: tl.constexpr):
    """The `count` newest slots of a ring at some entries, a tuple; zeros for all others, which are not read.

    ring_ptr: of slot 0, at those entries    stride: from slot to slot    OLDER: without the newest, `slot`.
    """
    slots = ()
    for j in tl.static_range(HISTORY):
        read = is_among(j, slot, count, HISTORY)
        if OLDER:
            read = read & (slot != j)
        slots += (tl.load(ring_ptr + j * stride, mask=tl.where(read, inside, False), other=0),)
    return slots


@triton.jit
def relaxed(fx, x, MIXING: tl.constexpr):
    """`x + β (f − x)`; with β = 1 that is f, to the last bit, wherever x is."""
    if MIXING == 1:
        return fx
    else:
        return x + MIXING * (fx - x)


@triton.jit
def mix(slots, weights, HISTORY: tl.constexpr, WIDE: tl.constexpr):
    """`Σ w_j s_j` of tuples of slots and weights, where what has no weight counts for nothing, NaN or not."""
    total = tl.zeros(slots[0].shape, dtype=WIDE)
    for j in tl.static_range(HISTORY):
        total += tl.where(weights[j] != 0, weights[j].to(WIDE) * slots[j].to(WIDE), 0)
    return total


@triton.jit
def scalars(vector, lanes, COUNT: tl.constexpr):
    """The first entries of a small vector, a tuple."""
    entries = ()
    for i in tl.static_range(COUNT):
        entries += (pick(vector, lanes, i),)
    return entries


@triton.jit
def load_triangle(gram_ptr, slot, count, HISTORY: tl.constexpr):
    """The lower triangle of a Gram matrix `[HISTORY, HISTORY]`, row after row, a tuple, for `weights_of_few`.

    Zeros in rows and columns of all but the `count` newest slots.
    """
    triangle = ()
    valid = ()
    for i in tl.static_range(HISTORY):
        valid += (is_among(i, slot, count, HISTORY),)
        for j in tl.static_range(i + 1):
            triangle += (tl.load(gram_ptr + i * HISTORY + j, mask=valid[i] & valid[j], other=0),)
    return triangle


@triton.jit
def load_triangles(grams_ptr, present, slot, count, HISTORY: tl.constexpr):
    """The same of many samples, vectors each; count: of each, read where `present`.

    Loads whose masks were as many vectors would leave a few at a time, for want of predicate registers, and
    wait for `count`: so all entries are read, and those that take no part are dropped then.
    """
    stored = ()
    for i in tl.static_range(HISTORY):
        for j in tl.static_range(i + 1):
            stored += (tl.load(grams_ptr + i * HISTORY + j, mask=present, other=0),)
    triangles = ()
    valid = ()
    for i in tl.static_range(HISTORY):
        valid += (is_among(i, slot, count, HISTORY),)
        for j in tl.static_range(i + 1):
            triangles += (tl.where(valid[i] & valid[j], entry_of(stored, i, j), 0),)
    return triangles


@triton.jit
def weights_of_few(
    triangle, sums, slot, count, HISTORY: tl.constexpr, RIDGE: tl.constexpr, RELATIVE_RIDGE: tl.constexpr
):
    """Anderson's α, a tuple in float64, and whether the solve was of use; of one sample or of many.

    triangle: of `load_triangle` or `load_triangles`. Row and column `slot` may already hold this step's sums
    or not: those in `sums`, a tuple with one for each slot, count.
    """
    matrix = ()
    right = ()
    fresh = ()
    newest = ()
    for i in tl.static_range(HISTORY):
        valid = is_among(i, slot, count, HISTORY)
        fresh += (tl.where(valid, sums[i], 0),)
        newest += (slot == i,)
        for j in tl.static_range(i):
            entry = tl.where(newest[j], fresh[i], entry_of(triangle, i, j))
            matrix += (tl.where(newest[i], fresh[j], entry),)
        square = tl.where(newest[i], fresh[i], entry_of(triangle, i, i))
        if RELATIVE_RIDGE:
            square += RIDGE * tl.maximum(square, LEAST_SQUARE)
        else:
            square += RIDGE
        matrix += (tl.where(valid, square, 1.0),)
        right += (tl.where(valid, 1.0, 0.0).to(tl.float64),)
    solution, least_pivot = solve_spd_scalars(matrix, right, HISTORY)
    total = solution[0]
    size = tl.abs(solution[0])
    for i in tl.static_range(1, HISTORY):
        total += solution[i]
        size += tl.abs(solution[i])
    inverse = 1 / total
    mixed = (least_pivot > 0) & (size * tl.abs(inverse) <= WEIGHT_LIMIT)  # false for NaN too
    weights = ()
    for i in tl.static_range(HISTORY):
        weights += (tl.where(mixed, solution[i] * inverse, tl.where(newest[i], 1.0, 0.0)),)
    return weights, mixed


@triton.jit
def load_gram(gram_ptr, slot, count, lanes, HISTORY: tl.constexpr):
    """A sample's Gram matrix `[HISTORY, HISTORY]`, for `weights_of`."""
    if HISTORY <= IN_SCALARS:
        return load_triangle(gram_ptr, slot, count, HISTORY)
    else:
        return load_matrix(gram_ptr, lanes, HISTORY)


@triton.jit
def weights_of(
    gram, sums, slot, count, lanes, HISTORY: tl.constexpr, RIDGE: tl.constexpr, RELATIVE_RIDGE: tl.constexpr
):
    """A sample's α, a tuple of float64 scalars, and whether the solve was of use.

    gram: of `load_gram`    sums: [LANES], this step's row of it
    """
    if HISTORY <= IN_SCALARS:
        row = scalars(sums, lanes, HISTORY)
        weights, mixed = weights_of_few(gram, row, slot, count, HISTORY, RIDGE, RELATIVE_RIDGE)
    else:
        gram = renew(gram, slot, sums, sums, lanes, HISTORY)
        vector, mixed = mixing_weights(gram, count, slot, lanes, HISTORY, RIDGE, RELATIVE_RIDGE)
        weights = scalars(vector, lanes, HISTORY)
    return weights, mixed


@triton.jit
def mixing_weights(
    gram, count, slot, lanes, HISTORY: tl.constexpr, RIDGE: tl.constexpr, RELATIVE_RIDGE: tl.constexpr
):
    """Anderson's α `[LANES]` in float64 from a Gram matrix, and whether that was of use.

    gram: in one of the forms of systems.py    count: how many of the newest slots may take part
    """
    diagonal = diagonal_of(gram, lanes, HISTORY)
    valid = (lanes < HISTORY) & is_among(lanes, slot, count, HISTORY)
    scale = tl.where(valid, 1 / tl.sqrt(tl.where(diagonal > LEAST_SQUARE, diagonal, LEAST_SQUARE)), 0)
    damping = scale * 0 + RIDGE
    if not RELATIVE_RIDGE:
        damping *= scale * scale
    damping = tl.where(valid, damping, 1.0)

    gram = balance(gram, valid, scale, damping, lanes, HISTORY)
    solution, least_pivot = solve(gram, scale, lanes, HISTORY, False)
    weights = scale * solution
    weights = weights / tl.sum(weights, axis=0)
    mixed = (least_pivot > 0) & (tl.sum(tl.abs(weights), axis=0) <= WEIGHT_LIMIT)  # false for NaN too
    plain = tl.where(lanes == slot, 1.0, 0.0).to(tl.float64)
    return tl.where(mixed, weights, plain), mixed
