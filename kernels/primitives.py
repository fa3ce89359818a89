"""Device functions that kernels share: activations, norms, stopping, probes.

The formulas of activations, with their first and second derivatives, stand in
triton_deq/reference/activations.py.
"""

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
AWAY = tl.constexpr(7)

CONVERGED = tl.constexpr(0)
RUNNING = tl.constexpr(1)
DIVERGED = tl.constexpr(2)
NONFINITE = tl.constexpr(3)

DIVERGENCE = tl.constexpr(1e6)
WEIGHT_LIMIT = tl.constexpr(1e4)
LEAST_SQUARE = tl.constexpr(1e-200)
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def sigmoid(a):
    """`1 / (1 + exp(−a))`"""
    return 1 / (1 + tl.exp(-a))


@triton.jit
def tanh(a):
    """By a polynomial near 0, where `1 − exp(−2|a|)` would cancel; the coefficients are those of Cephes."""
    size = tl.abs(a)
    e = tl.exp(-2 * size)
    far = (1 - e) / (1 + e)
    far = tl.where(a < 0, -far, far)
    if a.dtype == tl.float64:
        return far
    square = a * a
    series = 2.06390887954e-2 + square * -5.70498872745e-3
    series = -3.33332819422e-1 + square * (1.33314422036e-1 + square * (-5.37397155531e-2 + square * series))
    return tl.where(size < 0.625, a + a * square * series, far)


@triton.jit
def softplus(a):
    """`log(1 + exp(a))`, with Kahan's correction of log for the part of the sum that was rounded off."""
    e = tl.exp(-tl.abs(a))
    sum = 1 + e
    rest = sum - 1
    return tl.maximum(a, 0) + tl.where(rest == 0, e, tl.log(sum) * (e / tl.where(rest == 0, 1, rest)))


@triton.jit
def normal_cdf(a):
    """Φ(a)"""
    return 0.5 * (1 + tl.erf(a * 0.7071067811865476))


@triton.jit
def normal_density(a):
    """φ(a)"""
    return 0.3989422804014327 * tl.exp(-0.5 * a * a)


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    """`act(a)`; the names are those of triton_deq/reference/activations.py."""
    if ACTIVATION == "tanh":
        return tanh(a)
    elif ACTIVATION == "relu":
        return tl.where(a < 0, 0, a)  # NaN stays
    elif ACTIVATION == "gelu":
        return a * normal_cdf(a)
    elif ACTIVATION == "silu":
        return a * sigmoid(a)
    else:
        tl.static_assert(ACTIVATION == "softplus")
        return softplus(a)


@triton.jit
def activation_slope(a, ACTIVATION: tl.constexpr):
    """`act′(a)`"""
    if ACTIVATION == "tanh":
        value = tanh(a)
        return 1 - value * value
    elif ACTIVATION == "relu":
        return tl.where(a > 0, 1.0, 0.0).to(a.dtype)
    elif ACTIVATION == "gelu":
        return normal_cdf(a) + a * normal_density(a)
    elif ACTIVATION == "silu":
        logistic = sigmoid(a)
        return logistic * (1 + a * (1 - logistic))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        return sigmoid(a)


@triton.jit
def activation_curvature(a, ACTIVATION: tl.constexpr):
    """`act″(a)`"""
    if ACTIVATION == "tanh":
        value = tanh(a)
        return -2 * value * (1 - value * value)
    elif ACTIVATION == "relu":
        return tl.zeros_like(a)
    elif ACTIVATION == "gelu":
        return normal_density(a) * (2 - a * a)
    elif ACTIVATION == "silu":
        logistic = sigmoid(a)
        return logistic * (1 - logistic) * (2 + a * (1 - 2 * logistic))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        logistic = sigmoid(a)
        return logistic * (1 - logistic)


@triton.jit
def standardise(h, inside, N, EPSILON: tl.constexpr):
    """`n = (h − mean) / σ` of each row's N entries that are inside, and 1/σ."""
    mean = tl.sum(tl.where(inside, h, 0), axis=1) / N
    return standardise_centred(h - mean[:, None], inside, N, EPSILON)


@triton.jit
def standardise_centred(h, inside, N, EPSILON: tl.constexpr):
    """`standardise` of rows without their mean but for its rounding, which may be large and is taken off."""
    rest = tl.sum(tl.where(inside, h, 0), axis=1) / N
    centred = tl.where(inside, h - rest[:, None], 0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + EPSILON)
    return centred * inverse[:, None], inverse


@triton.jit
def standardise_vjp(g, normal, inverse, bend, N):
    """`(g − mean(g) − n mean(g n)) / σ − bend · n / (σ² N)`, the gradient in h from g in n and bend in 1/σ.

    g and n are zero outside of their row.
    """
    mean = tl.sum(g, axis=1) / N
    along = (tl.sum(g * normal, axis=1) + bend * inverse) / N
    return inverse[:, None] * (g - mean[:, None] - normal * along[:, None])


@triton.jit
def is_finite(value):
    """False for NaN and for either infinity."""
    return tl.abs(value) < float("inf")


@triton.jit
def pick(vector, lanes, lane):
    """The entry of a small vector at a run-time index; of each of many, `[..., P] -> [...]`."""
    return tl.sum(tl.where(lanes == lane, vector, 0), axis=-1)


@triton.jit
def side_by_side(values):
    """`[n]` each of a power of 2 of tensors `-> [n, 2, .., 2]`, in every thread what it has of them."""
    if len(values) == 1:
        return values[0]
    else:
        return tl.join(side_by_side(values[0::2]), side_by_side(values[1::2]))


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
def load_sums(dots_ptr, sample, parts, lanes, STRIDE: tl.constexpr, PARTS: tl.constexpr):
    """One sample's partial sums at `lanes`, `[PARTS, LANES]`: along axis 0 they are still to be added.

    dots: [B, parts, STRIDE]
    """
    index = tl.arange(0, PARTS)
    offsets = (sample * parts + index)[:, None] * STRIDE + lanes[None, :]
    return tl.load(dots_ptr + offsets, mask=(index < parts)[:, None], other=0)


@triton.jit
def batch_sums(dots_ptr, before_ptr, B, parts, residual_lane, value_lane, STRIDE: tl.constexpr):
    """`‖G‖²` and `‖f‖²` over all running finite samples, in float64 and in a fixed order."""
    residual_sq = tl.full((), 0.0, tl.float64)
    value_sq = tl.full((), 0.0, tl.float64)
    for first in range(0, B, 128):
        samples = first + tl.arange(0, 128)
        inside = samples < B
        each_residual = tl.zeros([128], dtype=tl.float64)
        each_value = tl.zeros([128], dtype=tl.float64)
        for part in range(parts):
            offsets = (samples * parts + part) * STRIDE
            each_residual += tl.load(dots_ptr + offsets + residual_lane, mask=inside, other=0)
            each_value += tl.load(dots_ptr + offsets + value_lane, mask=inside, other=0)
        status = tl.load(before_ptr + STATUS * B + samples, mask=inside, other=-1)
        counted = (status == RUNNING) & is_finite(each_residual) & is_finite(each_value)
        residual_sq += tl.sum(tl.where(counted, each_residual, 0), axis=0)
        value_sq += tl.sum(tl.where(counted, each_value, 0), axis=0)
    return residual_sq, value_sq


@triton.jit
def look_up(record_ptr, B, sample):
    """What a step begins with: a sample's status, best residual, count, and whether its best iterate is away,
    as they stand in the record."""
    status = tl.load(record_ptr + STATUS * B + sample)
    best = tl.load(record_ptr + BEST * B + sample)
    count = tl.load(record_ptr + COUNT * B + sample)
    away = tl.load(record_ptr + AWAY * B + sample)
    return status, best, count, away


@triton.jit
def look_up_more(record_ptr, B, sample):
    """What `judge_sample` takes besides: limit, tolerance and steps, loaded before anything has to wait."""
    limit = tl.load(record_ptr + LIMIT * B + sample)
    tolerance = tl.load(record_ptr + TOLERANCE * B + sample)
    steps = tl.load(record_ptr + STEPS * B + sample)
    return limit, tolerance, steps


@triton.jit
def snapshot(record_ptr, before_ptr, B, sample, part):
    """Copy what `look_up` gives, the rows of the record that a step's last kernel both reads and renews.

    Its programs of one sample run side by side, so they may not read what one of them writes. Returns the
    status.
    """
    status, best, count, away = look_up(record_ptr, B, sample)
    # Masks, since behind a branch they would be loaded one after the other.
    tl.store(before_ptr + STATUS * B + sample, status, mask=part == 0)
    tl.store(before_ptr + BEST * B + sample, best, mask=part == 0)
    tl.store(before_ptr + COUNT * B + sample, count, mask=part == 0)
    tl.store(before_ptr + AWAY * B + sample, away, mask=part == 0)
    return status


@triton.jit
def judge_sample(known, residual_sq, value_sq, finite, best, RELATIVE: tl.constexpr):
    """`judge` with what the record knows of the sample: (status, improved, verdict for `write_down`)."""
    limit, tolerance, steps = known
    # 0 until the first step. Whether part 0 has stored it already or not, every program gets the same.
    limit = tl.where(limit > 0, limit, DIVERGENCE * (tl.sqrt(residual_sq) + tl.sqrt(value_sq)))
    status, residual, improved = judge(residual_sq, value_sq, finite, best, limit, tolerance, RELATIVE)
    return status, improved, (status, residual, finite, improved, limit, steps + 1)


@triton.jit
def to_keep(status, improved, moving, kept, away, stay):
    """What a step does about a sample's best iterate, for `keep`: (fresh, behind, ended, away).

    The next iterate goes where the one before is, so the present one, if it is the best, can lie where it is:
    `away` until a later one is better, or until the place is needed. So a step that improves copies nothing.

    away: whether the best so far is the iterate before. stay: whether the next one goes where the present is.
    kept: the sample's count; of one that ends at its first step, when that is 0, no iterate is better.
    """
    ended = status != RUNNING
    fresh = tl.where(stay == 0, improved & (moving == 0), improved) | (ended & (kept == 0))
    behind = (away != 0) & (improved == 0)
    return fresh, behind, ended, tl.where(stay == 0, improved & moving, False)


@triton.jit
def keep(x_ptr, other_ptr, best_ptr, begin, end, plan, BLOCK: tl.constexpr):
    """A part of a sample's best iterate into `best`, by the plan of `to_keep`; before the next one is stored.

    Of a sample that ends, both places hold its last iterate then: f is evaluated at either.
    x, other, best: of the sample
    """
    fresh, behind, ended, _ = plan
    if fresh | behind | ended:
        for start in range(begin, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < end
            x = tl.load(x_ptr + columns, mask=tl.where(fresh | ended, inside, False), other=0)
            before = tl.load(other_ptr + columns, mask=tl.where(behind, inside, False), other=0)
            best = tl.where(fresh, x, before)
            tl.store(best_ptr + columns, best, mask=tl.where(fresh | behind, inside, False))
            tl.store(other_ptr + columns, x, mask=tl.where(ended, inside, False))
        tl.debug_barrier()  # no warp may store the next iterate where another still reads


@triton.jit
def write_down(record_ptr, active_ptr, B, sample, tick, verdict, away):
    """The verdict of `judge_sample` into the record, and one more in `active[tick]` if the sample goes on.

    away: of `to_keep`
    """
    status, residual, finite, improved, limit, steps = verdict
    tl.store(record_ptr + STATUS * B + sample, status)
    tl.store(record_ptr + STEPS * B + sample, steps)
    tl.store(record_ptr + LIMIT * B + sample, limit)
    tl.store(record_ptr + AWAY * B + sample, away.to(tl.float64))
    if finite:
        tl.store(record_ptr + RESIDUAL * B + sample, residual)
    if improved:
        tl.store(record_ptr + BEST * B + sample, residual)
    if status == RUNNING:
        tl.atomic_add(active_ptr + tick, 1, sem="relaxed")  # of integers: the order does not matter


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


@triton.jit
def words(seed, stream, rows, columns):
    """Random words of 32 bits as in triton_deq/reference/jacobian.py: those of a counter, `[R, C]` each.

    rows, columns: numbers of pairs of rows, r and r + 8, and of columns side by side. The words are of (row
    r, even column), (r, odd column), (r + 8, even column), (r + 8, odd column).
    """
    column, row = tl.broadcast(columns[None, :].to(tl.uint32), rows[:, None].to(tl.uint32))
    none = tl.zeros_like(row)
    return tl.philox(seed, column, row, none + stream.to(tl.uint32), none)


@triton.jit
def spread(e0, e1, e2, e3):
    """The tile `[2R, 2C]` of what was made of the four words of each pair, R being a multiple of 8.

    Those four stand where a thread holds the result of a tensor core's product (c0 to c3 of m16n8), so that
    nothing moves between threads where such a product meets the tile.
    """
    R: tl.constexpr = e0.shape[0]
    C: tl.constexpr = e0.shape[1]
    tile = tl.reshape(tl.join(tl.join(e0, e1), tl.join(e2, e3)), [R // 8, 8, C, 2, 2])
    return tl.reshape(tl.permute(tile, [0, 4, 1, 2, 3]), [2 * R, 2 * C])


@triton.jit
def probe_quads(seed, stream, rows, columns, GAUSSIAN: tl.constexpr):
    """Entries of probe `stream` of a seed, N(0, 1) or ±1, in the places of `words`."""
    w0, w1, w2, w3 = words(seed, stream, rows, columns)
    if GAUSSIAN:
        e0, e1 = gaussian_pair(w0, w1)
        e2, e3 = gaussian_pair(w2, w3)
        return e0, e1, e2, e3
    else:
        return sign(w0), sign(w1), sign(w2), sign(w3)


@triton.jit
def probe_tile(seed, stream, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """The tile of a probe that begins at `row`, a multiple of 16, and `column`, an even number."""
    rows, columns = row // 2 + tl.arange(0, ROWS // 2), column // 2 + tl.arange(0, COLUMNS // 2)
    e0, e1, e2, e3 = probe_quads(seed, stream, rows, columns, GAUSSIAN)
    return spread(e0, e1, e2, e3)
