"""A Transformer's feed-forward in PyTorch: its wide hidden layer, and the gradient that comes back to it.

`h = relu(m ⊙ (s Wᵀ + b))` with a dropout mask m ≥ 0. All is differentiable by ordinary operators.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..backend import tracked


def feedforward(s: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """h `[..., N]` from s `[..., K]`, weight `[N, K]`, bias `[N]` and m, which broadcasts to h."""
    recorded = tracked(s, weight, bias, mask)
    # Of rows, since through a view that was written into, autograd copies the whole gradient twice.
    inner = functional.linear(s.reshape(-1, s.shape[-1]), weight, bias)
    shape = *s.shape[:-1], len(weight)
    if mask is None:
        return inner.relu_().view(shape)
    inner = inner.view(shape)
    return (inner * mask if recorded else inner.mul_(mask)).relu_()  # the mask is not negative


def feedforward_vjp(vector: Tensor, matrix: Tensor, inner: Tensor) -> Tensor:
    """`v V` where h > 0, else 0 `[..., N]`: the gradient of `⟨v, h Vᵀ⟩` in what h is the relu of.

    vector v: `[..., K]`. matrix V: `[K, N]`. inner h: `[..., N]`, as `feedforward` gives it.

    In V's dtype: a forward under autocast has a backward that is not.
    """
    product = vector.to(matrix.dtype) @ matrix
    return gated(product, inner) if tracked(product, inner) else gated(product, inner, out=product)


def gated(vector: Tensor, inner: Tensor, out: Tensor | None = None) -> Tensor:
    """v where h > 0, else 0, in one pass: relu's own backward. out: where it is left, which may be v."""
    if out is None:
        return torch.ops.aten.threshold_backward(vector, inner, 0)
    return torch.ops.aten.threshold_backward.grad_input(vector, inner, 0, grad_input=out)
