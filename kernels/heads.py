"""Rows of one head: where they lie, how they are loaded and stored, and products of them.

The d columns of a row are held in one or two parts, of MAIN and REST of them, powers of 2: 70 as 64 + 16. So
rows are a tuple here, of a tile for each part.
    HEAD: (MAIN, REST, d, ALIGN); REST may be 0; all offsets and strides are multiples of ALIGN entries
    layout: (offset of the first entry, strides of sample, row and head)
"""

import triton
import triton.language as tl

from .products import dot


@triton.jit
def aligned(entries, HEAD: tl.constexpr):
    """The same number; the compiler sees that it is a multiple of ALIGN, and loads that much at a time."""
    return entries // HEAD[3] * HEAD[3]


@triton.jit
def at_head(ptr, layout, sample, head, HEAD: tl.constexpr):
    """Where one head of one sample begins."""
    offset = aligned(layout[0], HEAD) + head * aligned(layout[3], HEAD)
    return ptr + sample.to(tl.int64) * aligned(layout[1], HEAD) + offset


@triton.jit
def load_at(ptr, HEAD: tl.constexpr):
    """Rows that begin at `ptr` `[ROWS, 1]`, with zeros after their d columns."""
    columns = tl.arange(0, HEAD[0])
    if HEAD[0] <= HEAD[2]:
        main = tl.load(ptr + columns[None, :])
    else:
        main = tl.load(ptr + columns[None, :], mask=(columns < HEAD[2])[None, :], other=0)
    if HEAD[1] > 0:
        columns = HEAD[0] + tl.arange(0, HEAD[1])
        return (main, tl.load(ptr + columns[None, :], mask=(columns < HEAD[2])[None, :], other=0))
    else:
        return (main,)


@triton.jit
def load_rows(ptr, stride, rows, count, HEAD: tl.constexpr):
    """Rows of a head, of which there are `count`. In place of one that is not there comes the nearest.

    What is made of those has no weight, and loads without a condition take fewer registers.
    """
    rows = tl.minimum(tl.maximum(rows, 0), count - 1)
    # Made anew from the numbers each time: offsets that stay the same in a loop would fill the registers.
    begins = rows.to(tl.int64) * aligned(stride, HEAD)
    return load_at(ptr + begins[:, None], HEAD)


@triton.jit
def both_at(memory_ptr, memory_layout, ptr, layout, sample, head, M, HEAD: tl.constexpr):
    """A head's keys or values: (where those in memory begin, their stride, the same of the current ones).

    For the latter it is where row 0 would be if the M in memory lay before them.
    """
    remembered = at_head(memory_ptr, memory_layout, sample, head, HEAD)
    current = at_head(ptr, layout, sample, head, HEAD)
    stride = aligned(layout[2], HEAD)
    return remembered, memory_layout[2], current - tl.full((), M, tl.int64) * stride, layout[2]


@triton.jit
def load_keys(both, start, lanes, T, M, HEAD: tl.constexpr, MEMORY: tl.constexpr, PIPELINED: tl.constexpr):
    """A block of a head's M rows in memory and the T current ones after them; all of one kind.

    start: its first row; a whole number of blocks lies between it and M.
    PIPELINED: the caller's loop is, so that this one's rows are on their way while others are worked on.
    """
    # Only loads that are always made are pipelined. Triton 3.6.0 chooses no pointers for AMD.
    CHOSEN: tl.constexpr = PIPELINED and not tl.target_info.is_hip()
    if not MEMORY:
        return load_rows(both[2], both[3], start + lanes, M + T, HEAD)
    elif CHOSEN:
        if start < M:
            begin, stride, count = both[0], both[1], M
        else:
            begin, stride, count = both[2], both[3], M + T
        return load_rows(begin, stride, start + lanes, count, HEAD)
    else:
        if start < M:
            keys = load_rows(both[0], both[1], start + lanes, M, HEAD)
        else:
            keys = load_rows(both[2], both[3], start + lanes, M + T, HEAD)
        return keys


@triton.jit
def store_rows(ptr, stride, rows, count, values, HEAD: tl.constexpr):
    begins = (rows.to(tl.int64) * stride)[:, None]
    columns = tl.arange(0, HEAD[0])
    inside = (rows < count)[:, None] & (columns < HEAD[2])[None, :]
    tl.store(ptr + (begins + columns[None, :]), values[0], mask=inside)
    if HEAD[1] > 0:
        columns = HEAD[0] + tl.arange(0, HEAD[1])
        inside = (rows < count)[:, None] & (columns < HEAD[2])[None, :]
        tl.store(ptr + (begins + columns[None, :]), values[1], mask=inside)


@triton.jit
def store_sums(ptr, rows, HEAD: tl.constexpr):
    """The sum of all rows as one row at `ptr`."""
    columns = tl.arange(0, HEAD[0])
    tl.store(ptr + columns, tl.sum(rows[0], axis=0), mask=columns < HEAD[2])
    if HEAD[1] > 0:
        columns = HEAD[0] + tl.arange(0, HEAD[1])
        tl.store(ptr + columns, tl.sum(rows[1], axis=0), mask=columns < HEAD[2])


@triton.jit
def zero_rows(BLOCK: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr):
    main: tl.constexpr = HEAD[0]
    rest: tl.constexpr = HEAD[1]
    if rest > 0:
        return (tl.zeros([BLOCK, main], dtype=WIDE), tl.zeros([BLOCK, rest], dtype=WIDE))
    else:
        return (tl.zeros([BLOCK, main], dtype=WIDE),)


@triton.jit
def add(a, b):
    if len(a) == 2:
        return (a[0] + b[0], a[1] + b[1])
    else:
        return (a[0] + b[0],)


@triton.jit
def scaled(a, factor):
    if len(a) == 2:
        return (a[0] * factor, a[1] * factor)
    else:
        return (a[0] * factor,)


@triton.jit
def biased(rows, bias_ptr, head, HEAD: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """`q_i + b` as an operand of matrix products."""
    columns = tl.arange(0, HEAD[0])
    bias = tl.load(bias_ptr + head * HEAD[2] + columns, mask=columns < HEAD[2], other=0)
    main = (rows[0].to(WIDE) + bias.to(WIDE)[None, :]).to(OPERAND)
    if HEAD[1] > 0:
        columns = HEAD[0] + tl.arange(0, HEAD[1])
        bias = tl.load(bias_ptr + head * HEAD[2] + columns, mask=columns < HEAD[2], other=0)
        return (main, (rows[1].to(WIDE) + bias.to(WIDE)[None, :]).to(OPERAND))
    else:
        return (main,)


@triton.jit
def inner(a, b, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """`a bᵀ`: the inner product of each row of a with each of b."""
    total = tl.zeros([a[0].shape[0], b[0].shape[0]], dtype=WIDE)
    for part in tl.static_range(len(a)):
        total = dot(a[part], tl.trans(b[part]), total, TF32, OPERAND, WIDE)
    return total


@triton.jit
def mixed(weights, rows, totals, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """`totals + weights rows`."""
    main = dot(weights, rows[0], totals[0], TF32, OPERAND, WIDE)
    if len(rows) == 2:
        return (main, dot(weights, rows[1], totals[1], TF32, OPERAND, WIDE))
    else:
        return (main,)


@triton.jit
def row_sums(a, b, WIDE: tl.constexpr):
    """The inner product of each row of a with the same row of b."""
    total = tl.sum(a[0].to(WIDE) * b[0].to(WIDE), axis=1)
    if len(a) == 2:
        total += tl.sum(a[1].to(WIDE) * b[1].to(WIDE), axis=1)
    return total
