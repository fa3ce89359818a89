"""The multilayer perceptron's layer and its vector-Jacobian product.

Matrix products run on tensor cores and add up in float32 (float64 for float64). The formulas stand in
triton_deq/reference/mlp.py.
"""

import triton
import triton.language as tl

from .primitives import activate, activation_curvature, activation_slope, standardise
from .products import multiple, product, tile_of


@triton.jit
def mlp_kernel(
    z_ptr,
    weight_ptr,
    injection_ptr,
    gain_ptr,
    offset_ptr,
    value_ptr,
    slope_ptr,
    curvature_ptr,
    B,
    N,
    K,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CURVATURE: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`act(a)` with `a = z Wᵀ + u`, normalised over its width with NORM; on request `act′(a)` and `act″(a)`.

    z: [B, K]    weight: [N, K]    injection u, value, slope, curvature: [B, N]    gain, offset: [N]
    NORM: BLOCK_N is at least N.
    """
    N, K = multiple(N, ALIGN), multiple(K, ALIGN)
    begin, first = tile_of(N, B, BLOCK_B, BLOCK_N, GROUP)
    columns = first + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_B)
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
    value = activate(a, ACTIVATION)
    if NORM:
        normal, _ = standardise(value, inside, N, EPSILON)
        gain = tl.load(gain_ptr + columns, mask=columns < N, other=0).to(WIDE)
        offset = tl.load(offset_ptr + columns, mask=columns < N, other=0).to(WIDE)
        value = normal * gain[None, :] + offset[None, :]
    tl.store(value_ptr + tile, value, mask=inside)
    if SLOPE:
        tl.store(slope_ptr + tile, activation_slope(a, ACTIVATION), mask=inside)
    if CURVATURE:
        tl.store(curvature_ptr + tile, activation_curvature(a, ACTIVATION), mask=inside)


@triton.jit(do_not_specialize=["ROWS"])
def mlp_vjp_kernel(
    vector_ptr,
    slope_ptr,
    weight_ptr,
    shift_ptr,
    out_ptr,
    ROWS,
    B,
    N,
    K,
    SHIFT: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`(v ⊙ act′(a)) W`, the product of v with the Jacobian of `z ↦ act(z Wᵀ + u)`, plus `shift`.

    vector: [ROWS, K], ROWS a multiple of B    slope: [B, K]    weight: [K, N]    shift, out: [ROWS, N]
    """
    N, K = multiple(N, ALIGN), multiple(K, ALIGN)
    begin, first = tile_of(N, ROWS, BLOCK_B, BLOCK_N, GROUP)
    columns = first + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_B)
    present = begin + rows < ROWS
    scale_rows = ((begin + rows) % B).to(tl.int64)
    vector_ptr += begin.to(tl.int64) * K
    value = product(
        vector_ptr,
        slope_ptr,
        rows,
        scale_rows,
        present,
        weight_ptr,
        columns,
        1,
        N,
        N,
        K,
        True,
        True,
        BLOCK_K,
        TF32,
        OPERAND,
        WIDE,
    )
    inside = present[:, None] & (columns < N)[None, :]
    tile = begin.to(tl.int64) * N + (rows[:, None] * N + columns[None, :])
    if SHIFT:
        value += tl.load(shift_ptr + tile, mask=inside, other=0).to(WIDE)
    tl.store(out_ptr + tile, value, mask=inside)
