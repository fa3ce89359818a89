"""The multiscale sum and its product: maps of several resolutions are read once each.

Maps are channels-last: a sample is a matrix [H·W, C], dense but for base, vector and out, whose samples lie a
stride apart. The formulas stand in triton_deq/reference/fusion.py. Programs are dealt out to several sums in
their order.
"""

import triton
import triton.language as tl


@triton.jit
def add_term(
    total,
    term_ptr,
    sample,
    pixels,
    channels,
    inside,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds the term's pixel `(y // K, x // K)` to each `(y, x)`."""
    if K > 0:
        coarse = (pixels // W // K) * (W // K) + pixels % W // K
        start = term_ptr + sample * ((H // K) * (W // K) * C)
        total += tl.load(start + coarse[:, None] * C + channels[None, :], mask=inside, other=0).to(WIDE)
    return total


@triton.jit(do_not_specialize=["samples"])
def fusion_kernel(sums, samples, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`add_up` for every tile of every sample of every sum.

    sums, CONSTANTS: for each the arguments of `add_up` after `program`, up to the compile-time ones, and
    those.    PROGRAMS: how many each gets for a sample
    """
    first = 0
    for k in tl.static_range(len(CONSTANTS)):
        program = tl.program_id(0) - first
        if program >= 0 and program < samples * PROGRAMS[k]:
            add_up(program, *sums[k], *CONSTANTS[k])
        first += samples * PROGRAMS[k]


@triton.jit
def tile_of(program, pixels, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sample, and the pixels and channels, of a program's tile."""
    across = tl.cdiv(C, BLOCK)
    tiles = tl.cdiv(pixels, ROWS) * across
    tile = program % tiles
    rows = tile // across * ROWS + tl.arange(0, ROWS)
    return (program // tiles).to(tl.int64), rows, tile % across * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def add_up(
    program,
    base_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    out_ptr,
    base_stride,
    out_stride,
    H,
    W,
    C: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`relu(base + Σ up(t))` with up to three terms; K is how often each pixel is repeated, 0 for no term.

    base, out: [B, H·W, C], samples a stride of their own apart    first, second, third: [B, (H/K)·(W/K), C],
    dense
    """
    sample, pixels, channels = tile_of(program, H * W, C, ROWS, BLOCK)
    inside = (pixels < H * W)[:, None] & (channels < C)[None, :]
    offsets = pixels[:, None] * C + channels[None, :]
    total = tl.load(base_ptr + sample * base_stride + offsets, mask=inside, other=0).to(WIDE)
    total = add_term(total, first_ptr, sample, pixels, channels, inside, H, W, C, K1, WIDE)
    total = add_term(total, second_ptr, sample, pixels, channels, inside, H, W, C, K2, WIDE)
    total = add_term(total, third_ptr, sample, pixels, channels, inside, H, W, C, K3, WIDE)
    if RELU:
        total = tl.where(total < 0, 0, total)  # NaN stays
    tl.store(out_ptr + sample * out_stride + offsets, total, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def fusion_vjp_kernel(pools, samples, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`pool` for every tile of every sample of every map; arguments as of `fusion_kernel`."""
    first = 0
    for k in tl.static_range(len(CONSTANTS)):
        program = tl.program_id(0) - first
        if program >= 0 and program < samples * PROGRAMS[k]:
            pool(program, *pools[k], *CONSTANTS[k])
        first += samples * PROGRAMS[k]


@triton.jit
def pool(
    program,
    vector_ptr,
    value_ptr,
    v_ptr,
    pooled_ptr,
    vector_stride,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    WRITE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """v, the vector where value > 0, and its sums over blocks of K × K pixels, in a fixed order.

    vector: [B, H·W, C], samples vector_stride apart    value, v: the same, dense; v with WRITE
    pooled: [B, (H/K)·(W/K), C], dense; with K > 1
    """
    sample, coarse, channels = tile_of(program, (H // K) * (W // K), C, ROWS, BLOCK)
    inside = (coarse < (H // K) * (W // K))[:, None] & (channels < C)[None, :]
    corner = coarse // (W // K) * K * W + coarse % (W // K) * K
    total = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    for place in range(K * K):
        pixels = corner + place // K * W + place % K
        offsets = pixels[:, None] * C + channels[None, :]
        v = tl.load(vector_ptr + sample * vector_stride + offsets, mask=inside, other=0).to(WIDE)
        dense = sample * (H * W * C) + offsets
        if RELU:
            value = tl.load(value_ptr + dense, mask=inside, other=0).to(WIDE)
            v = tl.where(value <= 0, 0, v)
        if WRITE:
            tl.store(v_ptr + dense, v, mask=inside)
        total += v
    if K > 1:
        offsets = coarse[:, None] * C + channels[None, :]
        tl.store(pooled_ptr + sample * ((H // K) * (W // K) * C) + offsets, total, mask=inside)
