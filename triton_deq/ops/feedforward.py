"""A Transformer's feed-forward as an op: its hidden layer, and the gradient that comes back to it.

Inside torch.compile and in the transforms of torch.func the ordinary operators run. Under autocast the dtype
is that of the matrices, which are cast once a solve.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..backend import recorded
from ..reference import feedforward as reference
from ..reference.feedforward import gated
from .launch import kernels_serve, launch
from .products import tiles

GROUP = 32
"""Blocks of 128 rows: the matrix, wider than a cache, comes from memory once for that many."""


def feedforward(
    s: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`h = relu(m ⊙ (s Wᵀ + b))` `[..., T, N]`; differentiable to any order in s, W and b.

    Args:
        s: `[..., T, K]`, floating, any strides.
        weight: W `[N, K]`. The kernels serve where it has s's dtype.
        bias: b `[N]`.
        mask: m ≥ 0 `[..., 1, N]`, shared by the T rows (a variational dropout's), or None.
        backend: "auto", "triton" or "reference".

    float32 products are summed of three TF32 products each, whose error is that of float32, or of one where
    `torch.backends.cuda.matmul.fp32_precision` is "tf32"; 16-bit ones add up in float32.
    """
    # What does not fit is left to PyTorch's own rules.
    fits = s.dim() > 1 and weight.shape[1:] == s.shape[-1:] and bias.shape == weight.shape[:1]
    if mask is not None:
        fits = fits and mask.shape == (*s.shape[:-2], 1, len(weight)) and not mask.requires_grad
    if not (fits and kernels_serve(s, backend, weight, autocast=True)):
        return reference.feedforward(s, weight, bias, mask)
    if recorded(s, weight, bias):
        return FeedforwardFunction.apply(s, weight, bias, mask)
    return feedforward_fwd(s, weight, bias, mask)


def feedforward_vjp(vector: Tensor, matrix: Tensor, inner: Tensor, backend: str = "auto") -> Tensor:
    """`v V` where h > 0, else 0 `[..., N]`: the gradient of `⟨v, h Vᵀ⟩` in what h is the relu of.

    Differentiable to any order in v and V. Of a dropout mask it needs nothing: where that is 0, so is h, and
    its other value is a factor that the caller gives v, which is narrower.

    Args:
        vector: v `[..., K]`; cast to the matrix's dtype.
        matrix: V `[K, N]`.
        inner: h `[..., N]`, as `feedforward` gives it.
        backend: "auto", "triton" or "reference".
    """
    vector = vector.to(matrix.dtype)
    fits = matrix.shape == (vector.shape[-1], inner.shape[-1]) and inner.shape[:-1] == vector.shape[:-1]
    if not (fits and kernels_serve(vector, backend, matrix, inner, autocast=True)):
        return reference.feedforward_vjp(vector, matrix, inner)
    if recorded(vector, matrix):
        return FeedforwardVJPFunction.apply(vector, matrix, inner)
    return feedforward_vjp_fwd(vector, matrix, inner)


# ------------------------------------------------------------------------------------------- the launches


def feedforward_fwd(
    s: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """h by the kernel, into `out` if given, which is contiguous."""
    rows, weight = s.reshape(-1, s.shape[-1]).contiguous(), weight.contiguous()
    inner = s.new_empty(*s.shape[:-1], len(weight)) if out is None else out
    width, depth = weight.shape
    grid, constants = tiles(len(rows), width, depth, s, group=GROUP, paired=True)
    launch(
        _kernels().feedforward_kernel,
        grid,
        rows,
        weight,
        bias.contiguous(),
        weight if mask is None else mask.contiguous(),
        inner,
        len(rows),
        width,
        depth,
        s.shape[-2],
        MASK=mask is not None,
        **constants,
    )
    return inner


def feedforward_vjp_fwd(vector: Tensor, matrix: Tensor, inner: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient by the kernel, into `out` if given, which is contiguous."""
    rows, matrix = vector.reshape(-1, vector.shape[-1]).contiguous(), matrix.contiguous()
    gradient = torch.empty_like(inner, memory_format=torch.contiguous_format) if out is None else out
    depth, width = matrix.shape
    grid, constants = tiles(len(rows), width, depth, vector, group=GROUP, paired=True)
    launch(
        _kernels().feedforward_vjp_kernel,
        grid,
        rows,
        matrix,
        inner.contiguous(),
        gradient,
        len(rows),
        width,
        depth,
        **constants,
    )
    return gradient


# ------------------------------------------------------------------------------------------- the autograd
# The backward passes are ordinary operators: they run once a training step, and have derivatives themselves.


class FeedforwardFunction(torch.autograd.Function):
    """`(s, W, b, m) ↦ h`. With `ḡ = (h̄ ⊙ m where h > 0)`: `s̄ = ḡ W`, `W̄ = ḡᵀ s`, `b̄ = Σ ḡ`."""

    @staticmethod
    def forward(ctx, s: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        inner = feedforward_fwd(s, weight, bias, mask)
        ctx.save_for_backward(s, weight, inner, mask)
        ctx.bias_dtype = bias.dtype
        return inner

    @staticmethod
    def backward(ctx, grad: Tensor):
        s, weight, inner, mask = ctx.saved_tensors
        of_s, of_weight, of_bias, _ = ctx.needs_input_grad
        inward = gated(grad.to(weight.dtype), inner)
        # In place, so that a mask of more bits, as under autocast, makes no wide copy of the hidden layer.
        inward = inward if mask is None else inward.mul_(mask)
        rows = inward.flatten(0, -2)
        return (
            inward @ weight if of_s else None,
            rows.mT @ s.flatten(0, -2) if of_weight else None,
            rows.sum(0).to(ctx.bias_dtype) if of_bias else None,
            None,
        )


class FeedforwardVJPFunction(torch.autograd.Function):
    """`(v, V, h) ↦ v V where h > 0`; linear in v and in V, and h has no gradient through its sign."""

    @staticmethod
    def forward(ctx, vector: Tensor, matrix: Tensor, inner: Tensor) -> Tensor:
        ctx.save_for_backward(vector, matrix, inner)
        return feedforward_vjp_fwd(vector, matrix, inner)

    @staticmethod
    def backward(ctx, grad: Tensor):
        vector, matrix, inner = ctx.saved_tensors
        of_vector, of_matrix, _ = ctx.needs_input_grad
        passed = gated(grad, inner).to(matrix.dtype)
        return (
            passed @ matrix.mT if of_vector else None,
            vector.flatten(0, -2).mT @ passed.flatten(0, -2) if of_matrix else None,
            None,
        )


@cache
def _kernels() -> ModuleType:
    from ..kernels import feedforward as kernels

    return kernels
