"""GroupNorm's kernels in the catalog."""

from typing import Any

import triton.language as tl

from .. import groupnorm as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded, unit_of


def _entry(
    kernel: str,
    dtype: str,
    batch: int,
    pixels: int,
    channels: int,
    groups: int = 8,
    *,
    note: str = "",
    shift: bool = False,
    more: bool = False,
    gain: bool = True,
    relu: bool = True,
    parameters: bool = False,
    statistics: bool = True,
    spilled: int = 0,
) -> Entry:
    """more: with a residual, or in the second derivatives with its gradient."""
    second = kernel == "groupnorm_second"
    inputs, outputs, others = {
        "groupnorm": (("x", "shift", "residual"), ("out",), ()),
        "groupnorm_vjp": (("vector", "x", "shift", "value"), ("of_x", "v"), ("of_sum",)),
        "groupnorm_second": (
            ("along", "beside", "vector", "x", "shift", "value"),
            ("of_x", "of_vector"),
            ("of_sum",),
        ),
    }[kernel]
    left_out = {
        "shift": not shift,
        "residual": not more,
        "beside": not more,
        "value": not relu,
        "v": not relu,
    }
    bulk = tuple(f"{name}_ptr" for name in (*inputs, *outputs) if not left_out.get(name))
    flags = {"MASK": False, "SHIFT": shift, "GAIN": gain, "RELU": relu}
    if kernel == "groupnorm":
        flags |= {"RESIDUAL": more, "STATISTICS": statistics, "EPSILON": 1e-5}
        names = ("mask", "gain", "offset")
    else:
        flags |= {"SUM": False, **({"BESIDE": more} if second else {"OTHER": relu, "PARAMETERS": parameters})}
        names = ("mask", "gain")
    tiles, warps = _tiles(pixels, channels, groups, 2048 if second else 4096)
    wide = Pointer("fp64" if dtype == "fp64" else "fp32")
    sums = {} if kernel == "groupnorm" else {"sums_ptr": wide}
    strided = inputs if kernel != "groupnorm" else (*inputs, "out")
    access = min(16, BYTES[dtype] * _power(channels // groups))
    return Entry(
        op="groupnorm",
        name=name_of(kernel, dtype, f"{pixels}x{channels}", note),
        kernel=getattr(kernels, f"{kernel}_kernel"),
        shape=(batch, pixels * channels),
        arguments={
            **{f"{name}_ptr": Pointer(dtype) for name in (*inputs, *outputs, *others, *names)},
            **dict.fromkeys(("mean_ptr", "inverse_ptr"), wide if statistics else Pointer(dtype)),
            **sums,
            **{f"{name}_stride": pixels * channels for name in strided},
            "P": pixels,
            "C": channels,
            "G": groups,
            **flags,
            "WIDE": tl.float64 if dtype == "fp64" else tl.float32,
            **tiles,
        },
        contiguous=bulk,
        traffic=lambda entry, batch, entries: len(bulk) * batch * entries * BYTES[entry.dtype],
        work=lambda entry, batch, entries: {unit_of(entry): (30 if second else 12) * batch * entries},
        budget=Budget(spilled=spilled, load=access, store=access),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def _tiles(pixels: int, channels: int, groups: int, most: int) -> tuple[dict[str, Any], int]:
    """As the ops cut a group into tiles."""
    block = 1 << (channels // groups - 1).bit_length()
    rows = min(max(most // block, 1), 1 << (pixels - 1).bit_length())
    return {"ROWS": rows, "BLOCK": block}, min(max(rows * block // 512, 1), 8)


def _power(number: int) -> int:
    """The largest power of 2 in it."""
    return number & -number


ENTRIES = (
    _entry("groupnorm", "fp32", 32, 3136, 160),
    _entry("groupnorm", "bf16", 32, 3136, 160),
    traded(_entry("groupnorm", "bf16", 32, 3136, 32, note="tail", shift=True, more=True)),
    _entry("groupnorm", "fp16", 32, 49, 256, 4, note="post", gain=False, relu=False, statistics=False),
    _entry("groupnorm_vjp", "fp32", 32, 3136, 160),
    _entry("groupnorm_vjp", "bf16", 32, 784, 64, note="parameters", parameters=True),
    _entry("groupnorm_second", "fp32", 32, 3136, 160),
    _entry("groupnorm_second", "bf16", 32, 784, 64, note="tail", shift=True, more=True),
)
