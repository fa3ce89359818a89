"""GroupNorm with what surrounds it, its product, and the derivatives of that: a program a group of a sample.

The formulas stand in triton_deq/reference/groupnorm.py. Maps are channels-last: a sample is a matrix [P, C]
of pixels and channels, and samples lie a stride apart. A group is read in tiles [ROWS, BLOCK], twice; the
second time it is in the cache, or where it is one tile, in registers.

The first two take several maps in one launch, of any sizes: those of a multiscale state that do not wait for
each other. Programs are dealt out to the maps in their order, so the largest should come first.
"""

import triton
import triton.language as tl


@triton.jit
def tile_at(
    start, group, P: tl.constexpr, C: tl.constexpr, CG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets within a sample of a tile of its group, and which of them there are."""
    pixels = start + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    inside = (pixels < P)[:, None] & (lanes < CG)[None, :]
    return pixels[:, None] * C + (group * CG + lanes)[None, :], inside


@triton.jit
def of_channels(ptr, group, CG: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A number for each channel of the group."""
    lanes = tl.arange(0, BLOCK)
    return tl.load(ptr + group * CG + lanes, mask=lanes < CG, other=0).to(WIDE)


@triton.jit
def summed(
    x_ptr,
    shift_ptr,
    scale,
    x_offsets,
    offsets,
    inside,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`m ⊙ x + u`, 0 outside."""
    total = tl.load(x_ptr + x_offsets, mask=inside, other=0).to(WIDE)
    if MASK:
        total *= scale[None, :]
    if SHIFT:
        total += tl.load(shift_ptr + offsets, mask=inside, other=0).to(WIDE)
    return total


@triton.jit
def passed(vector_ptr, value_ptr, offsets, inside, RELU: tl.constexpr, WIDE: tl.constexpr):
    """The vector where the relu let the value through."""
    vector = tl.load(vector_ptr + offsets, mask=inside, other=0).to(WIDE)
    if RELU:
        value = tl.load(value_ptr + offsets, mask=inside, other=0).to(WIDE)
        vector = tl.where(value <= 0, 0, vector)
    return vector


@triton.jit(do_not_specialize=["samples"])
def groupnorm_kernel(maps, samples, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`normalise` for every group of every sample of every map.

    maps, CONSTANTS: for each map the arguments of `normalise` after `program`, up to the compile-time ones,
    and those.    PROGRAMS: how many each gets for a sample
    """
    first = 0
    for k in tl.static_range(len(CONSTANTS)):
        program = tl.program_id(0) - first
        if program >= 0 and program < samples * PROGRAMS[k]:
            normalise(program, *maps[k], *CONSTANTS[k])
        first += samples * PROGRAMS[k]


@triton.jit
def normalise(
    program,
    x_ptr,
    mask_ptr,
    shift_ptr,
    gain_ptr,
    offset_ptr,
    residual_ptr,
    out_ptr,
    mean_ptr,
    inverse_ptr,
    x_stride,
    shift_stride,
    residual_stride,
    out_stride,
    P: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    STATISTICS: tl.constexpr,
    EPSILON: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr,
):
    """`relu(γ ⊙ n + β + r)` with `n = (s − μ) / σ` of `s = m ⊙ x + u`, and with STATISTICS μ and 1/σ.

    x, shift u, residual r, out: [B, P, C], samples a stride of their own apart    mask m: [B, C]
    gain γ, offset β: [C]    mean, inverse: [B, G], of dtype WIDE
    x may be some channels of a map that has APART more.
    Each place of a tile has a running mean and sum of squares of its own (Welford); they are merged at the
    end (Chan, Golub & LeVeque), so that a large mean costs no digits.
    """
    CG: tl.constexpr = C // G
    N: tl.constexpr = P * CG
    sample = (program // G).to(tl.int64)
    group = program % G
    x_ptr += sample * x_stride
    shift_ptr += sample * shift_stride
    scale = tl.zeros([BLOCK], dtype=WIDE)
    if MASK:
        scale = of_channels(mask_ptr + sample * C, group, CG, BLOCK, WIDE)

    count = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    means = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    squares = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, group, P, C, CG, ROWS, BLOCK)
        x_offsets = offsets + (start + tl.arange(0, ROWS))[:, None] * APART
        s = summed(x_ptr, shift_ptr, scale, x_offsets, offsets, inside, MASK, SHIFT, WIDE)
        count += tl.where(inside, 1.0, 0.0).to(WIDE)
        distance = tl.where(inside, s - means, 0)
        means += distance / tl.where(count > 0, count, 1)
        squares += tl.where(inside, distance * (s - means), 0)
    mean = tl.sum(count * means) / N
    apart = means - mean
    variance = (tl.sum(squares) + tl.sum(count * apart * apart)) / N
    inverse = 1 / tl.sqrt(variance + EPSILON)
    if STATISTICS:
        tl.store(mean_ptr + sample * G + group, mean)
        tl.store(inverse_ptr + sample * G + group, inverse)

    if GAIN:
        gain = of_channels(gain_ptr, group, CG, BLOCK, WIDE)
        offset = of_channels(offset_ptr, group, CG, BLOCK, WIDE)
    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, group, P, C, CG, ROWS, BLOCK)
        x_offsets = offsets + (start + tl.arange(0, ROWS))[:, None] * APART
        s = summed(x_ptr, shift_ptr, scale, x_offsets, offsets, inside, MASK, SHIFT, WIDE)
        value = (s - mean) * inverse
        if GAIN:
            value = value * gain[None, :] + offset[None, :]
        if RESIDUAL:
            from_residual = residual_ptr + sample * residual_stride + offsets
            value += tl.load(from_residual, mask=inside, other=0).to(WIDE)
        if RELU:
            value = tl.where(value < 0, 0, value)  # NaN stays
        tl.store(out_ptr + sample * out_stride + offsets, value, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def groupnorm_vjp_kernel(maps, samples, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`pull` for every group of every sample of every map; arguments as of `groupnorm_kernel`."""
    first = 0
    for k in tl.static_range(len(CONSTANTS)):
        program = tl.program_id(0) - first
        if program >= 0 and program < samples * PROGRAMS[k]:
            pull(program, *maps[k], *CONSTANTS[k])
        first += samples * PROGRAMS[k]


@triton.jit
def pull(
    program,
    vector_ptr,
    x_ptr,
    mask_ptr,
    shift_ptr,
    gain_ptr,
    mean_ptr,
    inverse_ptr,
    value_ptr,
    of_x_ptr,
    of_sum_ptr,
    v_ptr,
    sums_ptr,
    vector_stride,
    x_stride,
    shift_stride,
    value_stride,
    of_x_stride,
    P: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    RELU: tl.constexpr,
    SUM: tl.constexpr,
    OTHER: tl.constexpr,
    PARAMETERS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr,
):
    """`(g − mean(g) − n mean(g n)) / σ` with `g = γ ⊙ v`, v the vector where value > 0; m times that.

    vector, x, shift, value: [B, P, C], samples a stride of their own apart; the rest as in `normalise`
    of_x: the same    with SUM of_sum, with OTHER v: [B, P, C], dense    sums: [B, 2, C], of v and v n, with
    PARAMETERS
    of_x may be some channels of a map that has APART more.
    """
    CG: tl.constexpr = C // G
    N: tl.constexpr = P * CG
    sample = (program // G).to(tl.int64)
    group = program % G
    vector_ptr += sample * vector_stride
    x_ptr += sample * x_stride
    shift_ptr += sample * shift_stride
    value_ptr += sample * value_stride
    mean = tl.load(mean_ptr + sample * G + group)
    inverse = tl.load(inverse_ptr + sample * G + group)
    scale = tl.zeros([BLOCK], dtype=WIDE)
    if MASK:
        scale = of_channels(mask_ptr + sample * C, group, CG, BLOCK, WIDE)
    gain = tl.zeros([BLOCK], dtype=WIDE) + 1
    if GAIN:
        gain = of_channels(gain_ptr, group, CG, BLOCK, WIDE)

    of_v = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    of_vn = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, group, P, C, CG, ROWS, BLOCK)
        s = summed(x_ptr, shift_ptr, scale, offsets, offsets, inside, MASK, SHIFT, WIDE)
        v = passed(vector_ptr, value_ptr, offsets, inside, RELU, WIDE)
        of_v += v
        of_vn += v * ((s - mean) * inverse)
    sum_v, sum_vn = tl.sum(of_v, axis=0), tl.sum(of_vn, axis=0)
    if PARAMETERS:
        lanes = tl.arange(0, BLOCK)
        place = sums_ptr + sample * 2 * C + group * CG + lanes
        tl.store(place, sum_v, mask=lanes < CG)
        tl.store(place + C, sum_vn, mask=lanes < CG)
    c = tl.sum(gain * sum_v) / N
    d = tl.sum(gain * sum_vn) / N

    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, group, P, C, CG, ROWS, BLOCK)
        s = summed(x_ptr, shift_ptr, scale, offsets, offsets, inside, MASK, SHIFT, WIDE)
        v = passed(vector_ptr, value_ptr, offsets, inside, RELU, WIDE)
        of_sum = inverse * (gain[None, :] * v - c - (s - mean) * inverse * d)
        out = sample * (P * C) + offsets
        if OTHER:
            tl.store(v_ptr + out, v, mask=inside)
        if SUM:
            tl.store(of_sum_ptr + out, of_sum, mask=inside)
        if MASK:
            of_sum *= scale[None, :]
        of_x_offsets = offsets + (start + tl.arange(0, ROWS))[:, None] * APART
        tl.store(of_x_ptr + sample * of_x_stride + of_x_offsets, of_sum, mask=inside)


@triton.jit
def groupnorm_second_kernel(
    along_ptr,
    beside_ptr,
    vector_ptr,
    x_ptr,
    mask_ptr,
    shift_ptr,
    gain_ptr,
    mean_ptr,
    inverse_ptr,
    value_ptr,
    of_x_ptr,
    of_sum_ptr,
    of_vector_ptr,
    sums_ptr,
    along_stride,
    beside_stride,
    vector_stride,
    x_stride,
    shift_stride,
    value_stride,
    P: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    BESIDE: tl.constexpr,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    RELU: tl.constexpr,
    SUM: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of `⟨along, of_x⟩ + ⟨beside, v⟩`, what `groupnorm_vjp_kernel` gives.

    With `w = m ⊙ along` and the linear map `V(w) = (w − mean(w) − n mean(w n)) / σ`: that in s is
    `−(mean(g n) V(w) + mean(w n) V(g) + mean(V(w) g) n) / σ`, that in the vector `γ V(w) + beside` where
    value > 0, and that in γ, for each sample, `Σ v V(w)`.

    along, beside, vector, x, shift, value: [B, P, C], samples a stride of their own apart
    of_x, with SUM of_sum, of_vector: [B, P, C], dense    sums: [B, C], with GAIN
    """
    CG: tl.constexpr = C // G
    N: tl.constexpr = P * CG
    sample = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    along_ptr += sample * along_stride
    beside_ptr += sample * beside_stride
    vector_ptr += sample * vector_stride
    x_ptr += sample * x_stride
    shift_ptr += sample * shift_stride
    value_ptr += sample * value_stride
    mean = tl.load(mean_ptr + sample * G + group)
    inverse = tl.load(inverse_ptr + sample * G + group)
    scale = tl.zeros([BLOCK], dtype=WIDE) + 1
    if MASK:
        scale = of_channels(mask_ptr + sample * C, group, CG, BLOCK, WIDE)
    gain = tl.zeros([BLOCK], dtype=WIDE) + 1
    if GAIN:
        gain = of_channels(gain_ptr, group, CG, BLOCK, WIDE)

    of_w = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    of_wn = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    of_v = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    of_vn = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    of_wv = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, group, P, C, CG, ROWS, BLOCK)
        s = summed(x_ptr, shift_ptr, scale, offsets, offsets, inside, MASK, SHIFT, WIDE)
        n = (s - mean) * inverse
        v = passed(vector_ptr, value_ptr, offsets, inside, RELU, WIDE)
        w = tl.load(along_ptr + offsets, mask=inside, other=0).to(WIDE) * scale[None, :]
        of_w += w
        of_wn += w * n
        of_v += v
        of_vn += v * n
        of_wv += w * v
    a, b = tl.sum(of_w) / N, tl.sum(of_wn) / N
    sum_v, sum_vn, sum_wv = tl.sum(of_v, axis=0), tl.sum(of_vn, axis=0), tl.sum(of_wv, axis=0)
    along_v = inverse * (sum_wv - a * sum_v - b * sum_vn)  # Σ v V(w) of each channel
    if GAIN:
        lanes = tl.arange(0, BLOCK)
        tl.store(sums_ptr + sample * C + group * CG + lanes, along_v, mask=lanes < CG)
    c = tl.sum(gain * sum_v) / N
    d = tl.sum(gain * sum_vn) / N
    q = tl.sum(gain * along_v) / N

    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, group, P, C, CG, ROWS, BLOCK)
        s = summed(x_ptr, shift_ptr, scale, offsets, offsets, inside, MASK, SHIFT, WIDE)
        n = (s - mean) * inverse
        v = passed(vector_ptr, value_ptr, offsets, inside, RELU, WIDE)
        w = tl.load(along_ptr + offsets, mask=inside, other=0).to(WIDE) * scale[None, :]
        along_w = inverse * (w - a - n * b)
        along_g = inverse * (gain[None, :] * v - c - n * d)
        of_sum = -inverse * (d * along_w + b * along_g + q * n)
        of_vector = gain[None, :] * along_w
        if BESIDE:
            of_vector += tl.load(beside_ptr + offsets, mask=inside, other=0).to(WIDE)
        if RELU:
            value = tl.load(value_ptr + offsets, mask=inside, other=0).to(WIDE)
            of_vector = tl.where(value <= 0, 0, of_vector)
        out = sample * (P * C) + offsets
        tl.store(of_vector_ptr + out, of_vector, mask=inside)
        if SUM:
            tl.store(of_sum_ptr + out, of_sum, mask=inside)
        tl.store(of_x_ptr + out, of_sum * scale[None, :], mask=inside)
