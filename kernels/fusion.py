"""The multiscale sum and its product: maps of several resolutions are read once each.

Maps are channels-last: a sample is a matrix [H·W, C], dense but for base and vector, whose samples lie a
stride apart. The formulas stand in triton_deq/reference/fusion.py.
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


@triton.jit(do_not_specialize=["H", "W"])
def fusion_kernel(
    base_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    out_ptr,
    base_stride,
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

    base: [B, H·W, C], samples base_stride apart    first, second, third: [B, (H/K)·(W/K), C], dense
    out: [B, H·W, C], dense
    """
    sample = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (pixels < H * W)[:, None] & (channels < C)[None, :]
    offsets = pixels[:, None] * C + channels[None, :]
    total = tl.load(base_ptr + sample * base_stride + offsets, mask=inside, other=0).to(WIDE)
    total = add_term(total, first_ptr, sample, pixels, channels, inside, H, W, C, K1, WIDE)
    total = add_term(total, second_ptr, sample, pixels, channels, inside, H, W, C, K2, WIDE)
    total = add_term(total, third_ptr, sample, pixels, channels, inside, H, W, C, K3, WIDE)
    if RELU:
        total = tl.where(total < 0, 0, total)  # NaN stays
    tl.store(out_ptr + sample * (H * W * C) + offsets, total, mask=inside)


@triton.jit(do_not_specialize=["H", "W"])
def fusion_vjp_kernel(
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
    sample = tl.program_id(2).to(tl.int64)
    coarse = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
