"""Weight normalisation in PyTorch (Salimans & Kingma, arXiv 1602.07868, eq. 2).

`w = g v / ‖v‖` for each row of a weight, in the dtype that products take, with zeros behind it.
"""

from typing import Any

import torch
from torch import Tensor

from ..backend import transformed
from .record import accumulate_dtype


def weightnorm(v: Tensor, g: Tensor | None, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """The value of a weight v `[O, N]`, as `[rows, columns]`; g `[O]`, or None for v itself."""
    weight = v
    if g is not None:
        wide = v.to(accumulate_dtype(v.dtype)).contiguous()  # as PyTorch's operator wants it on the way back
        length = g.to(wide.dtype)[:, None]
        weight = _by_rows(wide, length) if transformed() else Normalised.apply(wide, length)
    behind = (0, columns - v.shape[1], 0, rows - v.shape[0])
    return torch.nn.functional.pad(weight.to(dtype), behind) if any(behind) else weight.to(dtype)


def _by_rows(v: Tensor, g: Tensor) -> Tensor:
    return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))


class Normalised(torch.autograd.Function):
    """`(v, g) ↦ g v / ‖v‖` by PyTorch's own operator, a pass each way; derivatives of any order.

    Not those of that operator, whose second ones are wrong on a CPU, as of PyTorch 2.13.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        value, norm = torch.ops.aten._weight_norm_interface(v, g, 0)
        ctx.save_for_backward(v, g, norm)
        return value

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor, Tensor]:
        v, g, norm = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.aten._weight_norm_interface_backward(vector.contiguous(), v, g, norm, 0)
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        direction = v / norm
        along = (vector * direction).sum(1, keepdim=True)
        return g / norm * (vector - along * direction), along
