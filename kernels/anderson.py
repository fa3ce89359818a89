"""Anderson mixing in two kernels a step: residual with its Gram row, then decision with mixing.

A sample is cut into `parts` of `chunk` entries; the grid of both kernels is (B, parts). Partial sums go
to memory and are added in a fixed order, without atomics, so the same input gives the same bits. Where a
sample fits one program, one kernel does both.
Programs of stopped samples return at once. The formulas stand in triton_deq/reference/anderson.py.
"""

import triton
import triton.language as tl

from .primitives import (
    BEST,
    COUNT,
    RUNNING,
    STATUS,
    batch_sums,
    is_finite,
    judge_sample,
    mixing_weights,
    pick,
    sample_sums,
    snapshot,
    write_down,
)


@triton.jit
def take_in(
    fx_ptr,
    x_ptr,
    residuals_ptr,
    iterates_ptr,
    row,
    ring,
    columns,
    inside,
    slot,
    filled,
    dots,
    lanes,
    HISTORY: tl.constexpr,
    MIXING: tl.constexpr,
    LANDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of `G = f − x` and of `x + β G` into ring slot `slot`.

    Returns x and the iterate as they are stored, and `dots` plus the block's `G · G_j`, ‖f‖² in lane HISTORY.
    """
    fx = tl.load(fx_ptr + row + columns, mask=inside, other=0).to(WIDE)
    x = tl.load(x_ptr + row + columns, mask=inside, other=0)
    wide_x = x.to(WIDE)
    # Rounded as it is stored: else the row would not belong to the Gram matrix of the stored ring.
    residual = (fx - wide_x).to(x.dtype).to(WIDE)
    iterate = (wide_x + MIXING * (fx - wide_x)).to(x.dtype)
    tl.store(residuals_ptr + slot * ring + row + columns, residual, mask=inside)
    if not (LANDED and MIXING == 1):
        tl.store(iterates_ptr + slot * ring + row + columns, iterate, mask=inside)

    # In float64, which neither overflows nor underflows for squares of any float32.
    exact = residual.to(tl.float64)
    dots += tl.where(lanes == HISTORY, tl.sum(fx.to(tl.float64) * fx.to(tl.float64), axis=0), 0)
    for j in tl.static_range(HISTORY):
        older = tl.where((j < filled) & (j != slot), inside, False)
        other = tl.load(residuals_ptr + j * ring + row + columns, mask=older, other=0).to(WIDE)
        other = tl.where(j == slot, residual, other)
        dots += tl.where(lanes == j, tl.sum(exact * other.to(tl.float64), axis=0), 0)
    return x, iterate, dots


@triton.jit(do_not_specialize=["slot", "filled", "B", "parts"])
def anderson_residual_kernel(
    fx_ptr,
    x_ptr,
    residuals_ptr,
    iterates_ptr,
    dots_ptr,
    record_ptr,
    before_ptr,
    B,
    N,
    parts,
    chunk,
    slot,
    filled,
    HISTORY: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXING: tl.constexpr,
    LANDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """G = f − x and x + β G into ring slot `slot`; G · G_j and ‖f‖² of one part into `dots`.

    fx, x: [B, N]    residuals, iterates: [HISTORY, B, N]    dots: [B, parts, LANES]
    record, before: [FIELDS, B]
    LANDED: fx is slot `slot` of iterates, where f has left it.
    """
    sample = tl.program_id(0)
    part = tl.program_id(1)
    if part == 0:
        snapshot(record_ptr, before_ptr, B, sample)

    if tl.load(record_ptr + STATUS * B + sample) == RUNNING:
        lanes = tl.arange(0, LANES)
        dots = tl.zeros([LANES], dtype=tl.float64)
        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        begin = part * chunk
        for start in range(begin, tl.minimum(begin + chunk, N), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < N
            _, _, dots = take_in(
                fx_ptr,
                x_ptr,
                residuals_ptr,
                iterates_ptr,
                row,
                ring,
                columns,
                inside,
                slot,
                filled,
                dots,
                lanes,
                HISTORY,
                MIXING,
                LANDED,
                WIDE,
            )
        tl.store(dots_ptr + (sample * parts + part) * LANES + lanes, dots)


@triton.jit
def decide(
    sums,
    residual_sq,
    value_sq,
    finite,
    best,
    count,
    gram_ptr,
    record_ptr,
    active_ptr,
    B,
    sample,
    tick,
    slot,
    last,
    writes,
    lanes,
    HISTORY: tl.constexpr,
    RELATIVE: tl.constexpr,
    RIDGE: tl.constexpr,
    RELATIVE_RIDGE: tl.constexpr,
):
    """Judge a sample and solve for its mixing weights: (improved, moving, weights).

    Every program of a sample decides the same from the same numbers; the one that `writes` notes it down.

    sums: [LANES], the Gram matrix's new row. best, count: the record's, before this step.
    """
    status, residual, improved, limit = judge_sample(
        record_ptr, B, sample, residual_sq, value_sq, finite, best, RELATIVE
    )
    moving = (status == RUNNING) & (last == 0)

    offsets = sample * HISTORY * HISTORY + lanes[:, None] * HISTORY + lanes[None, :]
    within = (lanes < HISTORY)[:, None] & (lanes < HISTORY)[None, :]
    gram = tl.load(gram_ptr + offsets, mask=within, other=0)
    # Row and column `slot` may already hold this step's sums or not: the ones in registers count.
    gram = tl.where(lanes[:, None] == slot, sums[None, :], gram)
    gram = tl.where(lanes[None, :] == slot, sums[:, None], gram)
    count = tl.minimum(count.to(tl.int32) + 1, HISTORY)
    weights, mixed = mixing_weights(gram, count, slot, lanes, HISTORY, RIDGE, RELATIVE_RIDGE)

    if writes:
        write_down(record_ptr, active_ptr, B, sample, tick, status, residual, finite, improved, limit)
        row = gram_ptr + sample * HISTORY * HISTORY
        tl.store(row + slot * HISTORY + lanes, sums, mask=lanes < HISTORY)
        tl.store(row + lanes * HISTORY + slot, sums, mask=lanes < HISTORY)
        if moving:
            tl.store(record_ptr + COUNT * B + sample, tl.where(mixed, count, 1))
    return improved, moving, weights


@triton.jit(do_not_specialize=["tick", "next_tick", "slot", "last", "B", "parts"])
def anderson_advance_kernel(
    x_ptr,
    best_ptr,
    iterates_ptr,
    dots_ptr,
    gram_ptr,
    record_ptr,
    before_ptr,
    active_ptr,
    B,
    N,
    parts,
    chunk,
    tick,
    next_tick,
    slot,
    last,
    HISTORY: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RELATIVE: tl.constexpr,
    OVER_BATCH: tl.constexpr,
    RIDGE: tl.constexpr,
    RELATIVE_RIDGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Judge a sample, keep its best iterate, solve for the mixing weights and write its next iterate.

    x, best: [B, N]    iterates: [HISTORY, B, N]    dots: [B, parts, LANES]    gram: [B, HISTORY, HISTORY]
    record, before: [FIELDS, B]
    active: in `tick` the samples that go on are counted; `next_tick` is cleared for the next step.
    """
    sample = tl.program_id(0)
    part = tl.program_id(1)
    if (sample == 0) & (part == 0):
        tl.store(active_ptr + next_tick, 0)
    if tl.load(before_ptr + STATUS * B + sample) == RUNNING:
        lanes = tl.arange(0, LANES)
        sums = sample_sums(dots_ptr, sample, parts, lanes, LANES, PARTS)
        residual_sq = pick(sums, lanes, slot)
        value_sq = pick(sums, lanes, HISTORY)
        finite = is_finite(residual_sq) & is_finite(value_sq)
        if OVER_BATCH:
            residual_sq, value_sq = batch_sums(dots_ptr, before_ptr, B, parts, slot, HISTORY, LANES)
        improved, moving, weights = decide(
            sums,
            residual_sq,
            value_sq,
            finite,
            tl.load(before_ptr + BEST * B + sample),
            tl.load(before_ptr + COUNT * B + sample),
            gram_ptr,
            record_ptr,
            active_ptr,
            B,
            sample,
            tick,
            slot,
            last,
            part == 0,
            lanes,
            HISTORY,
            RELATIVE,
            RIDGE,
            RELATIVE_RIDGE,
        )

        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        begin = part * chunk
        for start in range(begin, tl.minimum(begin + chunk, N), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < N
            if improved:
                x = tl.load(x_ptr + row + columns, mask=inside, other=0)
                tl.store(best_ptr + row + columns, x, mask=inside)
            if moving:
                total = tl.zeros([BLOCK], dtype=WIDE)
                for j in tl.static_range(HISTORY):
                    weight = pick(weights, lanes, j).to(WIDE)
                    used = tl.where(weight != 0, inside, False)
                    iterate = tl.load(iterates_ptr + j * ring + row + columns, mask=used, other=0)
                    total += weight * iterate.to(WIDE)
                tl.store(x_ptr + row + columns, total, mask=inside)


@triton.jit(do_not_specialize=["tick", "next_tick", "slot", "filled", "last", "B"])
def anderson_step_kernel(
    fx_ptr,
    x_ptr,
    best_ptr,
    residuals_ptr,
    iterates_ptr,
    gram_ptr,
    record_ptr,
    active_ptr,
    B,
    N,
    tick,
    next_tick,
    slot,
    filled,
    last,
    HISTORY: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXING: tl.constexpr,
    LANDED: tl.constexpr,
    RELATIVE: tl.constexpr,
    RIDGE: tl.constexpr,
    RELATIVE_RIDGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A whole step of a sample of at most BLOCK entries: both kernels in one, x and the newest slot kept
    in registers between them.

    fx, x, best: [B, N]    residuals, iterates: [HISTORY, B, N]    gram: [B, HISTORY, HISTORY]
    record: [FIELDS, B]    active: as there
    """
    sample = tl.program_id(0)
    if sample == 0:
        tl.store(active_ptr + next_tick, 0)
    if tl.load(record_ptr + STATUS * B + sample) == RUNNING:
        # Loaded here, the sums' barriers lie between these and the stores that renew them.
        best = tl.load(record_ptr + BEST * B + sample)
        count = tl.load(record_ptr + COUNT * B + sample)
        lanes = tl.arange(0, LANES)
        columns = tl.arange(0, BLOCK)
        inside = columns < N
        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        x, newest, sums = take_in(
            fx_ptr,
            x_ptr,
            residuals_ptr,
            iterates_ptr,
            row,
            ring,
            columns,
            inside,
            slot,
            filled,
            tl.zeros([LANES], dtype=tl.float64),
            lanes,
            HISTORY,
            MIXING,
            LANDED,
            WIDE,
        )
        residual_sq = pick(sums, lanes, slot)
        value_sq = pick(sums, lanes, HISTORY)
        improved, moving, weights = decide(
            sums,
            residual_sq,
            value_sq,
            is_finite(residual_sq) & is_finite(value_sq),
            best,
            count,
            gram_ptr,
            record_ptr,
            active_ptr,
            B,
            sample,
            tick,
            slot,
            last,
            True,
            lanes,
            HISTORY,
            RELATIVE,
            RIDGE,
            RELATIVE_RIDGE,
        )
        if improved:
            tl.store(best_ptr + row + columns, x, mask=inside)
        if moving:
            total = pick(weights, lanes, slot).to(WIDE) * newest.to(WIDE)
            for j in tl.static_range(HISTORY):
                weight = pick(weights, lanes, j).to(WIDE)
                used = tl.where((weight != 0) & (j != slot), inside, False)
                iterate = tl.load(iterates_ptr + j * ring + row + columns, mask=used, other=0)
                total += weight * iterate.to(WIDE)
            tl.store(x_ptr + row + columns, total, mask=inside)
