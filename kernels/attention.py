"""Transformer-XL's relative attention: the value, and the gradients of everything that it reads.

The formulas stand in triton_deq/reference/attention.py. Scores exist in tiles of some queries by some keys
and nowhere else, BLOCK queries by BLOCK keys. The relative shift happens on such a tile. Its entry (a, c) is
at the distance `base + a − c`, whose row of r is in one of two blocks: the near one, that ends before `base`,
or the far one, that begins there. Take the products with the near one where w > a and with the far one
elsewhere: then entry (a, w) is what (a, (a − w) mod BLOCK) needs. So each row is read backwards and turned by
its number (`turned`), which is its own inverse: gradients go the same way. At the next block of keys what was
near is far.

What all kernels take:
    q, k, v, memory_keys, memory_values, vector: `[B, ·, H, d]`, the last dimension without gaps, with layouts
        (offset of the first entry, strides of sample, row and head)
    positions: `[≥ M + T, H, d]`, as if it had a sample as well
    content_bias, position_bias: `[H, d]`    out and the like: `[B, T, H, d]`, all of them contiguous
    sums: `[B, H, T]`, the logarithm of each query's Σ_j exp(S_ij)    seed: `[1]` int64
    window: the number of keys that a query may see, M + T for all of them
    HEAD: how the d columns are held, as in heads.py
"""

import triton
import triton.language as tl

from .heads import (
    add,
    at_head,
    biased,
    both_at,
    inner,
    load_keys,
    load_rows,
    mixed,
    row_sums,
    scaled,
    store_rows,
    store_sums,
    zero_rows,
)
from .primitives import spread, words

# -------------------------------------------------------------------------------------------- tiles of scores


@triton.jit
def turned(tile):
    """Entry (a, c) is that of (a, (a − c) mod BLOCK): each row backwards, turned by its number."""
    a, c = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    return tl.gather(tile, (a[:, None] - c[None, :]) & (tile.shape[1] - 1), 1)


@triton.jit
def nearer(BLOCK: tl.constexpr):
    """Where the entry (a, w) of a tile to be turned comes from the near block: w > a."""
    lanes = tl.arange(0, BLOCK)
    return lanes[None, :] > lanes[:, None]


@triton.jit
def shifted(rows, near, far, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """A tile of products from those with both blocks of what it is shifted along."""
    return turned(chosen(rows, near, far, TF32, OPERAND, WIDE))


@triton.jit
def chosen(rows, near, far, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr):
    """What `shifted` turns.

    The next tile needs the products with one of the two again. To make them anew takes fewer registers than
    to keep them, and no more instructions.
    """
    products = inner(rows, near, TF32, OPERAND, WIDE)
    others = inner(rows, far, TF32, OPERAND, WIDE)
    return tl.where(nearer(products.shape[0]), products, others)


@triton.jit
def reach(i, T, M, window):
    """How many distances query i sees: the window, as far as there are keys; none behind the last query."""
    return tl.where(i < T, tl.minimum(window, i + M + 1), 0)


@triton.jit
def masked(products, distance, reach):
    """The products where a query sees the key, elsewhere −∞."""
    seen = distance.to(tl.uint32) < reach.to(tl.uint32)[:, None]  # and so not negative
    return tl.where(seen, products, float("-inf"))


@triton.jit
def powers(products, level, SCALE: tl.constexpr):
    """`exp(SCALE products − level)`, of base 2 because that is what the hardware has."""
    return tl.exp2(products * (SCALE * 1.4426950408889634) - (level * 1.4426950408889634)[:, None])


@triton.jit
def kept(seed_ptr, line, first, start, M, DROPOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The dropout mask K of a tile: queries `first`, ... by keys `start`, ...; line: b · H + h.

    Each line is a stream of `words`, its keys counted from M. Both numbers are multiples of BLOCK then.
    """
    if DROPOUT == 0:
        return tl.full((), 1.0, WIDE)
    else:
        pairs = tl.arange(0, BLOCK // 2)
        w0, w1, w2, w3 = words(tl.load(seed_ptr), line, first // 2 + pairs, (start - M) // 2 + pairs)
        number = (spread(w0, w1, w2, w3) >> 8).to(tl.int32)
        least = tl.cast(-(-(DROPOUT * 16777216.0) // 1), tl.int32)
        return tl.where(number >= least, 1 / (1 - DROPOUT), 0.0).to(WIDE)


@triton.jit
def seen_keys(first, T, M, window, BLOCK: tl.constexpr):
    """The range of keys of which queries `first`, ... see some, from the start of a block.

    A block ends at M, so that each is in memory or is not; the first one may begin before key 0.
    """
    before = tl.cdiv(M, BLOCK) * BLOCK - M
    begin = (tl.maximum(first + M - window + 1, 0) + before) // BLOCK * BLOCK - before
    return begin, M + tl.minimum(first + BLOCK, T)


@triton.jit
def seeing_queries(first, T, M, window, BLOCK: tl.constexpr):
    """The range of queries that see some of the keys `first`, ..., from the start of a block."""
    return tl.maximum(first - M, 0) // BLOCK * BLOCK, tl.minimum(first + BLOCK + window - 1 - M, T)


@triton.jit
def first_slopes(weights, of_weights, delta):
    """`E = P (K g·v − Δ)`, the gradient of `⟨g, o⟩` in S of a tile.

    weights: P. of_weights: `K_ij g_i·v_j`. delta: `Δ_i = g_i·o_i`, which is `Σ_j P_ij K_ij g_i·v_j`.
    """
    return weights * (of_weights - delta[:, None])


@triton.jit
def second_slopes(weights, of_weights, delta, tangent, of_tangents, mean, balance):
    """`F = P ((Ṡ − m) K g·v + K g·c − Ṡ Δ − Y)`, the derivative of E along that of S and of v.

    tangent: Ṡ. of_tangents: `K_ij g_i·c_j`, c being the derivative of v. mean: `m_i = Σ_j P Ṡ`. balance: Y,
    with which the sum of F over the keys is zero.
    """
    bent = (tangent - mean[:, None]) * of_weights + of_tangents - tangent * delta[:, None]
    return weights * (bent - balance[:, None])


@triton.jit
def tangent_scores(
    a, content, keys, b, near, far, current,
    SCALE: tl.constexpr, TF32: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Ṡ of a tile, the derivative of S along a in q and b in k. near, far: rows of r.

    current: whether the keys are, and not in memory, where b is zero.
    """
    tangent = shifted(a, near, far, TF32, OPERAND, WIDE) + inner(a, keys, TF32, OPERAND, WIDE)
    return SCALE * (tangent + tl.where(current, inner(content, b, TF32, OPERAND, WIDE), 0))


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
    BLOCK: tl.constexpr,
):
    """o and the sums of a block of queries of one head, by one pass over the keys (softmax on the way)."""
    first, sample, head, line = block_of(T, H, BLOCK)
    lanes = tl.arange(0, BLOCK)
    i = first + lanes
    q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
    content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
    position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
    positions_ptr = at_head(positions_ptr, position_layout, sample, head, HEAD)

    highest = tl.full([BLOCK], float("-inf"), dtype=WIDE)
    total = tl.zeros([BLOCK], dtype=WIDE)
    value = zero_rows(BLOCK, HEAD, WIDE)
    key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
    value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
    reached = reach(i, T, M, window)
    begin, end = seen_keys(first, T, M, window, BLOCK)
    for start in range(begin, end, BLOCK):
        base = first + M - start
        near = load_rows(positions_ptr, position_layout[2], base - BLOCK + lanes, M + T, HEAD)
        far = load_rows(positions_ptr, position_layout[2], base + lanes, M + T, HEAD)
        products = shifted(position, near, far, TF32, OPERAND, WIDE)
        keys = load_keys(key_source, start, lanes, T, M, HEAD, MEMORY, True)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        products = masked(products, base + lanes[:, None] - lanes[None, :], reached)
        raised = tl.maximum(highest, SCALE * tl.max(products, axis=1))
        level = tl.where(raised == float("-inf"), 0, raised)  # nothing seen yet
        weights = powers(products, level, SCALE)
        faded = tl.exp2((highest - level) * 1.4426950408889634)
        total = total * faded + tl.sum(weights, axis=1)
        if DROPOUT > 0:
            weights *= kept(seed_ptr, line, first, start, M, DROPOUT, WIDE, BLOCK)
        values = load_keys(value_source, start, lanes, T, M, HEAD, MEMORY, True)
        value = mixed(weights, values, scaled(value, faded[:, None]), TF32, OPERAND, WIDE)
        highest = raised

    total = tl.where(i < T, total, 1)
    value = scaled(value, (1 / total)[:, None])
    out_ptr += (sample.to(tl.int64) * T * H + head) * HEAD[2]
    store_rows(out_ptr, H * HEAD[2], i, T, value, HEAD)
    tl.store(sums_ptr + line.to(tl.int64) * T + i, highest + tl.log(total), mask=i < T)


@triton.jit(do_not_specialize=["B"])
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
    gradients_ptr,
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
    BLOCK: tl.constexpr,
):
    """The gradient of `⟨vector, o⟩` in a block of queries of one head, and `Δ_i = vector_i·o_i` of each.

    With SECOND: the gradient of the derivative of o along (a, b, c) in (q, k, v), times vector.

    delta: [B, H, T]    gradients: [B, T, 3, H, d], of q, k and v; this kernel writes the first
    a, b, c, mean, balance: as in `attention_jvp_kernel`
    bias_gradients: [2, B, blocks, H, d], with BIASES: the parts of those in b_c and b_p from this block
    """
    first, sample, head, line = block_of(T, H, BLOCK)
    lanes = tl.arange(0, BLOCK)
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

    by_content = zero_rows(BLOCK, HEAD, WIDE)
    by_position = zero_rows(BLOCK, HEAD, WIDE)
    key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
    value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
    NARROW: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16  # else not pipelined
    reached = reach(i, T, M, window)
    begin, end = seen_keys(first, T, M, window, BLOCK)
    for start in range(begin, end, BLOCK):
        base = first + M - start
        near = load_rows(positions_ptr, position_layout[2], base - BLOCK + lanes, M + T, HEAD)
        far = load_rows(positions_ptr, position_layout[2], base + lanes, M + T, HEAD)
        products = shifted(position, near, far, TF32, OPERAND, WIDE)
        keys = load_keys(key_source, start, lanes, T, M, HEAD, MEMORY, NARROW)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        products = masked(products, base + lanes[:, None] - lanes[None, :], reached)
        weights = powers(products, sums, SCALE)
        values = load_keys(value_source, start, lanes, T, M, HEAD, MEMORY, NARROW)
        mask = kept(seed_ptr, line, first, start, M, DROPOUT, WIDE, BLOCK)
        of_weights = inner(vector, values, TF32, OPERAND, WIDE) * mask
        slopes = first_slopes(weights, of_weights, delta)
        if SECOND:
            b = load_rows(b_ptr + offset, H * HEAD[2], start - M + lanes, T, HEAD)
            c = load_rows(c_ptr + offset, H * HEAD[2], start - M + lanes, T, HEAD)
            current = start >= M
            tangent = tangent_scores(a, content, keys, b, near, far, current, SCALE, TF32, OPERAND, WIDE)
            by_content = mixed(tl.where(current, slopes, 0), b, by_content, TF32, OPERAND, WIDE)
            of_tangents = tl.where(current, inner(vector, c, TF32, OPERAND, WIDE) * mask, 0)
            slopes = second_slopes(weights, of_weights, delta, tangent, of_tangents, mean, balance)
        by_content = mixed(slopes, keys, by_content, TF32, OPERAND, WIDE)
        slopes = turned(slopes.to(OPERAND))
        of_near, of_far = tl.where(nearer(BLOCK), slopes, 0), tl.where(nearer(BLOCK), 0, slopes)
        if BIASES:
            by_position = mixed(of_near, near, by_position, TF32, OPERAND, WIDE)
            by_position = mixed(of_far, far, by_position, TF32, OPERAND, WIDE)
        else:
            by_content = mixed(of_near, near, by_content, TF32, OPERAND, WIDE)
            by_content = mixed(of_far, far, by_content, TF32, OPERAND, WIDE)

    gradient = scaled(by_content, SCALE)
    by_position = scaled(by_position, SCALE)
    if BIASES:
        blocks = tl.cdiv(T, BLOCK)
        part = ((sample.to(tl.int64) * blocks + first // BLOCK) * H + head) * HEAD[2]
        rest = tl.full((), B, tl.int64) * blocks * H * HEAD[2]
        store_sums(bias_gradients_ptr + part, gradient, HEAD)
        store_sums(bias_gradients_ptr + rest + part, by_position, HEAD)
    stride = 3 * H * HEAD[2]
    gradients_ptr += sample.to(tl.int64) * T * stride + head * HEAD[2]
    store_rows(gradients_ptr, stride, i, T, add(gradient, by_position), HEAD)


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
    gradients_ptr,
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
    lead,
    window,
    places,
    SECOND: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of `⟨vector, o⟩` in a block of keys and values of one head.

    keys, values: [B, count, H, d], the current ones with before = M, those in memory with before = 0, which
        counts the keys on the left of them
    lead: how many rows before the first one the first block begins, so that one ends at M
    gradients: [B, count, places, H, d], of keys and values in the last two places
    delta: as `attention_query_vjp_kernel` leaves it
    SECOND, a, b, c, mean, balance: as there
    """
    row, sample, head, line = block_of(lead + count, H, BLOCK)
    lanes = tl.arange(0, BLOCK)
    rows = row - lead + lanes
    start = row - lead + before
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
        b = load_rows(b_ptr + offset, H * HEAD[2], start - M + lanes, T, HEAD)
        c = load_rows(c_ptr + offset, H * HEAD[2], start - M + lanes, T, HEAD)
        mean_ptr += line.to(tl.int64) * T
        balance_ptr += line.to(tl.int64) * T

    of_keys = zero_rows(BLOCK, HEAD, WIDE)
    of_values = zero_rows(BLOCK, HEAD, WIDE)
    begin, end = seeing_queries(start, T, M, window, BLOCK)
    for first in range(begin, end, BLOCK):
        i = first + lanes
        q = load_rows(q_ptr, q_layout[2], i, T, HEAD)
        content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
        position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
        base = first + M - start
        near = load_rows(positions_ptr, position_layout[2], base - BLOCK + lanes, M + T, HEAD)
        far = load_rows(positions_ptr, position_layout[2], base + lanes, M + T, HEAD)
        products = shifted(position, near, far, TF32, OPERAND, WIDE)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        reached = reach(i, T, M, window)
        products = masked(products, base + lanes[:, None] - lanes[None, :], reached)
        sums = tl.load(sums_ptr + i, mask=i < T, other=0)
        weights = powers(products, sums, SCALE)
        vector = load_rows(vector_ptr, vector_layout[2], i, T, HEAD)
        mask = kept(seed_ptr, line, first, start, M, DROPOUT, WIDE, BLOCK)
        of_weights = inner(vector, values, TF32, OPERAND, WIDE) * mask
        delta = tl.load(delta_ptr + i, mask=i < T, other=0)
        slopes = first_slopes(weights, of_weights, delta)
        if SECOND:
            a = load_rows(a_ptr, H * HEAD[2], i, T, HEAD)
            mean = tl.load(mean_ptr + i, mask=i < T, other=0)
            balance = tl.load(balance_ptr + i, mask=i < T, other=0)
            current = start >= M
            tangent = tangent_scores(a, content, keys, b, near, far, current, SCALE, TF32, OPERAND, WIDE)
            of_keys = mixed(tl.trans(slopes.to(OPERAND)), a, of_keys, TF32, OPERAND, WIDE)
            of_tangents = tl.where(current, inner(vector, c, TF32, OPERAND, WIDE) * mask, 0)
            slopes = second_slopes(weights, of_weights, delta, tangent, of_tangents, mean, balance)
            weights *= tangent - mean[:, None]
        of_values = mixed(tl.trans((weights * mask).to(OPERAND)), vector, of_values, TF32, OPERAND, WIDE)
        of_keys = mixed(tl.trans(slopes.to(OPERAND)), content, of_keys, TF32, OPERAND, WIDE)

    stride = places * H * HEAD[2]
    rows = tl.where(rows < 0, count, rows)  # those before the first are not stored either
    gradients_ptr += sample.to(tl.int64) * count * stride + ((places - 2) * H + head) * HEAD[2]
    store_rows(gradients_ptr, stride, rows, count, scaled(of_keys, SCALE), HEAD)
    store_rows(gradients_ptr + H * HEAD[2], stride, rows, count, of_values, HEAD)


@triton.jit(do_not_specialize=["B"])
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
    BLOCK: tl.constexpr,
):
    """The gradient of `⟨vector, o⟩` in a block of positions of one head, from every parts-th sample.

    Tiles are queries by distances here: the keys lie along their diagonals and are the ones to be shifted.

    gradients: [parts, M + T, H, d], to be added up    delta: as `attention_query_vjp_kernel` leaves it
    SECOND, a, b, c, mean, balance: as there
    """
    closest, part, head, line = block_of(M + T, H, BLOCK)
    lanes = tl.arange(0, BLOCK)
    distance = closest + lanes
    positions_ptr = at_head(positions_ptr, position_layout, part, head, HEAD)
    r = load_rows(positions_ptr, position_layout[2], distance, M + T, HEAD)

    total = zero_rows(BLOCK, HEAD, WIDE)
    begin = tl.maximum(closest - M, 0) // BLOCK * BLOCK  # those before have no key so far away
    end = tl.where(closest < window, T, 0)
    for sample_number in range(part, B, parts):
        sample = tl.full((), sample_number, tl.int32)
        line = sample * H + head
        offset = (sample.to(tl.int64) * T * H + head) * HEAD[2]
        vector_head = at_head(vector_ptr, vector_layout, sample, head, HEAD)
        NARROW: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16  # else not pipelined
        key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
        value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
        for first in range(begin, end, BLOCK):
            i = first + lanes
            q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
            content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
            position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
            base = first + M - closest  # of keys: near ones end here, on the left, far ones begin
            near_keys = load_keys(key_source, base - BLOCK, lanes, T, M, HEAD, MEMORY, NARROW)
            far_keys = load_keys(key_source, base, lanes, T, M, HEAD, MEMORY, NARROW)
            products = shifted(content, near_keys, far_keys, TF32, OPERAND, WIDE)
            products += inner(position, r, TF32, OPERAND, WIDE)
            products = masked(products, distance[None, :], reach(i, T, M, window))
            sums = tl.load(sums_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
            weights = powers(products, sums, SCALE)
            vector = load_rows(vector_head, vector_layout[2], i, T, HEAD)
            near_values = load_keys(value_source, base - BLOCK, lanes, T, M, HEAD, MEMORY, NARROW)
            far_values = load_keys(value_source, base, lanes, T, M, HEAD, MEMORY, NARROW)
            if DROPOUT > 0:
                near_mask = kept(seed_ptr, line, first, base - BLOCK, M, DROPOUT, WIDE, BLOCK)
                far_mask = kept(seed_ptr, line, first, base, M, DROPOUT, WIDE, BLOCK)
                mask = tl.where(nearer(BLOCK), near_mask, far_mask)
            else:
                mask = tl.full((), 1.0, WIDE)
            of_weights = turned(chosen(vector, near_values, far_values, TF32, OPERAND, WIDE) * mask)
            delta = tl.load(delta_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
            slopes = first_slopes(weights, of_weights, delta)
            if SECOND:
                a = load_rows(a_ptr + offset, H * HEAD[2], i, T, HEAD)
                mean = tl.load(mean_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
                balance = tl.load(balance_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)
                near_place, far_place = base - BLOCK - M + lanes, base - M + lanes
                near_b = load_rows(b_ptr + offset, H * HEAD[2], near_place, T, HEAD)
                far_b = load_rows(b_ptr + offset, H * HEAD[2], far_place, T, HEAD)
                of_b = shifted(content, near_b, far_b, TF32, OPERAND, WIDE)
                tangent = shifted(a, near_keys, far_keys, TF32, OPERAND, WIDE) + inner(
                    a, r, TF32, OPERAND, WIDE
                )
                current = distance[None, :] <= i[:, None]  # the key is, and not in memory
                tangent = SCALE * (tangent + tl.where(current, of_b, 0))
                near_c = load_rows(c_ptr + offset, H * HEAD[2], near_place, T, HEAD)
                far_c = load_rows(c_ptr + offset, H * HEAD[2], far_place, T, HEAD)
                of_c = turned(chosen(vector, near_c, far_c, TF32, OPERAND, WIDE) * mask)
                of_c = tl.where(current, of_c, 0)
                total = mixed(tl.trans(slopes.to(OPERAND)), a, total, TF32, OPERAND, WIDE)
                slopes = second_slopes(weights, of_weights, delta, tangent, of_c, mean, balance)
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
    BLOCK: tl.constexpr,
):
    """The derivative ȯ of o along (a, b, c) in (q, k, v), and two sums that gradients of `⟨vector, ȯ⟩` need.

    `ȯ_i = Σ_j K_ij P_ij ((Ṡ_ij − m_i) v_j + c_j)` with `m_i = Σ_j P_ij Ṡ_ij`.

    a, b, c, derivative: [B, T, H, d]    mean m, balance Y = vector·ȯ − m vector·o: [B, H, T]
    """
    first, sample, head, line = block_of(T, H, BLOCK)
    lanes = tl.arange(0, BLOCK)
    i = first + lanes
    q = load_rows(at_head(q_ptr, q_layout, sample, head, HEAD), q_layout[2], i, T, HEAD)
    content = biased(q, content_bias_ptr, head, HEAD, OPERAND, WIDE)
    position = biased(q, position_bias_ptr, head, HEAD, OPERAND, WIDE)
    positions_ptr = at_head(positions_ptr, position_layout, sample, head, HEAD)
    offset = (sample.to(tl.int64) * T * H + head) * HEAD[2]
    a = load_rows(a_ptr + offset, H * HEAD[2], i, T, HEAD)
    sums = tl.load(sums_ptr + line.to(tl.int64) * T + i, mask=i < T, other=0)

    mean = tl.zeros([BLOCK], dtype=WIDE)
    derivative = zero_rows(BLOCK, HEAD, WIDE)
    key_source = both_at(memory_keys_ptr, memory_key_layout, k_ptr, k_layout, sample, head, M, HEAD)
    value_source = both_at(memory_values_ptr, memory_value_layout, v_ptr, v_layout, sample, head, M, HEAD)
    reached = reach(i, T, M, window)
    begin, end = seen_keys(first, T, M, window, BLOCK)
    for start in range(begin, end, BLOCK):
        base = first + M - start
        near = load_rows(positions_ptr, position_layout[2], base - BLOCK + lanes, M + T, HEAD)
        far = load_rows(positions_ptr, position_layout[2], base + lanes, M + T, HEAD)
        products = shifted(position, near, far, TF32, OPERAND, WIDE)
        keys = load_keys(key_source, start, lanes, T, M, HEAD, MEMORY, True)
        products += inner(content, keys, TF32, OPERAND, WIDE)
        products = masked(products, base + lanes[:, None] - lanes[None, :], reached)
        weights = powers(products, sums, SCALE)
        mask = kept(seed_ptr, line, first, start, M, DROPOUT, WIDE, BLOCK)
        b = load_rows(b_ptr + offset, H * HEAD[2], start - M + lanes, T, HEAD)
        current = start >= M
        tangent = tangent_scores(a, content, keys, b, near, far, current, SCALE, TF32, OPERAND, WIDE)
        moved = weights * tangent
        mean += tl.sum(moved, axis=1)
        values = load_keys(value_source, start, lanes, T, M, HEAD, MEMORY, True)
        derivative = mixed(moved * mask, values, derivative, TF32, OPERAND, WIDE)
        c = load_rows(c_ptr + offset, H * HEAD[2], start - M + lanes, T, HEAD)
        weights = tl.where(current, weights * mask, 0)
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
