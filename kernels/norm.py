"""LayerNorm of a residual sum `x + m ⊙ y`, and its vector-Jacobian product: a row is read once.

The formulas stand in triton_deq/reference/norm.py. Widths and strides are constants: so the compiler knows
how rows are aligned, and a model has few of them.
"""

import triton
import triton.language as tl

from .primitives import standardise_centred, standardise_vjp


@triton.jit
def terms(
    x_ptr,
    branch_ptr,
    mask_ptr,
    rows,
    columns,
    inside,
    per,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BRANCH_STRIDE: tl.constexpr,
    BRANCH: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x and m ⊙ y at rows and columns; the arguments are those of `norm_kernel`."""
    x = tl.load(x_ptr + rows[:, None] * X_STRIDE + columns[None, :], mask=inside, other=0).to(WIDE)
    branch = tl.zeros_like(x)
    if BRANCH:
        tile = rows[:, None] * BRANCH_STRIDE + columns[None, :]
        branch = tl.load(branch_ptr + tile, mask=inside, other=0).to(WIDE)
        if MASK:
            tile = (rows // per)[:, None] * D + columns[None, :]
            branch *= tl.load(mask_ptr + tile, mask=inside, other=0).to(WIDE)
    return x, branch


@triton.jit
def load_gain(gain_ptr, offset_ptr, columns, D: tl.constexpr, GAIN: tl.constexpr, WIDE: tl.constexpr):
    """γ and β, 1 and 0 where there are none."""
    gain = tl.zeros(columns.shape, dtype=WIDE) + 1
    offset = tl.zeros(columns.shape, dtype=WIDE)
    if GAIN:
        gain = tl.load(gain_ptr + columns, mask=columns < D, other=0).to(WIDE)
        offset = tl.load(offset_ptr + columns, mask=columns < D, other=0).to(WIDE)
    return gain, offset


@triton.jit
def write_value(
    normal,
    gain,
    offset,
    value_ptr,
    normal_ptr,
    rows,
    columns,
    inside,
    D: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    NORMAL_STRIDE: tl.constexpr,
    GAIN: tl.constexpr,
    NORMAL: tl.constexpr,
):
    """`γ ⊙ n + β` and n."""
    value = normal
    if GAIN:
        value = normal * gain[None, :] + offset[None, :]
    tl.store(value_ptr + rows[:, None] * VALUE_STRIDE + columns[None, :], value, mask=inside)
    if NORMAL:
        tl.store(normal_ptr + rows[:, None] * NORMAL_STRIDE + columns[None, :], normal, mask=inside)


@triton.jit(do_not_specialize=["B", "per"])
def norm_kernel(
    x_ptr,
    branch_ptr,
    mask_ptr,
    gain_ptr,
    offset_ptr,
    value_ptr,
    normal_ptr,
    inverse_ptr,
    B,
    per,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BRANCH_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    NORMAL_STRIDE: tl.constexpr,
    BRANCH: tl.constexpr,
    MASK: tl.constexpr,
    GAIN: tl.constexpr,
    NORMAL: tl.constexpr,
    INVERSE: tl.constexpr,
    EPSILON: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`γ ⊙ n + β` with `n = (s − mean(s)) / σ` of the rows `s = x + m ⊙ y`; on request n and 1/σ.

    x, branch y: [B, D], rows X_STRIDE and BRANCH_STRIDE apart    mask m: [B / per, D], each for per rows
    gain γ, offset β: [D]    value, normal: [B, D], rows VALUE_STRIDE and NORMAL_STRIDE apart
    inverse: [B], of dtype WIDE
    A row wider than BLOCK is read three times, by ROWS = 1.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < B
    if D <= BLOCK:
        columns = tl.arange(0, BLOCK)
        inside = present[:, None] & (columns < D)[None, :]
        x, branch = terms(
            x_ptr,
            branch_ptr,
            mask_ptr,
            rows,
            columns,
            inside,
            per,
            D,
            X_STRIDE,
            BRANCH_STRIDE,
            BRANCH,
            MASK,
            WIDE,
        )
        # Before the sums, since no load passes their barriers.
        gain, offset = load_gain(gain_ptr, offset_ptr, columns, D, GAIN, WIDE)
        # The mean is taken from x first, which is nearly exact: x + y would round y as coarsely as a large x.
        mean = tl.sum(x + branch, axis=1) / D
        normal, inverse = standardise_centred((x - mean[:, None]) + branch, inside, D, EPSILON)
        write_value(
            normal,
            gain,
            offset,
            value_ptr,
            normal_ptr,
            rows,
            columns,
            inside,
            D,
            VALUE_STRIDE,
            NORMAL_STRIDE,
            GAIN,
            NORMAL,
        )
    else:
        total = tl.zeros([ROWS, BLOCK], dtype=WIDE)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = present[:, None] & (columns < D)[None, :]
            x, branch = terms(
                x_ptr,
                branch_ptr,
                mask_ptr,
                rows,
                columns,
                inside,
                per,
                D,
                X_STRIDE,
                BRANCH_STRIDE,
                BRANCH,
                MASK,
                WIDE,
            )
            total += x + branch
        mean = tl.sum(total, axis=1) / D
        total = tl.zeros([ROWS, BLOCK], dtype=WIDE)
        squares = tl.zeros([ROWS, BLOCK], dtype=WIDE)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = present[:, None] & (columns < D)[None, :]
            x, branch = terms(
                x_ptr,
                branch_ptr,
                mask_ptr,
                rows,
                columns,
                inside,
                per,
                D,
                X_STRIDE,
                BRANCH_STRIDE,
                BRANCH,
                MASK,
                WIDE,
            )
            centred = tl.where(inside, (x - mean[:, None]) + branch, 0)
            total += centred
            squares += centred * centred
        rest = tl.sum(total, axis=1) / D  # the mean's rounding: of squares so small a difference is exact
        variance = tl.sum(squares, axis=1) / D - rest * rest
        inverse = 1 / tl.sqrt(tl.where(variance < 0, 0, variance) + EPSILON)  # NaN stays
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = present[:, None] & (columns < D)[None, :]
            x, branch = terms(
                x_ptr,
                branch_ptr,
                mask_ptr,
                rows,
                columns,
                inside,
                per,
                D,
                X_STRIDE,
                BRANCH_STRIDE,
                BRANCH,
                MASK,
                WIDE,
            )
            normal = ((x - mean[:, None]) + branch - rest[:, None]) * inverse[:, None]
            gain, offset = load_gain(gain_ptr, offset_ptr, columns, D, GAIN, WIDE)
            write_value(
                normal,
                gain,
                offset,
                value_ptr,
                normal_ptr,
                rows,
                columns,
                inside,
                D,
                VALUE_STRIDE,
                NORMAL_STRIDE,
                GAIN,
                NORMAL,
            )
    if INVERSE:
        tl.store(inverse_ptr + rows, inverse, mask=present)


@triton.jit
def gradient_and_normal(
    vector_ptr,
    shift_ptr,
    normal_ptr,
    gain_ptr,
    rows,
    normal_rows,
    columns,
    inside,
    D: tl.constexpr,
    VECTOR_STRIDE: tl.constexpr,
    GAIN: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient in n, `γ ⊙ v` plus shift, and n; the arguments are those of `norm_vjp_kernel`."""
    tile = rows[:, None] * VECTOR_STRIDE + columns[None, :]
    g = tl.load(vector_ptr + tile, mask=inside, other=0).to(WIDE)
    if GAIN:
        g *= tl.load(gain_ptr + columns, mask=columns < D, other=0).to(WIDE)[None, :]
    if SHIFT:
        g += tl.load(shift_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0).to(WIDE)
    tile = normal_rows[:, None] * D + columns[None, :]
    return g, tl.load(normal_ptr + tile, mask=inside, other=0).to(WIDE)


@triton.jit
def mask_and_addend(
    mask_ptr,
    addend_ptr,
    rows,
    normal_rows,
    columns,
    inside,
    per,
    D: tl.constexpr,
    MASK: tl.constexpr,
    ADDEND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """m and the addend, 1 and 0 where there are none; the arguments are those of `norm_vjp_kernel`."""
    mask = tl.zeros(inside.shape, dtype=WIDE) + 1
    addend = tl.zeros(inside.shape, dtype=WIDE)
    if MASK:
        tile = (normal_rows // per)[:, None] * D + columns[None, :]
        mask = tl.load(mask_ptr + tile, mask=inside, other=0).to(WIDE)
    if ADDEND:
        tile = rows[:, None] * D + columns[None, :]
        addend = tl.load(addend_ptr + tile, mask=inside, other=0).to(WIDE)
    return mask, addend


@triton.jit
def write_gradient(
    value,
    mask,
    addend,
    out_ptr,
    branch_out_ptr,
    rows,
    columns,
    inside,
    D: tl.constexpr,
    BRANCH_OUT_STRIDE: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """The gradient in x plus the addend, and with BRANCH the gradient in y."""
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], value + addend, mask=inside)
    if BRANCH:
        tile = rows[:, None] * BRANCH_OUT_STRIDE + columns[None, :]
        tl.store(branch_out_ptr + tile, value * mask, mask=inside)


@triton.jit(do_not_specialize=["R", "B", "per"])
def norm_vjp_kernel(
    vector_ptr,
    shift_ptr,
    bend_ptr,
    normal_ptr,
    inverse_ptr,
    gain_ptr,
    mask_ptr,
    addend_ptr,
    out_ptr,
    branch_out_ptr,
    R,
    B,
    per,
    D: tl.constexpr,
    VECTOR_STRIDE: tl.constexpr,
    BRANCH_OUT_STRIDE: tl.constexpr,
    GAIN: tl.constexpr,
    SHIFT: tl.constexpr,
    BEND: tl.constexpr,
    MASK: tl.constexpr,
    ADDEND: tl.constexpr,
    BRANCH: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`w = (g − mean(g) − n mean(g n)) / σ − bend · n / (σ² D)` with `g = γ ⊙ v + shift`.

    Written are `w + addend` and, with BRANCH, `m ⊙ w`.

    vector v: [R, D], rows VECTOR_STRIDE apart, R a multiple of B    shift, the gradient in n: [R, D]
    bend, the gradient in 1/σ: [R]    normal n: [B, D]    inverse 1/σ: [B], of dtype WIDE as bend
    gain γ: [D]    mask m: [B / per, D], each for per rows    addend, out: [R, D]
    branch_out: the same, rows BRANCH_OUT_STRIDE apart
    A row wider than BLOCK is read twice, by ROWS = 1.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < R
    normal_rows = rows % B
    inverse = tl.load(inverse_ptr + normal_rows, mask=present, other=0)
    bend = tl.zeros_like(inverse)
    if BEND:
        bend = tl.load(bend_ptr + rows, mask=present, other=0)
    if D <= BLOCK:
        columns = tl.arange(0, BLOCK)
        inside = present[:, None] & (columns < D)[None, :]
        g, normal = gradient_and_normal(
            vector_ptr,
            shift_ptr,
            normal_ptr,
            gain_ptr,
            rows,
            normal_rows,
            columns,
            inside,
            D,
            VECTOR_STRIDE,
            GAIN,
            SHIFT,
            WIDE,
        )
        # Before the sums, since no load passes their barriers.
        mask, addend = mask_and_addend(
            mask_ptr, addend_ptr, rows, normal_rows, columns, inside, per, D, MASK, ADDEND, WIDE
        )
        value = standardise_vjp(g, normal, inverse, bend, D)
        write_gradient(
            value,
            mask,
            addend,
            out_ptr,
            branch_out_ptr,
            rows,
            columns,
            inside,
            D,
            BRANCH_OUT_STRIDE,
            BRANCH,
        )
    else:
        total = tl.zeros([ROWS, BLOCK], dtype=WIDE)
        products = tl.zeros([ROWS, BLOCK], dtype=WIDE)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = present[:, None] & (columns < D)[None, :]
            g, normal = gradient_and_normal(
                vector_ptr,
                shift_ptr,
                normal_ptr,
                gain_ptr,
                rows,
                normal_rows,
                columns,
                inside,
                D,
                VECTOR_STRIDE,
                GAIN,
                SHIFT,
                WIDE,
            )
            total += g
            products += g * normal
        mean = tl.sum(total, axis=1) / D
        along = (tl.sum(products, axis=1) + bend * inverse) / D
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = present[:, None] & (columns < D)[None, :]
            g, normal = gradient_and_normal(
                vector_ptr,
                shift_ptr,
                normal_ptr,
                gain_ptr,
                rows,
                normal_rows,
                columns,
                inside,
                D,
                VECTOR_STRIDE,
                GAIN,
                SHIFT,
                WIDE,
            )
            mask, addend = mask_and_addend(
                mask_ptr, addend_ptr, rows, normal_rows, columns, inside, per, D, MASK, ADDEND, WIDE
            )
            write_gradient(
                inverse[:, None] * (g - mean[:, None] - normal * along[:, None]),
                mask,
                addend,
                out_ptr,
                branch_out_ptr,
                rows,
                columns,
                inside,
                D,
                BRANCH_OUT_STRIDE,
                BRANCH,
            )
