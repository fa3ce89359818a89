"""GroupNorm (Wu & He, arXiv 1803.08494) with what surrounds it in a multiscale DEQ, in PyTorch.

With `s = m ⊙ x + u` and, over each group of channels of a sample, `n = (s − μ) / σ`, `σ² = var(s) + ε`, the
value is `γ ⊙ n + β`, plus r, through a relu: what is asked for of these. `groupnorm` is the formula by
ordinary operators. The others are one map each, without a graph, in as few passes as PyTorch has for them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .record import accumulate_dtype


class Normalised(NamedTuple):
    """All that derivatives of a `groupnorm` need.

    Attributes:
        x: `[B, C, H, W]`. gain: `[C]` or None. mask: `[B, C]` or None. shift: u, like x, or None.
        mean, inverse: μ and 1/σ `[B, G]` in the accumulation dtype.
        value: the value, where it went through a relu; else None.
        residual: whether there was one; without it nobody asks for its gradient, and kernels do not write it.
    """

    x: Tensor
    gain: Tensor | None
    mask: Tensor | None
    shift: Tensor | None
    mean: Tensor
    inverse: Tensor
    value: Tensor | None
    residual: bool = True


class Gradients(NamedTuple):
    """Of what a groupnorm takes: x, u, r, γ and β; or, of its product, the vector in place of r, and no β."""

    x: Tensor
    shift: Tensor | None
    other: Tensor
    gain: Tensor | None
    offset: Tensor | None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The value `[B, C, H, W]` in x's dtype, and μ and 1/σ `[B, G]`; differentiable to any order."""
    wide = accumulate_dtype(x.dtype)
    total = summed(x.to(wide), mask, shift)
    grouped = total.unflatten(1, (groups, -1))
    mean = grouped.mean((2, 3, 4), keepdim=True)
    centred = grouped - mean
    inverse = (centred.square().mean((2, 3, 4), keepdim=True) + epsilon).rsqrt()
    value = (centred * inverse).flatten(1, 2)
    if gain is not None and offset is not None:
        value = value * gain.to(wide)[:, None, None] + offset.to(wide)[:, None, None]
    if residual is not None:
        value = value + residual.to(wide)
    if relu:
        value = value.relu()
    return value.to(x.dtype), mean[:, :, 0, 0, 0], inverse[:, :, 0, 0, 0]


def groupnorm_vjp(vector: Tensor, held: Normalised) -> tuple[Tensor, Tensor]:
    """The gradients of `⟨vector, value⟩` in x and in r; differentiable to any order, through μ and σ too.

    With `v = vector ⊙ 1[value > 0]`, which is the second of them, and `g = γ ⊙ v`, that in s is
    `(g − mean(g) − n mean(g n)) / σ`.
    """
    wide = held.mean.dtype
    groups = held.mean.shape[1]
    total = summed(held.x.to(wide), held.mask, held.shift).unflatten(1, (groups, -1))
    dims = (2, 3, 4)
    centred = total - total.mean(dims, keepdim=True)
    # ε is what 1/σ² has beyond the variance.
    variance = centred.square().mean(dims, keepdim=True)
    epsilon = (held.inverse.pow(-2)[:, :, None, None, None] - variance).detach()
    inverse = (variance + epsilon).rsqrt()
    n = centred * inverse
    v = vector if held.value is None else torch.where(held.value > 0, vector, 0)
    g = v.to(wide) if held.gain is None else v.to(wide) * held.gain.to(wide)[:, None, None]
    g = g.unflatten(1, (groups, -1))
    of_sum = inverse * (g - g.mean(dims, keepdim=True) - n * (g * n).mean(dims, keepdim=True))
    of_x = of_sum.flatten(1, 2)
    if held.mask is not None:
        of_x = of_x * held.mask.to(wide)[:, :, None, None]
    return of_x.to(held.x.dtype), v


def groupnorm_fwd(
    x: Tensor,
    groups: int,
    gain: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    epsilon: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value, into `out` if given, μ and 1/σ; by PyTorch's own GroupNorm, which is one operator."""
    batch, channels, height, width = x.shape
    total = taken(summed(x, mask, shift))
    gain, offset = (None if each is None else each.to(x.dtype).contiguous() for each in (gain, offset))
    value, mean, inverse = torch.native_group_norm(
        total, gain, offset, batch, channels, height * width, groups, epsilon
    )
    if residual is not None:
        value += residual
    if relu:
        value.relu_()
    return value.contiguous(memory_format=layout_of(x)) if out is None else out.copy_(value), mean, inverse


def groupnorm_vjp_fwd(vector: Tensor, held: Normalised, parameters: bool = False) -> Gradients:
    """The gradients of `⟨vector, value⟩`; those of γ and β only if asked for."""
    x, gain, mask, shift, mean, inverse, value, _ = held
    batch, channels, height, width = x.shape
    v = vector if value is None else torch.ops.aten.threshold_backward(vector, value, 0)
    total = taken(summed(x, mask, shift))
    # PyTorch's operator takes it for granted that both lie alike, and that γ is contiguous.
    layout = layout_of(total)
    of_sum, of_gain, of_offset = torch.ops.aten.native_group_norm_backward(
        v.to(x.dtype).contiguous(memory_format=layout),
        total,
        mean,
        inverse,
        None if gain is None else gain.to(x.dtype).contiguous(),
        batch,
        channels,
        height * width,
        mean.shape[1],
        [True, parameters, parameters],
    )
    of_x = of_sum if mask is None else of_sum * mask[:, :, None, None]
    return Gradients(of_x, of_sum, v, of_gain, of_offset)


def groupnorm_second_fwd(
    along: Tensor, beside: Tensor | None, vector: Tensor, of_g: Tensor, held: Normalised
) -> Gradients:
    """The gradients of `⟨along, of_x⟩ + ⟨beside, v⟩`, what `groupnorm_vjp` gives, in x, u, its vector and γ.

    Let w = m ⊙ along, `V(w) = (w − mean(w) − n mean(w n)) / σ`, the same of g, and means those over a group.
    That in s is `−(mean(g n) V(w) + mean(w n) V(g) + mean(V(w) g) n) / σ`, that in the vector
    `(γ V(w) + beside) ⊙ 1[value > 0]`, and that in γ `Σ v V(w)`.

    of_g: V(g), which `groupnorm_vjp_fwd` gave for u.
    """
    x, gain, mask, shift, mean, inverse, value, _ = held
    batch, channels, height, width = x.shape
    total = taken(summed(x, mask, shift))
    groups, layout = mean.shape[1], layout_of(total)
    w = along if mask is None else along * mask.to(along.dtype)[:, :, None, None]
    w = w.to(x.dtype).contiguous(memory_format=layout)
    v = vector if value is None else torch.ops.aten.threshold_backward(vector, value, 0)
    v = v.to(x.dtype).contiguous(memory_format=layout)
    gains = None if gain is None else gain.to(x.dtype)
    entries = channels // groups * height * width
    sizes = (batch, channels, height * width, groups, [True, False, False])
    of_w = torch.ops.aten.native_group_norm_backward(w, total, mean, inverse, None, *sizes)[0]
    # s − μ: what it lacks to be n, 1/σ, stands in `means`.
    normal = total - mean.repeat_interleave(channels // groups, 1).to(x.dtype)[:, :, None, None]
    place = torch.empty_like(normal)  # one for all products: fresh memory costs more than they do
    vn, wv, wn = (
        torch.mul(one, other, out=place).sum((2, 3)) for one, other in ((v, normal), (of_w, v), (w, normal))
    )
    # From sums over pixels to means over groups, for each of their channels.
    sums = torch.stack((vn, wv, wn))
    if gains is not None:
        sums[:2] *= gains
    means = sums.view(3, batch, groups, -1).sum(3).mul_(-inverse.square() / entries)
    of_w_by, normal_by, of_g_by = means.repeat_interleave(channels // groups, 2)[..., None, None]
    of_sum = torch.mul(of_w, of_w_by, out=place).addcmul_(of_g, of_g_by).addcmul_(normal, normal_by)
    of_gain = None if gain is None else wv.sum(0).to(gain.dtype)
    if gains is not None and beside is not None:
        of_vector = torch.addcmul(beside, of_w, gains[:, None, None])
    elif gains is not None:
        of_vector = of_w.mul_(gains[:, None, None])
    else:
        of_vector = of_w if beside is None else of_w.add_(beside)
    if value is not None:
        of_vector = torch.ops.aten.threshold_backward(of_vector, value, 0)
    of_x = of_sum if mask is None else of_sum * mask.to(x.dtype)[:, :, None, None]
    return Gradients(of_x, of_sum, of_vector.to(vector.dtype), of_gain, None)


def summed(x: Tensor, mask: Tensor | None, shift: Tensor | None) -> Tensor:
    """`m ⊙ x + u`, in x's dtype."""
    if mask is not None:
        x = x * mask.to(x.dtype)[:, :, None, None]
    return x if shift is None else x + shift.to(x.dtype)


def layout_of(x: Tensor) -> torch.memory_format:
    """How a map lies."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def taken(x: Tensor) -> Tensor:
    """The map as PyTorch's GroupNorm takes it: channels-last, too, on a CPU alone."""
    layout = layout_of(x) if x.device.type == "cpu" else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    if layout is torch.channels_last:
        _, channels, height, width = x.shape
        # Of one row or column any stride is as good, but PyTorch tells the layout by it, and refuses the map.
        if x.stride() != (channels * height * width, 1, channels * width, channels):
            return x.clone(memory_format=layout)
    return x
