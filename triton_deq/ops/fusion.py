"""The multiscale sum of a DEQ on several resolutions, as an op, and its vector-Jacobian product."""

from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import fusion as reference
from .launch import (
    fresh,
    kernels_serve,
    laid,
    launch,
    next_power_of_2,
    sample_stride,
    transformed,
    wide_dtype,
)

TILE = 2048
"""Entries of a program."""


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
    _check(base, terms)
    terms = tuple(terms)
    served = kernels_serve(base, backend, *terms, autocast=True)
    if not served and (transformed() or base.numel() == 0):
        return reference.fusion(base, terms, relu)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (base, *terms)):
        return FusionFunction.apply(relu, served, base, *terms)
    return (fusion_fwd if served else reference.fusion_fwd)(base, terms, relu)


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
    served = kernels_serve(vector, backend, autocast=True)
    if not served and (transformed() or vector.numel() == 0):
        return reference.fusion_vjp(vector, value, factors)
    if torch.is_grad_enabled() and vector.requires_grad:
        return FusionVJPFunction.apply(vector, value, tuple(factors), served)
    return (fusion_vjp_fwd if served else reference.fusion_vjp_fwd)(vector, value, factors)


# ------------------------------------------------------------------------------------------- the launches


def fusion_fwd(base: Tensor, terms: Sequence[Tensor], relu: bool) -> Tensor:
    """As `reference.fusion_fwd`, by the kernel, which takes three terms at once."""
    base = laid(base)
    value = fresh(base)
    height, width = base.shape[2:]
    grid, constants = _tiles(*base.shape[:2], height * width, base.dtype, TILE)
    for first in range(0, max(len(terms), 1), 3):
        three = [
            laid(term).contiguous(memory_format=torch.channels_last) for term in terms[first : first + 3]
        ]
        factors = [height // term.shape[2] for term in three]
        rest = 3 - len(three)
        launch(
            _kernels().fusion_kernel,
            grid,
            base,
            *three,
            *[base] * rest,
            value,
            sample_stride(base),
            height,
            width,
            **dict(zip(("K1", "K2", "K3"), factors + [0] * rest, strict=True)),
            RELU=relu and first + 3 >= len(terms),
            **constants,
        )
        base = value
    return value


def fusion_vjp_fwd(vector: Tensor, value: Tensor | None, factors: Sequence[int]) -> tuple[Tensor, ...]:
    """As `reference.fusion_vjp_fwd`, by the kernel: coarser sums are made of finer ones where they can be."""
    vector = laid(vector)
    v = vector if value is None else fresh(vector)
    held: dict[int, Tensor] = {1: v}
    for factor in sorted({1, *factors}):
        write = factor == min({*factors} - {1}, default=1) and value is not None
        if factor == 1 and not (write and not {*factors} - {1}):
            continue
        finer = max(each for each in held if factor % each == 0)
        source, relu = (vector, value is not None) if finer == 1 else (held[finer], False)
        step, (height, width) = factor // finer, source.shape[2:]
        pooled = v
        if factor > 1:
            shape = (*vector.shape[:2], height // step, width // step)
            pooled = torch.empty(
                shape, dtype=vector.dtype, device=vector.device, memory_format=torch.channels_last
            )
            held[factor] = pooled
        grid, constants = _tiles(*vector.shape[:2], height // step * (width // step), vector.dtype, TILE)
        launch(
            _kernels().fusion_vjp_kernel,
            grid,
            source,
            source if value is None or not relu else laid(value),
            v,
            pooled,
            sample_stride(source),
            height,
            width,
            K=step,
            RELU=relu,
            WRITE=write,
            **constants,
        )
    return v, *(held[factor] for factor in factors)


class FusionFunction(torch.autograd.Function):
    """`(base, *terms) ↦ value`; its gradient is `fusion_vjp`, which is differentiable itself."""

    @staticmethod
    def forward(ctx, relu: bool, served: bool, base: Tensor, *terms: Tensor):
        value = (fusion_fwd if served else reference.fusion_fwd)(base, terms, relu)
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
        found = (fusion_vjp_fwd if served else reference.fusion_vjp_fwd)(vector, value, factors)
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


@lru_cache(maxsize=1024)
def _tiles(
    batch: int, channels: int, pixels: int, dtype: torch.dtype, most: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid and the launch's constants: pixels and channels of a program, `most` entries together."""
    block = min(next_power_of_2(channels), 128)
    rows = min(most // block, next_power_of_2(pixels))
    constants = {
        "C": channels,
        "WIDE": wide_dtype(dtype),
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": min(max(rows * block // 512, 1), 4),
    }
    return (-(-pixels // rows), -(-channels // block), batch), constants


def _backend(served: bool) -> str:
    return "triton" if served else "reference"


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
