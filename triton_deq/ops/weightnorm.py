"""Weight normalisation as an op: several weights in shared launches, as products take them."""

from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import recorded
from ..reference import weightnorm as reference
from .launch import Part, kernels_serve, launch, next_power_of_2, shared, wide_dtype

MOST = 4096
"""Entries of a row that a program holds at once."""


class Weight(NamedTuple):
    """A weight `w = g v / ‖v‖`, or v alone.

    Attributes:
        v: `[O, ...]`, floating; a convolution's `[O, I, h, w]` as channels-last, too.
        g: `[O]` and ones, of v's dtype, or None.
        rows, columns: of a matrix v, the least that the value has: zeros fill it up.
    """

    v: Tensor
    g: Tensor | None = None
    rows: int = 0
    columns: int = 0


def weightnorm_each(
    weights: Sequence[Weight], dtype: torch.dtype | None = None, backend: str = "auto"
) -> list[Tensor]:
    """`g v / ‖v‖` of each weight, norms being those of rows (Salimans & Kingma, arXiv 1602.07868, eq. 2).

    Args:
        weights: what to normalise; v and g of one dtype and device.
        dtype: of the values; by default v's.
        backend: "auto", "triton" or "reference".

    Sums are taken in float32, or in float64 for float64. A row of zeros gives NaN, as PyTorch's does.

    Returns:
        Tensors of v's shape and order in memory, or the wider matrices; differentiable to any order.

    Raises:
        ValueError: a g of another length, or zeros behind what is not a matrix.
    """
    for place, weight in enumerate(weights):
        _check(place, weight)
    if not weights:
        return []
    served = all(kernels_serve(v, backend, g, autocast=True) for v, g, *_ in weights)
    rounded = dtype is not None and any(v.dtype == torch.float64 != dtype for v, *_ in weights)
    if not served or rounded:
        return [_by_reference(weight, dtype) for weight in weights]
    tensors = [each for v, g, *_ in weights for each in (v, g)]
    if recorded(*tensors):
        sizes = tuple((rows, columns) for *_, rows, columns in weights)
        return list(WeightnormFunction.apply(dtype, sizes, *tensors))
    return weightnorm_fwd(weights, dtype)


def _by_reference(weight: Weight, dtype: torch.dtype | None) -> Tensor:
    v, g, rows, columns = weight
    matrix, back = _matrix(v)
    length = None if g is None else g.reshape(-1)
    least = max(rows, matrix.shape[0]), max(columns, matrix.shape[1])
    return back(reference.weightnorm(matrix, length, dtype or v.dtype, *least))


# ------------------------------------------------------------------------------------------- the launches


def weightnorm_fwd(weights: Sequence[Weight], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The values by the kernel."""
    parts = [_part(weight, dtype or weight.v.dtype) for weight in weights]
    for grid, args, constants in shared(parts):
        launch(_kernels().weightnorm_kernel, grid, *args, **constants)
    return [part.result for part in parts]


def _part(weight: Weight, dtype: torch.dtype) -> Part:
    v, g, rows, columns = weight
    matrix, back = _matrix(v)
    rows, columns = max(rows, len(matrix)), max(columns, matrix.shape[1])
    out = torch.empty(rows, columns, dtype=dtype, device=v.device)
    tile = _tile(columns)
    return Part(
        operands=(matrix, matrix if g is None else g.reshape(-1), out, len(matrix), rows),
        constants=(matrix.shape[1], columns, g is not None, wide_dtype(v.dtype), *tile[:2]),
        programs=-(-rows // tile[0]),
        warps=tile[2],
        result=back(out),
    )


def weightnorm_vjp_fwd(
    weights: Sequence[Weight], vectors: Sequence[Tensor]
) -> list[tuple[Tensor | None, ...]]:
    """The gradients in v and in g, from those in the values, by the kernel."""
    parts = [_part_vjp(*each) for each in zip(weights, vectors, strict=True)]
    for grid, args, constants in shared(parts):
        launch(_kernels().weightnorm_vjp_kernel, grid, *args, **constants)
    return [part.result for part in parts]


def _part_vjp(weight: Weight, vector: Tensor) -> Part:
    v, g, *_ = weight
    matrix, back = _matrix(v)
    across = vector.permute(0, 2, 3, 1) if _channels_last(v) else vector
    across = across.reshape(len(across), -1).contiguous()
    of_v = torch.empty_like(matrix)
    of_g = of_v if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    tile = _tile(matrix.shape[1])
    return Part(
        operands=(matrix, matrix if g is None else g.reshape(-1), across, of_v, of_g, len(matrix)),
        constants=(
            matrix.shape[1],
            across.shape[1],
            g is not None,
            wide_dtype(v.dtype),
            *tile[:2],
        ),
        programs=-(-len(matrix) // tile[0]),
        warps=tile[2],
        result=(back(of_v), None if g is None else of_g),
    )


class WeightnormFunction(torch.autograd.Function):
    """`(v, g, v, g, …) ↦ (w, w, …)`; a gradient that is to be differentiated again goes through PyTorch."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype | None, sizes: tuple[tuple[int, int], ...], *tensors: Tensor | None):
        ctx.save_for_backward(*tensors)
        ctx.dtype, ctx.sizes = dtype, sizes
        ctx.set_materialize_grads(False)
        return tuple(weightnorm_fwd(_paired(tensors, sizes), dtype))

    @staticmethod
    def backward(ctx, *vectors: Tensor | None):
        weights = _paired(ctx.saved_tensors, ctx.sizes)
        found: list[tuple[Tensor | None, ...]] = [(None, None)] * len(weights)
        places = [place for place, vector in enumerate(vectors) if vector is not None]
        chosen = [weights[place] for place in places]
        given = [vector for vector in vectors if vector is not None]
        if torch.is_grad_enabled():
            pairs = _by_operators(chosen, given, ctx.dtype)
        else:
            pairs = weightnorm_vjp_fwd(chosen, given)
        for place, pair in zip(places, pairs, strict=True):
            found[place] = pair
        return None, None, *(each for pair in found for each in pair)


def _by_operators(
    weights: Sequence[Weight], vectors: Sequence[Tensor], dtype: torch.dtype | None
) -> list[tuple[Tensor | None, ...]]:
    found: list[tuple[Tensor | None, ...]] = []
    for weight, vector in zip(weights, vectors, strict=True):
        v, g = (
            each.detach().requires_grad_() if each is not None and not each.requires_grad else each
            for each in (weight.v, weight.g)
        )
        assert v is not None
        leaves = [v] if g is None else [v, g]
        value = _by_reference(weight._replace(v=v, g=g), dtype)
        gradients = torch.autograd.grad(value, leaves, vector, create_graph=True)
        found.append((*gradients, None)[:2])
    return found


def _paired(tensors: Sequence[Tensor | None], sizes: Sequence[tuple[int, int]]) -> list[Weight]:
    pairs = zip(tensors[::2], tensors[1::2], sizes, strict=True)
    return [Weight(v, g, *size) for v, g, size in pairs]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ shapes and their checks


def _matrix(v: Tensor) -> tuple[Tensor, Any]:
    """A weight as rows `[O, N]`, dense, in the order in which it lies; and the way back from such rows."""
    shape = v.shape
    if _channels_last(v):
        lying = (shape[0], *shape[2:], shape[1])
        return v.permute(0, 2, 3, 1).reshape(len(v), -1), lambda rows: rows.view(lying).permute(0, 3, 1, 2)
    matrix = v.reshape(len(v), -1).contiguous()
    return matrix, lambda rows: rows if v.dim() == 2 else rows.view(shape)


def _channels_last(v: Tensor) -> bool:
    return v.dim() == 4 and v.is_contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1024)
def _tile(columns: int) -> tuple[int, int, int]:
    """ROWS and BLOCK of a program, and its warps."""
    block = min(next_power_of_2(columns), MOST)
    rows = max(1, 1024 // block)
    return rows, block, min(max(rows * block // 512, 1), 8)


def _check(place: int, weight: Weight) -> None:
    v, g, rows, columns = weight
    if g is not None and (len(g) != len(v) or g.numel() != len(v)):
        raise ValueError(
            f"weights[{place}].g has shape {tuple(g.shape)}, v has {tuple(v.shape)}: give one number a row"
        )
    if (rows or columns) and v.dim() != 2:
        raise ValueError(
            f"weights[{place}] asks for zeros behind a v of shape {tuple(v.shape)}: only a matrix has room"
        )


@cache
def _kernels() -> ModuleType:
    from ..kernels import weightnorm

    return weightnorm
