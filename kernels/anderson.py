"""Anderson mixing in two kernels a step: residual with its Gram row, then decision with mixing.

A sample is cut into `parts` of `chunk` entries; the grid of both kernels is (B, parts). Partial sums go
to memory and are added in a fixed order, without atomics, so the same input gives the same bits. Where a
sample fits one program, one kernel does both.
Programs of stopped samples return at once. The formulas stand in triton_deq/reference/anderson.py.
"""

import triton
import triton.language as tl

from .mixing import load_gram, load_slots, mix, relaxed, weights_of
from .primitives import (
    COUNT,
    RUNNING,
    batch_sums,
    is_finite,
    judge_sample,
    keep,
    load_sums,
    look_up,
    look_up_more,
    pick,
    side_by_side,
    snapshot,
    to_keep,
    write_down,
)
from .systems import an_entry_a_thread


@triton.jit
def take_in(
    fx,
    x,
    older,
    residual_ptr,
    iterate_ptr,
    inside,
    slot,
    HISTORY: tl.constexpr,
    LANES: tl.constexpr,
    MIXING: tl.constexpr,
    LANDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of `G = f − x` and of `x + β G` into the ring's newest slot, to which the pointers lead.

    Returns the iterate as it is stored, and the block's part of `G · G_j`, with ‖f‖² in lane HISTORY.

    fx, x: [BLOCK]    older: G_j of the other slots, a tuple of [BLOCK]
    """
    wide_fx = fx.to(WIDE)
    wide_x = x.to(WIDE)
    # Rounded as it is stored: else the row would not belong to the Gram matrix of the stored ring.
    residual = (wide_fx - wide_x).to(x.dtype).to(WIDE)
    iterate = relaxed(wide_fx, wide_x, MIXING).to(x.dtype)
    tl.store(residual_ptr, residual, mask=inside)
    if not (LANDED and MIXING == 1):
        tl.store(iterate_ptr, iterate, mask=inside)

    # In float64, which neither overflows nor underflows for squares of any float32.
    exact = residual.to(tl.float64)
    products = ()
    for j in tl.static_range(LANES):
        if j < HISTORY:
            products += (exact * tl.where(slot == j, residual, older[j].to(WIDE)).to(tl.float64),)
        elif j == HISTORY:
            products += (wide_fx.to(tl.float64) * wide_fx.to(tl.float64),)
        else:
            products += (tl.zeros_like(exact),)
    # Added up all at once: sums one after another would wait for as many barriers.
    return iterate, tl.reshape(tl.sum(side_by_side(products), axis=0), [LANES])


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
    if snapshot(record_ptr, before_ptr, B, sample, part) == RUNNING:
        lanes = tl.arange(0, LANES)
        dots = tl.zeros([LANES], dtype=tl.float64)
        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        begin = part * chunk
        for start in range(begin, tl.minimum(begin + chunk, N), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < N
            fx = tl.load(fx_ptr + row + columns, mask=inside, other=0)
            x = tl.load(x_ptr + row + columns, mask=inside, other=0)
            older = load_slots(residuals_ptr + row + columns, ring, inside, slot, filled, HISTORY, True)
            newest = slot * ring + row + columns
            _, sums = take_in(
                fx,
                x,
                older,
                residuals_ptr + newest,
                iterates_ptr + newest,
                inside,
                slot,
                HISTORY,
                LANES,
                MIXING,
                LANDED,
                WIDE,
            )
            dots += sums
        tl.store(dots_ptr + (sample * parts + part) * LANES + lanes, dots)


@triton.jit
def decide(
    sums,
    residual_sq,
    value_sq,
    finite,
    best,
    kept,
    away,
    count,
    known,
    gram,
    slot,
    stay,
    last,
    lanes,
    HISTORY: tl.constexpr,
    RELATIVE: tl.constexpr,
    RIDGE: tl.constexpr,
    RELATIVE_RIDGE: tl.constexpr,
):
    """Judge a sample and solve for its mixing weights: (plan of `to_keep`, moving, weights, what `note_down`
    takes).

    Every program of a sample decides the same from the same numbers; one of them notes it down.

    sums: [LANES], the Gram matrix's new row. best, kept, away: the record's, before this step. count: how
    many slots may take part. known: of `look_up_more`. gram: of `load_gram`.
    """
    status, improved, verdict = judge_sample(known, residual_sq, value_sq, finite, best, RELATIVE)
    moving = (status == RUNNING) & (last == 0)
    plan = to_keep(status, improved, moving, kept, away, stay)
    weights, mixed = weights_of(gram, sums, slot, count, lanes, HISTORY, RIDGE, RELATIVE_RIDGE)
    return plan, moving, weights, (verdict, plan[3], sums, moving, tl.where(mixed, count, 1))


@triton.jit
def note_down(
    record_ptr,
    gram_ptr,
    active_ptr,
    B,
    sample,
    tick,
    slot,
    noted,
    lanes,
    HISTORY: tl.constexpr,
):
    """What `decide` has found: the verdict, the Gram matrix's new row and column, how many slots are kept.

    gram: the sample's
    """
    verdict, away, sums, moving, count = noted
    write_down(record_ptr, active_ptr, B, sample, tick, verdict, away)
    tl.store(gram_ptr + slot * HISTORY + lanes, sums, mask=lanes < HISTORY)
    tl.store(gram_ptr + lanes * HISTORY + slot, sums, mask=lanes < HISTORY)
    if moving:
        tl.store(record_ptr + COUNT * B + sample, count)


@triton.jit(do_not_specialize=["tick", "next_tick", "slot", "stay", "last", "B", "parts"])
def anderson_advance_kernel(
    x_ptr,
    other_ptr,
    next_ptr,
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
    stay,
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

    x, other, next, best: [B, N]    iterates: [HISTORY, B, N]    dots: [B, parts, LANES]
    gram: [B, HISTORY, HISTORY]    record, before: [FIELDS, B]
    other: where the iterate before is, and next in its place; with stay, next in that of x.
    active: in `tick` the samples that go on are counted; `next_tick` is cleared for the next step.
    """
    sample = tl.program_id(0)
    part = tl.program_id(1)
    if (sample == 0) & (part == 0):
        tl.store(active_ptr + next_tick, 0)
    status, best, kept, away = look_up(before_ptr, B, sample)
    if (status == RUNNING) & (kept >= 0):  # the count, too, before the branch: it says what to load behind
        known = look_up_more(record_ptr, B, sample)
        # All that the decision takes is on its way before the first barrier, and what will be mixed as well.
        lanes = tl.arange(0, LANES)
        count = tl.minimum(kept.to(tl.int32) + 1, HISTORY)
        gram_ptr += sample * HISTORY * HISTORY
        gram = load_gram(gram_ptr, slot, count, lanes, HISTORY)
        partial = load_sums(dots_ptr, sample, parts, lanes, LANES, PARTS)
        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        begin = part * chunk
        end = tl.minimum(begin + chunk, N)
        columns = begin + tl.arange(0, BLOCK)
        needed = tl.where(last == 0, columns < end, False)
        iterates = load_slots(iterates_ptr + row + columns, ring, needed, slot, count, HISTORY, False)

        sums = an_entry_a_thread(tl.sum(partial, axis=0), lanes)
        residual_sq = pick(sums, lanes, slot)
        value_sq = pick(sums, lanes, HISTORY)
        finite = is_finite(residual_sq) & is_finite(value_sq)
        if OVER_BATCH:
            residual_sq, value_sq = batch_sums(dots_ptr, before_ptr, B, parts, slot, HISTORY, LANES)
        plan, moving, weights, noted = decide(
            sums,
            residual_sq,
            value_sq,
            finite,
            best,
            kept,
            away,
            count,
            known,
            gram,
            slot,
            stay,
            last,
            lanes,
            HISTORY,
            RELATIVE,
            RIDGE,
            RELATIVE_RIDGE,
        )
        keep(x_ptr + row, other_ptr + row, best_ptr + row, begin, end, plan, BLOCK)
        for start in range(begin, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            following = mix(iterates, weights, HISTORY, WIDE)
            tl.store(next_ptr + row + columns, following, mask=tl.where(moving, columns < end, False))
            ahead = columns + BLOCK
            needed = tl.where(moving, ahead < end, False)
            iterates = load_slots(iterates_ptr + row + ahead, ring, needed, slot, count, HISTORY, False)
        if part == 0:
            note_down(record_ptr, gram_ptr, active_ptr, B, sample, tick, slot, noted, lanes, HISTORY)


@triton.jit(do_not_specialize=["tick", "next_tick", "slot", "filled", "stay", "last", "B"])
def anderson_step_kernel(
    fx_ptr,
    x_ptr,
    other_ptr,
    next_ptr,
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
    stay,
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

    fx: [B, N]    residuals, iterates: [HISTORY, B, N]    gram: [B, HISTORY, HISTORY]
    record: [FIELDS, B]    x, other, next, best, active: as there
    """
    sample = tl.program_id(0)
    if sample == 0:
        tl.store(active_ptr + next_tick, 0)
    # Loaded here, the sums' barriers lie between these and the stores that renew them.
    status, best, kept, away = look_up(record_ptr, B, sample)
    if (status == RUNNING) & (kept >= 0):  # the count, too, before the branch: it says what to load behind
        known = look_up_more(record_ptr, B, sample)
        lanes = tl.arange(0, LANES)
        count = tl.minimum(kept.to(tl.int32) + 1, HISTORY)
        gram_ptr += sample * HISTORY * HISTORY
        gram = load_gram(gram_ptr, slot, count, lanes, HISTORY)
        columns = tl.arange(0, BLOCK)
        inside = columns < N
        row = sample.to(tl.int64) * N
        place = row + columns
        ring = B.to(tl.int64) * N
        fx = tl.load(fx_ptr + place, mask=inside, other=0)
        x = tl.load(x_ptr + place, mask=inside, other=0)
        older = load_slots(residuals_ptr + place, ring, inside, slot, filled, HISTORY, True)
        needed = tl.where(last == 0, inside, False)
        iterates = load_slots(iterates_ptr + place, ring, needed, slot, count, HISTORY, True)
        newest, sums = take_in(
            fx,
            x,
            older,
            residuals_ptr + slot * ring + place,
            iterates_ptr + slot * ring + place,
            inside,
            slot,
            HISTORY,
            LANES,
            MIXING,
            LANDED,
            WIDE,
        )
        residual_sq = pick(sums, lanes, slot)
        value_sq = pick(sums, lanes, HISTORY)
        plan, moving, weights, noted = decide(
            sums,
            residual_sq,
            value_sq,
            is_finite(residual_sq) & is_finite(value_sq),
            best,
            kept,
            away,
            count,
            known,
            gram,
            slot,
            stay,
            last,
            lanes,
            HISTORY,
            RELATIVE,
            RIDGE,
            RELATIVE_RIDGE,
        )
        ready = ()
        for j in tl.static_range(HISTORY):
            ready += (tl.where(slot == j, newest, iterates[j]),)
        keep(x_ptr + row, other_ptr + row, best_ptr + row, 0, N, plan, BLOCK)
        following = mix(ready, weights, HISTORY, WIDE)
        tl.store(next_ptr + place, following, mask=tl.where(moving, inside, False))
        note_down(record_ptr, gram_ptr, active_ptr, B, sample, tick, slot, noted, lanes, HISTORY)
