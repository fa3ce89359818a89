"""Broyden's inverse `−I + U Vᵀ` as a ring of rank-one terms that outlives the pairs it was made from.

`td.Broyden(memory=m)` follows the last m pairs exactly. TorchDEQ with `LBFGS_thres=m` instead overwrites the
oldest of m terms `u vᵀ`, each of which was computed with the terms of its time, and no set of pairs gives
that again. So these few PyTorch operators are there for its numbers, and for nothing else.
"""

import torch
from torch import Tensor

from ..reference.record import accumulate_dtype


class LowRank:
    """U and V of at most `terms` terms; rows `[B, N]`.

    With `s = x⁺ − x`, `y = g⁺ − g` and B⁻¹ the estimate so far: `v = B⁻ᵀ s`, `u = (s − B⁻¹ y) / (v · y)`.
    Broyden, Math. Comp. 19 (1965), in the form of Bai et al., arXiv 1909.01377, section 3.
    """

    def __init__(self, terms: int, like: Tensor):
        batch, entries = like.shape
        self._u, self._v = like.new_zeros((2, batch, terms, entries), dtype=accumulate_dtype(like.dtype))
        self._count = 0

    def direction(self, s: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """Take in a pair, and give `−B⁻¹ g`; y and g go through V and U together."""
        s, y, g = (rows.to(self._u.dtype) for rows in (s, y, g))
        used = min(self._count, self._u.shape[1])
        u, v = self._u[:, :used], self._v[:, :used]
        row = torch.bmm(torch.bmm(s[:, None], u.mT), v)[:, 0] - s
        inverse = torch.bmm(torch.bmm(torch.stack((y, g), dim=1), v.mT), u)
        column = s - (inverse[:, 0] - y)
        column /= (row * y).sum(1, keepdim=True)
        row, column = (torch.where(torch.isnan(term), 0, term) for term in (row, column))

        slot = self._count % self._u.shape[1]
        overwritten = (self._v[:, slot] * g).sum(1, keepdim=True) * self._u[:, slot]  # zero while it fills
        self._u[:, slot], self._v[:, slot] = column, row
        self._count += 1
        return g - inverse[:, 1] + overwritten - (row * g).sum(1, keepdim=True) * column
