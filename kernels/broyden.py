"""Good Broyden in two kernels a step: the newest pair with all its products, then decision with update.

The grid is (B, parts) as in anderson.py, and so is the order of sums. The compact form, in which nothing
of the size of a state is updated but the newest pair, stands in triton_deq/reference/broyden.py.
"""

import triton
import triton.language as tl

from .mixing import load_slots, mix, scalars
from .primitives import (
    COUNT,
    LEAST_SQUARE,
    RUNNING,
    WEIGHT_LIMIT,
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
from .systems import an_entry_a_thread, balance, load_matrix, renew, solve

AT_ONCE = tl.constexpr(16)
"""Up to how many slots of a block are all loaded before its sample's coefficients are known."""
TOGETHER = tl.constexpr(8)
"""Of more slots, so many are loaded at a time."""


@triton.jit
def sums_of(values):
    """Four sums, each of a vector, for the barriers of one."""
    even, odd = tl.split(tl.sum(side_by_side(values), axis=0))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_pair(moves_ptr, changes_ptr, columns, ring, inside, i, slot, newest, filled):
    """A move and its change at some columns; zeros if slot i is the open or newest one, or not filled."""
    older = tl.where((i < filled) & (i != slot) & (i != newest), inside, False)
    move = tl.load(moves_ptr + i * ring + columns, mask=older, other=0)
    change = tl.load(changes_ptr + i * ring + columns, mask=older, other=0)
    return move, change


@triton.jit(do_not_specialize=["slot", "newest", "filled", "B", "parts"])
def broyden_residual_kernel(
    fx_ptr,
    x_ptr,
    moves_ptr,
    changes_ptr,
    dots_ptr,
    record_ptr,
    before_ptr,
    B,
    N,
    parts,
    chunk,
    slot,
    newest,
    filled,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Close the pair in slot `newest`, open one in `slot`, and one part of the step's sums into `dots`.

    fx, x: [B, N]    moves, changes: [SLOTS, B, N]    record, before: [FIELDS, B]
    dots: [B, parts, 3, LANES]: s_i · g, s_i · (s_p − φ_p), s_p · φ_i; in lane SLOTS ‖g‖², ‖f‖², ‖s_p‖².
    LANDED: fx is slot `slot` of changes, where f has left it.
    filled: how many slots have been written before this step; 0 in the first, which has no pair to close.
    """
    sample = tl.program_id(0)
    part = tl.program_id(1)
    if snapshot(record_ptr, before_ptr, B, sample, part) == RUNNING:
        lanes = tl.arange(0, LANES)
        by_residual = tl.zeros([LANES], dtype=tl.float64)
        by_curvature = tl.zeros([LANES], dtype=tl.float64)
        by_change = tl.zeros([LANES], dtype=tl.float64)
        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        stored = moves_ptr.dtype.element_ty
        begin = part * chunk
        for start in range(begin, tl.minimum(begin + chunk, N), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < N
            closing = tl.where(filled > 0, inside, False)
            fx = tl.load(fx_ptr + row + columns, mask=inside, other=0)
            x = tl.load(x_ptr + row + columns, mask=inside, other=0)
            move = tl.load(moves_ptr + newest * ring + row + columns, mask=closing, other=0).to(WIDE)
            change = tl.load(changes_ptr + newest * ring + row + columns, mask=closing, other=0).to(WIDE)
            tl.store(moves_ptr + slot * ring + row + columns, x, mask=inside)
            if not LANDED:
                tl.store(changes_ptr + slot * ring + row + columns, fx, mask=inside)
            fx = fx.to(WIDE)
            x = x.to(WIDE)

            # Rounded as they are stored: else M would not belong to the pairs in the rings.
            move = tl.where(closing, x - move, 0).to(stored).to(WIDE)
            change = tl.where(closing, fx - change, 0).to(stored).to(WIDE)
            tl.store(moves_ptr + newest * ring + row + columns, move, mask=closing)
            tl.store(changes_ptr + newest * ring + row + columns, change, mask=closing)

            # In float64, which neither overflows nor underflows for squares of any float32.
            residual = (fx - x).to(tl.float64)
            fx64 = fx.to(tl.float64)
            move64 = move.to(tl.float64)
            curvature = move64 - change.to(tl.float64)
            nothing = tl.zeros_like(move64)
            squares = sums_of((residual * residual, fx64 * fx64, move64 * move64, nothing))
            by_residual += tl.where(lanes == SLOTS, squares[0], 0)
            by_curvature += tl.where(lanes == SLOTS, squares[1], 0)
            by_change += tl.where(lanes == SLOTS, squares[2], 0)
            # Not unrolled: the compiler would issue the loads of all pairs at once and run out of registers.
            # But the next pair is on its way while this one's products are added up.
            place = row + columns
            pair = load_pair(moves_ptr, changes_ptr, place, ring, inside, 0, slot, newest, filled)
            for i in tl.range(0, filled, num_stages=1):
                other_move = tl.where(i == newest, move, pair[0].to(WIDE)).to(tl.float64)
                other_change = tl.where(i == newest, change, pair[1].to(WIDE)).to(tl.float64)
                pair = load_pair(moves_ptr, changes_ptr, place, ring, inside, i + 1, slot, newest, filled)
                products = (other_move * residual, other_move * curvature, other_change * move64, nothing)
                sums = sums_of(products)
                by_residual += tl.where(lanes == i, sums[0], 0)
                by_curvature += tl.where(lanes == i, sums[1], 0)
                by_change += tl.where(lanes == i, sums[2], 0)
        out = dots_ptr + (sample * parts + part) * 3 * LANES + lanes
        tl.store(out, by_residual)
        tl.store(out + LANES, by_curvature)
        tl.store(out + 2 * LANES, by_change)


@triton.jit
def broyden_coefficients(matrix, squares, right, pairs, slot, lanes, SLOTS: tl.constexpr):
    """c `[LANES]` in float64 from M, and whether the solve was of use; zero if it was not."""
    age = (slot - lanes + SLOTS) % SLOTS
    used = (lanes < SLOTS) & (age >= 1) & (age <= pairs) & (squares > LEAST_SQUARE)
    scale = tl.where(used, 1 / tl.sqrt(tl.where(used, squares, 1.0)), 0.0)
    damping = tl.where(used, 0.0, 1.0).to(tl.float64)

    matrix = balance(matrix, used, scale, damping, lanes, SLOTS)
    solution, _ = solve(matrix, tl.where(used, right, 0) * scale, lanes, SLOTS, True)
    coefficients = scale * solution
    useful = tl.sum(tl.abs(coefficients), axis=0) <= WEIGHT_LIMIT  # false for NaN too
    return tl.where(useful, coefficients, 0.0), useful


@triton.jit
def weighted(ring_ptr, stride, inside, weights, lanes, first, WIDE: tl.constexpr):
    """TOGETHER slots from `first` on times their weights, loaded all at once; what has none is not read."""
    slots = ()
    factors = ()
    for k in tl.static_range(TOGETHER):
        factors += (pick(weights, lanes, first + k),)  # 0 for slots that are none
        used = tl.where(factors[k] != 0, inside, False)
        slots += (tl.load(ring_ptr + (first + k) * stride, mask=used, other=0),)
    return mix(slots, factors, TOGETHER, WIDE)


@triton.jit(do_not_specialize=["tick", "next_tick", "slot", "newest", "stay", "last", "B", "parts"])
def broyden_advance_kernel(
    x_ptr,
    other_ptr,
    next_ptr,
    best_ptr,
    changes_ptr,
    dots_ptr,
    matrix_ptr,
    squares_ptr,
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
    newest,
    stay,
    last,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RELATIVE: tl.constexpr,
    OVER_BATCH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Judge a sample, keep its best iterate, renew M, solve for c and write the next iterate.

    Every program of a sample takes the same decisions from the same numbers; part 0 writes them down.

    x, other, next, best, active: as there    changes: [SLOTS, B, N]    dots: [B, parts, 3, LANES]
    matrix: [B, SLOTS, SLOTS]    squares: [B, SLOTS]    record, before: [FIELDS, B]
    """
    sample = tl.program_id(0)
    part = tl.program_id(1)
    if (sample == 0) & (part == 0):
        tl.store(active_ptr + next_tick, 0)
    status, best, kept, away = look_up(before_ptr, B, sample)
    if status == RUNNING:
        known = look_up_more(record_ptr, B, sample)
        lanes = tl.arange(0, LANES)
        # All that the decision takes is on its way before the first barrier, and what may be mixed as well.
        pairs = kept.to(tl.int32)
        parts_of_residual = load_sums(dots_ptr, sample, parts, lanes, 3 * LANES, PARTS)
        parts_of_curvature = load_sums(dots_ptr + LANES, sample, parts, lanes, 3 * LANES, PARTS)
        parts_of_change = load_sums(dots_ptr + 2 * LANES, sample, parts, lanes, 3 * LANES, PARTS)
        matrix_ptr += sample * SLOTS * SLOTS
        matrix = load_matrix(matrix_ptr, lanes, SLOTS)
        squares = tl.load(squares_ptr + sample * SLOTS + lanes, mask=lanes < SLOTS, other=0)
        row = sample.to(tl.int64) * N
        ring = B.to(tl.int64) * N
        begin = part * chunk
        end = tl.minimum(begin + chunk, N)
        columns = begin + tl.arange(0, BLOCK)
        if SLOTS <= AT_ONCE:
            needed = tl.where(last == 0, columns < end, False)
            changes = load_slots(changes_ptr + row + columns, ring, needed, slot, pairs + 1, SLOTS, False)

        nothing = tl.zeros_like(parts_of_change)
        sums = sums_of((parts_of_residual, parts_of_curvature, parts_of_change, nothing))
        by_residual = an_entry_a_thread(sums[0], lanes)
        by_curvature = an_entry_a_thread(sums[1], lanes)
        by_change = an_entry_a_thread(sums[2], lanes)
        residual_sq = pick(by_residual, lanes, SLOTS)
        value_sq = pick(by_curvature, lanes, SLOTS)
        finite = is_finite(residual_sq) & is_finite(value_sq)
        if OVER_BATCH:
            residual_sq, value_sq = batch_sums(
                dots_ptr, before_ptr, B, parts, SLOTS, LANES + SLOTS, 3 * LANES
            )
        judged, improved, verdict = judge_sample(known, residual_sq, value_sq, finite, best, RELATIVE)
        moving = (judged == RUNNING) & (last == 0)
        plan = to_keep(judged, improved, moving, kept, away, stay)

        # The newest pair's may hold this step's sums already or not: the ones in registers count.
        matrix = renew(matrix, newest, -by_change, by_curvature, lanes, SLOTS)
        square = pick(by_change, lanes, SLOTS)
        squares = tl.where(lanes == newest, square, squares)
        coefficients, useful = broyden_coefficients(matrix, squares, by_residual, pairs, slot, lanes, SLOTS)

        # The open slot holds f(x), so with a weight of one there the sum is the next iterate.
        weights = tl.where(lanes == slot, 1.0, coefficients).to(WIDE)
        if SLOTS <= AT_ONCE:
            factors = scalars(weights, lanes, SLOTS)
        keep(x_ptr + row, other_ptr + row, best_ptr + row, begin, end, plan, BLOCK)
        for start in range(begin, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            place = row + columns
            goes_on = tl.where(moving, columns < end, False)
            if SLOTS <= AT_ONCE:
                total = mix(changes, factors, SLOTS, WIDE)
                needed = tl.where(moving, columns + BLOCK < end, False)
                changes = load_slots(changes_ptr + place + BLOCK, ring, needed, slot, pairs + 1, SLOTS, False)
            else:
                total = tl.zeros([BLOCK], dtype=WIDE)
                for first in range(0, SLOTS, TOGETHER):
                    total += weighted(changes_ptr + place, ring, goes_on, weights, lanes, first, WIDE)
            tl.store(next_ptr + place, total, mask=goes_on)

        if part == 0:
            write_down(record_ptr, active_ptr, B, sample, tick, verdict, plan[3])
            others = (lanes < SLOTS) & (lanes != newest)
            tl.store(matrix_ptr + newest * SLOTS + lanes, -by_change, mask=others)
            tl.store(matrix_ptr + lanes * SLOTS + newest, by_curvature, mask=lanes < SLOTS)
            tl.store(squares_ptr + sample * SLOTS + newest, square)
            if moving:
                count = tl.where(useful, tl.minimum(pairs + 1, SLOTS - 1), 1)
                tl.store(record_ptr + COUNT * B + sample, count)
