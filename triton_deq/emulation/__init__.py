"""Kernels as they are compiled, run where no GPU is.

Triton's interpreter runs a kernel's Python, tile by tile. What a GPU runs has been through the compiler: a
tile is spread over threads, sums are shuffles and barriers, bfloat16 is bfloat16, products are those of
tensor cores, copies to shared memory are under way while the program goes on. `install` gives Triton a driver
that compiles for sm_90 or sm_80, stops at PTX, the last form that is documented, and runs its instructions
with NumPy.

Warps run in an order that chance decides, from access to access, so that what depends on the order differs
from launch to launch. Asynchronous copies, and products of sm_90 that read shared memory by themselves, are
done early or late. Shared memory that nothing has written holds NaN. Every address is held against the
tensors of the launch.

What it does not see: what NVIDIA's assembler makes of the PTX, instructions of other GPUs, and time.
"""

from typing import Any

from .memory import Fault
from .traffic import Traffic, counted

__all__ = ["Fault", "Traffic", "counted", "install", "prepare"]


def install() -> None:
    """Let any Triton kernel run on CPU tensors in this process, as compiled for a GPU.

    Kernels must be defined without `TRITON_INTERPRET`. Launches are as on a GPU, `kernel[grid](...)`. The ops
    of this library also need `TRITON_DEQ_EMULATE=1`, to take their kernels for CPU tensors. The GPU is what
    `TRITON_DEQ_EMULATE_TARGET` says, sm_90 or sm_80. What it would fault at raises :class:`Fault`.
    """
    from . import driver

    driver.install()


def prepare(kernel: Any) -> None:
    """Install, for a kernel that can be compiled.

    Raises:
        RuntimeError: it was imported for Triton's interpreter.
    """
    from triton.runtime.interpreter import InterpretedFunction

    if isinstance(kernel, InterpretedFunction):
        raise RuntimeError(
            f"the kernel {kernel.__name__} was imported for Triton's interpreter, which Triton decides once: "
            "emulate it in a new process, with TRITON_DEQ_EMULATE=1 and without TRITON_INTERPRET"
        )
    install()
