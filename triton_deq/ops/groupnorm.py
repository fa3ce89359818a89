"""GroupNorm with what surrounds it in a multiscale DEQ, as an op, and its vector-Jacobian product.

Maps that do not wait for each other, as those of several resolutions, go together: one launch serves a few.

Inside torch.compile and in the transforms of torch.func the ordinary operators run: those know what to make
of them. Autocast changes nothing: statistics are wide anyway, and the value has x's dtype.
"""

from collections.abc import Collection, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import compiled_serves, recorded, transformed
from ..checks import check_count, check_number
from ..reference import groupnorm as reference
from ..reference.groupnorm import Gradients, Normalised
from ..reference.record import accumulate_dtype
from .launch import (
    Part,
    channels_of,
    fresh,
    kernels_serve,
    laid,
    launch,
    most_warps,
    next_power_of_2,
    processors,
    sample_stride,
    shared,
    wide_dtype,
)

WHOLE = 16384
"""Entries of 32 bits that a program of 16 warps can hold, so that it reads its part once."""
TILE = 4096
"""Those that it holds at once of a larger part, and of each of five sums in the second derivatives."""
SECOND_TILE = 2048
SECTOR = 32
"""Bytes that a GPU's L2 cache gives or takes at least."""


class Map(NamedTuple):
    """What `groupnorm` takes of one map, and whether its value may take the place of x, being spare."""

    x: Tensor
    groups: int
    gain: Tensor | None = None
    offset: Tensor | None = None
    mask: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    epsilon: float = 1e-5
    out: Tensor | None = None
    spare: bool = False

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """All that a gradient may be asked for in."""
        return self.x, self.gain, self.offset, self.mask, self.shift, self.residual

    def place(self, dtypes: Collection[torch.dtype] | None = None) -> Tensor:
        """Where the value is written: `out` or x if that can be. dtypes: in which; None for any."""
        x, out = self.x, self.out
        if out is not None and (dtypes is None or out.dtype in dtypes) and laid(out) is out:
            return out
        # Some channels of a map stay what they are: the next convolution wants its map dense.
        spare = self.spare and out is None and x.is_contiguous(memory_format=torch.channels_last)
        return x if spare else fresh(x)


def groupnorm(
    x: Tensor,
    groups: int,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    epsilon: float = 1e-5,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`relu(γ ⊙ n + β + r)` with `n = (s − μ) / σ`, `σ² = var(s) + ε`, of `s = m ⊙ x + u`.

    Mean and variance are those of a group of channels of a sample (Wu & He, arXiv 1803.08494). Everything
    but x may be left out, the relu too.

    Args:
        x: `[B, C, H, W]`, floating; channels-last is read as it lies, however far apart samples are, and if
            they are some channels of such a map.
        groups: G, which divides C.
        gain, offset: γ and β `[C]`, both or neither.
        mask: m `[B, C]`, as of a dropout of whole channels; no gradient reaches it.
        shift: u, of x's shape. residual: r, of x's shape.
        relu: whether a relu ends it.
        epsilon: ε above 0.
        backend: "auto", "triton" or "reference".
        out: where the value is left, of x's shape and any floating dtype; only without gradients. May be x.

    Statistics are taken in float32, or in float64 for float64, in two passes.

    Returns:
        `[B, C, H, W]` in x's dtype, channels-last where x is; differentiable to any order.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
    """
    given = Map(x, groups, gain, offset, mask, shift, residual, relu, epsilon, out)
    return groupnorm_each([given], backend, statistics=False)[0][0]


def groupnorm_each(
    maps: Sequence[Map], backend: str = "auto", statistics: bool = True
) -> list[tuple[Tensor, Normalised]]:
    """The value of `groupnorm` for each map, and what `groupnorm_vjp` needs of it, without `statistics` less.

    Maps of which nobody asks for gradients share launches.
    """
    for given in maps:
        _check(given)
    together = _together([given.x for given in maps], backend)
    if together and not any(recorded(*each.inputs) for each in maps):
        found = groupnorm_fwd(maps, statistics)
    elif len(maps) == 1:  # of which that is known already
        found = [_evaluated(maps[0], backend, statistics, together)]
    else:
        found = [_evaluated(given, backend, statistics, _together([given.x], backend)) for given in maps]
    return [
        (value, Normalised(*held, mean, inverse, value if given.relu else None, given.residual is not None))
        for given, (value, mean, inverse) in zip(maps, found, strict=True)
        for held in [(given.x, given.gain, given.mask, given.shift)]
    ]


def _evaluated(given: Map, backend: str, statistics: bool, served: bool) -> tuple[Tensor, Any, Any]:
    """Value, μ and 1/σ of one map, which the kernels can serve or not."""
    if not served and (transformed() or given.x.numel() == 0):
        value, mean, inverse = reference.groupnorm(*given[:9])
        return (value if given.out is None else given.out.copy_(value)), mean, inverse
    if recorded(*given.inputs):
        return GroupNormFunction.apply(
            *given.inputs, given.groups, given.relu, given.epsilon, served, backend
        )
    return groupnorm_fwd([given], statistics)[0] if served else _on_host(given, backend)


def _on_host(given: Map, backend: str) -> tuple[Tensor, Any, Any]:
    """By PyTorch's operators or, of a channels-last map, by what Numba has compiled."""
    x, groups, gain, offset, mask, shift, residual, relu, epsilon, out, _ = given
    if laid(x) is not x or not compiled_serves(backend, x, *given.inputs[1:], out):
        return reference.groupnorm_fwd(*given[:10])
    wide = accumulate_dtype(x.dtype)
    readable = {wide, torch.bfloat16} if wide == torch.float32 else {wide}
    vectors = (None if each is None else each.to(wide).contiguous() for each in (gain, offset, mask))
    maps = (
        None if each is None else laid(each if each.dtype in readable else each.to(wide))
        for each in (shift, residual)
    )
    value, mean, inverse = _compiled().groupnorm_fwd(
        x, groups, *vectors, *maps, relu, epsilon, given.place({x.dtype})
    )
    # PyTorch's operators, which the derivatives are taken by, have statistics in the map's dtype.
    mean, inverse = mean.to(x.dtype), inverse.to(x.dtype)
    return value if out is None or value is out else out.copy_(value), mean, inverse


def groupnorm_vjp(vector: Tensor, held: Normalised, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The gradients of `⟨vector, value⟩` in x and in r; where there was no r, the second means nothing.

    With `v = vector ⊙ 1[value > 0]`, which is the second, and `g = γ ⊙ v`: that in s is
    `(g − mean(g) − n mean(g n)) / σ` with means over a group, and that in x is m times it.

    Args:
        vector: `[B, C, H, W]`.
        held: as `groupnorm_each` gives it.
        backend: "auto", "triton" or "reference".

    Returns:
        A tensor like x and one like vector, differentiable to any order, also in x and u through μ and σ.

    Raises:
        ValueError: a vector of another shape.
    """
    return groupnorm_vjp_each([vector], [held], backend)[0]


def groupnorm_vjp_each(
    vectors: Sequence[Tensor],
    held: Sequence[Normalised],
    backend: str = "auto",
    outs: Sequence[Tensor | None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`groupnorm_vjp` for each map, in shared launches like those of `groupnorm_each`.

    outs: where the gradients in x are left, of x's shape and dtype; only without gradients.
    """
    pairs = list(zip(vectors, held, strict=True))
    for vector, of in pairs:
        if vector.shape != of.x.shape:
            raise ValueError(
                f"vector has shape {tuple(vector.shape)}, the value has {tuple(of.x.shape)}: give a vector "
                "of that shape"
            )
    tracked = any(recorded(vector, *of[:4]) for vector, of in pairs)
    if _together(vectors, backend) and not tracked:
        return [(found.x, found.other) for found in groupnorm_vjp_fwd(vectors, held, outs=outs)]
    products = [_pulled(*pair, backend) for pair in pairs]
    if outs is None:
        return products
    return [
        (of_x if out is None else out.copy_(of_x), other)
        for (of_x, other), out in zip(products, outs, strict=True)
    ]


def _pulled(vector: Tensor, held: Normalised, backend: str) -> tuple[Tensor, Tensor]:
    """The product of one map."""
    served = kernels_serve(vector, backend, autocast=True)
    if not served and (transformed() or vector.numel() == 0):
        return reference.groupnorm_vjp(vector, held)
    if recorded(vector, *held[:4]):
        return GroupNormVJPFunction.apply(vector, *held, served)
    found = _vjp_of(served, vector, held)
    return found.x, found.other


def _vjp_of(served: bool, vector: Tensor, held: Normalised, parameters: bool = False) -> Gradients:
    if served:
        return groupnorm_vjp_fwd([vector], [held], parameters)[0]
    return reference.groupnorm_vjp_fwd(vector, held, parameters)


def _together(maps: Sequence[Tensor], backend: str) -> bool:
    """Whether the kernels serve all of these alike, as many samples of each."""
    served = len(maps) > 0 and kernels_serve(maps[0], backend, *maps[1:], autocast=True)
    return served and all(x.numel() and len(x) == len(maps[0]) for x in maps)


# ------------------------------------------------------------------------------------------- the launches


def groupnorm_fwd(maps: Sequence[Map], statistics: bool = True) -> list[tuple[Tensor, Any, Any]]:
    """`reference.groupnorm_fwd` of each map, by the kernel; without `statistics` the value alone."""
    parts = [_forward(given, statistics) for given in maps]
    for grid, args, constants in shared(parts, len(maps[0].x)):
        launch(_kernels().groupnorm_kernel, grid, *args, **constants)
    return [
        (value if given.out is None or value is given.out else given.out.copy_(value), mean, inverse)
        for given, (value, mean, inverse) in zip(maps, (part.result for part in parts), strict=True)
    ]


def groupnorm_vjp_fwd(
    vectors: Sequence[Tensor],
    held: Sequence[Normalised],
    parameters: bool = False,
    outs: Sequence[Tensor | None] | None = None,
) -> list[Gradients]:
    """`reference.groupnorm_vjp_fwd` of each map, by the kernel."""
    places: Sequence[Tensor | None] = [None] * len(held) if outs is None else outs
    given = zip(vectors, held, places, strict=True)
    parts = [_backward(vector, of, parameters, out) for vector, of, out in given]
    for grid, args, constants in shared(parts, len(vectors[0])):
        launch(_kernels().groupnorm_vjp_kernel, grid, *args, **constants)
    found = []
    for vector, of, part, out in zip(vectors, held, parts, places, strict=True):
        gradients, sums = part.result
        if out is not None and gradients.x is not out:
            gradients = gradients._replace(x=out.copy_(gradients.x))
        if parameters:
            of_offset, of_gain = sums.sum(0).to(vector.dtype if of.gain is None else of.gain.dtype)
            gradients = gradients._replace(gain=of_gain, offset=of_offset)
        found.append(gradients)
    return found


def _forward(given: Map, statistics: bool) -> Part:
    x, groups, gain, offset, mask, shift, residual, relu, epsilon, _, _ = given
    (x, apart), residual = channels_of(x), None if residual is None else laid(residual)
    shift = None if shift is None else laid(shift)
    value = given.place()
    mean = inverse = None
    if statistics:
        wide = accumulate_dtype(x.dtype)
        mean, inverse = (x.new_empty(x.shape[0], groups, dtype=wide) for _ in range(2))
    operands = (
        x,
        x if mask is None else mask.contiguous(),
        x if shift is None else shift,
        x if gain is None else gain.contiguous(),
        x if offset is None else offset.contiguous(),
        x if residual is None else residual,
        value,
        x if mean is None else mean,
        x if inverse is None else inverse,
        *(sample_stride(x if each is None else each) for each in (x, shift, residual, value)),
    )
    there = (each is not None for each in (mask, shift, gain, residual))
    tiles = _tiles(x.shape, x.dtype, groups, TILE, WHOLE, processors(x.device))
    constants = (*tiles.sizes, *there, relu, statistics, float(epsilon), *tiles.tile, apart)
    return Part(operands, constants, tiles.programs, tiles.warps, (value, mean, inverse))


def _backward(vector: Tensor, held: Normalised, parameters: bool, out: Tensor | None) -> Part:
    x, gain, mask, shift, mean, inverse, value, residual = held
    vector, x = laid(vector), laid(x)
    shift, value = (None if each is None else laid(each) for each in (shift, value))
    of_x, apart = (fresh(x), 0) if out is None else channels_of(out)
    if out is not None and of_x is not out:  # which no kernel writes to
        of_x, apart = fresh(x), 0
    of_sum = of_x if mask is None else fresh(x)
    masked = value is not None and residual
    v = fresh(vector) if masked else vector
    sums = mean.new_empty(len(x), 2, x.shape[1]) if parameters else mean
    operands = (
        vector,
        x,
        x if mask is None else mask.contiguous(),
        x if shift is None else shift,
        x if gain is None else gain.contiguous(),
        mean,
        inverse,
        x if value is None else value,
        of_x,
        of_sum,
        v,
        sums,
        *(sample_stride(x if each is None else each) for each in (vector, x, shift, value, of_x)),
    )
    there = (each is not None for each in (mask, shift, gain, value, mask))  # SUM for a mask, too
    tiles = _tiles(x.shape, x.dtype, mean.shape[1], TILE, WHOLE, processors(x.device))
    constants = (*tiles.sizes, *there, masked, parameters, *tiles.tile, apart)
    gradients = Gradients(of_x, of_sum, v, None, None)
    return Part(operands, constants, tiles.programs, tiles.warps, (gradients, sums))


def groupnorm_second_fwd(along: Tensor, beside: Tensor | None, vector: Tensor, held: Normalised) -> Gradients:
    """As `reference.groupnorm_second_fwd`, by the kernel."""
    x, gain, mask, shift, mean, inverse, value, _ = held
    along, vector, x = laid(along), laid(vector), laid(x)
    beside, shift, value = (None if each is None else laid(each) for each in (beside, shift, value))
    of_x, of_vector = fresh(x), fresh(vector)
    of_sum = of_x if mask is None else fresh(x)
    sums = mean if gain is None else mean.new_empty(len(x), x.shape[1])
    tiles = _tiles(x.shape, x.dtype, mean.shape[1], SECOND_TILE, SECOND_TILE, processors(x.device))
    launch(
        _kernels().groupnorm_second_kernel,
        (len(x) * tiles.programs,),
        along,
        x if beside is None else beside,
        vector,
        x,
        x if mask is None else mask.contiguous(),
        x if shift is None else shift,
        x if gain is None else gain.contiguous(),
        mean,
        inverse,
        x if value is None else value,
        of_x,
        of_sum,
        of_vector,
        sums,
        *(sample_stride(x if each is None else each) for each in (along, beside, vector, x, shift, value)),
        BESIDE=beside is not None,
        MASK=mask is not None,
        SHIFT=shift is not None,
        GAIN=gain is not None,
        RELU=value is not None,
        SUM=mask is not None,
        **dict(zip(("P", "C", "G", "PACKED"), tiles.sizes, strict=True)),
        **dict(zip(("WIDE", "ROWS", "BLOCK"), tiles.tile, strict=True)),
        num_warps=tiles.warps,
    )
    of_gain = None if gain is None else sums.sum(0).to(gain.dtype)
    return Gradients(of_x, of_sum, of_vector, of_gain, None)


class GroupNormFunction(torch.autograd.Function):
    """`(x, γ, β, m, u, r) ↦ (value, μ, 1/σ)`; μ and 1/σ carry no gradient."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gain: Tensor | None,
        offset: Tensor | None,
        mask: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        groups: int,
        relu: bool,
        epsilon: float,
        served: bool,
        backend: str,
    ):
        given = Map(x, groups, gain, offset, mask, shift, residual, relu, epsilon)
        value, mean, inverse = groupnorm_fwd([given])[0] if served else _on_host(given, backend)
        ctx.save_for_backward(x, gain, mask, shift, mean, inverse, value if relu else None, offset)
        ctx.served, ctx.epsilon = served, epsilon
        ctx.mark_non_differentiable(mean, inverse)
        return value, mean, inverse

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any):
        *saved, offset = ctx.saved_tensors
        of_x, of_gain, of_offset, _, of_shift, of_residual = ctx.needs_input_grad[:6]
        held = Normalised(*saved)._replace(residual=of_residual)
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            found = _by_operators(grad, held, offset, ctx.epsilon)
        else:
            found = _vjp_of(ctx.served, grad, held, of_gain or of_offset)
        return (
            found.x if of_x else None,
            found.gain if of_gain else None,
            found.offset if of_offset else None,
            None,
            found.shift if of_shift else None,
            found.other if of_residual else None,
            *(None,) * 5,
        )


class GroupNormVJPFunction(torch.autograd.Function):
    """`(v, x, γ, m, u; μ, 1/σ, value) ↦` the gradients in x and r; its own knows what μ and σ are of x."""

    @staticmethod
    def forward(
        ctx,
        vector: Tensor,
        x: Tensor,
        gain: Tensor | None,
        mask: Tensor | None,
        shift: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        value: Tensor | None,
        residual: bool,
        served: bool,
    ):
        ctx.served = served
        ctx.set_materialize_grads(False)
        found = _vjp_of(served, vector, Normalised(x, gain, mask, shift, mean, inverse, value, residual))
        # PyTorch's operators have no sums to begin from in the backward pass, but the product in s.
        of_sum = None if served else found.shift
        ctx.save_for_backward(vector, of_sum, x, gain, mask, shift, mean, inverse, value)
        # Without a relu the second result is the vector itself, which a Function may not return.
        return found.x, found.other.view_as(found.other)

    @staticmethod
    def backward(ctx, along: Tensor | None, beside: Tensor | None):
        vector, of_sum, *saved = ctx.saved_tensors
        held = Normalised(*saved)
        of_vector, of_x, of_gain, _, of_shift = ctx.needs_input_grad[:5]
        along = torch.zeros_like(vector) if along is None else along
        if torch.is_grad_enabled():
            found = _second_by_operators(along, beside, vector, held)
        elif ctx.served:
            found = groupnorm_second_fwd(along, beside, vector, held)
        else:
            found = reference.groupnorm_second_fwd(along, beside, vector, of_sum, held)
        return (
            found.other if of_vector else None,
            found.x if of_x else None,
            found.gain if of_gain else None,
            None,
            found.shift if of_shift else None,
            *(None,) * 5,
        )


def _by_operators(grad: Tensor, held: Normalised, offset: Tensor | None, epsilon: float) -> Gradients:
    """The gradients by ordinary operators, with a graph."""
    v = grad if held.value is None else torch.where(held.value > 0, grad, 0)
    shift = torch.zeros_like(held.x) if held.shift is None else held.shift
    x, shift, gain, offset = given = tuple(_tracked(each) for each in (held.x, shift, held.gain, offset))
    groups = held.mean.shape[1]
    value = reference.groupnorm(x, groups, gain, offset, held.mask, shift, None, False, epsilon)[0]
    of_x, of_shift, of_gain, of_offset = _gradients(value, given, v)
    return Gradients(of_x, of_shift, v, of_gain, of_offset)


def _second_by_operators(along: Tensor, beside: Tensor | None, vector: Tensor, held: Normalised) -> Gradients:
    shift = torch.zeros_like(held.x) if held.shift is None else held.shift
    x, shift, gain, vector = given = tuple(_tracked(each) for each in (held.x, shift, held.gain, vector))
    of_x, of_residual = reference.groupnorm_vjp(vector, held._replace(x=x, shift=shift, gain=gain))
    total = (of_x * along).sum()
    total = total if beside is None else total + (of_residual * beside).sum()
    in_x, in_shift, in_gain, in_vector = _gradients(total, given, None)
    return Gradients(in_x, in_shift, in_vector, in_gain, None)


def _tracked(tensor: Any) -> Any:
    """Something to differentiate by, with the tensor's graph; None stays.

    An alias of it: of two tensors one may be made from the other, and what is asked for is the gradient in
    the one where the other stays what it is.
    """
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _gradients(value: Tensor, given: tuple[Any, ...], vector: Tensor | None) -> list[Any]:
    """Of the value in each that is given, None where nothing is."""
    there = [each for each in given if each is not None]
    found = iter(torch.autograd.grad(value, there, vector, create_graph=True, materialize_grads=True))
    return [None if each is None else next(found) for each in given]


# ------------------------------------------------------------------------------------ shapes and their checks


class Tiles(NamedTuple):
    """How a map is shared out: sizes are P, C, G and PACKED, tile is WIDE, ROWS and BLOCK.

    A program has PACKED groups of a sample, of which there are `programs` parts, and reads them in tiles.
    """

    sizes: tuple[int, int, int, int]
    tile: tuple[Any, int, int]
    programs: int
    warps: int


@lru_cache(maxsize=1024)
def _tiles(
    shape: torch.Size, dtype: torch.dtype, groups: int, most: int, whole: int, processors: int
) -> Tiles:
    """Tiles of `most` entries, or the part in one if it has no more than `whole`."""
    samples, channels, height, width = shape
    packed = _packed(channels // groups, dtype.itemsize, groups, samples, processors)
    block, rows = next_power_of_2(channels // groups * packed), next_power_of_2(height * width)
    if rows * block > (most if dtype == torch.float64 else whole):
        rows = min(max(most // block, 1), rows)
    return Tiles(
        sizes=(height * width, channels, groups, packed),
        tile=(wide_dtype(dtype), rows, block),
        programs=groups // packed,
        warps=min(max(rows * block // 512, 1), most_warps()),
    )


def _packed(width: int, size: int, groups: int, samples: int, processors: int) -> int:
    """How many groups, each of `width` channels of `size` bytes, a program has.

    Fewer channels than fill a sector of the L2 cache are read as many times as groups share one. But all
    multiprocessors shall have a program.
    """
    packed = 1
    while (
        width & (width - 1) == 0  # others leave gaps in a tile
        and width * size * packed < SECTOR
        and groups % (2 * packed) == 0
        and samples * groups >= 2 * packed * processors
    ):
        packed *= 2
    return packed


def _check(given: Map) -> None:
    x, groups, gain, offset, mask, shift, residual, _, epsilon, _, _ = given
    check_number("epsilon", epsilon, 0, open_low=True)
    check_count("groups", groups)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: convert it to a floating one, e.g. x.float()")
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: give x of shape [B, C, H, W]")
    channels = x.shape[1]
    if channels == 0 or channels % groups:
        raise ValueError(
            f"x has {channels} channels, which groups={groups} does not divide: give a divisor of {channels}"
        )
    if (gain is None) != (offset is None):
        there, missing = ("gain", "offset") if offset is None else ("offset", "gain")
        raise ValueError(f"{there} was given and {missing}=None: give both, or neither")
    wanted = (
        ("gain", gain, (channels,)),
        ("offset", offset, (channels,)),
        ("mask", mask, (x.shape[0], channels)),
        ("shift", shift, x.shape),
        ("residual", residual, x.shape),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: for this x it must be {tuple(shape)}")
    if mask is not None and mask.requires_grad:
        raise ValueError("mask.requires_grad=True, and no gradient reaches a mask: give mask.detach()")


@cache
def _compiled() -> ModuleType:
    from ..compiled import groupnorm

    return groupnorm


@cache
def _kernels() -> ModuleType:
    from ..kernels import groupnorm

    return groupnorm
