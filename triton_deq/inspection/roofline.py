"""The least time that a kernel's traffic and arithmetic can take on a GPU, and which of them binds.

Sources of the peaks, all for the SXM form without sparsity, bandwidth in TB/s and rates in TFLOP/s:
- A100 80 GB: NVIDIA A100 Tensor Core GPU datasheet (2.039; FP64 9.7, FP32 19.5, TF32 156, BF16 312).
- H100 80 GB: NVIDIA H100 Tensor Core GPU datasheet (3.35; FP64 34, FP32 67, TF32 494, BF16 989).
- H200: NVIDIA H200 Tensor Core GPU datasheet (4.8; arithmetic as H100).
- 32-bit integers: half as many a cycle as float32 additions (H100) or as many (A100), of which a fused
  multiply-add counts two: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """Peaks: bytes a second, and operations a second of each unit."""

    bandwidth: float
    rates: Mapping[str, float]


_HOPPER = {
    "fp64": 34e12,
    "fp32": 67e12,
    "int32": 67e12 / 4,
    "tensor_tf32": 494e12,
    "tensor_bf16": 989e12,
    "tensor_fp16": 989e12,
}
DEVICES = {
    "a100": Device(
        2.039e12,
        {
            "fp64": 9.7e12,
            "fp32": 19.5e12,
            "int32": 19.5e12 / 2,
            "tensor_tf32": 156e12,
            "tensor_bf16": 312e12,
            "tensor_fp16": 312e12,
        },
    ),
    "h100": Device(3.35e12, _HOPPER),
    "h200": Device(4.8e12, _HOPPER),
}

SHAPES = ((8, 4096), (64, 65536), (128, 524288))
"""(batch, entries per sample): an MLP's state, a Transformer's of 128 × 512, a multiscale image model's."""

LAUNCH = 10e-6
"""Seconds of the host for one launch of a Triton kernel from Python, at the least.

An assumption, not a measurement: 10 to 30 µs are usual. A CUDA graph takes about one.
"""


@dataclass(frozen=True)
class Bound:
    """The least time for one kernel, or for the kernels of a solver's step, at one shape.

    traffic: bytes; bandwidth, arithmetic, launches: seconds; binds: the name of the unit, or "bandwidth".
    """

    kernel: str
    device: str
    batch: int
    entries: int
    traffic: int
    bandwidth: float
    arithmetic: float
    launches: float
    binds: str

    @property
    def least(self) -> float:
        """Memory and arithmetic overlap at best; launches are not hidden where the host is the slower."""
        return max(self.bandwidth, self.arithmetic) + self.launches


def bound(entry: Any, device: str, batch: int, entries: int) -> Bound:
    """The roofline of one kernel, without its launch."""
    peak = DEVICES[device]
    traffic = entry.traffic(entry, batch, entries)
    units = {unit: count / peak.rates[unit] for unit, count in entry.work(entry, batch, entries).items()}
    slowest = max(units, key=units.__getitem__)
    bandwidth, arithmetic = traffic / peak.bandwidth, units[slowest]
    binds = "bandwidth" if bandwidth >= arithmetic else slowest
    return Bound(entry.name, device, batch, entries, traffic, bandwidth, arithmetic, 0.0, binds)


def step(name: str, kernels: list[Bound], launch: float) -> Bound:
    """The kernels of a step one after another, with a launch each; f itself is not counted."""
    times = {
        "bandwidth": sum(kernel.bandwidth for kernel in kernels),
        "launches": launch * len(kernels),
        "arithmetic": sum(kernel.arithmetic for kernel in kernels),
    }
    first = kernels[0]
    return Bound(
        name,
        first.device,
        first.batch,
        first.entries,
        sum(kernel.traffic for kernel in kernels),
        times["bandwidth"],
        times["arithmetic"],
        times["launches"],
        max(times, key=times.__getitem__),
    )


def bounds(catalog: Any, chosen: list[Any], device: str, launch: float) -> list[Bound]:
    """All of `chosen` at all SHAPES, then the steps whose kernels are among them."""
    of = {(entry.name, shape): bound(entry, device, *shape) for entry in chosen for shape in SHAPES}
    steps = [
        step(name, [of[kernel, shape] for kernel in kernels], launch)
        for name, kernels in getattr(catalog, "STEPS", {}).items()
        for shape in SHAPES
        if all((kernel, shape) in of for kernel in kernels)
    ]
    return [*of.values(), *steps]
