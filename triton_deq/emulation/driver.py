"""A driver for Triton whose GPU is this machine's CPU: it stops at PTX, and runs that on CPU tensors."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from ..backend import emulation_seed, emulation_target
from .memory import Memory
from .program import Program
from .traffic import of_launch

SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448}
"""The GPUs that can be emulated, and how many bytes of shared memory a program may have there."""


class Compiler(CUDABackend):
    """NVIDIA's, without the assembler."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def hash(self) -> str:
        return f"emulated {super().hash()}"  # in Triton's cache a GPU's kernels are others

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any = None) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]


class Launcher:
    """Runs a compiled kernel, as Triton calls it: grid, stream, what `load_binary` gave, hooks, arguments."""

    launched = 0
    """How many launches there were: each has its own order of warps."""

    def __init__(self, source: Any, metadata: Any):
        self._signature = tuple(source.signature.values())
        self._name, self._shared, self._warps = metadata.name, metadata.shared, metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
        arguments = rest[4:]  # behind metadata and hooks
        given = list(_flat(self._signature, arguments))
        values = [_value(kind, argument) for kind, argument in given]
        tensors = [argument for kind, argument in given if kind.startswith("*") and argument is not None]
        elsewhere = {str(tensor.device) for tensor in tensors if tensor.device.type != "cpu"}
        if elsewhere:
            raise ValueError(
                f"an emulated kernel got a tensor on {elsewhere.pop()}: move it to the CPU, or let kernels "
                "run on the GPU, without triton_deq.emulation"
            )
        Launcher.launched += 1
        seed = emulation_seed() << 32 | Launcher.launched
        with of_launch(self._name) as traffic:
            memory = Memory.of_tensors(tensors, traffic)
            program.run((x, y, z), values, self._shared, self._warps, memory, seed, traffic)


def _flat(signature: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """What the compiled kernel takes, with its kinds; constants are in its code."""
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, argument)
        elif kind != "constexpr":
            yield kind, argument


def _value(kind: str, argument: Any) -> Any:
    """An argument as the bits that a parameter holds."""
    if kind.startswith("*"):
        return np.uint64(0 if argument is None else argument.data_ptr())
    if kind.startswith("fp"):
        return np.dtype(f"f{int(kind[2:]) // 8}").type(argument)
    size = max(int(kind[1:]) // 8, 1)
    return np.array(int(argument) & ((1 << 8 * size) - 1), f"u{size}")[()]


class Utilities:
    """What Triton asks of a driver about a device and a binary."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        shared = SHARED_MEMORY[emulation_target()]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, binary: Any, shared: int, device: int) -> tuple[Any, Program, int, int, int]:
        program = _program(binary if isinstance(binary, str) else binary.decode())
        return None, program, 0, 0, 1024


_program = cache(Program)


class Driver(DriverBase):
    """One device, a CPU."""

    utils = Utilities
    launcher_cls = Launcher

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return False  # only where it was asked for

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("an emulated launch compiles nothing")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(emulation_target().removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("time means nothing in an emulation")


@cache
def install() -> None:
    """Make it the driver that Triton uses in this process, in NVIDIA's place, for which kernels may ask."""
    backends["nvidia"] = Backend(Compiler, Driver)
    driver.set_active(Driver())
