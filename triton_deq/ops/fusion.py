"""The multiscale sum of a DEQ on several resolutions, as an op, and its vector-Jacobian product.

Sums that do not wait for each other go together: one launch serves a few.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import recorded, transformed
from ..reference import fusion as reference
from .launch import (
    Part,
    fresh,
    kernels_serve,
    laid,
    launch,
    next_power_of_2,
    sample_stride,
    shared,
    wide_dtype,
)

TILE = 2048
"""Entries of a program."""


class Sum(NamedTuple):
    """What `fusion` takes of one sum, and where its value is left: of any floating dtype."""

    base: Tensor
    terms: Sequence[Tensor] = ()
    relu: bool = True
    out: Tensor | None = None


def fusion(base: Tensor, terms: Sequence[Tensor], relu: bool = True, backend: str = "auto") -> Tensor:
    """`relu(base + Σ up(t))`, where up repeats each pixel of t k × k times (arXiv 2006.08656, section 3.2).

    Args:
        base: `[B, C, H, W]`, floating.
        terms: any number of tensors `[B, C, H/k, W/k]` of base's dtype, each with a k of its own.
        relu: whether a relu ends it.
        backend: "auto", "triton" or "reference".

    Returns:
        Like base, channels-last where that is; differentiable to any order.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
    """
    return fusion_each([Sum(base, terms, relu)], backend)[0]


def fusion_each(sums: Sequence[Sum], backend: str = "auto") -> list[Tensor]:
    """The value of `fusion` for each sum, in shared launches where nobody asks for gradients.

    Launches are shared by sums of as many samples. With an `out`, for which nobody may, terms may be of other
    dtypes than their base.
    """
    for each in sums:
        _check(each.base, each.terms)
    served = [
        kernels_serve(base, backend, *(terms if out is None else ()), autocast=True)
        for base, terms, _, out in sums
    ]
    together = all(served) and _as_many([base for base, *_ in sums])
    if together and not any(recorded(base, *terms) for base, terms, *_ in sums):
        return fusion_fwd(sums)
    return [_value(each, does) for each, does in zip(sums, served, strict=True)]


def _as_many(maps: Sequence[Tensor]) -> bool:
    return len({len(each) for each in maps}) == 1


def _value(given: Sum, served: bool) -> Tensor:
    base, terms, relu, out = given
    if not served and (transformed() or base.numel() == 0):
        value = reference.fusion(base, terms, relu)
        return value if out is None else out.copy_(value)
    if recorded(base, *terms):
        return FusionFunction.apply(relu, served, base, *terms)
    return fusion_fwd([given])[0] if served else reference.fusion_fwd(*given)


def fusion_vjp(
    vector: Tensor, value: Tensor | None, factors: Sequence[int], backend: str = "auto"
) -> tuple[Tensor, ...]:
    """The gradients of `⟨vector, value⟩`: in base `v = vector ⊙ 1[value > 0]`, in each term its block sums.

    Args:
        vector: `[B, C, H, W]`.
        value: what `fusion` returned, or None if that was without its relu.
        factors: k of each term, which divides H and W.
        backend: "auto", "triton" or "reference".

    Returns:
        One tensor like vector and one `[B, C, H/k, W/k]` for each term; differentiable in vector.

    Raises:
        ValueError: a factor that does not divide H and W, or a value of another shape.
    """
    return fusion_vjp_each([vector], [value], [factors], backend)[0]


def fusion_vjp_each(
    vectors: Sequence[Tensor],
    values: Sequence[Tensor | None],
    factors: Sequence[Sequence[int]],
    backend: str = "auto",
) -> list[tuple[Tensor, ...]]:
    """`fusion_vjp` for each sum, in shared launches like those of `fusion_each`."""
    given = list(zip(vectors, values, factors, strict=True))
    for each in given:
        _check_vjp(*each)
    served = [kernels_serve(vector, backend, autocast=True) for vector in vectors]
    if all(served) and _as_many(vectors) and not recorded(*vectors):
        return fusion_vjp_fwd(vectors, values, factors)
    return [_gradients(*each, does) for each, does in zip(given, served, strict=True)]


def _gradients(
    vector: Tensor, value: Tensor | None, factors: Sequence[int], served: bool
) -> tuple[Tensor, ...]:
    if not served and (transformed() or vector.numel() == 0):
        return reference.fusion_vjp(vector, value, factors)
    if recorded(vector):
        return FusionVJPFunction.apply(vector, value, tuple(factors), served)
    return _vjp_of(served, vector, value, factors)


def _vjp_of(served: bool, vector: Tensor, value: Tensor | None, factors: Sequence[int]) -> tuple[Tensor, ...]:
    if served:
        return fusion_vjp_fwd([vector], [value], [factors])[0]
    return reference.fusion_vjp_fwd(vector, value, factors)


# ------------------------------------------------------------------------------------------- the launches


def fusion_fwd(sums: Sequence[Sum]) -> list[Tensor]:
    """`reference.fusion_fwd` of each sum, by the kernel, which takes three terms at once."""
    values = [out if out is not None and laid(out) is out else fresh(base) for base, _, _, out in sums]
    for first in range(0, max(1, *(len(each.terms) for each in sums)), 3):
        parts = [
            _sum(value if first else base, terms[first : first + 3], relu and first + 3 >= len(terms), value)
            for (base, terms, relu, _), value in zip(sums, values, strict=True)
            if first == 0 or first < len(terms)
        ]
        for grid, args, constants in shared(parts, len(values[0])):
            launch(_kernels().fusion_kernel, grid, *args, **constants)
    return [
        value if out is None or value is out else out.copy_(value)
        for (*_, out), value in zip(sums, values, strict=True)
    ]


def _sum(base: Tensor, terms: Sequence[Tensor], relu: bool, value: Tensor) -> Part:
    base = laid(base)
    three = [laid(term).contiguous(memory_format=torch.channels_last) for term in terms]
    height, width = base.shape[2:]
    rest = 3 - len(three)
    dtype = torch.float64 if any(term.dtype == torch.float64 for term in three) else base.dtype
    tiles = _tiles(base.shape[1], height * width, dtype, TILE)
    return Part(
        operands=(
            base,
            *three,
            *[base] * rest,
            value,
            sample_stride(base),
            sample_stride(value),
            height,
            width,
        ),
        constants=(
            base.shape[1],
            *(height // term.shape[2] for term in three),
            *(0,) * rest,
            relu,
            *tiles.tile,
        ),
        programs=tiles.programs,
        warps=tiles.warps,
        result=value,
    )


def fusion_vjp_fwd(
    vectors: Sequence[Tensor], values: Sequence[Tensor | None], factors: Sequence[Sequence[int]]
) -> list[tuple[Tensor, ...]]:
    """`reference.fusion_vjp_fwd` of each sum, by the kernel."""
    plans = [_levels(*each) for each in zip(vectors, values, factors, strict=True)]
    for level in range(max(len(levels) for levels, _ in plans)):
        parts = [levels[level] for levels, _ in plans if level < len(levels)]
        for grid, args, constants in shared(parts, len(vectors[0])):
            launch(_kernels().fusion_vjp_kernel, grid, *args, **constants)
    return [found for _, found in plans]


def _levels(
    vector: Tensor, value: Tensor | None, factors: Sequence[int]
) -> tuple[list[Part], tuple[Tensor, ...]]:
    """What to launch one after another, coarser sums of finer ones if possible, and what it gives."""
    vector = laid(vector)
    v = vector if value is None else fresh(vector)
    held: dict[int, Tensor] = {1: v}
    coarser = sorted({*factors} - {1})
    levels: list[Part] = []
    for factor in coarser or ([1] if value is not None else []):
        finer = max(each for each in held if factor % each == 0)
        source, relu = (vector, value is not None) if finer == 1 else (held[finer], False)
        step, (height, width) = factor // finer, source.shape[2:]
        pooled = v
        if factor > 1:
            pooled = held[factor] = torch.empty(
                (*vector.shape[:2], height // step, width // step),
                dtype=vector.dtype,
                device=vector.device,
                memory_format=torch.channels_last,
            )
        tiles = _tiles(vector.shape[1], height // step * (width // step), vector.dtype, TILE)
        masked = source if value is None or not relu else laid(value)
        # The first reads the vector, and writes v.
        flags = (relu, not levels and value is not None)
        levels.append(
            Part(
                operands=(source, masked, v, pooled, sample_stride(source), height, width),
                constants=(vector.shape[1], step, *flags, *tiles.tile),
                programs=tiles.programs,
                warps=tiles.warps,
                result=pooled,
            )
        )
    return levels, (v, *(held[factor] for factor in factors))


class FusionFunction(torch.autograd.Function):
    """`(base, *terms) ↦ value`; its gradient is `fusion_vjp`, which is differentiable itself."""

    @staticmethod
    def forward(ctx, relu: bool, served: bool, base: Tensor, *terms: Tensor):
        given = Sum(base, terms, relu)
        value = fusion_fwd([given])[0] if served else reference.fusion_fwd(*given[:3])
        ctx.save_for_backward(value if relu else None)
        ctx.factors, ctx.served = tuple(base.shape[2] // term.shape[2] for term in terms), served
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        (value,) = ctx.saved_tensors
        found = fusion_vjp(grad, value, ctx.factors, _backend(ctx.served))
        needed = ctx.needs_input_grad[2:]
        return None, None, *(each if need else None for each, need in zip(found, needed, strict=True))


class FusionVJPFunction(torch.autograd.Function):
    """`vector ↦ (v, *pooled)`; linear, and its transpose is the sum without relu, masked as v is."""

    @staticmethod
    def forward(ctx, vector: Tensor, value: Tensor | None, factors: tuple[int, ...], served: bool):
        ctx.save_for_backward(value)
        ctx.factors, ctx.served, ctx.shape = factors, served, vector.shape
        ctx.set_materialize_grads(False)
        found = _vjp_of(served, vector, value, factors)
        return tuple(each.view_as(each) for each in found)

    @staticmethod
    def backward(ctx, base: Tensor | None, *terms: Tensor | None):
        (value,) = ctx.saved_tensors
        if base is None and all(each is None for each in terms):
            return (None,) * 4
        given = [each for each in terms if each is not None]
        base = given[0].new_zeros(ctx.shape) if base is None else base
        total = fusion(base, given, relu=False, backend=_backend(ctx.served))
        return total if value is None else torch.where(value > 0, total, 0), None, None, None


class Tiles(NamedTuple):
    """A program a tile of pixels and channels; tile is WIDE, ROWS and BLOCK. So many programs a sample."""

    tile: tuple[Any, int, int]
    programs: int
    warps: int


@lru_cache(maxsize=1024)
def _tiles(channels: int, pixels: int, dtype: torch.dtype, most: int) -> Tiles:
    """Tiles of `most` entries."""
    block = min(next_power_of_2(channels), 128)
    rows = min(most // block, next_power_of_2(pixels))
    return Tiles(
        tile=(wide_dtype(dtype), rows, block),
        programs=-(-pixels // rows) * -(-channels // block),
        warps=min(max(rows * block // 512, 1), 4),
    )


def _backend(served: bool) -> str:
    return "triton" if served else "reference"


def _check_vjp(vector: Tensor, value: Tensor | None, factors: Sequence[int]) -> None:
    for factor in factors:
        if factor < 1 or vector.shape[2] % factor or vector.shape[3] % factor:
            raise ValueError(
                f"factors has {factor}, which does not divide vector's {tuple(vector.shape[2:])}: give the "
                "H/h of each term"
            )
    if value is not None and value.shape != vector.shape:
        raise ValueError(
            f"vector has shape {tuple(vector.shape)}, value has {tuple(value.shape)}: give them one shape"
        )


def _check(base: Any, terms: Sequence[Any]) -> None:
    if not isinstance(base, Tensor) or base.dim() != 4 or not base.is_floating_point():
        given = f"{base.dtype} {tuple(base.shape)}" if isinstance(base, Tensor) else type(base).__name__
        raise TypeError(f"base is {given}: give a floating tensor [B, C, H, W]")
    for place, term in enumerate(terms):
        fits = term.dim() == 4 and term.shape[:2] == base.shape[:2] and min(term.shape[2:]) > 0
        factor = base.shape[2] // term.shape[2] if fits else 0
        if not fits or tuple(base.shape[2:]) != (factor * term.shape[2], factor * term.shape[3]):
            raise ValueError(
                f"terms[{place}] has shape {tuple(term.shape)}, base has {tuple(base.shape)}: its height and "
                "width must be base's divided by one whole number, and its other sizes base's"
            )


@cache
def _kernels() -> ModuleType:
    from ..kernels import fusion

    return fusion
