"""The stochastic Jacobian-norm estimate: probes from Philox, and squared norms per sample.

The formulas stand in triton_deq/reference/jacobian.py, which gives the same probes for the same seed.
"""

import triton
import triton.language as tl

from .primitives import gaussian_pair, sign


@triton.jit(do_not_specialize=["index"])
def probe_kernel(out_ptr, seed_ptr, index, total, quarter, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """Fill out: [total] with N(0, 1) or ±1. seed: [1] int64; index: number of the probe in its stream.

    Counter c gives the entries c, c + quarter, c + 2·quarter, c + 3·quarter: four coalesced stores.
    """
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    stream = tl.zeros_like(low) + index.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, stream, tl.zeros_like(low))
    if GAUSSIAN:
        e0, e1 = gaussian_pair(w0, w1)
        e2, e3 = gaussian_pair(w2, w3)
    else:
        e0, e1, e2, e3 = sign(w0), sign(w1), sign(w2), sign(w3)

    own = counter < quarter
    tl.store(out_ptr + counter, e0, mask=own & (counter < total))
    tl.store(out_ptr + quarter + counter, e1, mask=own & (quarter + counter < total))
    tl.store(out_ptr + 2 * quarter + counter, e2, mask=own & (2 * quarter + counter < total))
    tl.store(out_ptr + 3 * quarter + counter, e3, mask=own & (3 * quarter + counter < total))


@triton.jit(do_not_specialize=["parts"])
def squared_norm_kernel(rows_ptr, partial_ptr, N, parts, chunk, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """`Σ v²` over one part of each row. rows: [B, N]; partial: [B, parts]; grid (B, parts)."""
    sample = tl.program_id(0)
    part = tl.program_id(1)
    row = sample.to(tl.int64) * N
    begin = part * chunk
    total = tl.zeros([BLOCK], dtype=WIDE)
    for start in range(begin, tl.minimum(begin + chunk, N), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(rows_ptr + row + columns, mask=columns < N, other=0).to(WIDE)
        total += value * value
    tl.store(partial_ptr + sample * parts + part, tl.sum(total, axis=0))
