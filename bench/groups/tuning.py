"""Launch parameters: the ones this library takes, beside others that might be faster on the device at hand.

"triton-deq" is the default. A variant that beats it by more than the spread of both is a reason to change the
rule that chose it. All are replayed from a CUDA graph of CALLS calls, so the cache is as warm as in a loop.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import triton_deq.ops
from triton_deq.ops.launch import Again, launch, shared
from triton_deq.timing import Call, graphed

from ..cases import Case, Setting, Variant, ours
from . import kernels

GROUP = "tuning"
CALLS = 10


@dataclass(frozen=True)
class Choice:
    """What differs from the default.

    Attributes:
        name: as the rows have it.
        compiler: `num_warps` and `num_stages`, for every launch of the op.
        values: names in the op's module, and what stands for them.
    """

    name: str
    compiler: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def cases(setting: Setting) -> Iterator[Case]:
    if ours(setting)[0][1] != "triton":
        return  # the reference has nothing to choose
    tiny = setting.scale == "tiny"
    for op, dtype, shape, choices in _plan():
        if tiny and op not in ("norm", "anderson_advance"):
            continue
        shape, choices = ((2, 16), choices[:1]) if tiny else (shape, choices)
        variants = [Variant("triton-deq", partial(_prepare, setting, op, dtype, shape, None), "triton")]
        for choice in choices:
            prepare = partial(_prepare, setting, op, dtype, shape, choice)
            variants.append(Variant(choice.name, prepare, "triton"))
        yield Case(GROUP, op, f"{CALLS} calls", dtype, shape, tuple(variants))


def _plan() -> Iterator[tuple[str, torch.dtype, tuple[int, ...], list[Choice]]]:
    half, full = torch.bfloat16, torch.float32
    for dtype in (half, full):
        for op in ("feedforward", "feedforward_vjp"):
            yield op, dtype, (2100, 704), _product_choices(dtype)
        for op in ("mlp", "mlp_vjp"):
            yield op, dtype, (1024, 1024), _product_choices(dtype)
        for op in ("mlp_probe", "mlp_probe_vjp"):
            yield op, dtype, (1024, 1024), _probe_choices(dtype)
    yield "mlp", half, (4096, 2048), _product_choices(half)  # with several tiles to a multiprocessor
    for shape in ((32, 16384), (32, 1048576)):
        for dtype in (full, half):
            registers = [Choice("maxnreg=255", {"maxnreg": 255})] if dtype == full else []
            yield "anderson_residual", dtype, shape, _parts_choices() + registers
            yield "anderson_advance", dtype, shape, _parts_choices() + _wave_choices()
    yield "broyden_residual", full, (32, 16384), _pairs_choices()
    yield "broyden_advance", full, (32, 16384), _pairs_choices() + _wave_choices()
    yield "anderson_step", full, (32, 1024), [Choice(f"num_warps={n}", {"num_warps": n}) for n in (1, 2, 8)]
    rows = [(1024, 1), (1024, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8)]
    for op in ("norm", "norm_vjp"):
        for width in ((2100, 700), (16384, 1024)):
            yield op, half, width, _tile_choices(rows)
    for dtype, size in ((half, (32, 56, 32)), (full, (96, 32, 32))):
        for op in ("groupnorm", "groupnorm_vjp"):
            yield op, dtype, size, _part_choices(size[2])
    for size in ((32, 56, 160), (96, 32, 32), (96, 8, 128)):
        for op in ("groupnorm", "groupnorm_vjp"):
            yield op, half, size, _part_choices(size[2])
        for op in ("fusion", "fusion_vjp"):
            yield op, half, size, _tile_choices([(1024, 2), (1024, 4), (2048, 8), (4096, 4), (4096, 8)])
    for size in ((96, 32, 32), (32, 56, 32)):
        launches = [
            Choice(f"sharing={most}", values={"shared": partial(shared, most=most)}) for most in (1, 2)
        ]
        warps = [Choice(f"num_warps={warps}", {"num_warps": warps}) for warps in (4, 16)]
        yield "groupnorm_each", half, size, launches + warps
    for weight in ((1280, 2304), (48000, 700), (700, 48000)):
        warps = [Choice(f"num_warps={warps}", {"num_warps": warps}) for warps in (2, 4, 8, 16)]
        yield "weightnorm", full, weight, warps
    for dtype in (half, full):
        for op in kernels.ATTENTION:
            yield op, dtype, (14, 150), _attention_choices(dtype)


def _parts_choices() -> list[Choice]:
    cuts = [
        (1, 8192, 4096),
        (2, 8192, 4096),
        (4, 4096, 4096),
        (8, 8192, 4096),
        (4, 8192, 2048),
        (4, 8192, 8192),
    ]
    return [
        Choice(
            f"warps={warps} bytes={size} programs={programs}",
            values={"WARPS": warps, "WARP_BYTES": size, "PROGRAMS": programs},
        )
        for warps, size, programs in cuts
    ]


def _pairs_choices() -> list[Choice]:
    return [
        Choice(f"bytes={size} num_warps={warps}", {"num_warps": warps}, {"BLOCK_BYTES": size})
        for size, warps in ((2048, 4), (4096, 8), (8192, 4), (8192, 8))
    ]


def _wave_choices() -> list[Choice]:
    return [Choice(f"resident={count}", values={"RESIDENT": count}) for count in (1, 2, 3, 6, 64)]


def _tile_choices(sizes: list[tuple[int, int]]) -> list[Choice]:
    return [
        Choice(f"tile={tile} num_warps={warps}", {"num_warps": warps}, {"TILE": tile})
        for tile, warps in sizes
    ]


def _part_choices(channels: int) -> list[Choice]:
    """Of GroupNorm: groups a program, the largest part that is one tile, the tiles of others, and warps."""
    from triton_deq.ops import groupnorm

    def choice(packed: int, whole: int, tile: int, warps: int) -> Choice:
        # Not the cached one, which knows nothing of the choice.
        tiles = {"_packed": lambda *_: packed, "_tiles": groupnorm._tiles.__wrapped__}
        name = f"packed={packed} whole={whole} tile={tile} num_warps={warps}"
        return Choice(name, {"num_warps": warps}, {**tiles, "WHOLE": whole, "TILE": tile})

    sizes = [(4096, 2048, 8), (4096, 4096, 8), (16384, 4096, 16)]
    several = (1, 2, 4) if channels & (channels - 1) == 0 else (1,)  # in whose groups a tile has gaps
    return [choice(packed, *each) for packed in several for each in sizes]


def _attention_choices(dtype: torch.dtype) -> list[Choice]:
    wide = [(16, 1, 1), (16, 1, 2), (16, 2, 1), (32, 2, 1)]
    narrow = [(16, 1, 2), (32, 2, 1), (32, 2, 2), (32, 2, 3), (32, 4, 2), (64, 4, 2)]
    if dtype.itemsize > 2:
        return [_attention_choice(*each) for each in wide]
    # With 168 registers six programs of the forward kernel fit a multiprocessor instead of five.
    return [*(_attention_choice(*each) for each in narrow), Choice("maxnreg=168", {"maxnreg": 168})]


def _attention_choice(block: int, warps: int, stages: int) -> Choice:
    constants = {"BLOCK": block, "num_warps": warps, "num_stages": stages}

    def tiles(dtype: torch.dtype, rows: int, **kind: bool) -> dict[str, int]:
        return constants

    return Choice(" ".join(f"{name}={value}" for name, value in constants.items()), values={"_tiles": tiles})


def _product_choices(dtype: torch.dtype) -> list[Choice]:
    """BLOCK_B, BLOCK_N, BLOCK_K, warps, stages."""
    if dtype.itemsize == 2:
        sizes = [
            (128, 128, 64, 8, 4),
            (128, 128, 64, 4, 3),
            (128, 128, 64, 4, 4),
            (128, 256, 64, 8, 3),
            (256, 128, 64, 8, 3),
            (128, 128, 32, 8, 4),
            (64, 256, 64, 8, 3),
            (128, 256, 64, 8, 4),
            (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 4),
            (128, 64, 64, 8, 3),
            (128, 64, 64, 4, 4),
            (32, 64, 64, 4, 3),
        ]
        # 128 is what two programs of the largest tile have; the default where no epilogue spills for it.
        bounds = [Choice(f"maxnreg={most}", {"maxnreg": most}) for most in (128, 255)]
    else:
        sizes = [(64, 64, 16, 4, 3), (64, 64, 32, 8, 3), (128, 64, 16, 8, 3), (128, 128, 16, 8, 3)]
        bounds = []
    return [*(_product_choice(*each) for each in sizes), *bounds]


def _probe_choices(dtype: torch.dtype) -> list[Choice]:
    """Tiles of more rows, and other numbers of warps, for products that make random numbers as well."""
    if dtype.itemsize == 2:
        sizes = [(64, 64, 8), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8), (128, 128, 16)]
        return [_product_choice(rows, columns, 64, warps, 3) for rows, columns, warps in sizes]
    sizes = [(32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8)]
    return [_product_choice(rows, columns, 32, warps, 3) for rows, columns, warps in sizes]


def _product_choice(block_b: int, block_n: int, block_k: int, warps: int, stages: int) -> Choice:
    compiler = {"num_warps": warps, "num_stages": stages}

    def tiles(
        rows: int, columns: int, depth: int, like: Tensor, *, group: int = 8, **kind: Any
    ) -> tuple[tuple[int], dict[str, Any]]:
        from triton_deq.ops.products import tiles as default

        _, constants = default(rows, columns, depth, like, group=group)
        constants |= {"BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_K": block_k}
        return (-(-rows // block_b) * -(-columns // block_n),), constants

    name = f"{block_b}x{block_n}x{block_k} num_warps={warps} num_stages={stages}"
    return Choice(name, compiler, {"tiles": tiles})


# ------------------------------------------------------------------------------------------------- running


def _prepare(
    setting: Setting, op: str, dtype: torch.dtype, shape: tuple[int, ...], choice: Choice | None
) -> Call:
    """The op's call of the group `kernels`, CALLS times in a graph, captured under this choice."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=setting.device).to(dtype)

    def repeated() -> None:
        for _ in range(CALLS):
            call()

    with ExitStack() as stack:
        if choice is not None:
            stack.enter_context(_chosen(op, choice))
        call: Callable[[], Any] = kernels.CALLS[op](randn, *shape, "triton")
        if setting.gpu:
            return graphed(repeated, setting.watch)
    return repeated


def module_of(op: str) -> ModuleType:
    """The module of an op or of one of its kernels: the one whose name is the longest beginning of op's."""
    names = [each.name for each in pkgutil.iter_modules(triton_deq.ops.__path__)]
    found = max((name for name in names if f"{op}_".startswith(f"{name}_")), key=len)
    return importlib.import_module(f"triton_deq.ops.{found}")


def _chosen(op: str, choice: Choice) -> Any:
    """The op's module with this choice in place of its own."""
    module = module_of(op)

    def chosen_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Again:
        return launch(kernel, grid, *arguments, **{**constants, **choice.compiler})

    return patch.multiple(module, launch=chosen_launch, **choice.values)
