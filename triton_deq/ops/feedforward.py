"""A Transformer's feed-forward as an op: its hidden layer, and the gradient that comes back to it.

Inside torch.compile and in the transforms of torch.func the ordinary operators run. Under autocast the dtype
is that of the matrices, which are cast once a solve.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

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
    if not (_fits(s, weight, bias, mask) and kernels_serve(s, backend, weight, autocast=True)):
        return reference.feedforward(s, weight, bias, mask)
    if recorded(s, weight, bias):
        return FeedforwardFunction.apply(s, weight, bias, mask, None, None, 1.0)[0]
    return feedforward_fwd(s, weight, bias, mask)


def feedforward_branch(
    s: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    mask: Tensor | None = None,
    kept: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y = h Vᵀ + c` `[..., T, D]` and h, as `feedforward` gives it; differentiable to any order.

    Args:
        s, up, up_bias, mask: s, W, b and m as in `feedforward`.
        down: V `[D, N]`, of s's dtype as W.
        down_bias: c `[D]`, likewise.
        kept: what m, if there is one, is where it is not 0. So what comes back to h takes no pass over the
            hidden layer: where m is 0, so is h, and the other value goes to y's gradient, which is narrower.
        backend: "auto", "triton" or "reference".
    """
    fits = _fits(s, up, up_bias, mask) and down.shape == (len(down_bias), len(up))
    served = fits and kernels_serve(s, backend, up, down, autocast=True)
    if served and recorded(s, up, up_bias, down, down_bias):
        inner, branch = FeedforwardFunction.apply(s, up, up_bias, mask, down, down_bias, kept)
        return branch, inner
    inner = feedforward(s, up, up_bias, mask, backend)
    return functional.linear(inner, down, down_bias), inner


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
    """`(s, W, b, m) ↦ h`, and with V and c also `y = h Vᵀ + c`, else None; m is 0 or `kept` then.

    With `ḡ = (h̄ ⊙ m where h > 0)` and `h̄ = ȳ V`: `s̄ = ḡ W`, `W̄ = ḡᵀ s`, `b̄ = Σ ḡ`.
    """

    @staticmethod
    def forward(
        ctx,
        s: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        down: Tensor | None,
        down_bias: Tensor | None,
        kept: float,
    ) -> tuple[Tensor, Tensor | None]:
        inner = feedforward_fwd(s, weight, bias, mask)
        ctx.save_for_backward(s, weight, inner, mask, down)
        ctx.kept, ctx.bias_dtypes = kept, (bias.dtype, None if down_bias is None else down_bias.dtype)
        ctx.set_materialize_grads(False)
        return inner, None if down is None else functional.linear(inner, down, down_bias)

    @staticmethod
    def backward(ctx, of_inner: Tensor | None, of_branch: Tensor | None):
        s, weight, inner, mask, down = ctx.saved_tensors
        of_s, of_weight, of_bias, _, of_down, of_down_bias, _ = ctx.needs_input_grad
        inward = down_grad = down_bias_grad = None
        if of_branch is not None:
            of_branch = of_branch.to(down.dtype)
            if of_s or of_weight or of_bias:
                narrow = of_branch if mask is None else of_branch * ctx.kept
                inward = feedforward_vjp(narrow, down, inner, "triton")
            down_grad = _outer(of_branch, inner) if of_down else None
            down_bias_grad = _summed(of_branch, ctx.bias_dtypes[1]) if of_down_bias else None
        if of_inner is not None:
            direct = gated(of_inner.to(weight.dtype), inner)
            # In place, so that a mask of more bits, as under autocast, makes no wide copy.
            direct = direct if mask is None else direct.mul_(mask)
            inward = direct if inward is None else inward + direct
        if inward is None:
            return None, None, None, None, down_grad, down_bias_grad, None
        return (
            inward @ weight if of_s else None,
            _outer(inward, s) if of_weight else None,
            _summed(inward, ctx.bias_dtypes[0]) if of_bias else None,
            None,
            down_grad,
            down_bias_grad,
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
        return passed @ matrix.mT if of_vector else None, _outer(vector, passed) if of_matrix else None, None


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`Σ l rᵀ` over all rows."""
    return left.flatten(0, -2).mT @ right.flatten(0, -2)


def _summed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in a bias of this dtype."""
    return rows.flatten(0, -2).sum(0).to(dtype)


def _fits(s: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> bool:
    """What does not is left to PyTorch's own rules."""
    fits = s.dim() > 1 and weight.shape[1:] == s.shape[-1:] and bias.shape == weight.shape[:1]
    if mask is None:
        return fits
    return fits and mask.shape == (*s.shape[:-2], 1, len(weight)) and not mask.requires_grad


@cache
def _kernels() -> ModuleType:
    from ..kernels import feedforward as kernels

    return kernels
