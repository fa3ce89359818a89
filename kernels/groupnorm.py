"""GroupNorm with what surrounds it, its product, and the derivatives of that: a program a few groups.

The formulas stand in triton_deq/reference/groupnorm.py. Maps are channels-last: a sample is a matrix [P, C]
of pixels and channels, and samples lie a stride apart. A program has PACKED groups beside each other, so that
a pixel's channels fill the 32 bytes that the L2 cache gives at least. They are read in tiles [ROWS, BLOCK],
twice; the second time they are in the cache, or where they are one tile, in registers.

The first two take several maps in one launch, of any sizes: those of a multiscale state that do not wait for
each other. Programs are dealt out to the maps in their order, so the largest should come first.
"""

import triton
import triton.language as tl


@triton.jit
def tile_at(start, part, TILE: tl.constexpr):
    """Offsets within a sample of a tile of a program's part of its channels, and which of them there are.

    TILE: (pixels, channels, channels of a program, ROWS, BLOCK), as everywhere here
    """
    pixels = start + tl.arange(0, TILE[3])
    lanes = tl.arange(0, TILE[4])
    inside = (pixels < TILE[0])[:, None] & (lanes < TILE[2])[None, :]
    return pixels[:, None] * TILE[1] + (part * TILE[2] + lanes)[None, :], inside


@triton.jit
def of_channels(ptr, part, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A number for each channel of the part."""
    lanes = tl.arange(0, BLOCK)
    return tl.load(ptr + part * WIDTH + lanes, mask=lanes < WIDTH, other=0).to(WIDE)


@triton.jit
def of_groups(ptr, part, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The number of the part's group, or of several that of each channel's, `[1, BLOCK]`."""
    if PACKED == 1:
        return tl.load(ptr + part)
    else:
        return tl.load(ptr + part * PACKED + tl.arange(0, BLOCK) // (BLOCK // PACKED))[None, :]


@triton.jit
def store_of_groups(ptr, part, value, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The other way, for a value as `over_groups` has it."""
    if PACKED == 1:
        tl.store(ptr + part, value)
    else:
        for k in tl.static_range(PACKED):
            first = tl.arange(0, BLOCK)[None, :] == k * (BLOCK // PACKED)
            tl.store(ptr + part * PACKED + k, tl.sum(tl.where(first, value, 0)))


@triton.jit
def over_groups(of_channel, PACKED: tl.constexpr):
    """The sum over the part's group, or of several that over each channel's, `[1, BLOCK]`."""
    if PACKED == 1:
        return tl.sum(of_channel)
    else:
        # Made of numbers, which have no layout: to a vector's layout the compiler would move whole tiles.
        group = tl.arange(0, of_channel.shape[0]) // (of_channel.shape[0] // PACKED)
        sums = tl.zeros_like(of_channel)
        for k in tl.static_range(PACKED):
            sums = tl.where(group == k, tl.sum(tl.where(group == k, of_channel, 0)), sums)
        return sums[None, :]


@triton.jit
def over_tile(tile, PACKED: tl.constexpr):
    """The same for a tile `[ROWS, BLOCK]`, over its rows as well."""
    if PACKED == 1:
        return tl.sum(tile)
    else:
        return over_groups(tl.sum(tile, axis=0), PACKED)


@triton.jit
def load_if(GIVEN: tl.constexpr, ptr, offsets, inside):
    """What is given, 0 outside; 0 everywhere if it is not."""
    if GIVEN:
        return tl.load(ptr + offsets, mask=inside, other=0)
    else:
        return tl.zeros(offsets.shape, dtype=ptr.dtype.element_ty)


@triton.jit
def load_tile(x_ptr, shift_ptr, start, part, TILE: tl.constexpr, SHIFT: tl.constexpr, APART: tl.constexpr):
    """The tiles of x and of the shift u, as they are stored."""
    offsets, inside = tile_at(start, part, TILE)
    pixels = start + tl.arange(0, TILE[3])
    x = tl.load(x_ptr + offsets + pixels[:, None] * APART, mask=inside, other=0)
    return x, load_if(SHIFT, shift_ptr, offsets, inside)


@triton.jit
def summed(x, scale, shift, MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """`m ⊙ x + u`, 0 outside."""
    total = x.to(WIDE)
    if MASK:
        total *= scale[None, :]
    if SHIFT:
        total += shift.to(WIDE)
    return total


@triton.jit
def finished(normal, gain, offset, residual, GAIN: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """`relu(γ ⊙ n + β + r)`"""
    value = normal
    if GAIN:
        value = value * gain[None, :] + offset[None, :]
    if RESIDUAL:
        value += residual.to(value.dtype)
    if RELU:
        value = tl.where(value < 0, 0, value)  # NaN stays
    return value


@triton.jit
def passed(vector_ptr, value_ptr, offsets, inside, RELU: tl.constexpr, WIDE: tl.constexpr):
    """The vector where the relu let the value through."""
    vector = tl.load(vector_ptr + offsets, mask=inside, other=0).to(WIDE)
    if RELU:
        value = tl.load(value_ptr + offsets, mask=inside, other=0).to(WIDE)
        vector = tl.where(value <= 0, 0, vector)
    return vector


@triton.jit
def pulled(
    maps, scale, mean, inverse, start, part,
    TILE: tl.constexpr, MASK: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """A tile of v, which is the vector where the relu let the value through and 0 outside, and one of n.

    maps: where the sample's vector, value, x and shift begin
    """
    vector_ptr, value_ptr, x_ptr, shift_ptr = maps
    offsets, inside = tile_at(start, part, TILE)
    x, shift = load_tile(x_ptr, shift_ptr, start, part, TILE, SHIFT, 0)
    v = passed(vector_ptr, value_ptr, offsets, inside, RELU, mean.dtype)
    return v, (summed(x, scale, shift, MASK, SHIFT, mean.dtype) - mean) * inverse


@triton.jit(do_not_specialize=["samples"])
def groupnorm_kernel(maps, samples, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`normalise` for every part of every sample of every map.

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
def entries_of_places(P: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a part's entries each place of a tile meets on the way through P rows, `[ROWS, BLOCK]`."""
    rows = (P - tl.arange(0, ROWS) + ROWS - 1) // ROWS
    return tl.where((tl.arange(0, BLOCK) < WIDTH)[None, :], rows[:, None], 0)


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
    PACKED: tl.constexpr,
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
    WIDTH: tl.constexpr = C // G * PACKED
    PARTS: tl.constexpr = G // PACKED
    N: tl.constexpr = P * (C // G)
    TILE: tl.constexpr = (P, C, WIDTH, ROWS, BLOCK)
    sample = (program // PARTS).to(tl.int64)
    part = program % PARTS
    x_ptr += sample * x_stride
    shift_ptr += sample * shift_stride
    residual_ptr += sample * residual_stride
    out_ptr += sample * out_stride
    # Before the sums, since no load passes their barriers.
    scale = tl.zeros([BLOCK], dtype=WIDE)
    if MASK:
        scale = of_channels(mask_ptr + sample * C, part, WIDTH, BLOCK, WIDE)
    gain = tl.zeros([BLOCK], dtype=WIDE)
    offset = gain
    if GAIN:
        gain = of_channels(gain_ptr, part, WIDTH, BLOCK, WIDE)
        offset = of_channels(offset_ptr, part, WIDTH, BLOCK, WIDE)

    means = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    squares = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    x, shift = load_tile(x_ptr, shift_ptr, 0, part, TILE, SHIFT, APART)
    if P <= ROWS:
        offsets, inside = tile_at(0, part, TILE)
        residual = load_if(RESIDUAL, residual_ptr, offsets, inside)
        means = summed(x, scale, shift, MASK, SHIFT, WIDE)
    else:
        for start in range(0, P, ROWS):
            _, inside = tile_at(start, part, TILE)
            s = summed(x, scale, shift, MASK, SHIFT, WIDE)
            # The next tile is on its way meanwhile; after the last one there is nothing to read.
            x, shift = load_tile(x_ptr, shift_ptr, start + ROWS, part, TILE, SHIFT, APART)
            # A place that is inside was so in all tiles before, so as many entries have come to it as tiles.
            distance = tl.where(inside, s - means, 0)
            means += distance * (tl.full((), 1, WIDE) / (start // ROWS + 1))
            squares += distance * (s - means)
    count = entries_of_places(P, WIDTH, ROWS, BLOCK).to(WIDE)
    mean = over_tile(count * means, PACKED) / N
    apart = means - mean
    variance = over_tile(squares + count * apart * apart, PACKED) / N
    inverse = 1 / tl.sqrt(variance + EPSILON)
    if STATISTICS:
        store_of_groups(mean_ptr + sample * G, part, mean, PACKED, BLOCK)
        store_of_groups(inverse_ptr + sample * G, part, inverse, PACKED, BLOCK)

    normal = apart * inverse
    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, part, TILE)
        if P > ROWS:  # a single tile is at hand
            residual = load_if(RESIDUAL, residual_ptr, offsets, inside)
            x, shift = load_tile(x_ptr, shift_ptr, start, part, TILE, SHIFT, APART)
            normal = (summed(x, scale, shift, MASK, SHIFT, WIDE) - mean) * inverse
        value = finished(normal, gain, offset, residual, GAIN, RESIDUAL, RELU)
        tl.store(out_ptr + offsets, value, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def groupnorm_vjp_kernel(maps, samples, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`pull` for every part of every sample of every map; arguments as of `groupnorm_kernel`."""
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
    PACKED: tl.constexpr,
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
    WIDTH: tl.constexpr = C // G * PACKED
    PARTS: tl.constexpr = G // PACKED
    N: tl.constexpr = P * (C // G)
    TILE: tl.constexpr = (P, C, WIDTH, ROWS, BLOCK)
    sample = (program // PARTS).to(tl.int64)
    part = program % PARTS
    vector_ptr += sample * vector_stride
    value_ptr += sample * value_stride
    x_ptr += sample * x_stride
    shift_ptr += sample * shift_stride
    maps = (vector_ptr, value_ptr, x_ptr, shift_ptr)
    mean = of_groups(mean_ptr + sample * G, part, PACKED, BLOCK)
    inverse = of_groups(inverse_ptr + sample * G, part, PACKED, BLOCK)
    scale = tl.zeros([BLOCK], dtype=WIDE)
    if MASK:
        scale = of_channels(mask_ptr + sample * C, part, WIDTH, BLOCK, WIDE)
    gain = tl.zeros([BLOCK], dtype=WIDE) + 1
    if GAIN:
        gain = of_channels(gain_ptr, part, WIDTH, BLOCK, WIDE)

    v, n = pulled(maps, scale, mean, inverse, 0, part, TILE, MASK, SHIFT, RELU)
    of_v = v
    of_vn = v * n
    for start in range(ROWS, P, ROWS):
        v, n = pulled(maps, scale, mean, inverse, start, part, TILE, MASK, SHIFT, RELU)
        of_v += v
        of_vn += v * n
    if PARAMETERS or PACKED > 1:
        sum_v, sum_vn = tl.sum(of_v, axis=0), tl.sum(of_vn, axis=0)
        c = over_groups(gain * sum_v, PACKED) / N
        d = over_groups(gain * sum_vn, PACKED) / N
    else:
        c = tl.sum(gain[None, :] * of_v) / N
        d = tl.sum(gain[None, :] * of_vn) / N
    if PARAMETERS:
        lanes = tl.arange(0, BLOCK)
        place = sums_ptr + sample * 2 * C + part * WIDTH + lanes
        tl.store(place, sum_v, mask=lanes < WIDTH)
        tl.store(place + C, sum_vn, mask=lanes < WIDTH)

    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, part, TILE)
        if P > ROWS:  # a single tile is at hand
            v, n = pulled(maps, scale, mean, inverse, start, part, TILE, MASK, SHIFT, RELU)
        of_sum = inverse * (gain[None, :] * v - c - n * d)
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
    PACKED: tl.constexpr,
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
    WIDTH: tl.constexpr = C // G * PACKED
    PARTS: tl.constexpr = G // PACKED
    N: tl.constexpr = P * (C // G)
    TILE: tl.constexpr = (P, C, WIDTH, ROWS, BLOCK)
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    along_ptr += sample * along_stride
    beside_ptr += sample * beside_stride
    vector_ptr += sample * vector_stride
    value_ptr += sample * value_stride
    x_ptr += sample * x_stride
    shift_ptr += sample * shift_stride
    maps = (vector_ptr, value_ptr, x_ptr, shift_ptr)
    mean = of_groups(mean_ptr + sample * G, part, PACKED, BLOCK)
    inverse = of_groups(inverse_ptr + sample * G, part, PACKED, BLOCK)
    scale = tl.zeros([BLOCK], dtype=WIDE) + 1
    if MASK:
        scale = of_channels(mask_ptr + sample * C, part, WIDTH, BLOCK, WIDE)
    gain = tl.zeros([BLOCK], dtype=WIDE) + 1
    if GAIN:
        gain = of_channels(gain_ptr, part, WIDTH, BLOCK, WIDE)

    offsets, inside = tile_at(0, part, TILE)
    w = tl.load(along_ptr + offsets, mask=inside, other=0).to(WIDE) * scale[None, :]
    v, n = pulled(maps, scale, mean, inverse, 0, part, TILE, MASK, SHIFT, RELU)
    of_w, of_wn, of_v, of_vn, of_wv = w, w * n, v, v * n, w * v
    for start in range(ROWS, P, ROWS):
        offsets, inside = tile_at(start, part, TILE)
        w = tl.load(along_ptr + offsets, mask=inside, other=0).to(WIDE) * scale[None, :]
        v, n = pulled(maps, scale, mean, inverse, start, part, TILE, MASK, SHIFT, RELU)
        of_w += w
        of_wn += w * n
        of_v += v
        of_vn += v * n
        of_wv += w * v
    a, b = over_tile(of_w, PACKED) / N, over_tile(of_wn, PACKED) / N
    sum_v, sum_vn, sum_wv = tl.sum(of_v, axis=0), tl.sum(of_vn, axis=0), tl.sum(of_wv, axis=0)
    # Σ v V(w) of each channel
    along_v = tl.reshape(inverse * (sum_wv - a * sum_v - b * sum_vn), [BLOCK])
    if GAIN:
        lanes = tl.arange(0, BLOCK)
        tl.store(sums_ptr + sample * C + part * WIDTH + lanes, along_v, mask=lanes < WIDTH)
    c = over_groups(gain * sum_v, PACKED) / N
    d = over_groups(gain * sum_vn, PACKED) / N
    q = over_groups(gain * along_v, PACKED) / N

    for start in range(0, P, ROWS):
        offsets, inside = tile_at(start, part, TILE)
        if P > ROWS:  # a single tile is at hand
            w = tl.load(along_ptr + offsets, mask=inside, other=0).to(WIDE) * scale[None, :]
            v, n = pulled(maps, scale, mean, inverse, start, part, TILE, MASK, SHIFT, RELU)
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
