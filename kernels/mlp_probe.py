"""What the norm of the layer's Jacobian needs beside matrix products, and its gradient; probes from a seed.

The formulas stand in triton_deq/ops/mlp_probe.py.
"""

import triton
import triton.language as tl

from .primitives import activation_curvature, activation_slope, probe_tile
from .products import multiple, product, tile_of


@triton.jit(do_not_specialize=["B"])
def mlp_probe_kernel(
    z_ptr,
    weight_ptr,
    injection_ptr,
    seed_ptr,
    vectors_ptr,
    curvature_ptr,
    B,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PROBES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`ε_m ⊙ act′(a)` of the probes that a seed stands for, and `act″(a)`, with `a = z Wᵀ + u`.

    The product of these vectors with W is `ε_mᵀ J`. No probe is ever in memory.

    z: [B, K]    weight: [N, K]    injection, curvature: [B, N]    seed: [1] int64    vectors: [PROBES, B, N]
    """
    N, K = multiple(N, ALIGN), multiple(K, ALIGN)
    begin, first = tile_of(N, B, BLOCK_B, BLOCK_N, GROUP)
    rows, columns = tl.arange(0, BLOCK_B), first + tl.arange(0, BLOCK_N)
    present = begin + rows < B
    z_ptr += begin.to(tl.int64) * K
    a = product(
        z_ptr,
        z_ptr,
        rows,
        rows,
        present,
        weight_ptr,
        columns,
        K,
        1,
        N,
        K,
        False,
        False,
        BLOCK_K,
        TF32,
        OPERAND,
        WIDE,
    )
    inside = present[:, None] & (columns < N)[None, :]
    tile = begin.to(tl.int64) * N + (rows[:, None] * N + columns[None, :])
    a += tl.load(injection_ptr + tile, mask=inside, other=0).to(WIDE)
    tl.store(curvature_ptr + tile, activation_curvature(a, ACTIVATION), mask=inside)
    slope = activation_slope(a, ACTIVATION)
    seed = tl.load(seed_ptr)
    for m in range(PROBES):
        stream = tl.full((), m, tl.int32)
        entries = probe_tile(seed, stream, begin, first, BLOCK_B, BLOCK_N, GAUSSIAN)
        tl.store(vectors_ptr + m * B.to(tl.int64) * N + tile, entries * slope, mask=inside)


@triton.jit(do_not_specialize=["B"])
def mlp_probe_vjp_kernel(
    products_ptr,
    weight_ptr,
    curvature_ptr,
    seed_ptr,
    out_ptr,
    B,
    N,
    K,
    PROBES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`act″(a) ⊙ Σ_m ε_m ⊙ (p̄_m Wᵀ)`: the gradient in a, from p̄_m, those in the products `p_m = ε_mᵀ J`.

    products p̄: [PROBES, B, K]    weight: [N, K]    curvature, out: [B, N]    seed: as there
    """
    N, K = multiple(N, ALIGN), multiple(K, ALIGN)
    begin, first = tile_of(N, B, BLOCK_B, BLOCK_N, GROUP)
    rows, columns = tl.arange(0, BLOCK_B), first + tl.arange(0, BLOCK_N)
    present = begin + rows < B
    products_ptr += begin.to(tl.int64) * K
    inside = present[:, None] & (columns < N)[None, :]
    tile = begin.to(tl.int64) * N + (rows[:, None] * N + columns[None, :])
    seed = tl.load(seed_ptr)
    total = tl.zeros([BLOCK_B, BLOCK_N], dtype=WIDE)
    for m in range(PROBES):
        back = product(
            products_ptr + m * B.to(tl.int64) * K,
            products_ptr,
            rows,
            rows,
            present,
            weight_ptr,
            columns,
            K,
            1,
            N,
            K,
            False,
            False,
            BLOCK_K,
            TF32,
            OPERAND,
            WIDE,
        )
        stream = tl.full((), m, tl.int32)
        total += probe_tile(seed, stream, begin, first, BLOCK_B, BLOCK_N, GAUSSIAN) * back
    curvature = tl.load(curvature_ptr + tile, mask=inside, other=0).to(WIDE)
    tl.store(out_ptr + tile, total * curvature, mask=inside)
