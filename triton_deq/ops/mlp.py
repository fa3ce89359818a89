"""The multilayer perceptron's layer as an op, and its vector-Jacobian product.

Inside torch.compile, under autocast and in the transforms of torch.func the ordinary operators run: those
know what to make of them.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..backend import recorded
from ..reference import mlp as reference
from ..reference.activations import ACTIVATIONS, Activation
from .launch import kernels_serve, launch
from .products import tiles

MOST_NORM = 1024
"""Bytes of the widest rows that a program normalises itself; it reads the whole weight for a few of them."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm's gain and offset, `[N]` both, and its ε."""

    gain: Tensor
    offset: Tensor
    epsilon: float


def served(z: Tensor, activation: Activation, backend: str, *others: Tensor | None) -> bool:
    """Whether the kernels can compute a layer of these tensors here, and should."""
    known = activation == ACTIVATIONS.get(activation.name)  # equal, since a copied model has a copy of it
    return kernels_serve(z, backend, *others) and known


def normalises(weight: Tensor) -> bool:
    """Whether the kernel applies a LayerNorm to what this weight makes, faster than one after it."""
    return len(weight) * weight.element_size() <= MOST_NORM


def fit(z: Tensor, weight: Tensor, u: Tensor) -> bool:
    """Whether the kernel can read these as a layer's; what does not fit is left to PyTorch's own rules."""
    same = u.shape[:-1] == z.shape[:-1] or (
        torch.broadcast_shapes(u.shape[:-1], z.shape[:-1]) == z.shape[:-1]
    )
    return same and (u.shape[-1], z.shape[-1]) == weight.shape


def mlp(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: Activation,
    norm: Norm | None = None,
    backend: str = "auto",
) -> Tensor:
    """`act(z Wᵀ + u)`, or with `norm` its LayerNorm; differentiable to any order.

    Args:
        z: `[..., K]`, floating, any strides.
        weight: W `[N, K]`, of z's dtype.
        u: `[..., N]`, of z's dtype, with z's leading dimensions or some that broadcast to them.
        activation: one of `ACTIVATIONS`, or one of your own, which the reference computes.
        norm: fused into the product where no gradient is recorded and a row has at most 1024 bytes,
            else applied by PyTorch.

    float32 products are summed of three TF32 products each, whose error is that of float32, or of one where
    `torch.backends.cuda.matmul.fp32_precision` is "tf32"; 16-bit ones add up in float32.
    """
    if not (served(z, activation, backend, weight, u) and fit(z, weight, u)):
        value = reference.mlp(z, weight, u, activation)
    elif recorded(z, weight, u):
        value, _ = MLPFunction.apply(z, weight, u, activation)
    elif norm is None or normalises(weight):
        return mlp_fwd(z, weight, u, activation, norm)
    else:
        value = mlp_fwd(z, weight, u, activation)
    if norm is None:
        return value
    return torch.nn.functional.layer_norm(value, value.shape[-1:], norm.gain, norm.offset, norm.epsilon)


def mlp_and_slope(
    z: Tensor, weight: Tensor, u: Tensor, activation: Activation, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`act(a)` and `act′(a)`, both differentiable; arguments as in `mlp`."""
    if not (served(z, activation, backend, weight, u) and fit(z, weight, u)):
        return reference.mlp_and_slope(z, weight, u, activation)
    return MLPFunction.apply(z, weight, u, activation)


def mlp_vjp(
    vector: Tensor,
    slope: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`(v ⊙ act′(a)) W`, the layer's vector-Jacobian product, plus `shift`; differentiable.

    Args:
        vector: v `[..., *slope.shape]`, of any number of probes.
        slope: `act′(a)` `[..., N]`.
        weight: W `[N, K]`.
        shift: `[..., K]`, shaped like the product, or None.
        out: where the product is left; only without gradients.
    """
    alike = served(vector, ACTIVATIONS["relu"], backend, slope, weight, shift)
    fitting = vector.shape[vector.dim() - slope.dim() :] == slope.shape and slope.shape[-1] == len(weight)
    if recorded(vector, slope, weight, shift) or not alike or not fitting:
        return reference.mlp_vjp(vector, slope, weight, shift, out)
    if out is not None and not out.is_contiguous():  # the kernel writes rows one after another
        return out.copy_(mlp_vjp_fwd(vector, slope, weight, shift, None))
    return mlp_vjp_fwd(vector, slope, weight, shift, out)


# ------------------------------------------------------------------------------------------- the launches


def mlp_fwd(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: Activation,
    norm: Norm | None = None,
    out: Tensor | None = None,
    slope: Tensor | None = None,
    curvature: Tensor | None = None,
) -> Tensor:
    """The value by the kernel, into `out` if given; act′ and act″ into the others. Those are contiguous."""
    rows, injected = _rows(z), _rows(u.expand(*z.shape[:-1], u.shape[-1]))
    batch, depth = rows.shape
    width = weight.shape[0]
    value = z.new_empty(*z.shape[:-1], width) if out is None else out
    weight = weight.contiguous()
    # With derivatives too the epilogue needs more registers than two programs would have.
    grid, constants = tiles(batch, width, depth, z, whole=norm is not None, paired=slope is None)
    launch(
        _kernels().mlp_kernel,
        grid,
        rows,
        weight,
        injected,
        weight if norm is None else norm.gain.contiguous(),
        weight if norm is None else norm.offset.contiguous(),
        value,
        value if slope is None else slope,
        value if curvature is None else curvature,
        batch,
        width,
        depth,
        ACTIVATION=activation.name,
        SLOPE=slope is not None,
        CURVATURE=curvature is not None,
        NORM=norm is not None,
        EPSILON=0.0 if norm is None else norm.epsilon,
        **constants,
    )
    return value


def mlp_vjp_fwd(
    vector: Tensor, slope: Tensor, weight: Tensor, shift: Tensor | None, out: Tensor | None
) -> Tensor:
    """The product by the kernel, into `out` if given."""
    rows, slopes = _rows(vector), _rows(slope)
    depth, width = weight.shape
    product = vector.new_empty(*vector.shape[:-1], width) if out is None else out
    grid, constants = tiles(len(rows), width, depth, vector)
    launch(
        _kernels().mlp_vjp_kernel,
        grid,
        rows,
        slopes,
        weight.contiguous(),
        product if shift is None else _rows(shift.expand(product.shape)),
        product,
        len(rows),
        len(slopes),
        width,
        depth,
        SHIFT=shift is not None,
        **constants,
    )
    return product


class MLPFunction(torch.autograd.Function):
    """`(z, W, u) ↦ (act(a), act′(a))`, so that the Jacobian's own derivative needs no double backward.

    With ḡ, s̄ the gradients of both: `ā = ḡ ⊙ act′(a) + s̄ ⊙ act″(a)`, then `z̄ = ā W`, `W̄ = āᵀ z`, `ū = ā`.
    """

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, u: Tensor, activation: Activation):
        slope, curvature = (z.new_empty(*z.shape[:-1], weight.shape[0]) for _ in range(2))
        value = mlp_fwd(z, weight, u, activation, slope=slope, curvature=curvature)
        ctx.save_for_backward(z, weight, u, slope, curvature)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return value, slope

    @staticmethod
    def backward(ctx, grad: Tensor | None, slope_grad: Tensor | None):
        z, weight, u, slope, curvature = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return *_by_operators((z, weight, u), ctx.activation, (grad, slope_grad)), None
        inner = None if grad is None else grad * slope
        if slope_grad is not None:
            bent = slope_grad * curvature
            inner = bent if inner is None else inner.add_(bent)
        if inner is None:
            return None, None, None, None
        of_z, of_weight, of_u, _ = ctx.needs_input_grad
        return (
            inner @ weight if of_z else None,
            _rows(inner).mT @ _rows(z) if of_weight else None,
            inner.sum_to_size(u.shape) if of_u else None,
            None,
        )


def _by_operators(
    tensors: tuple[Tensor, Tensor, Tensor], activation: Activation, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """`MLPFunction`'s gradients by ordinary operators, which can be differentiated."""
    tensors = z, weight, u = aliases(*tensors)
    outputs = reference.mlp_and_slope(z, weight, u, activation)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not pairs or not leaves:
        return (None,) * len(tensors)
    values, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(values, leaves, given, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in tensors)


def aliases(z: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with graph nodes of their own: where u depends on z, z's own gradient must not go by way of u.

    The engine adds that part itself.
    """
    return z.view_as(z), weight.view_as(weight), u.view_as(u)


def _rows(tensor: Tensor) -> Tensor:
    """`[..., N]` as contiguous rows `[rows, N]`."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


@cache
def _kernels() -> ModuleType:
    from ..kernels import mlp

    return mlp
