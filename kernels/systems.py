"""Small linear systems, one a sample, which a program solves between its sums and its mixing.

How a system lies in the threads decides what it costs:

- In scalars, every thread solves it for itself: nothing waits, but each thread holds all of it.
- A vector of up to 32 entries is held by each warp anew, so a matrix that is a tuple of its columns needs
  shuffles within a warp alone.
- A matrix `[P, P]` is spread over all warps, and each turn of an elimination goes through shared memory and
  barriers: for what is too large for the others.

`load_matrix`, `renew`, `diagonal_of`, `balance` and `solve` take a matrix in either of the last two forms.
"""

import triton
import triton.language as tl

from .primitives import pick

WARP = tl.constexpr(32)
"""Up to how many lanes a matrix is a tuple of its columns."""


@triton.jit
def at(vector, lanes, lane):
    """The entry of a small vector at `lane`, or at each of several: one shuffle, where `pick` adds up."""
    return tl.gather(vector, lanes * 0 + lane, axis=0)


@triton.jit
def an_entry_a_thread(vector, lanes):
    """The same vector `[P]`, which a reduction may have left several entries in each of a few threads.

    All that is computed with it is laid out like it: twice the entries are twice the instructions.
    """
    if lanes.shape[0] <= WARP:
        return at(vector, lanes, lanes)
    else:
        return vector


@triton.jit
def load_matrix(matrix_ptr, lanes, SIZE: tl.constexpr):
    """A row-major matrix `[SIZE, SIZE]`, float64; of up to 32 lanes its columns, else `[P, P]`."""
    within = lanes < SIZE
    if lanes.shape[0] <= WARP:
        columns = ()
        for j in tl.static_range(SIZE):
            columns += (tl.load(matrix_ptr + lanes * SIZE + j, mask=within, other=0),)
        return columns
    else:
        places = lanes[:, None] * SIZE + lanes[None, :]
        return tl.load(matrix_ptr + places, mask=within[:, None] & within[None, :], other=0)


@triton.jit
def renew(matrix, index, row, column, lanes, SIZE: tl.constexpr):
    """The matrix with another row and column `index`, which share the column's entry; row, column: [P]."""
    if lanes.shape[0] <= WARP:
        columns = ()
        for j in tl.static_range(SIZE):
            old = tl.where(lanes == index, at(row, lanes, j), matrix[j])
            columns += (tl.where(index == j, column, old),)
        return columns
    else:
        matrix = tl.where(lanes[:, None] == index, row[None, :], matrix)
        return tl.where(lanes[None, :] == index, column[:, None], matrix)


@triton.jit
def diagonal_of(matrix, lanes, SIZE: tl.constexpr):
    """The entries (i, i), `[P]`; beyond SIZE they are of no meaning."""
    if lanes.shape[0] <= WARP:
        diagonal = matrix[0]
        for j in tl.static_range(1, SIZE):
            diagonal = tl.where(lanes == j, matrix[j], diagonal)
        return diagonal
    else:
        return tl.sum(tl.where(lanes[:, None] == lanes[None, :], matrix, 0), axis=1)


@triton.jit
def balance(matrix, used, scale, damping, lanes, SIZE: tl.constexpr):
    """`D M D + diag(damping)`, D having `scale` where a lane is `used`, else 0, whatever M holds there."""
    scale = tl.where(used, scale, 0)
    if lanes.shape[0] <= WARP:
        both = used.to(tl.int32)
        columns = ()
        for j in tl.static_range(SIZE):
            column = tl.where(used & (at(both, lanes, j) != 0), matrix[j], 0) * scale * at(scale, lanes, j)
            columns += (column + tl.where(lanes == j, damping, 0),)
        return columns
    else:
        matrix = tl.where(used[:, None] & used[None, :], matrix, 0) * scale[:, None] * scale[None, :]
        return matrix + tl.where(lanes[:, None] == lanes[None, :], damping[:, None], 0)


@triton.jit
def solve(matrix, right, lanes, SIZE: tl.constexpr, PIVOTED: tl.constexpr):
    """Gauss-Jordan elimination, with row pivoting or without, which a positive definite matrix needs not.

    Rows stay where they are. Returns the solution `[P]`, 0 beyond SIZE, and the least pivot, whose sign is
    that of no eigenvalue if rows were exchanged. A singular matrix gives entries that are not finite.
    """
    if lanes.shape[0] <= WARP:
        return solve_columns(matrix, right, lanes, SIZE, PIVOTED)
    else:
        return solve_matrix(matrix, right, lanes, SIZE, PIVOTED)


@triton.jit
def row_of_largest(column, free, lanes):
    """Which of the `free` rows has the largest entry in size; one with NaN, if there is any.

    The upper halves of float64 compare like the numbers, NaN above all. A row's number takes the place of
    their last bits, so that the largest of them tells where it stands.
    """
    LAST: tl.constexpr = lanes.shape[0] - 1
    size = (tl.abs(column).to(tl.int64, bitcast=True) >> 32).to(tl.int32)
    return tl.max(tl.where(free, (size & ~LAST) | lanes, -1), axis=0) & LAST


@triton.jit
def solve_columns(columns, right, lanes, SIZE: tl.constexpr, PIVOTED: tl.constexpr):
    """`solve` for a tuple of columns `[P]`."""
    free = lanes < SIZE
    rows = lanes  # by which row an unknown was found
    inverses = tl.zeros_like(right)
    least = tl.full(right.shape, float("inf"), tl.float64)
    for k in range(SIZE):  # a loop, whose turns rotate the columns: written out, it is 40 kB of code
        column = columns[0]
        if PIVOTED:
            lane = row_of_largest(column, free, lanes)
            free = free & (lanes != lane)
            rows = tl.where(lanes == k, lane, rows)
        else:
            lane = k
        pivot = at(column, lanes, lane)
        least = tl.minimum(least, pivot)
        inverse = 1 / pivot
        inverses = tl.where(lanes == lane, inverse, inverses)
        factor = tl.where(lanes == lane, 0, column * inverse)
        rest = ()
        for j in tl.static_range(1, SIZE):
            rest += (columns[j] - factor * at(columns[j], lanes, lane),)
        rest += (column,)  # which nobody reads again
        columns = rest
        right -= factor * at(right, lanes, lane)
    solution = right * inverses
    if PIVOTED:
        solution = at(solution, lanes, rows)
    return tl.where(lanes < SIZE, solution, 0), tl.min(least, axis=0)


@triton.jit
def solve_matrix(matrix, right, lanes, SIZE: tl.constexpr, PIVOTED: tl.constexpr):
    """`solve` for a matrix `[P, P]`."""
    order = tl.full(right.shape, -1, tl.int32)  # which unknown a row was the pivot of
    least = tl.full((), float("inf"), tl.float64)
    for k in range(SIZE):  # written out 50 times, it takes minutes to compile
        column = tl.sum(tl.where(lanes[None, :] == k, matrix, 0), axis=1)
        if PIVOTED:
            lane = row_of_largest(column, (order < 0) & (lanes < SIZE), lanes)
        else:
            lane = k
        order = tl.where(lanes == lane, k, order)
        pivot_row = tl.sum(tl.where(lanes[:, None] == lane, matrix, 0), axis=0)
        pivot = pick(pivot_row, lanes, k)
        least = tl.minimum(least, pivot)
        factor = tl.where(lanes == lane, 0, column * (1 / pivot))
        matrix -= factor[:, None] * pivot_row[None, :]
        right -= factor * pick(right, lanes, lane)
    found = order[:, None] == lanes[None, :]
    diagonal = tl.sum(tl.where(found, matrix, 0), axis=1)
    solution = right / tl.where(order < 0, 1.0, diagonal)
    return tl.sum(tl.where(found, solution[:, None], 0), axis=0), least


@triton.jit
def entry_of(triangle, i: tl.constexpr, j: tl.constexpr):
    """Entry (i, j), j at most i, of a lower triangle in a tuple."""
    return triangle[i * (i + 1) // 2 + j]


@triton.jit
def solve_spd_scalars(matrix, right, SIZE: tl.constexpr):
    """Solve `L D Lᵀ x = right` for the lower triangle `matrix` of an SPD matrix, tuples of its entries.

    Returns x and the least entry of D: not above 0, the matrix was not positive definite.
    """
    lower = ()  # L, whose diagonal of ones is never read
    scaled = ()  # L D
    inverses = ()  # D⁻¹
    forward = ()  # L⁻¹ right
    least = matrix[0]
    for i in tl.static_range(SIZE):
        value = right[i]
        pivot = entry_of(matrix, i, i)
        for j in tl.static_range(i):
            entry = entry_of(matrix, i, j)
            for k in tl.static_range(j):
                entry -= entry_of(scaled, i, k) * entry_of(lower, j, k)
            factor = entry * inverses[j]
            value -= factor * forward[j]
            pivot -= factor * entry
            scaled += (entry,)
            lower += (factor,)
        least = tl.minimum(least, pivot)
        scaled += (pivot,)
        lower += (pivot,)
        inverses += (1 / pivot,)
        forward += (value,)

    backward = ()  # x, from its last entry to its first
    for n in tl.static_range(SIZE):
        value = forward[SIZE - 1 - n] * inverses[SIZE - 1 - n]
        for m in tl.static_range(n):
            value -= entry_of(lower, SIZE - 1 - m, SIZE - 1 - n) * backward[m]
        backward += (value,)
    return backward[::-1], least
