"""What every launch has in common: the device, the compiler's options, the cut of a row into parts."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend as backends

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


def kernels_serve(tensor: Tensor, backend: str, *others: Tensor | None, autocast: bool = False) -> bool:
    """Whether the kernels can compute something differentiable of these tensors here, and should.

    Inside torch.compile and in transforms the ordinary operators know what to do; under autocast too, unless
    the op computes in the dtype it is given whatever autocast says.
    """
    if torch.compiler.is_compiling() or backends.choose(tensor, backend)[0] == "reference":
        return False
    kind = (tensor.dtype, tensor.device)
    alike = all(other is None or (other.dtype, other.device) == kind for other in others)
    cast = torch.is_autocast_enabled(tensor.device.type) and not autocast
    return alike and tensor.numel() > 0 and not (transformed() or cast)


def transformed() -> bool:
    """Whether torch.compile or a transform (torch.func, forward AD) is at work, which sees into operators."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


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


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """The constants that say how entries are multiplied and added."""
    import triton.language as tl

    # The interpreter's arithmetic in bfloat16 is wrong; numbers of that kind are exact in float32.
    operand = torch.float32 if dtype == torch.bfloat16 and backends.interpreting() else dtype
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
    return {
        "TF32": dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        "OPERAND": names.get(operand, tl.float32),
        "WIDE": wide_dtype(dtype),
    }


def laid(x: Tensor) -> Tensor:
    """A map `[B, C, H, W]` with each sample dense and channels-last, `[H, W, C]`: itself if it can be."""
    _, channels, _, width = x.shape
    wanted = (1, width * channels, channels)
    if all(
        size == 1 or own == wish for size, own, wish in zip(x.shape[1:], x.stride()[1:], wanted, strict=True)
    ):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def sample_stride(x: Tensor) -> int:
    """How far apart the samples of such a map begin; of a single one it means nothing."""
    return x.stride(0) if len(x) > 1 else x[0].numel()


def fresh(like: Tensor) -> Tensor:
    """A dense channels-last map of like's shape and dtype."""
    return torch.empty_like(like, memory_format=torch.channels_last)
