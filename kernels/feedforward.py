"""A Transformer's feed-forward: its wide hidden layer, and the gradient that comes back to it.

Both are matrix products whose tiles are finished where they are made. The hidden layer of the paper's model
is 68 times as wide as its state: an operator that passes over it by itself reads and writes all that again.
The formulas stand in triton_deq/reference/feedforward.py.
"""

import triton
import triton.language as tl

from .products import multiple, product, tile_of


@triton.jit(do_not_specialize=["B", "per"])
def feedforward_kernel(
    s_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    inner_ptr,
    B,
    N,
    K,
    per,
    MASK: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`h = relu(m ⊙ (s Wᵀ + b))`.

    s: [B, K]    weight: [N, K]    bias: [N]    mask m, with MASK: [B / per, N]    inner h: [B, N]
    """
    N, K = multiple(N, ALIGN), multiple(K, ALIGN)
    begin, first = tile_of(N, B, BLOCK_B, BLOCK_N, GROUP)
    columns = first + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_B)
    present = begin + rows < B
    s_ptr += begin.to(tl.int64) * K
    value = product(
        s_ptr,
        s_ptr,
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
    value += tl.load(bias_ptr + columns, mask=columns < N, other=0).to(WIDE)[None, :]
    inside = present[:, None] & (columns < N)[None, :]
    if MASK:
        first = begin // per  # offsets from there fit 32 bits
        entries = ((begin + rows) // per - first)[:, None] * N + columns[None, :]
        value *= tl.load(mask_ptr + first.to(tl.int64) * N + entries, mask=inside, other=0).to(WIDE)
    tile = begin.to(tl.int64) * N + (rows[:, None] * N + columns[None, :])
    tl.store(inner_ptr + tile, tl.where(value < 0, 0, value), mask=inside)  # NaN stays


@triton.jit(do_not_specialize=["B"])
def feedforward_vjp_kernel(
    vector_ptr,
    matrix_ptr,
    inner_ptr,
    out_ptr,
    B,
    N,
    K,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`v V` where h > 0, else 0: the gradient of `⟨v, h Vᵀ⟩` in what `h` is the relu of.

    vector v: [B, K]    matrix V: [K, N]    inner h, out: [B, N]
    """
    N, K = multiple(N, ALIGN), multiple(K, ALIGN)
    begin, first = tile_of(N, B, BLOCK_B, BLOCK_N, GROUP)
    columns = first + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_B)
    present = begin + rows < B
    vector_ptr += begin.to(tl.int64) * K
    value = product(
        vector_ptr,
        vector_ptr,
        rows,
        rows,
        present,
        matrix_ptr,
        columns,
        1,
        N,
        N,
        K,
        False,
        True,
        BLOCK_K,
        TF32,
        OPERAND,
        WIDE,
    )
    inside = present[:, None] & (columns < N)[None, :]
    tile = begin.to(tl.int64) * N + (rows[:, None] * N + columns[None, :])
    # Compared in WIDE: some interpreters compare the bits of bfloat16.
    inner = tl.load(inner_ptr + tile, mask=inside, other=0).to(WIDE)
    tl.store(out_ptr + tile, tl.where(inner <= 0, 0, value), mask=inside)
