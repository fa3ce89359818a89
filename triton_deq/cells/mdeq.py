"""The multiscale cell: residual blocks on several resolutions, and sums of all of them into each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backend import tracked
from ..checks import check_count, check_number
from ..ops.fusion import Sum, fusion_each, fusion_vjp_each
from ..ops.groupnorm import groupnorm_vjp_each
from ..ops.launch import kernels_serve
from ..precision import autocast_dtype
from .layers import does_as, normalise_kernels, weights_of
from .mdeq_layers import (
    KINDS,
    Advance,
    Block,
    ConvNorm,
    Kept,
    MDEQInjection,
    Scale,
    Step,
    backwards,
    for_products,
    forwards,
    pack,
    transposed,
    unpack,
    walk,
)
from .prepacked import Prepacked


class MDEQCell(nn.Module):
    """One layer of a multiscale DEQ (Bai, Koltun & Kolter, arXiv 2006.08656, section 3).

    On each resolution i a residual block, `e = GN(relu(z + GN(m ⊙ conv(relu(GN(conv(z)))) + u)))` with 3×3
    convolutions, the first to `expansion` times the channels, and u on the highest resolution only. Then each
    resolution gets the sum of all: those that are higher through convolutions of stride 2, those that are
    lower through a 1×1 convolution and repeated pixels, GN behind every convolution; and of the sum
    `GN(conv(relu(·)))` with a 1×1 convolution. A cell of one resolution is its block alone.

    Args:
        channels: C_i of each resolution, the highest first; each has half the height and width of the last.
        groups: of every GN but the final ones, which have half as many.
        expansion: inner channels of a block over its own.
        dropout: probability of the masks m of whole channels while training, one mask for a solve.
        weight_norm: `w = g v / ‖v‖` for each output channel (torch's parametrization) of the blocks' and the
            final convolutions, as in the authors' code.
        post_affine: whether the final GNs have gain and offset.
        init_std: convolutions start from N(0, init_std²).
        device, dtype: of the parameters, as in PyTorch's modules.

    Shapes: z `[B, N]` is the packed state: the maps one after another, each channels-last, `[H, W, C]`; they
    are views of it (`maps`). `inject(x)` takes the features `[B, C_0, H, W]` of the highest resolution.

    The cell knows its vector-Jacobian product in closed form (`vjp`), so a backward solve needs no autograd
    engine, and the Jacobian penalty no double backward. Convolutions are PyTorch's; all between is fused.

    Raises:
        TypeError, ValueError: an argument outside its range; channels that groups do not divide; features of
            another number of channels, or too small for the number of resolutions; a layer that was replaced
            or has a hook: the cell reads weights and does not call its layers.
    """

    def __init__(
        self,
        channels: Sequence[int],
        groups: int = 8,
        expansion: int = 5,
        *,
        dropout: float = 0.0,
        weight_norm: bool = True,
        post_affine: bool = True,
        init_std: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_arguments(channels, groups, expansion, dropout, init_std)
        self.channels = tuple(channels)
        self.dropout = dropout
        count = len(self.channels)
        kind: Any = {"device": device, "dtype": dtype}
        self.blocks: Any = nn.ModuleList(
            Block(width, expansion * width, groups, **kind) for width in self.channels
        )
        self.fuse: Any = nn.ModuleList()
        self.post: Any = nn.ModuleList()
        if count > 1:
            self.fuse.extend(
                nn.ModuleList(self._path(source, target, groups, **kind) for source in range(count))
                for target in range(count)
            )
            self.post.extend(
                ConvNorm(width, width, 1, max(groups // 2, 1), affine=post_affine, **kind)
                for width in self.channels
            )
        self._units = [layer for layer in self.modules() if isinstance(layer, ConvNorm)]
        for place, unit in enumerate(self._units):
            unit.place = place
        self._paths = self._crossing()
        self._joins = self._joining()
        for unit in self._units:
            nn.init.normal_(unit.conv.weight, 0, init_std)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if weight_norm:
            for unit in self._units:
                if not unit.fuses:
                    normalise_kernels(unit.conv)

    def _path(self, source: int, target: int, groups: int, **kind: Any) -> nn.Sequential:
        """What brings the maps of one resolution to another; nothing where they are the same."""
        begin, end = self.channels[source], self.channels[target]
        if target <= source:
            fusing = [ConvNorm(begin, end, 1, groups, fuses=True, **kind)] if target < source else []
            return nn.Sequential(*fusing)
        steps = target - source
        widths = [begin] * steps + [end]
        return nn.Sequential(
            *(
                ConvNorm(
                    widths[k], widths[k + 1], 3, groups, stride=2, relu=k + 1 < steps, fuses=True, **kind
                )
                for k in range(steps)
            )
        )

    def _crossing(self) -> dict[tuple[int, int], tuple[ConvNorm, ...]]:
        """The path to each target from each other source."""
        return {
            (target, source): tuple(path)
            for target, paths in enumerate(self.fuse)
            for source, path in enumerate(paths)
            if source != target
        }

    def _joining(self) -> list[list[tuple[int, int]]]:
        """The paths that begin with convolutions of one map and one kind, which can be one."""
        joins: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for target, source in self._paths:
            joins.setdefault((source, target > source), []).append((target, source))
        return list(joins.values())

    # ------------------------------------------------------------------------------- once a solve

    def inject(self, x: Tensor) -> MDEQInjection:
        """u from the features `[B, C_0, H, W]`."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.channels[0]:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x is {given}: give features [B, {self.channels[0]}, H, W]")
        step = 2 ** (len(self.channels) - 1)
        height, width = x.shape[2:]
        if height == 0 or width == 0 or height % step or width % step:
            raise ValueError(
                f"x has maps of {height}×{width}, and {len(self.channels)} resolutions halve them "
                f"{len(self.channels) - 1} times: give height and width as multiples of {step}"
            )
        scales = tuple(
            Scale(each, height >> place, width >> place) for place, each in enumerate(self.channels)
        )
        shift = x.contiguous(memory_format=torch.channels_last)
        weights = self._weights(x)
        if kernels_serve(x, "auto", autocast=True):
            return MDEQInjection(shift, weights, self._masks(x), scales, joined=self._joined(weights))
        prepacked = Prepacked() if x.device.type == "cpu" else None
        return MDEQInjection(shift, weights, self._masks(x), scales, prepacked=prepacked)

    def initial_state(self, u: MDEQInjection) -> Tensor:
        """Zeros, `[B, N]`."""
        return self._like.new_zeros(u.shift.shape[0], sum(scale.entries for scale in u.scales))

    def select(self, u: MDEQInjection, samples: Tensor) -> MDEQInjection:
        """u for these samples of the batch alone."""
        shift = u.shift[samples].contiguous(memory_format=torch.channels_last)
        masks = None if u.masks is None else tuple(mask[samples] for mask in u.masks)
        return u._replace(shift=shift, masks=masks)

    def maps(self, z: Tensor, u: MDEQInjection) -> list[Tensor]:
        """The maps `[B, C_i, H_i, W_i]` of a packed state, channels-last, as views of it."""
        return unpack(z, u.scales)

    @property
    def _like(self) -> Tensor:
        """A parameter, for dtype and device: a convolution's weight may have to be made of two."""
        return self.blocks[0].norm.weight

    def _weights(self, x: Tensor) -> tuple[Tensor, ...]:
        for layer in self.modules():
            kind = next((kind for kind in KINDS if isinstance(layer, kind)), None)
            if kind is not None and not does_as(kind, layer):
                raise TypeError(
                    f"a {kind.__name__} of the cell was replaced or has a hook, and the cell reads its "
                    "weights without calling it: change the weight by torch.nn.utils.parametrize instead"
                )
        weights = weights_of([unit.conv for unit in self._units], autocast_dtype(x.device), x)
        return tuple(weight.contiguous(memory_format=torch.channels_last) for weight in weights)

    def _joined(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = []
        for join in self._joins:
            parts = [weights[self._paths[ends][0].place].detach() for ends in join]
            found.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return tuple(found)

    def _masks(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Variational dropout (Gal & Ghahramani, arXiv 1506.02142) of whole channels: 0 or 1 / (1 − p)."""
        if not (self.training and self.dropout):
            return None
        kept = 1 - self.dropout
        return tuple(
            self._like.new_empty(x.shape[0], width).bernoulli_(kept) / kept for width in self.channels
        )

    # ------------------------------------------------------------------------------- every step

    def forward(self, z: Tensor, u: MDEQInjection) -> Tensor:
        """The next state `[B, N]` from z and `u = inject(x)`."""
        return self._next(z, u)

    def write(self, z: Tensor, u: MDEQInjection, out: Tensor) -> None:
        """The next state into `out`; without gradients."""
        if does_as(MDEQCell, self):
            self._evaluate(z, u, out=out)
        else:
            out.copy_(self.forward(z, u))

    @property
    def vjp(self) -> Callable[[Tensor, MDEQInjection], tuple[Tensor, "Pullback"]] | None:
        """`(z, u) ↦ (value, ε ↦ εᵀJ)` for ε `[..., B, N]`, or None in a subclass with its own forward."""
        return self._vjp if does_as(MDEQCell, self) else None

    def _vjp(self, z: Tensor, u: MDEQInjection) -> tuple[Tensor, "Pullback"]:
        kept = Kept({}, [])
        return self._next(z, u, kept), Pullback(self, u, kept, z.dtype)

    def _next(self, z: Tensor, u: MDEQInjection, kept: Kept | None = None) -> Tensor:
        if tracked():
            return pack(self._evaluate(z, u, kept)).to(z.dtype)
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        self._evaluate(z, u, kept, out)
        return out

    def _evaluate(
        self, z: Tensor, u: MDEQInjection, kept: Kept | None = None, out: Tensor | None = None
    ) -> list[Tensor]:
        """The next maps, left in `out` if given; what products need of the way is left in `kept`."""
        if z.shape != (u.shift.shape[0], sum(scale.entries for scale in u.scales)):
            wanted = (len(u.shift), sum(scale.entries for scale in u.scales))
            raise ValueError(f"z has shape {tuple(z.shape)}, and this u is for {wanted}: give z that shape")
        places: Sequence[Tensor | None] = [None] * len(u.scales) if out is None else unpack(out, u.scales)
        maps, alone = unpack(z, u.scales), len(u.scales) == 1

        def advance(steps: list[Step], values: list[Tensor]) -> list[Tensor]:
            return forwards(steps, values, u, kept)

        blocks = [
            block.steps(
                mask=None if u.masks is None else u.masks[i],
                shift=u.shift if i == 0 else None,
                residual=maps[i],
                out=places[i] if alone else None,
            )
            for i, block in enumerate(self.blocks)
        ]
        branches = walk(for_products(maps, u.weights[0].dtype), blocks, advance)
        if alone:
            return branches
        paths = {ends: [unit.step() for unit in path] for ends, path in self._paths.items()}
        if u.joined and kept is None and not tracked():
            starts = self._first_products(branches, u)
            paths = {ends: [path[0]._replace(unit=None), *path[1:]] for ends, path in paths.items()}
        else:
            starts = [branches[source] for _, source in paths]
        crossed = walk(starts, [*paths.values()], advance)
        crossed_to = list(zip(self._paths, crossed, strict=True))
        fused = fusion_each(
            [
                Sum(branch, [term for (target, _), term in crossed_to if target == i])
                for i, branch in enumerate(branches)
            ]
        )
        if kept is not None:
            kept.fused.extend(fused)
        last = [[unit.step(out=place)] for unit, place in zip(self.post, places, strict=True)]
        return walk(fused, last, advance)

    def _first_products(self, branches: list[Tensor], u: MDEQInjection) -> list[Tensor]:
        """What the first convolution of each path gives: some channels of what a joined one gives."""
        products: dict[tuple[int, int], Tensor] = {}
        for join, weight in zip(self._joins, u.joined, strict=True):
            units = [self._paths[ends][0] for ends in join]
            conv = units[0].conv
            product = functional.conv2d(branches[join[0][1]], weight, None, conv.stride, conv.padding)
            parts = product.split([unit.conv.out_channels for unit in units], dim=1)
            products.update(zip(join, parts, strict=True))
        return [products[ends] for ends in self._paths]

    def extra_repr(self) -> str:
        return f"channels={self.channels}, dropout={self.dropout}"


@dataclass(frozen=True, eq=False)  # torch.compile hashes what it calls, before it has fields
class Pullback:
    """`ε ↦ εᵀJ` of an `MDEQCell` at a state, `[..., B, N]`; differentiable. dtype is the state's."""

    cell: MDEQCell
    u: MDEQInjection
    kept: Kept
    dtype: torch.dtype

    def __call__(self, vector: Tensor) -> Tensor:
        if vector.dim() > 2:
            return torch.stack([self(each) for each in vector.flatten(0, -3)]).view(vector.shape)
        if tracked():
            return pack([direct + skipped for direct, skipped in self._parts(vector)]).to(self.dtype)
        out = torch.empty_like(vector, dtype=self.dtype, memory_format=torch.contiguous_format)
        parts = zip(self._parts(vector), unpack(out, self.u.scales), strict=True)
        fusion_each([Sum(direct, (skipped,), False, place) for (direct, skipped), place in parts])
        return out

    def plus(self, shift: Tensor) -> "Adjoint":
        """`x ↦ xJ + g`."""
        return Adjoint(self, shift)

    def _parts(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each resolution two tensors that add up to its gradient."""
        cell, u = self.cell, self.u
        of_residuals: dict[nn.Module, Tensor] = {}

        def advance(steps: list[Step], vectors: list[Tensor]) -> list[Tensor]:
            return backwards(steps, vectors, u, self.kept, of_residuals)

        of_branches = unpack(vector, u.scales)
        if len(of_branches) > 1:
            last = [[unit.step()] for unit in cell.post]
            of_branches, of_crossed = self._parted(walk(of_branches, last, advance))
            crossed = self._uncrossed(of_crossed, advance)
            of_branches = fusion_each(
                [
                    Sum(base, [term for source, term in crossed if source == i], relu=False)
                    for i, base in enumerate(of_branches)
                ]
            )
        of_maps = walk(of_branches, [block.steps()[::-1] for block in cell.blocks], advance)
        return [(of, of_residuals[block.second.norm]) for of, block in zip(of_maps, cell.blocks, strict=True)]

    def _uncrossed(self, vectors: list[Tensor], advance: Advance) -> list[tuple[int, Tensor]]:
        """From the gradients in what crossed to those in what it came from, each with its source."""
        cell, u, paths = self.cell, self.u, self.cell._paths
        back = [[unit.step() for unit in reversed(path)] for path in paths.values()]
        if not u.joined or tracked():
            found = walk(vectors, back, advance)
            return [(source, term) for (_, source), term in zip(paths, found, strict=True)]
        vectors = walk(vectors, [chain[:-1] for chain in back], advance)
        held = [self.kept.norms[path[0].norm] for path in paths.values()]
        shapes = {ends: each.x.shape for ends, each in zip(paths, held, strict=True)}
        # The gradients in all parts of a joined product lie where those in the product are wanted.
        wholes: list[Tensor] = []
        places: dict[tuple[int, int], Tensor] = {}
        for join in cell._joins:
            batch, _, height, width = shapes[join[0]]
            sizes = [shapes[ends][1] for ends in join]
            whole = torch.empty(
                (batch, sum(sizes), height, width),
                dtype=held[0].x.dtype,
                device=held[0].x.device,
                memory_format=torch.channels_last,
            )
            wholes.append(whole)
            places.update(zip(join, whole.split(sizes, dim=1), strict=True))
        groupnorm_vjp_each(vectors, held, outs=[places[ends] for ends in paths])
        return [
            (join[0][1], transposed(paths[join[0]][0].conv, whole, weight))
            for join, whole, weight in zip(cell._joins, wholes, u.joined, strict=True)
        ]

    def _parted(self, vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """From the gradients in the sums to those in each resolution's own term, and in what crossed."""
        resolutions = range(len(vectors))
        factors = [
            [2 ** max(source - target, 0) for source in resolutions if source != target]
            for target in resolutions
        ]
        found = fusion_vjp_each(vectors, self.kept.fused, factors)
        return [base for base, *_ in found], [term for _, *terms in found for term in terms]


@dataclass(frozen=True, eq=False)
class Adjoint:
    """`x ↦ xJ + g`, the map of a backward solve, which can leave its value in the solver's ring."""

    pullback: Pullback
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if tracked():
            return self.pullback(x) + self.shift
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.write(x, out)
        return out

    def write(self, x: Tensor, out: Tensor) -> None:
        scales = self.pullback.u.scales
        shifts, places = unpack(self.shift, scales), unpack(out, scales)
        parts = zip(shifts, self.pullback._parts(x), places, strict=True)
        fusion_each([Sum(shift, both, False, place) for shift, both, place in parts])


def _check_arguments(
    channels: Sequence[int], groups: int, expansion: int, dropout: float, init_std: float
) -> None:
    check_count("groups", groups)
    check_count("expansion", expansion)
    check_number("init_std", init_std, 0)
    check_number("dropout", dropout, 0, 1)
    if dropout == 1:
        raise ValueError(f"dropout={dropout!r} drops everything: pick a number in [0, 1)")
    if not channels:
        raise ValueError(f"channels={channels!r} has no resolution: give at least one number")
    for place, width in enumerate(channels):
        check_count(f"channels[{place}]", width)
        if width % groups:
            raise ValueError(
                f"channels[{place}]={width} is not divisible by groups={groups}: give multiples of {groups}, "
                "or other groups"
            )
