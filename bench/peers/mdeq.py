"""The multiscale layer in plain PyTorch, as the authors' code computes it (arXiv 2006.08656, section 3).

Maps in PyTorch's default layout, a list packed by `torch.cat` and cut again at every evaluation, GroupNorm by
PyTorch's module, derivatives by the autograd engine.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PlainMDEQ:
    """`z ↦ f(z; x)` with the weights of an `MDEQCell`.

    Args:
        cell: whose weights are read, once, as the authors' code computes weight normalisation once a solve.
        x: the features `[B, C_0, H, W]`.
        masks: of the cell's dropout.
    """

    def __init__(self, cell: Any, x: Tensor, masks: Any = None):
        self.cell, self.masks = cell, masks
        self.weights = {unit: unit.conv.weight.contiguous() for unit in cell._units}
        height, width = x.shape[2:]
        self.sizes = [(c, height >> i, width >> i) for i, c in enumerate(cell.channels)]
        # Every resolution is injected something: all but the first get zeros.
        self.injected = [x, *(x.new_zeros(len(x), *size) for size in self.sizes[1:])]

    def __call__(self, z: Tensor) -> Tensor:
        """`[B, N]` to `[B, N]`, each map in the order channel, row, column."""
        maps = [
            piece.reshape(-1, *size)
            for piece, size in zip(z.split([c * h * w for c, h, w in self.sizes], 1), self.sizes, strict=True)
        ]
        branches = [self._block(i, each) for i, each in enumerate(maps)]
        if len(maps) > 1:
            branches = [self._fused(i, branches) for i in range(len(maps))]
        return torch.cat([each.reshape(len(z), -1) for each in branches], 1)

    def _unit(self, unit: Any, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weights[unit], None, unit.conv.stride, unit.conv.padding)

    def _block(self, place: int, x: Tensor) -> Tensor:
        block = self.cell.blocks[place]
        inner = functional.relu(_norm(block.first.norm, self._unit(block.first, x)), inplace=True)
        out = self._unit(block.second, inner)
        if self.masks is not None:
            out = out * self.masks[place][:, :, None, None]
        out = _norm(block.second.norm, out + self.injected[place])
        out += x
        return _norm(block.norm, functional.relu(out, inplace=True))

    def _fused(self, target: int, branches: list[Tensor]) -> Tensor:
        total: Any = 0
        for source, each in enumerate(branches):
            for unit in self.cell.fuse[target][source]:
                each = _norm(unit.norm, self._unit(unit, each))
                each = functional.relu(each, inplace=True) if unit.relu else each
            factor = 2 ** max(source - target, 0)
            total = total + (functional.interpolate(each, scale_factor=factor) if factor > 1 else each)
        post = self.cell.post[target]
        return _norm(post.norm, self._unit(post, functional.relu(total)))


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
