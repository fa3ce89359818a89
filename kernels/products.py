"""Device functions for matrix products, whose tiles kernels finish in their own ways."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_hip


@triton.jit
def dot(a, b, total, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """`total + a b`. OPERAND: what tensor cores take; float32 as three TF32 products, or as one with TF32."""
    if TF32:
        return tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision="tf32", out_dtype=WIDE)
    elif is_hip():  # AMD's matrix cores take float32 as it is
        return tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision="ieee", out_dtype=WIDE)
    else:
        return tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision="tf32x3", out_dtype=WIDE)


@triton.jit
def multiple(number, ALIGN: tl.constexpr):
    """The same number; the compiler sees that ALIGN divides it, and reads that many entries at a time."""
    return number // ALIGN * ALIGN


@triton.jit
def tile_of(N, ROWS, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's first row and column; GROUP row blocks share what they read of the matrix."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(ROWS, BLOCK_B)
    wide = GROUP * tl.cdiv(N, BLOCK_N)
    first = program // wide * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    row_block = first + program % wide % size
    return row_block * BLOCK_B, program % wide // size * BLOCK_N


@triton.jit
def product(
    rows_ptr,
    scale_ptr,
    rows,
    scale_rows,
    present,
    matrix_ptr,
    columns,
    column_stride,
    depth_stride,
    N,
    K,
    SCALED: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`X M` at `rows` and `columns`, X being rows of K entries, multiplied elementwise by `scale` if SCALED.

    rows, scale_rows: numbers of rows, counted from where the pointers point.
    matrix: entry (depth k, column n) of M lies at k · depth_stride + n · column_stride; M is [K, N].
    ALONG_COLUMNS: whether entries along a row of M are neighbours, not those along a column.
    """
    # Tensor cores that read the right operand from shared memory want float32 along the depth. What lies
    # along columns would be turned on its way there, against the order of the banks: so it becomes the left
    # operand, of the transpose.
    # Written out twice: of one text for both, ptxas spills in the other branch on sm_80 and sm_100.
    LEFT: tl.constexpr = ALONG_COLUMNS and tl.float32 == OPERAND and cuda_capability_geq(9, 0)
    if LEFT:
        total = tl.zeros([columns.shape[0], rows.shape[0]], dtype=WIDE)
    else:
        total = tl.zeros([rows.shape[0], columns.shape[0]], dtype=WIDE)
    for start in range(0, K, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        within = depth < K
        if LEFT:
            inside = within[:, None] & present[None, :]
            a = tl.load(rows_ptr + rows[None, :] * K + depth[:, None], mask=inside, other=0)
            if SCALED:
                scale = tl.load(scale_ptr + scale_rows[None, :] * K + depth[:, None], mask=inside, other=0)
                a = a.to(WIDE) * scale.to(WIDE)
            entries = depth[None, :] * depth_stride + columns[:, None] * column_stride
            b = tl.load(matrix_ptr + entries, mask=within[None, :] & (columns < N)[:, None], other=0)
            total = dot(b, a, total, TF32, OPERAND, WIDE)
        else:
            inside = present[:, None] & within[None, :]
            a = tl.load(rows_ptr + rows[:, None] * K + depth[None, :], mask=inside, other=0)
            if SCALED:
                scale = tl.load(scale_ptr + scale_rows[:, None] * K + depth[None, :], mask=inside, other=0)
                a = a.to(WIDE) * scale.to(WIDE)
            entries = depth[:, None] * depth_stride + columns[None, :] * column_stride
            b = tl.load(matrix_ptr + entries, mask=within[:, None] & (columns < N)[None, :], other=0)
            total = dot(a, b, total, TF32, OPERAND, WIDE)
    if LEFT:
        total = tl.trans(total)
    return total
