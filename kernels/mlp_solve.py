"""A whole solve of the multilayer perceptron's cell, or of a linear system in its Jacobian, in one launch.

Matrix products run on tensor cores and add up in float32 (float64 for float64).
"""

import triton
import triton.language as tl

from .mixing import load_triangles, weights_of_few
from .primitives import (
    BEST,
    CONVERGED,
    COUNT,
    DIVERGENCE,
    LIMIT,
    RESIDUAL,
    RUNNING,
    STATUS,
    STEPS,
    TOLERANCE,
    activate,
    is_finite,
    judge,
    standardise,
    standardise_vjp,
)
from .products import dot, product


@triton.jit
def evaluate(
    x_ptr,
    first_ptr,
    second_ptr,
    shift_ptr,
    slope_ptr,
    gain_ptr,
    offset_ptr,
    normal_ptr,
    inverse_ptr,
    scratch_ptr,
    rows,
    columns,
    present,
    ADJOINT: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The cell at `rows`, or with ADJOINT the map `x ↦ x J + g` of its backward solve; whole rows.

    The arguments are those of `mlp_solve_kernel`, but pointers to rows point to the program's first.
    """
    within = columns < WIDTH
    inside = present[:, None] & within[None, :]
    tile = rows[:, None] * WIDTH + columns[None, :]
    source_ptr = x_ptr
    if NORM:
        gain = tl.load(gain_ptr + columns, mask=within, other=0).to(WIDE)
    if ADJOINT and (NORM or HIDDEN == 0):
        vector = tl.load(x_ptr + tile, mask=inside, other=0).to(WIDE)
        if NORM:
            normal = tl.load(normal_ptr + tile, mask=inside, other=0).to(WIDE)
            inverse = tl.load(inverse_ptr + rows, mask=present, other=0).to(WIDE)
            vector = standardise_vjp(vector * gain[None, :], normal, inverse, 0.0, WIDTH)
        if HIDDEN == 0:
            vector *= tl.load(slope_ptr + tile, mask=inside, other=0).to(WIDE)
        tl.store(scratch_ptr + tile, vector, mask=inside)
        tl.debug_barrier()  # the product reads what other threads have stored
        source_ptr = scratch_ptr

    if HIDDEN == 0:
        # W as it is for the adjoint, else transposed.
        column_stride: tl.constexpr = 1 if ADJOINT else WIDTH
        depth_stride: tl.constexpr = WIDTH if ADJOINT else 1
        value = product(
            source_ptr,
            source_ptr,
            rows,
            rows,
            present,
            first_ptr,
            columns,
            column_stride,
            depth_stride,
            WIDTH,
            WIDTH,
            False,
            False,
            BLOCK_K,
            TF32,
            OPERAND,
            WIDE,
        )
        shift = tl.load(shift_ptr + tile, mask=inside, other=0).to(WIDE)
        value = value + shift if ADJOINT else activate(value + shift, ACTIVATION)
    else:
        value = tl.zeros([rows.shape[0], columns.shape[0]], dtype=WIDE)
        for start in range(0, HIDDEN, BLOCK_H):
            hidden = start + tl.arange(0, BLOCK_H)
            part = present[:, None] & (hidden < HIDDEN)[None, :]
            hidden_tile = rows[:, None] * HIDDEN + hidden[None, :]
            column_stride: tl.constexpr = 1 if ADJOINT else WIDTH
            depth_stride: tl.constexpr = HIDDEN if ADJOINT else 1
            inner = product(
                source_ptr,
                source_ptr,
                rows,
                rows,
                present,
                second_ptr if ADJOINT else first_ptr,
                hidden,
                column_stride,
                depth_stride,
                HIDDEN,
                WIDTH,
                False,
                False,
                BLOCK_K,
                TF32,
                OPERAND,
                WIDE,
            )
            if ADJOINT:
                inner *= tl.load(slope_ptr + hidden_tile, mask=part, other=0).to(WIDE)
                entries = hidden[:, None] * WIDTH + columns[None, :]
                matrix_ptr = first_ptr
            else:
                inner = activate(
                    inner + tl.load(shift_ptr + hidden_tile, mask=part, other=0).to(WIDE), ACTIVATION
                )
                entries = hidden[:, None] + columns[None, :] * HIDDEN
                matrix_ptr = second_ptr
            mask = (hidden < HIDDEN)[:, None] & within[None, :]
            value = dot(inner, tl.load(matrix_ptr + entries, mask=mask, other=0), value, TF32, OPERAND, WIDE)
        if ADJOINT:
            value += tl.load(shift_ptr + tile, mask=inside, other=0).to(WIDE)

    if NORM and not ADJOINT:
        normal, _ = standardise(value, inside, WIDTH, EPSILON)
        offset = tl.load(offset_ptr + columns, mask=within, other=0).to(WIDE)
        value = normal * gain[None, :] + offset[None, :]
    return value


@triton.jit
def load_older(ring_ptr, stride, tile, live, j, slot, filled):
    """Slot j of a ring at some rows; zeros if it is the newest, or not filled."""
    return tl.load(
        ring_ptr + j * stride + tile, mask=tl.where((j < filled) & (j != slot), live, False), other=0
    )


@triton.jit(do_not_specialize=["B", "max_steps"])
def mlp_solve_kernel(
    x_ptr,
    best_ptr,
    residuals_ptr,
    iterates_ptr,
    gram_ptr,
    weights_ptr,
    record_ptr,
    trace_ptr,
    first_ptr,
    second_ptr,
    shift_ptr,
    slope_ptr,
    gain_ptr,
    offset_ptr,
    normal_ptr,
    inverse_ptr,
    scratch_ptr,
    B,
    max_steps,
    ADJOINT: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    HISTORY: tl.constexpr,
    LANES: tl.constexpr,
    MIXING: tl.constexpr,
    RELATIVE: tl.constexpr,
    RIDGE: tl.constexpr,
    RELATIVE_RIDGE: tl.constexpr,
    TRACE: tl.constexpr,
    TF32: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program takes SAMPLES rows from x to their fixed point by Anderson mixing; each stops by itself.

    The cell is `act(z Wᵀ + u)`, with HIDDEN `act(z Wᵀ + u) Vᵀ`, with NORM its LayerNorm. With ADJOINT what
    is solved is `x = x J + g`, J being the cell's Jacobian. Decisions stay in registers; histories
    and Gram matrices, which a program alone reads and writes, are in its cache.

    x, best: [B, WIDTH]; x holds z0 (with ADJOINT: a first guess)    residuals, iterates: [HISTORY, B, WIDTH]
    gram: [B, HISTORY, HISTORY]    weights: [B, LANES]
    record: [FIELDS, B], as before the first step
    trace: [max_steps, B] float64, written up to the step at which a sample stops
    first: W [WIDTH or HIDDEN, WIDTH]    second: V [WIDTH, HIDDEN]
    shift: u [B, WIDTH or HIDDEN]; with ADJOINT g [B, WIDTH]    slope: act′ [B, WIDTH or HIDDEN]
    gain, offset: the LayerNorm's [WIDTH]    normal: [B, WIDTH], inverse: [B], its n and 1/σ at the solution
    scratch: [B, WIDTH]
    slope, normal, inverse and scratch are read with ADJOINT only.
    """
    EARLY: tl.constexpr = HISTORY > 1 and BLOCK <= 128  # wider rows would be spilled for it
    first_row = tl.program_id(0) * SAMPLES
    local = tl.arange(0, SAMPLES)
    rows = first_row + local
    present = rows < B
    columns = tl.arange(0, BLOCK)
    lanes = tl.arange(0, LANES)
    inside = present[:, None] & (columns < WIDTH)[None, :]

    # Pointers to the program's own rows, so that offsets of 32 bits, which take fewer registers, serve.
    begin = first_row.to(tl.int64) * WIDTH
    x_ptr += begin
    best_ptr += begin
    residuals_ptr += begin
    iterates_ptr += begin
    scratch_ptr += begin
    normal_ptr += begin
    gram_ptr += first_row.to(tl.int64) * HISTORY * HISTORY
    weights_ptr += first_row.to(tl.int64) * LANES
    inverse_ptr += first_row
    slope_ptr += first_row.to(tl.int64) * (HIDDEN if HIDDEN > 0 else WIDTH)
    shift_ptr += first_row.to(tl.int64) * (HIDDEN if HIDDEN > 0 and not ADJOINT else WIDTH)
    tile = local[:, None] * WIDTH + columns[None, :]
    ring = B.to(tl.int64) * WIDTH
    status = tl.where(present, RUNNING, CONVERGED)
    for step in range(max_steps):
        running = status == RUNNING
        if tl.sum(running.to(tl.int32), axis=0) > 0:
            tl.debug_barrier()  # the last step's stores, by whichever thread, are seen from here on
            live = running[:, None] & inside
            fx = evaluate(
                x_ptr,
                first_ptr,
                second_ptr,
                shift_ptr,
                slope_ptr,
                gain_ptr,
                offset_ptr,
                normal_ptr,
                inverse_ptr,
                scratch_ptr,
                local,
                columns,
                present,
                ADJOINT,
                WIDTH,
                HIDDEN,
                ACTIVATION,
                NORM,
                EPSILON,
                TF32,
                OPERAND,
                WIDE,
                BLOCK_K,
                BLOCK_H,
            )
            x = tl.load(x_ptr + tile, mask=inside, other=0)
            # Before the sums, since no load passes their barriers.
            limit = tl.load(record_ptr + LIMIT * B + rows, mask=present, other=0)
            best = tl.load(record_ptr + BEST * B + rows, mask=present, other=0)
            tolerance = tl.load(record_ptr + TOLERANCE * B + rows, mask=present, other=0)
            wide_x = x.to(WIDE)
            slot = step % HISTORY
            filled = tl.minimum(step + 1, HISTORY)
            if EARLY:
                other = load_older(residuals_ptr, ring, tile, live, 0, slot, filled)
            fx = tl.where(inside, fx.to(x.dtype).to(WIDE), 0)  # rounded as f's value is outside of here
            difference = (fx - wide_x).to(x.dtype).to(WIDE)
            # Also where β is 1: fx itself, kept until the mixing, costs registers that are spilled.
            iterate = (wide_x + MIXING * (fx - wide_x)).to(x.dtype)

            exact = difference.to(tl.float64)
            value_sq = tl.sum(fx.to(tl.float64) * fx.to(tl.float64), axis=1)
            residual_sq = tl.sum(exact * exact, axis=1)
            finite = is_finite(residual_sq) & is_finite(value_sq)
            limit = tl.where(limit > 0, limit, DIVERGENCE * (tl.sqrt(residual_sq) + tl.sqrt(value_sq)))
            fate, residual, improved = judge(residual_sq, value_sq, finite, best, limit, tolerance, RELATIVE)
            improved = running & improved
            status = tl.where(running, fate, status)
            moving = status == RUNNING
            tl.store(best_ptr + tile, x, mask=improved[:, None] & inside)

            if HISTORY > 1:
                sums = tl.where(lanes[None, :] == slot, residual_sq[:, None], 0.0)
                # The next slot is on its way while this one's products are added up.
                if not EARLY:
                    other = load_older(residuals_ptr, ring, tile, live, 0, slot, filled)
                for j in range(HISTORY):
                    product_sum = tl.sum(exact * other.to(tl.float64), axis=1)
                    other = load_older(residuals_ptr, ring, tile, live, j + 1, slot, filled)
                    sums += tl.where(lanes[None, :] == j, product_sum[:, None], 0.0)
                tl.store(residuals_ptr + slot * ring + tile, difference, mask=live)
                tl.store(iterates_ptr + slot * ring + tile, iterate, mask=live)
                # The small solves have layouts of their own, so what they take and give goes through memory.
                renewed = running[:, None] & (lanes < HISTORY)[None, :]
                corner = local[:, None] * HISTORY * HISTORY
                tl.store(gram_ptr + corner + slot * HISTORY + lanes[None, :], sums, mask=renewed)
                tl.store(gram_ptr + corner + lanes[None, :] * HISTORY + slot, sums, mask=renewed)
            tl.debug_barrier()  # every thread has read x, and what it stored may be read by others
            if HISTORY > 1:
                count = tl.load(record_ptr + COUNT * B + rows, mask=present, other=0).to(tl.int32)
                count = tl.where(present, tl.minimum(count + 1, HISTORY), 0)
                grams = gram_ptr + local * HISTORY * HISTORY
                triangle = load_triangles(grams, present, slot, count, HISTORY)
                sums = ()
                for j in tl.static_range(HISTORY):
                    sums += (tl.load(grams + slot * HISTORY + j, mask=present, other=0),)
                weights, mixed = weights_of_few(triangle, sums, slot, count, HISTORY, RIDGE, RELATIVE_RIDGE)
                for j in tl.static_range(HISTORY):
                    tl.store(weights_ptr + local * LANES + j, weights[j], mask=present)
                tl.debug_barrier()  # every thread has read count, too
                tl.store(record_ptr + COUNT * B + rows, tl.where(mixed, count, 1), mask=present)
                factors = ()
                for j in tl.static_range(HISTORY):
                    factors += (tl.load(weights_ptr + local * LANES + j, mask=moving, other=0).to(WIDE),)
                following = tl.zeros([SAMPLES, BLOCK], dtype=WIDE)
                for j in tl.static_range(HISTORY):
                    used = (factors[j] != 0)[:, None] & inside
                    other = tl.load(iterates_ptr + j * ring + tile, mask=used, other=0).to(WIDE)
                    following += factors[j][:, None] * other
            else:
                following = iterate.to(WIDE)
            tl.store(x_ptr + tile, following, mask=moving[:, None] & inside)

            # What is known of a sample is kept there, and not in registers that a product needs.
            tl.store(record_ptr + LIMIT * B + rows, limit, mask=running)
            tl.store(record_ptr + STEPS * B + rows, tl.where(running, step + 1, 0), mask=running)
            tl.store(record_ptr + RESIDUAL * B + rows, residual, mask=running & finite)
            tl.store(record_ptr + BEST * B + rows, residual, mask=improved)
            if TRACE:
                kept = tl.load(record_ptr + RESIDUAL * B + rows, mask=running & (finite == 0), other=0)
                tl.store(trace_ptr + step * B + rows, tl.where(finite, residual, kept), mask=running)

    tl.store(record_ptr + STATUS * B + rows, status, mask=present)
