"""Device functions that several kernels share: small sums, the stopping rule, the small SPD solve, probes."""

import triton
import triton.language as tl

# Rows of a solve's record, a float64 `[FIELDS, B]`; triton_deq/reference/record.py holds the same numbers.
STATUS = tl.constexpr(0)
COUNT = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
BEST = tl.constexpr(3)
LIMIT = tl.constexpr(4)
TOLERANCE = tl.constexpr(5)
STEPS = tl.constexpr(6)

CONVERGED = tl.constexpr(0)
RUNNING = tl.constexpr(1)
DIVERGED = tl.constexpr(2)
NONFINITE = tl.constexpr(3)

DIVERGENCE = tl.constexpr(1e6)
WEIGHT_LIMIT = tl.constexpr(1e4)
LEAST_SQUARE = tl.constexpr(1e-200)
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def is_finite(value):
    """False for NaN and for either infinity."""
    return tl.abs(value) < float("inf")


@triton.jit
def pick(vector, lanes, lane):
    """The entry of a small vector at a run-time index."""
    return tl.sum(tl.where(lanes == lane, vector, 0), axis=0)


@triton.jit
def judge(residual_sq, value_sq, finite, best, limit, tolerance, RELATIVE: tl.constexpr):
    """One running sample's fate from `‖f(z) − z‖²` and `‖f(z)‖²`: (status, residual, improved)."""
    norm = tl.sqrt(residual_sq)
    scale = tl.sqrt(value_sq)
    residual = norm
    if RELATIVE:
        residual = tl.where(norm == 0, 0.0, norm / tl.where(norm == 0, 1.0, scale))
    status = tl.where(norm > limit, DIVERGED, RUNNING)
    status = tl.where(residual <= tolerance, CONVERGED, status)
    status = tl.where(finite, status, NONFINITE)
    return status, residual, finite & (residual < best)


@triton.jit
def solve_spd(matrix, rhs, lanes, SIZE: tl.constexpr):
    """Solve the leading SIZE×SIZE system of a small SPD `matrix` `[P, P]` by Gauss-Jordan elimination.

    A positive definite matrix needs no pivoting. Returns the solution, in which entries beyond SIZE are
    rhs / diagonal, and the least pivot: not above 0, the matrix was not positive definite.
    """
    least = tl.full((), float("inf"), matrix.dtype)
    for k in tl.static_range(SIZE):
        pivot_row = tl.sum(tl.where(lanes[:, None] == k, matrix, 0), axis=0)
        column = tl.sum(tl.where(lanes[None, :] == k, matrix, 0), axis=1)
        pivot = pick(pivot_row, lanes, k)
        least = tl.minimum(least, pivot)
        factor = tl.where(lanes == k, 0, column * (1 / pivot))
        matrix -= factor[:, None] * pivot_row[None, :]
        rhs -= factor * pick(rhs, lanes, k)
    return rhs / tl.sum(tl.where(lanes[:, None] == lanes[None, :], matrix, 0), axis=1), least


@triton.jit
def gaussian_pair(first, second):
    """Two standard normals from two 32-bit words by Box-Muller, from the upper 24 bits of each.

    The angle is a quarter turn times a number from the two highest bits, plus at most an eighth of a turn
    either way: short polynomials serve there, where the library's cosine would spill for large angles.
    """
    radius = tl.sqrt(-2.0 * tl.log(((first >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8))
    quadrant = second >> 30
    angle = (((second >> 8) & 0x3FFFFF).to(tl.float32) * 2.384185791015625e-7 - 0.5) * HALF_PI
    square = angle * angle
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sine = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    odd = (quadrant & 1) == 1
    turned = quadrant >= 2
    along = tl.where(odd, -sine, cosine)
    across = tl.where(odd, cosine, sine)
    return radius * tl.where(turned, -along, along), radius * tl.where(turned, -across, across)


@triton.jit
def sign(word):
    """±1 from the lowest bit of a 32-bit word."""
    return 1.0 - 2.0 * (word & 1).to(tl.float32)
