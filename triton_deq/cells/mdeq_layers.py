"""What a multiscale cell consists of, and how its maps go through: together, or one after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backend import recorded, tracked
from ..ops.fusion import Sum, fusion_each
from ..ops.groupnorm import Map, groupnorm_each, groupnorm_vjp_each
from ..ops.launch import kernels_serve
from ..reference.groupnorm import Normalised
from .prepacked import Prepacked


class Scale(NamedTuple):
    """The size of one resolution's maps."""

    channels: int
    height: int
    width: int

    @property
    def entries(self) -> int:
        return self.channels * self.height * self.width


class MDEQInjection(NamedTuple):
    """u, all that does not depend on z.

    Attributes:
        shift: `[B, C_0, H, W]`, added on the highest resolution.
        weights: of every convolution: weight normalisation and autocast's casts are done once for all steps.
        masks: of the dropout, `[B, C_i]` for each resolution, or None.
        scales: how a packed state is cut.
        joined: where kernels serve, the weights by which several convolutions of one map are one; nobody asks
            for gradients in them.
        prepacked: on a CPU, the weights as oneDNN lays them out.
    """

    shift: Tensor
    weights: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] | None
    scales: tuple[Scale, ...]
    joined: tuple[Tensor, ...] = ()
    prepacked: Prepacked | None = None


@dataclass(frozen=True)
class Kept:
    """What an evaluation leaves to its products: of each norm, and the value of each fusion, by target."""

    norms: dict[nn.Module, Normalised]
    fused: list[Tensor]


class Step(NamedTuple):
    """A GroupNorm, the convolution before it or none, and what surrounds the norm."""

    unit: "ConvNorm | None"
    norm: Any
    around: dict[str, Any]


Advance = Callable[[list[Step], list[Tensor]], list[Tensor]]
"""Takes values that do not wait for each other a step each."""


class ConvNorm(nn.Module):
    """`GN(conv(x))` and what follows it, with the convolution's weight from u.

    fuses: between resolutions; kind: device and dtype.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        groups: int,
        *,
        stride: int = 1,
        relu: bool = False,
        affine: bool = True,
        fuses: bool = False,
        **kind: Any,
    ):
        super().__init__()
        self.conv: Any = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False, **kind)
        self.norm = nn.GroupNorm(groups, outputs, affine=affine, **kind)
        self.relu = relu
        self.fuses = fuses
        self.place = 0

    def step(self, **around: Any) -> Step:
        return Step(self, self.norm, {"relu": self.relu, **around})

    def product(self, x: Tensor, u: MDEQInjection) -> Tensor:
        weight = u.weights[self.place]
        x, stride, padding = x.to(weight.dtype), self.conv.stride, self.conv.padding
        if u.prepacked is None or tracked():
            return functional.conv2d(x, weight, None, stride, padding)
        return u.prepacked.conv2d(x, weight, stride, padding)

    def pull(self, vector: Tensor, u: MDEQInjection) -> Tensor:
        """From the gradient in the product to that in x."""
        return transposed(self.conv, vector, u.weights[self.place])


class Block(nn.Module):
    """The layers of `GN(relu(z + GN(m ⊙ conv(relu(GN(conv(z)))) + u)))`."""

    def __init__(self, width: int, inner: int, groups: int, **kind: Any):
        super().__init__()
        self.first = ConvNorm(width, inner, 3, groups, relu=True, **kind)
        self.second = ConvNorm(inner, width, 3, groups, **kind)
        self.norm = nn.GroupNorm(groups, width, **kind)

    def steps(
        self,
        mask: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> list[Step]:
        second = self.second.step(mask=mask, shift=shift, residual=residual, relu=True)
        return [self.first.step(), second, Step(None, self.norm, {"out": out})]


KINDS = (nn.Conv2d, nn.GroupNorm, ConvNorm, Block)
"""What a cell consists of, and does not call."""


def transposed(conv: Any, vector: Tensor, weight: Tensor) -> Tensor:
    """From the gradient in a convolution's value to that in what it took."""
    # An even size, halved, could have been that size less one too.
    more = 1 if conv.stride[0] == 2 else 0
    return functional.conv_transpose2d(vector.to(weight.dtype), weight, None, conv.stride, conv.padding, more)


def for_products(maps: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Maps as convolutions read them, dense and of their dtype, where each would make its own so itself."""
    first = maps[0]
    if not kernels_serve(first, "auto", autocast=True):
        return maps
    if recorded(first) or (first.dtype == dtype and first.is_contiguous(memory_format=torch.channels_last)):
        return maps
    places = [torch.empty_like(each, dtype=dtype, memory_format=torch.channels_last) for each in maps]
    return fusion_each([Sum(each, (), False, place) for each, place in zip(maps, places, strict=True)])


def walk(
    values: list[Tensor],
    chains: Sequence[Sequence[Step]],
    advance: Advance,
) -> list[Tensor]:
    """Take each value along its chain of steps, in the list that they are in.

    Where kernels serve, all values take a step before one takes the next, and share launches. On a CPU each
    goes to its end, while what a step has left is in the cache.
    """
    every = range(len(values))
    at_once = kernels_serve(values[0], "auto", autocast=True)
    for group in [every] if at_once else [[place] for place in every]:
        for depth in range(max(len(chains[place]) for place in group)):
            here = [place for place in group if depth < len(chains[place])]
            found = advance([chains[place][depth] for place in here], [values[place] for place in here])
            for place, value in zip(here, found, strict=True):
                values[place] = value
    return values


def forwards(
    steps: Sequence[Step], values: Sequence[Tensor], u: MDEQInjection, kept: Kept | None
) -> list[Tensor]:
    """The values of steps that do not wait for each other."""
    maps = list(values)
    for place in reversed(range(len(maps))):  # the first is the largest: it is still in the cache then
        unit = steps[place].unit
        if unit is not None:
            maps[place] = unit.product(maps[place], u)
    spare = kept is None and not tracked()  # what was made on the way nobody reads again
    given = [
        Map(x, norm.num_groups, norm.weight, norm.bias, epsilon=norm.eps, spare=spare, **around)
        for x, (_, norm, around) in zip(maps, steps, strict=True)
    ]
    found = groupnorm_each(given, statistics=kept is not None)
    if kept is not None:
        kept.norms.update((step.norm, held) for step, (_, held) in zip(steps, found, strict=True))
    return [value for value, _ in found]


def backwards(
    steps: Sequence[Step],
    vectors: Sequence[Tensor],
    u: MDEQInjection,
    kept: Kept,
    of_residuals: dict[nn.Module, Tensor],
) -> list[Tensor]:
    """From the gradients in such values to those in what the steps took, and in the residuals by norm."""
    held = [kept.norms[step.norm] for step in steps]
    found = groupnorm_vjp_each(vectors, held)
    for step, each, (_, of_residual) in zip(steps, held, found, strict=True):
        if each.residual:
            of_residuals[step.norm] = of_residual
    return [
        of_map if step.unit is None else step.unit.pull(of_map, u)
        for step, (of_map, _) in zip(steps, found, strict=True)
    ]


def unpack(z: Tensor, scales: Sequence[Scale]) -> list[Tensor]:
    """Views `[B, C, H, W]` of a state `[B, N]`."""
    pieces = z.split([scale.entries for scale in scales], dim=1)
    return [
        piece.unflatten(1, (scale.height, scale.width, scale.channels)).permute(0, 3, 1, 2)
        for piece, scale in zip(pieces, scales, strict=True)
    ]


def pack(maps: Sequence[Tensor]) -> Tensor:
    """A state `[B, N]` of maps, which are copied."""
    return torch.cat([each.permute(0, 2, 3, 1).flatten(1) for each in maps], dim=1)
