"""LayerNorm of a residual sum in PyTorch, and its vector-Jacobian product (Ba et al., arXiv 1607.06450).

With `s = x + m ⊙ y`, `1/σ = (var(s) + ε)^(-1/2)` and `n = (s − mean(s)) / σ` the value is `γ ⊙ n + β`. All is
differentiable by ordinary operators.
"""

import torch
from torch import Tensor

from ..backend import tracked
from .record import accumulate_dtype


def norm(
    x: Tensor,
    branch: Tensor | None = None,
    mask: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value `[..., D]`, n `[..., D]` and 1/σ `[..., 1]`, the last in the accumulation dtype.

    x, branch y: `[..., D]`. mask m: broadcasts to them. gain γ, offset β: `[D]`, both or neither; without
    them the value is n. Statistics are taken in the accumulation dtype.
    """
    wide = accumulate_dtype(x.dtype)
    total = x.to(wide)
    if branch is not None:
        total = total + (branch.to(wide) if mask is None else branch.to(wide) * mask.to(wide))
    if tracked(x, branch, mask):
        centred = total - total.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        normal = centred * inverse
    else:  # one pass, but 1/σ has no derivative there
        normal, _, inverse = torch.native_layer_norm(total, total.shape[-1:], None, None, epsilon)
    if gain is None or offset is None:
        value = normal.to(x.dtype)
        return value, value, inverse
    return (normal * gain.to(wide) + offset.to(wide)).to(x.dtype), normal.to(x.dtype), inverse


def norm_value(
    x: Tensor,
    branch: Tensor | None = None,
    mask: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """The value of `norm` by PyTorch's own LayerNorm, which is one pass; the sum is rounded to x's dtype."""
    if branch is None:
        total = x
    else:
        total = (x + branch if mask is None else torch.addcmul(x, branch, mask)).to(x.dtype)
    gain, offset = (None if each is None else each.to(x.dtype) for each in (gain, offset))
    return torch.nn.functional.layer_norm(total, x.shape[-1:], gain, offset, epsilon).to(x.dtype)


def norm_vjp(vector: Tensor, normal: Tensor, inverse: Tensor, gain: Tensor | None = None) -> Tensor:
    """The gradient of `⟨vector, value⟩` in s: `(g − mean(g) − n mean(g n)) / σ` with `g = γ ⊙ vector`."""
    wide = inverse.dtype
    g, n = vector.to(wide), normal.to(wide)
    gain = None if gain is None else gain.to(wide)
    if not tracked(vector, normal, inverse, gain):
        return _centred(g, n, gain).mul_(inverse).to(vector.dtype)
    g = g if gain is None else g * gain
    along = (g * n).mean(-1, keepdim=True)
    return (inverse * (g - g.mean(-1, keepdim=True) - n * along)).to(vector.dtype)


def _centred(vector: Tensor, normal: Tensor, gain: Tensor | None) -> Tensor:
    """`g − mean(g) − n mean(g n)` by PyTorch's own LayerNorm, for which n are rows of mean 0 and σ 1."""
    vector, normal = torch.broadcast_tensors(vector, normal)
    mean = vector.new_zeros(*vector.shape[:-1], 1)
    backward = torch.ops.aten.native_layer_norm_backward
    of_rows = (True, False, False)
    return backward(vector, normal, vector.shape[-1:], mean, torch.ones_like(mean), gain, None, of_rows)[0]
