"""The multilayer perceptron's layer `act(z Wᵀ + u)` in PyTorch, and its vector-Jacobian product.

With `a = z Wᵀ + u` the Jacobian in z is `diag(act′(a)) W`. All is differentiable by ordinary operators.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .activations import Activation


def mlp(z: Tensor, weight: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """`act(a)` `[..., N]` from z `[..., K]`, weight `[N, K]` and u `[..., N]`."""
    return activation(functional.linear(z, weight) + u)


def mlp_and_slope(z: Tensor, weight: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """`act(a)` and `act′(a)`, both `[..., N]`."""
    inner = functional.linear(z, weight) + u
    return activation(inner), activation.derivative(inner)


def mlp_vjp(
    vector: Tensor, slope: Tensor, weight: Tensor, shift: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`(v ⊙ act′(a)) W`, and plus `shift`, `[..., K]`, for v `[..., N]`.

    In v's dtype: a forward under autocast has a backward that is not.
    out: where it is left; only without gradients.
    """
    scaled = vector * slope
    weight = weight.to(scaled.dtype)
    if (
        shift is not None
        and out is not None
        and scaled.dim() == 2
        and shift.dtype == out.dtype == scaled.dtype
    ):
        return torch.addmm(shift, scaled, weight, out=out)
    product = scaled @ weight
    product = product if shift is None else product + shift
    return product if out is None else out.copy_(product)
