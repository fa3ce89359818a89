"""Transformer-XL's relative attention: the value, and the gradients of everything that it reads.

The formulas stand in triton_deq/reference/attention.py. Scores exist in tiles of some queries by some keys
and nowhere else. The relative shift happens on such a tile: its queries and keys are at no more than
BLOCK_T + BLOCK_K − 1 different distances, so the products with a window of that many rows of r are made, and
each entry takes the one of its own distance (`shift`); a gradient goes the other way (`unshift`).

What all kernels take:
    q, k, v, memory_keys, memory_values, vector: `[B, ·, H, d]`, the last dimension without gaps, with layouts
        (offset of the first entry, strides of sample, row and head)
    positions: `[≥ M + T, H, d]`, as if it had a sample as well
    content_bias, position_bias: `[H, d]`    out and the like: `[B, T, H, d]`, all of them contiguous
    sums: `[B, H, T]`, the logarithm of each query's Σ_j exp(S_ij)    seed: `[1]` int64
    window: the number of keys that a query may see, M + T for all of them
    HEAD: (MAIN, REST, d, ALIGN): d columns are held as parts of MAIN and REST, powers of 2 (70 as 64 + 16;
        REST may be 0); all offsets and strides are multiples of ALIGN entries
"""

import triton
import triton.language as tl

from .products import dot

# ---------------------------------------------------------------------------------- rows of a head, in parts


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
def load_keys(both, rows, limit, M, HEAD: tl.constexpr, MEMORY: tl.constexpr):
    """Of a head's M rows in memory and the current ones after them, all of one kind; those before `limit`."""
    if MEMORY:
        if limit <= M:
            keys = load_rows(both[0], both[1], rows, limit, HEAD)
        else:
            keys = load_rows(both[2], both[3], rows, limit, HEAD)
        return keys
    else:
        return load_rows(both[2], both[3], rows, limit, HEAD)


@triton.jit
def load_mixed(both, rows, T, M, HEAD: tl.constexpr, MEMORY: tl.constexpr):
    """Of a head's M rows in memory and the T current ones after them, from both."""
    current = load_rows(both[2], both[3], tl.maximum(rows, M), M + T, HEAD)
    if MEMORY:
        remembered = load_rows(both[0], both[1], rows, M, HEAD)
        if len(current) == 2:
            main = tl.where((rows < M)[:, None], remembered[0], current[0])
            return (main, tl.where((rows < M)[:, None], remembered[1], current[1]))
        else:
            return (tl.where((rows < M)[:, None], remembered[0], current[0]),)
    else:
        return current


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


# -------------------------------------------------------------------------------------------- tiles of scores


@triton.jit
def shift(products, columns, first):
    """Entry (i, n) is that of (i, columns[i, n] − first): `[BLOCK_T, W] -> [BLOCK_T, BLOCK]`.

    Columns of products are distances from `first`, those of the outcome keys; or the other way round.
    """
    # Never below `first`, but the compiler does not know, and so it keeps no table of the differences.
    return tl.gather(products, tl.maximum(columns, first) - first, 1)


@triton.jit
def unshift(tile, columns, first):
    """The transpose of `shift` as a map: `[BLOCK_T, BLOCK] -> [BLOCK_T, W]`, zero where nothing came from.

    columns: of the outcome's entries, what their column in `tile` stands for, which begins at `first`.
    """
    n = columns - first
    there = (n >= 0) & (n < tile.shape[1])
    return tl.where(there, tl.gather(tile, tl.where(there, n, 0), 1), 0)


@triton.jit
def masked(products, i, j, distance, T, limit, window, SCALE: tl.constexpr):
    """S of a tile from its products: −∞ where query i does not see key j, or there is none below `limit`."""
    seen = (distance >= 0) & (distance < window) & (i < T) & (j >= 0) & (j < limit)
    return tl.where(seen, products * SCALE, float("-inf"))


@triton.jit
def kept(seed_ptr, line, i, j, T, R, DROPOUT: tl.constexpr, WIDE: tl.constexpr):
    """The dropout mask K of a tile; line: b · H + h; j counts from the first key in memory, as everywhere."""
    if DROPOUT == 0:
        return tl.full((), 1.0, WIDE)
    else:
        entries = (line.to(tl.int64) * T + i) * R + j
        low = entries.to(tl.uint32)
        none = tl.zeros_like(low)
        word, _, _, _ = tl.philox(tl.load(seed_ptr), low, (entries >> 32).to(tl.uint32), none, none)
        number = (word >> 8).to(tl.float32) * 5.9604644775390625e-8
        return tl.where(number >= DROPOUT, 1.0, 0.0).to(WIDE) / (1 - DROPOUT)


@triton.jit
def seen_blocks(first, T, M, window, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The range of blocks of keys of which queries `first`, ... see some; those in memory come first."""
    j = tl.maximum(first + M - window + 1, 0)
    blocks = tl.cdiv(M, BLOCK_K)
    begin = tl.where(j < M, j // BLOCK_K, blocks + (j - M) // BLOCK_K)
    return begin, blocks + tl.cdiv(tl.minimum(first + BLOCK_T, T), BLOCK_K)


@triton.jit
def keys_of(block, T, M, BLOCK_K: tl.constexpr):
    """A block's first key and the end of its kind: of those in memory, M of them, or of the others."""
    blocks = tl.cdiv(M, BLOCK_K)
    start = block * BLOCK_K
    return tl.where(block < blocks, start, start - blocks * BLOCK_K + M), tl.where(block < blocks, M, M + T)


@triton.jit
def seeing_queries(first, T, M, window, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The range of queries that see some of the keys `first`, ..., from the start of a block."""
    begin = tl.maximum(first - M, 0) // BLOCK_T * BLOCK_T
    return begin, tl.minimum(first + BLOCK_K + window - 1 - M, T)


@triton.jit
def first_slopes(weights, mask, of_weights, delta):
    """`E = P (K g·v − Δ)`, the gradient of `⟨g, o⟩` in S of a tile.

    weights: P. mask: K. of_weights: `g_i·v_j`. delta: `Δ_i = g_i·o_i`, which is `Σ_j P_ij K_ij g_i·v_j`.
    """
    return weights * (of_weights * mask - delta[:, None])


@triton.jit
def second_slopes(weights, mask, of_weights, delta, tangent, of_tangents, mean, balance):
    """`F = P ((Ṡ − m) K g·v + K g·c − Ṡ Δ − Y)`, the derivative of E along that of S and of v.

    tangent: Ṡ. of_tangents: `g_i·c_j`, c being the derivative of v. mean: `m_i = Σ_j P Ṡ`. balance: Y, with
    which the sum of F over the keys is zero.
    """
    bent = (tangent - mean[:, None]) * (of_weights * mask) + of_tangents * mask - tangent * delta[:, None]
    return weights * (bent - balance[:, None])


@triton.jit
def tangent_scores(
    a, content, keys, b, r, i, j, nearest, M,
    SCALE: tl.constexpr, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Ṡ of queries i and keys j, the derivative of S along a in q and b in k, which is zero in memory."""
    products = shift(inner(a, r, TF32, OPERAND, WIDE), i[:, None] + M - j[None, :], nearest)
    products += inner(a, keys, TF32, OPERAND, WIDE)
    return SCALE * (products + tl.where((j >= M)[None, :], inner(content, b, TF32, OPERAND, WIDE), 0))


@triton.jit
def block_of(length, H, BLOCK: tl.constexpr):
    """This program's (first row, sample, head, sample · H + head)."""
    blocks = tl.cdiv(length, BLOCK)
    line = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks * BLOCK, line // H, line % H, line


# ------------------------------------------------------------------------------------------------ the kernels


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    memory_keys_ptr,
    memory_values_ptr,
    positions_ptr,
    content_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    out_ptr,
    sums_ptr,
    q_layout,
    k_layout,
    v_layout,
    memory_key_layout,
    memory_value_layout,
    position_layout,
    H,
    T,
    M,
    window,
    MEMORY: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """o and the sums of a block of queries of one head, by one pass over the keys (softmax on the way)."""
    WINDOW: tl.constexpr = 2 * max(BLOCK_T, BLOCK_K)
    first, sample, head, line = block_of(T, H, BLOCK_T)
    lanes, key_lanes, window_lanes = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, WINDOW)
    i = first + lanes
    q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
    content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
    position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
    positions_ptr = at_head(positions_ptr, position_layout, sample, head, HEAD)

    highest = tl.full([BLOCK_T], float("-inf"), dtype=WIDE)
    total = tl.zeros([BLOCK_T], dtype=WIDE)
    value = zero_rows(BLOCK_T, HEAD, WIDE)
    key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
    value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
    begin, end = seen_blocks(first, T, M, window, BLOCK_T, BLOCK_K)
    for block in range(begin, end):
        start, limit = keys_of(block, T, M, BLOCK_K)
        j = start + key_lanes
        nearest = first + M - start - (BLOCK_K - 1)
        r = load_rows(positions_ptr, position_layout[2], nearest + window_lanes, M + T, HEAD)
        distance = i[:, None] + M - j[None, :]
        products = shift(inner(position, r, TF32, OPERAND, WIDE), distance, nearest)
        keys = load_keys(key_source, j, limit, M, HEAD, MEMORY)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        score = masked(products, i[:, None], j[None, :], distance, T, limit, window, SCALE)
        raised = tl.maximum(highest, tl.max(score, axis=1))
        level = tl.where(raised == float("-inf"), 0, raised)  # nothing seen yet
        weights = tl.exp(score - level[:, None])
        faded = tl.exp(highest - level)
        total = total * faded + tl.sum(weights, axis=1)
        if DROPOUT > 0:
            weights *= kept(seed_ptr, line, i[:, None], j[None, :], T, M + T, DROPOUT, WIDE)
        values = load_keys(value_source, j, limit, M, HEAD, MEMORY)
        value = mixed(weights, values, scaled(value, faded[:, None]), TF32, OPERAND, WIDE)
        highest = raised

    total = tl.where(i < T, total, 1)
    value = scaled(value, (1 / total)[:, None])
    out_ptr += (sample.to(tl.int64) * T * H + head) * HEAD[2]
    store_rows(out_ptr, H * HEAD[2], i, T, value, HEAD)
    tl.store(sums_ptr + line.to(tl.int64) * T + i, highest + tl.log(total), mask=i < T)


@triton.jit
def attention_query_vjp_kernel(
    vector_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    memory_keys_ptr,
    memory_values_ptr,
    positions_ptr,
    content_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    out_ptr,
    sums_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    mean_ptr,
    balance_ptr,
    gradient_ptr,
    bias_gradients_ptr,
    vector_layout,
    q_layout,
    k_layout,
    v_layout,
    memory_key_layout,
    memory_value_layout,
    position_layout,
    B,
    H,
    T,
    M,
    window,
    MEMORY: tl.constexpr,
    BIASES: tl.constexpr,
    SECOND: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of `⟨vector, o⟩` in a block of queries of one head, and `Δ_i = vector_i·o_i` of each.

    With SECOND: the gradient of the derivative of o along (a, b, c) in (q, k, v), times vector.

    delta: [B, H, T]    gradient: [B, T, H, d]    a, b, c, mean, balance: as in `attention_jvp_kernel`
    bias_gradients: [2, B, blocks, H, d], with BIASES: the parts of those in b_c and b_p from this block
    """
    WINDOW: tl.constexpr = 2 * max(BLOCK_T, BLOCK_K)
    first, sample, head, line = block_of(T, H, BLOCK_T)
    lanes, key_lanes, window_lanes = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, WINDOW)
    i = first + lanes
    q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
    content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
    position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
    positions_ptr = at_head(positions_ptr, position_layout, sample, head, HEAD)
    vector_ptr = at_head(vector_ptr, vector_layout, sample, head, HEAD)
    vector = load_rows(vector_ptr, vector_layout[2], i, T, HEAD)
    offset = (sample.to(tl.int64) * T * H + head) * HEAD[2]
    value = load_rows(out_ptr + offset, H * HEAD[2], i, T, HEAD)
    delta = row_sums(vector, value, WIDE)
    tl.store(delta_ptr + line.to(tl.int64) * T + i, delta, mask=i < T)
    sums = tl.load(sums_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
    if SECOND:
        a = load_rows(a_ptr + offset, H * HEAD[2], i, T, HEAD)
        mean = tl.load(mean_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
        balance = tl.load(balance_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)

    by_content = zero_rows(BLOCK_T, HEAD, WIDE)
    by_position = zero_rows(BLOCK_T, HEAD, WIDE)
    key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
    value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
    begin, end = seen_blocks(first, T, M, window, BLOCK_T, BLOCK_K)
    for block in range(begin, end):
        start, limit = keys_of(block, T, M, BLOCK_K)
        j = start + key_lanes
        nearest = first + M - start - (BLOCK_K - 1)
        r = load_rows(positions_ptr, position_layout[2], nearest + window_lanes, M + T, HEAD)
        distance = i[:, None] + M - j[None, :]
        products = shift(inner(position, r, TF32, OPERAND, WIDE), distance, nearest)
        keys = load_keys(key_source, j, limit, M, HEAD, MEMORY)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        score = masked(products, i[:, None], j[None, :], distance, T, limit, window, SCALE)
        values = load_keys(value_source, j, limit, M, HEAD, MEMORY)
        of_weights = inner(vector, values, TF32, OPERAND, WIDE)
        weights = tl.exp(score - sums[:, None])
        mask = kept(seed_ptr, line, i[:, None], j[None, :], T, M + T, DROPOUT, WIDE)
        slopes = first_slopes(weights, mask, of_weights, delta)
        if SECOND:
            b = load_rows(b_ptr + offset, H * HEAD[2], j - M, T, HEAD)
            c = load_rows(c_ptr + offset, H * HEAD[2], j - M, T, HEAD)
            tangent = tangent_scores(a, content, keys, b, r, i, j, nearest, M, SCALE, TF32, OPERAND, WIDE)
            current = (j >= M)[None, :]
            by_content = mixed(tl.where(current, slopes, 0), b, by_content, TF32, OPERAND, WIDE)
            of_tangents = tl.where(current, inner(vector, c, TF32, OPERAND, WIDE), 0)
            slopes = second_slopes(weights, mask, of_weights, delta, tangent, of_tangents, mean, balance)
        by_content = mixed(slopes, keys, by_content, TF32, OPERAND, WIDE)
        reached = (i[:, None] + M) - (nearest + window_lanes)[None, :]
        slopes = unshift(slopes.to(OPERAND), reached, start)
        if BIASES:
            by_position = mixed(slopes, r, by_position, TF32, OPERAND, WIDE)
        else:
            by_content = mixed(slopes, r, by_content, TF32, OPERAND, WIDE)

    gradient = scaled(by_content, SCALE)
    if BIASES:
        blocks = tl.cdiv(T, BLOCK_T)
        part = ((sample.to(tl.int64) * blocks + first // BLOCK_T) * H + head) * HEAD[2]
        rest = tl.full((), B, tl.int64) * blocks * H * HEAD[2]
        store_sums(bias_gradients_ptr + part, gradient, HEAD)
        by_position = scaled(by_position, SCALE)
        store_sums(bias_gradients_ptr + rest + part, by_position, HEAD)
        gradient = add(gradient, by_position)
    store_rows(gradient_ptr + offset, H * HEAD[2], i, T, gradient, HEAD)


@triton.jit
def attention_key_vjp_kernel(
    vector_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    content_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    sums_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    mean_ptr,
    balance_ptr,
    key_gradient_ptr,
    value_gradient_ptr,
    vector_layout,
    q_layout,
    key_layout,
    value_layout,
    position_layout,
    H,
    T,
    M,
    count,
    before,
    window,
    SECOND: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of `⟨vector, o⟩` in a block of keys and values of one head.

    keys, values and both gradients: [B, count, H, d], the current ones with before = M, those in memory with
    before = 0: how many keys are on the left of them    delta: as `attention_query_vjp_kernel` leaves it
    SECOND, a, b, c, mean, balance: as there
    """
    WINDOW: tl.constexpr = 2 * max(BLOCK_T, BLOCK_K)
    row, sample, head, line = block_of(count, H, BLOCK_K)
    lanes, key_lanes, window_lanes = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, WINDOW)
    rows = row + key_lanes
    start, j = row + before, rows + before
    keys_ptr = at_head(keys_ptr, key_layout, sample, head, HEAD)
    values_ptr = at_head(values_ptr, value_layout, sample, head, HEAD)
    keys = load_rows(keys_ptr, key_layout[2], rows, count, HEAD)
    values = load_rows(values_ptr, value_layout[2], rows, count, HEAD)
    q_ptr = at_head(q_ptr, q_layout, sample, head, HEAD)
    vector_ptr = at_head(vector_ptr, vector_layout, sample, head, HEAD)
    positions_ptr = at_head(positions_ptr, position_layout, sample, head, HEAD)
    sums_ptr += line.to(tl.int64) * T
    delta_ptr += line.to(tl.int64) * T
    if SECOND:
        offset = (sample.to(tl.int64) * T * H + head) * HEAD[2]
        a_ptr += offset
        b = load_rows(b_ptr + offset, H * HEAD[2], j - M, T, HEAD)
        c = load_rows(c_ptr + offset, H * HEAD[2], j - M, T, HEAD)
        mean_ptr += line.to(tl.int64) * T
        balance_ptr += line.to(tl.int64) * T

    of_keys = zero_rows(BLOCK_K, HEAD, WIDE)
    of_values = zero_rows(BLOCK_K, HEAD, WIDE)
    begin, end = seeing_queries(start, T, M, window, BLOCK_T, BLOCK_K)
    for first in range(begin, end, BLOCK_T):
        i = first + lanes
        q = load_rows(q_ptr, q_layout[2], i, T, HEAD)
        content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
        position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
        nearest = first + M - start - (BLOCK_K - 1)
        r = load_rows(positions_ptr, position_layout[2], nearest + window_lanes, M + T, HEAD)
        distance = i[:, None] + M - j[None, :]
        products = shift(inner(position, r, TF32, OPERAND, WIDE), distance, nearest)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        score = masked(products, i[:, None], j[None, :], distance, T, before + count, window, SCALE)
        vector = load_rows(vector_ptr, vector_layout[2], i, T, HEAD)
        of_weights = inner(vector, values, TF32, OPERAND, WIDE)
        sums = tl.load(sums_ptr + i, mask=i < T, other=0)
        delta = tl.load(delta_ptr + i, mask=i < T, other=0)
        weights = tl.exp(score - sums[:, None])
        mask = kept(seed_ptr, line, i[:, None], j[None, :], T, M + T, DROPOUT, WIDE)
        slopes = first_slopes(weights, mask, of_weights, delta)
        if SECOND:
            a = load_rows(a_ptr, H * HEAD[2], i, T, HEAD)
            mean = tl.load(mean_ptr + i, mask=i < T, other=0)
            balance = tl.load(balance_ptr + i, mask=i < T, other=0)
            tangent = tangent_scores(a, content, keys, b, r, i, j, nearest, M, SCALE, TF32, OPERAND, WIDE)
            of_keys = mixed(tl.trans(slopes.to(OPERAND)), a, of_keys, TF32, OPERAND, WIDE)
            of_tangents = tl.where((j >= M)[None, :], inner(vector, c, TF32, OPERAND, WIDE), 0)
            slopes = second_slopes(weights, mask, of_weights, delta, tangent, of_tangents, mean, balance)
            weights *= tangent - mean[:, None]
        of_values = mixed(tl.trans((weights * mask).to(OPERAND)), vector, of_values, TF32, OPERAND, WIDE)
        of_keys = mixed(tl.trans(slopes.to(OPERAND)), content, of_keys, TF32, OPERAND, WIDE)

    offset = (sample.to(tl.int64) * count * H + head) * HEAD[2]
    store_rows(key_gradient_ptr + offset, H * HEAD[2], rows, count, scaled(of_keys, SCALE), HEAD)
    store_rows(value_gradient_ptr + offset, H * HEAD[2], rows, count, of_values, HEAD)


@triton.jit
def attention_position_vjp_kernel(
    vector_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    memory_keys_ptr,
    memory_values_ptr,
    positions_ptr,
    content_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    sums_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    mean_ptr,
    balance_ptr,
    gradients_ptr,
    vector_layout,
    q_layout,
    k_layout,
    v_layout,
    memory_key_layout,
    memory_value_layout,
    position_layout,
    B,
    H,
    T,
    M,
    window,
    parts,
    MEMORY: tl.constexpr,
    SECOND: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of `⟨vector, o⟩` in a block of positions of one head, from every parts-th sample.

    Tiles are queries by distances here: the keys lie along their diagonals and are the ones to be shifted.

    gradients: [parts, M + T, H, d], to be added up    delta: as `attention_query_vjp_kernel` leaves it
    SECOND, a, b, c, mean, balance: as there
    """
    WINDOW: tl.constexpr = 2 * max(BLOCK_T, BLOCK_N)
    closest, part, head, line = block_of(M + T, H, BLOCK_N)
    lanes, distance_lanes, window_lanes = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, WINDOW)
    distance = closest + distance_lanes
    positions_ptr = at_head(positions_ptr, position_layout, part, head, HEAD)
    r = load_rows(positions_ptr, position_layout[2], distance, M + T, HEAD)

    total = zero_rows(BLOCK_N, HEAD, WIDE)
    begin = tl.maximum(closest - M, 0) // BLOCK_T * BLOCK_T  # those before have no key so far away
    end = tl.where(closest < window, T, 0)
    for sample_number in range(part, B, parts):
        sample = tl.full((), sample_number, tl.int32)
        line = sample * H + head
        offset = (sample.to(tl.int64) * T * H + head) * HEAD[2]
        vector_head = at_head(vector_ptr, vector_layout, sample, head, HEAD)
        key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
        value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
        for first in range(begin, end, BLOCK_T):
            i = first + lanes
            q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
            content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
            position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
            leftmost = first + M - closest - (BLOCK_N - 1)
            keys = load_mixed(key_source, leftmost + window_lanes, T, M, HEAD, MEMORY)
            j = i[:, None] + M - distance[None, :]
            products = shift(inner(content, keys, TF32, OPERAND, WIDE), j, leftmost)
            products += inner(position, r, TF32, OPERAND, WIDE)
            score = masked(products, i[:, None], j, distance[None, :], T, M + T, window, SCALE)
            vector = load_rows(vector_head, vector_layout[2], i, T, HEAD)
            values = load_mixed(value_source, leftmost + window_lanes, T, M, HEAD, MEMORY)
            of_weights = shift(inner(vector, values, TF32, OPERAND, WIDE), j, leftmost)
            sums = tl.load(sums_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
            delta = tl.load(delta_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
            weights = tl.exp(score - sums[:, None])
            mask = kept(seed_ptr, line, i[:, None], j, T, M + T, DROPOUT, WIDE)
            slopes = first_slopes(weights, mask, of_weights, delta)
            if SECOND:
                a = load_rows(a_ptr + offset, H * HEAD[2], i, T, HEAD)
                b = load_rows(b_ptr + offset, H * HEAD[2], leftmost + window_lanes - M, T, HEAD)
                c = load_rows(c_ptr + offset, H * HEAD[2], leftmost + window_lanes - M, T, HEAD)
                mean = tl.load(mean_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
                balance = tl.load(balance_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
                tangent = inner(a, r, TF32, OPERAND, WIDE)
                tangent += shift(inner(a, keys, TF32, OPERAND, WIDE), j, leftmost)
                of_b = shift(inner(content, b, TF32, OPERAND, WIDE), j, leftmost)
                of_c = shift(inner(vector, c, TF32, OPERAND, WIDE), j, leftmost)
                tangent = SCALE * (tangent + tl.where(j >= M, of_b, 0))
                total = mixed(tl.trans(slopes.to(OPERAND)), a, total, TF32, OPERAND, WIDE)
                slopes = second_slopes(
                    weights, mask, of_weights, delta, tangent, tl.where(j >= M, of_c, 0), mean, balance
                )
            total = mixed(tl.trans(slopes.to(OPERAND)), position, total, TF32, OPERAND, WIDE)

    gradients_ptr += (part.to(tl.int64) * (M + T) * H + head) * HEAD[2]
    store_rows(gradients_ptr, H * HEAD[2], distance, M + T, scaled(total, SCALE), HEAD)


@triton.jit
def attention_jvp_kernel(
    vector_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    memory_keys_ptr,
    memory_values_ptr,
    positions_ptr,
    content_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    out_ptr,
    sums_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    derivative_ptr,
    mean_ptr,
    balance_ptr,
    vector_layout,
    q_layout,
    k_layout,
    v_layout,
    memory_key_layout,
    memory_value_layout,
    position_layout,
    H,
    T,
    M,
    window,
    MEMORY: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The derivative ȯ of o along (a, b, c) in (q, k, v), and two sums that gradients of `⟨vector, ȯ⟩` need.

    `ȯ_i = Σ_j K_ij P_ij ((Ṡ_ij − m_i) v_j + c_j)` with `m_i = Σ_j P_ij Ṡ_ij`.

    a, b, c, derivative: [B, T, H, d]    mean m, balance Y = vector·ȯ − m vector·o: [B, H, T]
    """
    WINDOW: tl.constexpr = 2 * max(BLOCK_T, BLOCK_K)
    first, sample, head, line = block_of(T, H, BLOCK_T)
    lanes, key_lanes, window_lanes = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, WINDOW)
    i = first + lanes
    q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
    content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
    position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
    positions_ptr = at_head(positions_ptr, position_layout, sample, head, HEAD)
    offset = (sample.to(tl.int64) * T * H + head) * HEAD[2]
    a = load_rows(a_ptr + offset, H * HEAD[2], i, T, HEAD)
    sums = tl.load(sums_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)

    mean = tl.zeros([BLOCK_T], dtype=WIDE)
    derivative = zero_rows(BLOCK_T, HEAD, WIDE)
    key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
    value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
    begin, end = seen_blocks(first, T, M, window, BLOCK_T, BLOCK_K)
    for block in range(begin, end):
        start, limit = keys_of(block, T, M, BLOCK_K)
        j = start + key_lanes
        nearest = first + M - start - (BLOCK_K - 1)
        r = load_rows(positions_ptr, position_layout[2], nearest + window_lanes, M + T, HEAD)
        distance = i[:, None] + M - j[None, :]
        products = shift(inner(position, r, TF32, OPERAND, WIDE), distance, nearest)
        keys = load_keys(key_source, j, limit, M, HEAD, MEMORY)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        score = masked(products, i[:, None], j[None, :], distance, T, limit, window, SCALE)
        weights = tl.exp(score - sums[:, None])
        mask = kept(seed_ptr, line, i[:, None], j[None, :], T, M + T, DROPOUT, WIDE)
        b = load_rows(b_ptr + offset, H * HEAD[2], j - M, T, HEAD)
        tangent = tangent_scores(a, content, keys, b, r, i, j, nearest, M, SCALE, TF32, OPERAND, WIDE)
        moved = weights * tangent
        mean += tl.sum(moved, axis=1)
        values = load_keys(value_source, j, limit, M, HEAD, MEMORY)
        derivative = mixed(moved * mask, values, derivative, TF32, OPERAND, WIDE)
        c = load_rows(c_ptr + offset, H * HEAD[2], j - M, T, HEAD)
        weights = tl.where((j >= M)[None, :], weights * mask, 0)
        derivative = mixed(weights, c, derivative, TF32, OPERAND, WIDE)

    value = load_rows(out_ptr + offset, H * HEAD[2], i, T, HEAD)
    vector = load_rows(at_head(vector_ptr, vector_layout, sample, head, HEAD), vector_layout[2], i, T, HEAD)
    if HEAD[1] > 0:
        derivative = (
            derivative[0] - mean[:, None] * value[0].to(WIDE),
            derivative[1] - mean[:, None] * value[1].to(WIDE),
        )
    else:
        derivative = (derivative[0] - mean[:, None] * value[0].to(WIDE),)
    balance = row_sums(vector, derivative, WIDE) - mean * row_sums(vector, value, WIDE)
    store_rows(derivative_ptr + offset, H * HEAD[2], i, T, derivative, HEAD)
    tl.store(mean_ptr + line.to(tl.int64) * T + i, mean, mask=i < T)
    tl.store(balance_ptr + line.to(tl.int64) * T + i, balance, mask=i < T)
