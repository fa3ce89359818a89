"""The negative log-likelihood of one class a row under a softmax, and its gradient in the logits.

The formulas stand in triton_deq/reference/cross_entropy.py. Logits are read as they are, in 16 bits too, and
nothing of their size is written but the gradient.

What both kernels take:
    logits: [n, WIDTH], of which the first N columns are classes    targets: [n] int64
    levels: [2, n], each row's highest logit h, and log₂ Σ exp(l − h): apart, since their sum would be rounded
"""

import triton
import triton.language as tl

from .products import multiple

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def classes_of(logits, columns, N, WIDE: tl.constexpr):
    """A block's logits, −∞ where there is no class: a load with that mask would not be of 16 bytes."""
    return tl.where(columns < N, logits.to(WIDE), float("-inf"))


@triton.jit
def power(exponent):
    """exp, of base 2 because that is what the hardware has."""
    return tl.exp2(exponent * LOG2_E)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    out_ptr,
    levels_ptr,
    N,
    WIDTH,
    rows,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`log Σ exp(l) − l_t` of a row into out: [n], by one pass over it.

    Each place of the tile is the highest logit so far, and the sum below it, of eight that a thread loads at
    once. So there is an exponential for each logit, one more for each eight, and no barrier until the end.
    """
    row = tl.program_id(0)
    width = multiple(WIDTH, ALIGN)
    logits_ptr += row.to(tl.int64) * width
    highest = tl.full([BLOCK // 8], float("-inf"), dtype=WIDE)
    total = tl.zeros([BLOCK // 8], dtype=WIDE)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < width, other=0)
        logits = tl.reshape(classes_of(logits, columns, N, WIDE), [BLOCK // 8, 8])
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        below = tl.where(raised == float("-inf"), 0, raised)  # nothing but −∞ yet
        total = total * power(highest - below) + tl.sum(power(logits - below[:, None]), axis=1)
        highest = raised
    top = tl.max(highest, axis=0)
    level = tl.log2(tl.sum(total * power(highest - top), axis=0))
    target = tl.load(targets_ptr + row)
    own_ptr = logits_ptr + target
    own = tl.load(own_ptr, mask=(target >= 0) & (target < N), other=float("nan")).to(WIDE)
    tl.store(out_ptr + row, level / LOG2_E + (top - own))
    tl.store(levels_ptr + row, top)
    tl.store(levels_ptr + rows + row, level)


@triton.jit(do_not_specialize=["rows", "parts"])
def cross_entropy_vjp_kernel(
    logits_ptr,
    targets_ptr,
    levels_ptr,
    vector_ptr,
    out_ptr,
    N,
    WIDTH,
    rows,
    parts,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`g (softmax(l) − 1_t)` of a block of a row, g being its entry of vector: [n]; 0 behind the classes.

    out: [n, WIDTH]
    """
    row = tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    width = multiple(WIDTH, ALIGN)
    begin = row.to(tl.int64) * width
    logits = tl.load(logits_ptr + begin + columns, mask=columns < width, other=0)
    logits = classes_of(logits, columns, N, WIDE)
    highest, level = tl.load(levels_ptr + row), tl.load(levels_ptr + rows + row)
    hit = (columns == tl.load(targets_ptr + row)).to(WIDE)
    slopes = (tl.exp2((logits - highest) * LOG2_E - level) - hit) * tl.load(vector_ptr + row).to(WIDE)
    tl.store(out_ptr + begin + columns, slopes, mask=columns < width)
