"""The sanitizer for interpreted kernels, on kernels that do what it has to notice."""

from contextlib import nullcontext

import pytest
import torch

from tests.memcheck import backwards, checked
from triton_deq.backend import interpreting

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not interpreting(), reason="it watches Triton's interpreter"),
]


@triton.jit
def copy_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(target_ptr + lanes, tl.load(source_ptr + lanes, mask=lanes < count), mask=lanes < count)


@triton.jit
def neighbour_kernel(ptr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Each program stores its entry and reads or writes another's, before or after."""
    program = tl.program_id(0)
    if FIRST:
        tl.load(ptr + (program + 1) % 2)
    tl.store(ptr + program, 1.0)
    if SECOND:
        tl.store(ptr + (program + 1) % 2, 2.0)


@triton.jit
def count_kernel(ptr, PLAIN: tl.constexpr):
    tl.atomic_add(ptr, 1.0)
    if PLAIN:
        tl.load(ptr)


@triton.jit
def shifted_kernel(ptr, BY: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile, and read it by other threads."""
    lanes = tl.arange(0, BLOCK)
    tl.store(ptr + lanes, lanes.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(ptr + BLOCK + lanes, tl.load(ptr + (lanes + BY) % BLOCK))


@triton.jit
def doubled_kernel(ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(ptr + lanes, tl.load(ptr + lanes) * 2)


@triton.jit
def smoothed_kernel(ptr, BLOCK: tl.constexpr):
    """Each entry is read by two threads, of which the second stores it."""
    lanes = tl.arange(0, BLOCK)
    neighbours = tl.load(ptr + (lanes + 1) % BLOCK)
    tl.store(ptr + lanes, tl.load(ptr + lanes) + neighbours)


@triton.jit
def twice_kernel(ptr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """The entry in the middle is stored by two threads."""
    lanes = tl.arange(0, BLOCK)
    tl.store(ptr + lanes, lanes * 0.0)
    tl.store(ptr + BLOCK // 2 + lanes, lanes * (0.0 if SAME else 1.0))


@triton.jit
def numbered_kernel(at_ptr, order_ptr):
    """Which program was the how-manyth."""
    number = tl.atomic_add(order_ptr, 1.0)
    tl.store(at_ptr + tl.program_id(0) * 2 + tl.program_id(1), number)


@pytest.mark.parametrize(("count", "what"), [(5, "reads"), (4, "writes")])
def test_an_address_behind_a_tensor(count, what):
    with checked(), pytest.raises(Exception, match=f"copy_kernel {what} 0 bytes behind a tensor"):
        copy_kernel[(1,)](torch.zeros(4), torch.zeros(3), count, BLOCK=8)


@pytest.mark.parametrize(("first", "second", "how"), [(True, False, "writes"), (False, True, "touches")])
def test_what_another_program_touches(first, second, how):
    with checked():
        neighbour_kernel[(2,)](torch.zeros(2), FIRST=False, SECOND=False)
        with pytest.raises(Exception, match=f"neighbour_kernel.*another program {how}"):
            neighbour_kernel[(2,)](torch.zeros(2), FIRST=first, SECOND=second)


def test_atomics_race_with_all_but_atomics():
    total = torch.zeros(1)
    with checked():
        count_kernel[(3,)](total, PLAIN=False)
        with pytest.raises(Exception, match=r"Race.*count_kernel.*another program"):
            count_kernel[(3,)](total, PLAIN=True)
    assert total.item() >= 3


@pytest.mark.parametrize(
    ("by", "barrier", "warps", "races"),
    [
        (1, False, 4, True),
        (1, True, 4, False),
        (0, False, 4, False),  # each thread reads what it wrote
        (0, False, 8, True),  # or one of two that hold an entry
        (1, False, 1, False),
    ],
)
def test_what_another_warp_may_not_have_written(by, barrier, warps, races):
    arguments = {"BY": by, "BARRIER": barrier, "BLOCK": 128, "num_warps": warps}
    with checked():
        if races:
            with pytest.raises(Exception, match="another warp may not have written"):
                shifted_kernel[(1,)](torch.zeros(256), **arguments)
        else:
            shifted_kernel[(1,)](torch.zeros(256), **arguments)


def test_what_another_warp_may_not_have_read():
    with checked():
        doubled_kernel[(1,)](torch.zeros(64), BLOCK=64, num_warps=2)
        with pytest.raises(Exception, match="another warp may not have read"):
            doubled_kernel[(1,)](torch.zeros(64), BLOCK=64, num_warps=4)
        with pytest.raises(Exception, match="another warp may not have read"):
            smoothed_kernel[(1,)](torch.zeros(64), BLOCK=64, num_warps=2)


def test_two_warps_may_write_the_same():
    with checked():
        twice_kernel[(1,)](torch.zeros(96), SAME=True, BLOCK=64, num_warps=2)
        with pytest.raises(Exception, match="another warp writes otherwise"):
            twice_kernel[(1,)](torch.zeros(96), SAME=False, BLOCK=64, num_warps=2)


def test_programs_from_the_last_to_the_first():
    at, order = torch.zeros(6), torch.zeros(1)
    for run, wanted in ((nullcontext, range(6)), (backwards, range(5, -1, -1))):
        order.zero_()
        with run():
            numbered_kernel[(3, 2)](at, order)
        assert at.tolist() == list(wanted)
