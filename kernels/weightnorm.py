"""Weight normalisation and what else a weight needs before a solve: the products' dtype, zeros behind it.

A weight is a matrix of rows, dense, each with a norm of its own. The formulas stand in
triton_deq/reference/weightnorm.py. Programs are dealt out to several weights in their order.
"""

import triton
import triton.language as tl


@triton.jit
def weightnorm_kernel(weights, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`normalise` for some rows of every weight.

    weights, CONSTANTS: for each the arguments of `normalise` after `program`, up to the compile-time ones,
    and those.    PROGRAMS: how many each gets
    """
    first = 0
    for k in tl.static_range(len(CONSTANTS)):
        program = tl.program_id(0) - first
        if program >= 0 and program < PROGRAMS[k]:
            normalise(program, *weights[k], *CONSTANTS[k])
        first += PROGRAMS[k]


@triton.jit
def tile_at(start, rows, M, N: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from start on, and the places of a tile of the weight `[M, N]` that are inside."""
    columns = start + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    return columns, rows[:, None] * N + columns[None, :], inside


@triton.jit
def normalise(
    program,
    v_ptr,
    g_ptr,
    out_ptr,
    M,
    M_OUT,
    N: tl.constexpr,
    N_OUT: tl.constexpr,
    NORMED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`g v / ‖v‖` of some rows, or v; zeros behind.

    v: [M, N]    g: [M]; with NORMED    out: [M_OUT, N_OUT]
    A row wider than BLOCK is read twice, by ROWS = 1.
    """
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = tl.full([ROWS], 1, dtype=WIDE)
    if N_OUT <= BLOCK:
        columns, places, inside = tile_at(0, rows, M, N, BLOCK)
        v = tl.load(v_ptr + places, mask=inside, other=0).to(WIDE)
        if NORMED:
            scale = scale_of(tl.sum(v * v, axis=1), g_ptr, rows, M, WIDE)
        write(v, scale, out_ptr, rows, columns, inside, M_OUT, N_OUT)
    else:
        if NORMED:
            squares = tl.zeros([ROWS, BLOCK], dtype=WIDE)
            for start in range(0, N, BLOCK):
                columns, places, inside = tile_at(start, rows, M, N, BLOCK)
                v = tl.load(v_ptr + places, mask=inside, other=0).to(WIDE)
                squares += v * v
            scale = scale_of(tl.sum(squares, axis=1), g_ptr, rows, M, WIDE)
        for start in range(0, N_OUT, BLOCK):
            columns, places, inside = tile_at(start, rows, M, N, BLOCK)
            v = tl.load(v_ptr + places, mask=inside, other=0).to(WIDE)
            write(v, scale, out_ptr, rows, columns, inside, M_OUT, N_OUT)


@triton.jit
def scale_of(square, g_ptr, rows, M, WIDE: tl.constexpr):
    """`g / ‖v‖` of each row."""
    g = tl.load(g_ptr + rows, mask=rows < M, other=0).to(WIDE)
    return g / tl.sqrt(square)


@triton.jit
def write(v, scale, out_ptr, rows, columns, inside, M_OUT, N_OUT: tl.constexpr):
    """`v ⊙ scale` inside, zeros elsewhere: there a scale is 0 / 0."""
    value = tl.where(inside, v * scale[:, None], 0)
    present = (rows < M_OUT)[:, None] & (columns < N_OUT)[None, :]
    tl.store(out_ptr + rows[:, None] * N_OUT + columns[None, :], value, mask=present)


@triton.jit
def weightnorm_vjp_kernel(weights, PROGRAMS: tl.constexpr, CONSTANTS: tl.constexpr):
    """`pull_back` for some rows of every weight; arguments as of `weightnorm_kernel`."""
    first = 0
    for k in tl.static_range(len(CONSTANTS)):
        program = tl.program_id(0) - first
        if program >= 0 and program < PROGRAMS[k]:
            pull_back(program, *weights[k], *CONSTANTS[k])
        first += PROGRAMS[k]


@triton.jit
def pull_back(
    program,
    v_ptr,
    g_ptr,
    vector_ptr,
    of_v_ptr,
    of_g_ptr,
    M,
    N: tl.constexpr,
    N_OUT: tl.constexpr,
    NORMED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the gradient w̄ in the value: `ḡ = ⟨w̄, v⟩ / ‖v‖` and `v̄ = g / ‖v‖ (w̄ − v ⟨w̄, v⟩ / ‖v‖²)`.

    v, of_v: [M, N]    g, of_g: [M]; with NORMED    vector: [≥ M, N_OUT]
    """
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    square = tl.full([ROWS], 1, dtype=WIDE)
    along = tl.zeros([ROWS], dtype=WIDE)
    scale = tl.full([ROWS], 1, dtype=WIDE)
    if N <= BLOCK:
        columns, places, inside = tile_at(0, rows, M, N, BLOCK)
        v = tl.load(v_ptr + places, mask=inside, other=0).to(WIDE)
        w = tl.load(vector_ptr + rows[:, None] * N_OUT + columns[None, :], mask=inside, other=0).to(WIDE)
        if NORMED:
            square, along = tl.sum(v * v, axis=1), tl.sum(v * w, axis=1)
            scale = scale_of(square, g_ptr, rows, M, WIDE)
        of_v = scale[:, None] * (w - v * (along / square)[:, None])
        tl.store(of_v_ptr + places, of_v, mask=inside)
    else:
        if NORMED:
            squares = tl.zeros([ROWS, BLOCK], dtype=WIDE)
            products = tl.zeros([ROWS, BLOCK], dtype=WIDE)
            for start in range(0, N, BLOCK):
                columns, places, inside = tile_at(start, rows, M, N, BLOCK)
                v = tl.load(v_ptr + places, mask=inside, other=0).to(WIDE)
                across = rows[:, None] * N_OUT + columns[None, :]
                w = tl.load(vector_ptr + across, mask=inside, other=0).to(WIDE)
                squares += v * v
                products += v * w
            square, along = tl.sum(squares, axis=1), tl.sum(products, axis=1)
            scale = scale_of(square, g_ptr, rows, M, WIDE)
        for start in range(0, N, BLOCK):
            columns, places, inside = tile_at(start, rows, M, N, BLOCK)
            v = tl.load(v_ptr + places, mask=inside, other=0).to(WIDE)
            w = tl.load(vector_ptr + rows[:, None] * N_OUT + columns[None, :], mask=inside, other=0).to(WIDE)
            of_v = scale[:, None] * (w - v * (along / square)[:, None])
            tl.store(of_v_ptr + places, of_v, mask=inside)
    if NORMED:
        tl.store(of_g_ptr + rows, along / tl.sqrt(square), mask=rows < M)
