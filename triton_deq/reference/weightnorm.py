"""Weight normalisation in PyTorch (Salimans & Kingma, arXiv 1602.07868, eq. 2).

`w = g v / ‖v‖` for each row of a weight, in the dtype that products take, with zeros behind it.
"""

import torch
from torch import Tensor

from .record import accumulate_dtype


def weightnorm(v: Tensor, g: Tensor | None, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """The value of a weight v `[O, N]`, as `[rows, columns]`; g `[O]`, or None for v itself."""
    weight = v
    if g is not None:
        wide = v.to(accumulate_dtype(v.dtype))
        weight = wide * (g.to(wide.dtype) / torch.linalg.vector_norm(wide, dim=1))[:, None]
    behind = (0, columns - v.shape[1], 0, rows - v.shape[0])
    return torch.nn.functional.pad(weight.to(dtype), behind) if any(behind) else weight.to(dtype)
