"""What every launch has in common: the device, the compiler's options, the cut of a row into parts."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 2048
"""Enough programs to fill a large GPU several times; more would only repeat each sample's small solve."""
MAX_PARTS = 256
MAX_BLOCK = 2048


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel[grid]` on the device of the first tensor among `args`.

    `enable_fp_fusion` is said here for all kernels: Triton's default for it changes between versions.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, enable_fp_fusion=True)


@dataclass(frozen=True)
class Partition:
    """A row of N entries cut into `parts` of `chunk` entries, each read in blocks of `block`.

    It depends on the shape alone, so that the order of every sum does too.
    """

    parts: int
    chunk: int
    block: int


def partition(batch: int, entries: int, most: int = MAX_BLOCK) -> Partition:
    """Cut rows `[batch, entries]` into blocks of at most `most`, about PROGRAMS programs sharing the work."""
    block = min(next_power_of_2(entries), most)
    blocks = -(-entries // block)
    wanted = min(max(PROGRAMS // max(batch, 1), 1), MAX_PARTS, blocks)
    chunk = -(-blocks // wanted) * block
    return Partition(parts=-(-entries // chunk), chunk=chunk, block=block)


def cycle_length(slots: int) -> int:
    """After how many steps a step's arguments are the same again: a multiple of the ring's slots, at least 4.

    A CUDA graph holds that many, and the host looks as rarely.
    """
    return slots * -(-4 // slots)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def wide_dtype(dtype: torch.dtype) -> Any:
    """The Triton dtype of sums over entries of `dtype`: float64 for float64, else float32."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
