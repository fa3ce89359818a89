"""A kernel with arguments of every kind."""

import triton
import triton.language as tl


@triton.jit
def toy_kernel(x_ptr, n, scale, layout, WIDTH: tl.constexpr):
    start, step = layout
    tl.store(x_ptr + start + step * tl.arange(0, WIDTH), n * scale)
