"""Launch kernels through the stand-in, and print as JSON what they would have got."""

import ctypes
import json
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

Launched = ctypes.CFUNCTYPE(None, ctypes.c_size_t, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p))
DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NUMBERS = (3, 1, 16, 3)
"""Each but the last is of another kind for Triton, which compiles anew for it unless it is told not to."""
KINDS = {
    "x": (torch.zeros(64), torch.zeros(64)[1:], torch.zeros(64, dtype=torch.bfloat16)),
    "n": (1, 2, 16, 17, 1 << 31, 1 << 40, (1 << 40) + 1, 1 << 63, -5, -16, True),
    "scale": (1.0, 2.0, 1, 3),
    "layout": ((0, 1), (1, 3), (16, 3), (5, 32)),
    "WIDTH": (16, 32),
}


class StandIn:
    """The driver at the end of Triton's launches.

    Attributes:
        sizes: bytes of each parameter of the kernel that is launched next.
        launched: a number for the loaded kernel, the grid and the parameters, of every launch.
    """

    def __init__(self, library: str):
        self.sizes: list[int] = []
        self.launched: list[tuple[int, list[int], list[int]]] = []
        self._driver = ctypes.CDLL(library)
        self._callback = Launched(self._launch)
        self._driver.stand_in(self._callback)

    def _launch(self, kernel: int, x: int, y: int, z: int, parameters: Any) -> None:
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)]
        self.launched.append((kernel, [x, y, z], [int.from_bytes(value, "little") for value in values]))

    def take(self) -> list[tuple[int, list[int], list[int]]]:
        """What was launched since it was last asked, without two addresses of Triton's own."""
        taken = [(kernel, grid, values[:-2]) for kernel, grid, values in self.launched]
        self.launched.clear()
        return taken


def main(library: str) -> None:
    stand_in = StandIn(library)
    _put_in_place_of_a_gpu()
    from triton_deq.kernels.catalog import ENTRIES

    kernels = {entry.kernel: None for entry in ENTRIES}
    found = {
        "catalog": [
            _of_catalog([each for each in ENTRIES if each.kernel is kernel], stand_in) for kernel in kernels
        ],
        "toy": _of_every_kind(stand_in),
    }
    print(json.dumps(found))


def _of_catalog(entries: list[Any], stand_in: StandIn) -> dict[str, Any]:
    """What a kernel got, and what it was given, for several numbers where it leaves them open."""
    from triton_deq.ops.launch import _launch_known

    entry = max(entries, key=lambda entry: len(list(_leaves(tuple(entry.arguments.values())))))
    kernel, constants = entry.kernel, {**entry.arguments, **entry.options}
    free = {of.name: of.do_not_specialize for of in kernel.params if not of.is_constexpr}
    arguments = {name: _argument(constants.pop(name)) for name in free}
    stand_in.sizes = _sizes(kernel.warmup(grid=(1,), **arguments, **constants))
    constants.pop("enable_fp_fusion")
    wanted = []
    for number in NUMBERS:
        given = {name: _with(number, of) if free[name] else of for name, of in arguments.items()}
        _launch_known(kernel, (number, 2), 0, tuple(given.values()), constants)
        passed = [each for name, of in given.items() for each in _passed(of, free[name])]
        wanted.append(([number, 2, 1], passed))
    launched = stand_in.take()
    return {
        "kernel": kernel.fn.__name__,
        "wanted": wanted,
        "got": [(grid, values) for _, grid, values in launched],
        "compiled": len({of for of, *_ in launched}),
    }


def _of_every_kind(stand_in: StandIn) -> list[Any]:
    """Of one kernel: arguments, what Triton launched for them, and twice what was launched past it."""
    from triton_deq.ops.launch import _launch_known

    from .toy import toy_kernel

    rows, draw = [], random.Random(0)
    for _ in range(150):
        x, *rest, width = (draw.choice(kinds) for kinds in KINDS.values())
        options = {"WIDTH": width, "num_warps": 1}
        compiled = toy_kernel.warmup(x, *rest, grid=(1,), **options, enable_fp_fusion=True)
        stand_in.sizes = _sizes(compiled)
        toy_kernel[(1,)](x, *rest, **options, enable_fp_fusion=True)
        for _ in range(2):
            _launch_known(toy_kernel, (1,), 0, (x, *rest), options)
        rows.append({"given": str((x.dtype, x.data_ptr() % 16, *rest, width)), "launched": stand_in.take()})
    return rows


def _put_in_place_of_a_gpu() -> None:
    """What Triton asks PyTorch, which has no GPU here."""
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    driver.set_active(CudaDriver())


def _leaves(argument: Any) -> Iterator[Any]:
    if isinstance(argument, tuple):
        for each in argument:
            yield from _leaves(each)
    else:
        yield argument


def _argument(value: Any) -> Any:
    """What stands in the catalog, with a tensor for each pointer."""
    if isinstance(value, tuple):
        return tuple(map(_argument, value))
    if not hasattr(value, "dtype"):
        return value
    name = DTYPES.get(value.dtype) or re.sub(r"^(u?)i?(\d+)$", r"\1int\2", value.dtype)
    return torch.empty(64, dtype=getattr(torch, name))


def _with(number: int, argument: Any) -> Any:
    """Other numbers in the place of those that a kernel is not to be compiled for."""
    return tuple(_with(number, each) for each in argument) if isinstance(argument, tuple) else number


def _passed(argument: Any, free: bool) -> Iterator[int]:
    """The parameters that an argument becomes; an integer 1 that a kernel is compiled for is none."""
    for each in _leaves(argument):
        if isinstance(each, torch.Tensor):
            yield each.data_ptr()
        elif each is not None and (free or each != 1):
            yield int(each)


def _sizes(compiled: Any) -> list[int]:
    """Bytes of each parameter of a kernel."""
    (parameters,) = re.findall(r"\.visible \.entry \w+\(([^)]*)\)", compiled.asm["ptx"])
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", parameters)]


if __name__ == "__main__":
    main(sys.argv[1])
