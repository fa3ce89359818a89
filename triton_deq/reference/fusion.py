"""The multiscale sum `y = base + Σ up(t)` through a relu, in PyTorch; `up` repeats pixels.

Bai, Koltun & Kolter, arXiv 2006.08656, section 3.2: what all resolutions give to one of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def fusion(base: Tensor, terms: Sequence[Tensor], relu: bool = True) -> Tensor:
    """The value `[B, C, H, W]`; each term is `[B, C, H/k, W/k]` with a k of its own. Differentiable."""
    value = base
    for term in terms:
        value = value + repeated(term, base.shape[2] // term.shape[2])
    return value.relu() if relu else value


def fusion_fwd(base: Tensor, terms: Sequence[Tensor], relu: bool, out: Tensor | None = None) -> Tensor:
    """The same, into `out` if given, in place after the first sum."""
    others = sorted(terms, key=lambda term: -term.shape[2])
    if others and others[0].shape == base.shape:
        value = torch.add(base, others.pop(0), out=out)
    else:
        value = base.clone() if out is None else out.copy_(base)
    for term in others:
        blocks(value, base.shape[2] // term.shape[2]).add_(term[:, :, :, None, :, None])
    return value.relu_() if relu else value


def fusion_vjp(vector: Tensor, value: Tensor | None, factors: Sequence[int]) -> tuple[Tensor, ...]:
    """The gradients of `⟨vector, value⟩` in base and in each term, k of which are its factors.

    value: what came out of the relu, or None without one. Differentiable.
    """
    masked = vector if value is None else torch.where(value > 0, vector, 0)
    return masked, *(pooled(masked, factor) for factor in factors)


def fusion_vjp_fwd(vector: Tensor, value: Tensor | None, factors: Sequence[int]) -> tuple[Tensor, ...]:
    """The same without a graph; equal gradients are one tensor."""
    masked = vector if value is None else torch.ops.aten.threshold_backward(vector, value, 0)
    held = {factor: pooled(masked, factor) for factor in set(factors)}
    return masked, *(held[factor] for factor in factors)


def repeated(term: Tensor, factor: int) -> Tensor:
    """Each pixel k × k times."""
    return term if factor == 1 else functional.interpolate(term, scale_factor=factor, mode="nearest")


def pooled(vector: Tensor, factor: int) -> Tensor:
    """The sum of each block of k × k pixels."""
    return vector if factor == 1 else functional.avg_pool2d(vector, factor, divisor_override=1)


def blocks(value: Tensor, factor: int) -> Tensor:
    """`[B, C, H/k, k, W/k, k]`, a view."""
    return value.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
