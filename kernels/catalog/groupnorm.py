"""GroupNorm's kernels in the catalog."""

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from .. import groupnorm as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded, unit_of


@dataclass(frozen=True)
class Uses:
    """What an op is asked for.

    more: with a residual, or in the second derivatives with its gradient. apart: how many channels of others
    lie between its pixels, or in the product between those of its result.
    """

    shift: bool = False
    more: bool = False
    gain: bool = True
    relu: bool = True
    parameters: bool = False
    statistics: bool = True
    apart: int = 0


def _entry(
    kernel: str,
    dtype: str,
    batch: int,
    *maps: tuple[int, int, Uses],
    groups: int = 8,
    note: str = "",
    spilled: int = 0,
) -> Entry:
    """maps: pixels and channels of each, and what is done with it."""
    pixels, channels, uses = maps[0]
    name = name_of(kernel, dtype, f"{pixels}x{channels}", note)
    packed = [_packed(dtype, batch, channels, groups) for _, channels, _ in maps]
    runs = [_power(channels // groups * each) for (_, channels, _), each in zip(maps, packed, strict=True)]
    if kernel == "groupnorm_second":
        bulk, arguments, warps = _second(dtype, pixels, channels, groups, packed[0], uses)
    else:
        part = _forward if kernel == "groupnorm" else _vjp
        parts = [part(dtype, groups, *each) for each in zip(packed, *zip(*maps, strict=True), strict=True)]
        bulk = parts[0][0]
        arguments = {
            "maps": tuple(operands for _, operands, _, _ in parts),
            "samples": batch,
            "PROGRAMS": tuple(groups // each for each in packed),
            "CONSTANTS": tuple(constants for _, _, constants, _ in parts),
        }
        warps = max(warps for *_, warps in parts)
        # The warps are the largest map's; of a small one a thread may have less than it could read at once.
        for (pixels, channels, _), each in zip(maps, packed, strict=True):
            (_, rows, block), _ = _tiles(dtype, pixels, channels // groups * each, 4096)
            runs.append(max(rows * block // (64 * warps), 1))
    access = min(16, BYTES[dtype] * min(runs))
    operations = 30 if kernel == "groupnorm_second" else 12
    return Entry(
        op="groupnorm",
        name=name,
        kernel=getattr(kernels, f"{kernel}_kernel"),
        shape=(batch, sum(pixels * channels for pixels, channels, _ in maps)),
        arguments=arguments,
        contiguous=bulk,
        traffic=lambda entry, batch, entries: len(bulk) * batch * entries * BYTES[entry.dtype],
        work=lambda entry, batch, entries: {unit_of(entry): operations * batch * entries},
        budget=Budget(spilled=spilled, load=access, store=access),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def _forward(dtype: str, groups: int, packed: int, pixels: int, channels: int, uses: Uses) -> tuple[Any, ...]:
    """What is bulk, the operands, the constants and the warps of a map."""
    state, wide = Pointer(dtype), _wide(dtype)
    tiles, warps = _tiles(dtype, pixels, channels // groups * packed, 4096)
    numbers = wide if uses.statistics else state
    dense, of_x = pixels * channels, pixels * (channels + uses.apart)
    # In place of what is absent stands x.
    strides = (of_x, *(dense if there else of_x for there in (uses.shift, uses.more)), dense)
    operands = (*(state,) * 7, *(numbers,) * 2, *strides)
    flags = (False, uses.shift, uses.gain, uses.more, uses.relu, uses.statistics, 1e-5)
    bulk = _chosen(x_ptr=True, shift_ptr=uses.shift, residual_ptr=uses.more, out_ptr=True)
    return bulk, operands, (pixels, channels, groups, packed, *flags, *tiles, uses.apart), warps


def _vjp(dtype: str, groups: int, packed: int, pixels: int, channels: int, uses: Uses) -> tuple[Any, ...]:
    """The same of its product."""
    state, wide = Pointer(dtype), _wide(dtype)
    tiles, warps = _tiles(dtype, pixels, channels // groups * packed, 4096)
    dense, of_x = pixels * channels, pixels * (channels + uses.apart)
    operands = (*(state,) * 5, *(wide,) * 2, *(state,) * 4, wide, *(dense,) * 4, of_x)
    flags = (False, uses.shift, uses.gain, uses.relu, False, uses.relu, uses.parameters)
    relu = uses.relu
    bulk = _chosen(
        vector_ptr=True, x_ptr=True, shift_ptr=uses.shift, value_ptr=relu, of_x_ptr=True, v_ptr=relu
    )
    return bulk, operands, (pixels, channels, groups, packed, *flags, *tiles, uses.apart), warps


def _second(dtype: str, pixels: int, channels: int, groups: int, packed: int, uses: Uses) -> tuple[Any, ...]:
    """What is bulk, the arguments and the warps of the second derivatives."""
    state, wide = Pointer(dtype), _wide(dtype)
    inputs = ("along", "beside", "vector", "x", "shift", "value")
    states = (*inputs, "of_x", "of_vector", "of_sum", "mask", "gain")
    tiles, warps = _tiles(dtype, pixels, channels // groups * packed, 2048, 2048)
    arguments = {
        **{f"{name}_ptr": state for name in states},
        **dict.fromkeys(("mean_ptr", "inverse_ptr", "sums_ptr"), wide),
        **{f"{name}_stride": pixels * channels for name in inputs},
        "P": pixels,
        "C": channels,
        "G": groups,
        "PACKED": packed,
        "MASK": False,
        "SHIFT": uses.shift,
        "GAIN": uses.gain,
        "RELU": uses.relu,
        "SUM": False,
        "BESIDE": uses.more,
        **dict(zip(("WIDE", "ROWS", "BLOCK"), tiles, strict=True)),
    }
    bulk = _chosen(
        along_ptr=True,
        beside_ptr=uses.more,
        vector_ptr=True,
        x_ptr=True,
        shift_ptr=uses.shift,
        value_ptr=uses.relu,
        of_x_ptr=True,
        of_vector_ptr=True,
    )
    return bulk, arguments, warps


def _chosen(**pointers: bool) -> tuple[str, ...]:
    return tuple(name for name, there in pointers.items() if there)


def _wide(dtype: str) -> Pointer:
    return Pointer("fp64" if dtype == "fp64" else "fp32")


def _tiles(dtype: str, pixels: int, width: int, most: int, whole: int = 16384) -> tuple[tuple[Any, ...], int]:
    """As the ops cut a program's channels into tiles: WIDE, ROWS and BLOCK, and the warps."""
    block, rows = 1 << (width - 1).bit_length(), 1 << (pixels - 1).bit_length()
    if rows * block > (most if dtype == "fp64" else whole):
        rows = min(max(most // block, 1), rows)
    wide = tl.float64 if dtype == "fp64" else tl.float32
    return (wide, rows, block), min(max(rows * block // 512, 1), 16)


def _packed(dtype: str, batch: int, channels: int, groups: int) -> int:
    """As the ops give a program several groups, on 132 multiprocessors."""
    width, packed = channels // groups, 1
    while width & (width - 1) == 0 and width * BYTES[dtype] * packed < 32 and groups % (2 * packed) == 0:
        if batch * groups < 2 * packed * 132:
            break
        packed *= 2
    return packed


def _power(number: int) -> int:
    """The largest power of 2 in it."""
    return number & -number


PLAIN = Uses()
TAIL = Uses(shift=True, more=True)
STAGE = tuple(
    (pixels, channels, Uses(shift=place == 0, more=True, statistics=False))
    for place, (pixels, channels) in enumerate(((1024, 32), (256, 64), (64, 128), (16, 256)))
)
"""The four resolutions of a block's end, on images of 32×32. The first has a launch of its own."""

ENTRIES = (
    _entry("groupnorm", "fp32", 32, (3136, 160, PLAIN)),
    _entry("groupnorm", "bf16", 32, (3136, 160, PLAIN)),
    traded(_entry("groupnorm", "bf16", 32, (3136, 32, TAIL), note="tail")),
    _entry(
        "groupnorm",
        "fp16",
        32,
        (49, 256, Uses(gain=False, relu=False, statistics=False)),
        groups=4,
        note="post",
    ),
    _entry("groupnorm", "bf16", 96, STAGE[0], note="stage"),
    traded(_entry("groupnorm", "bf16", 96, *STAGE[1:], note="stage")),
    _entry("groupnorm", "fp32", 96, STAGE[0], note="stage"),
    _entry("groupnorm", "bf16", 96, (256, 32, Uses(statistics=False, apart=96)), note="apart"),
    _entry("groupnorm_vjp", "fp32", 32, (3136, 160, PLAIN)),
    traded(_entry("groupnorm_vjp", "bf16", 32, (784, 64, Uses(parameters=True)), note="parameters")),
    _entry("groupnorm_vjp", "bf16", 96, STAGE[0], note="stage"),
    _entry("groupnorm_vjp", "bf16", 96, *STAGE[1:], note="stage"),
    _entry("groupnorm_vjp", "fp32", 96, STAGE[0], note="stage"),
    _entry("groupnorm_vjp", "bf16", 96, (256, 32, Uses(apart=96)), note="apart"),
    _entry("groupnorm_second", "fp32", 32, (3136, 160, PLAIN)),
    _entry("groupnorm_second", "bf16", 32, (784, 64, TAIL), note="tail"),
    _entry("groupnorm_second", "bf16", 96, STAGE[0], note="stage"),
)
