"""Textbook solvers beside triton_deq.demo.textbook: an Anderson that compiles well, and Broyden."""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
HISTORY = 6
RIDGE = 1e-4


def compiled_anderson() -> Callable[[Function, Tensor, int], Tensor]:
    """The textbook's Anderson with its arithmetic in two compiled functions of fixed shapes.

    Compiled as it stands, its loop is unrolled and compiled anew for each slot of the history, and comes out
    slower than eager. Here slots that are not filled yet are masked, so one compilation serves all steps.
    """
    mix, residual = torch.compile(_mix), torch.compile(_residual)
    return lambda f, z0, steps: masked_anderson(f, z0, steps, mix, residual)


def masked_anderson(
    f: Function,
    z0: Tensor,
    steps: int,
    mix: Callable[[Tensor, Tensor, Tensor], Tensor],
    residual: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """The last iterate after `steps` ≥ 3 evaluations of f; looks at the residual each step if it is given."""
    shape, batch = z0.shape, z0.shape[0]
    x = z0.new_zeros(batch, HISTORY, z0[0].numel())
    fx = torch.zeros_like(x)
    filled = z0.new_zeros(HISTORY)
    x[:, 0], fx[:, 0] = z0.reshape(batch, -1), f(z0).reshape(batch, -1)
    x[:, 1], fx[:, 1] = fx[:, 0], f(fx[:, 0].view(shape)).reshape(batch, -1)
    filled[:2].fill_(1)
    slot = 1
    for step in range(2, steps):
        slot = step % HISTORY
        x[:, slot] = mix(x, fx, filled)
        fx[:, slot] = f(x[:, slot].view(shape)).reshape(batch, -1)
        filled[slot].fill_(1)  # an assignment would copy a number from the host, which no graph can hold
        if residual is not None and residual(x[:, slot], fx[:, slot]).item() < 0:
            break
    return x[:, slot].view(shape)


def _mix(x: Tensor, fx: Tensor, filled: Tensor) -> Tensor:
    """The next iterate `[B, N]` from histories `[B, m, N]`; an unfilled slot gets weight zero."""
    g = fx - x
    gram = torch.bmm(g, g.mT) + RIDGE * torch.eye(HISTORY, dtype=g.dtype, device=g.device)
    border = filled.expand(g.shape[0], 1, HISTORY)
    matrix = torch.cat((torch.cat((gram, border.mT), 2), torch.nn.functional.pad(border, (0, 1))), 1)
    right = torch.nn.functional.pad(torch.zeros_like(border[:, 0]), (0, 1), value=1.0)
    weights = torch.linalg.solve_ex(matrix, right[..., None])[0][:, :HISTORY]
    return torch.bmm(weights.mT, fx)[:, 0]


def _residual(x: Tensor, fx: Tensor) -> Tensor:
    return (fx - x).norm() / (1e-5 + fx.norm())


def graphable_anderson(f: Function, z0: Tensor, steps: int) -> Tensor:
    """The same without a look at the residual, so that a CUDA graph can hold it."""
    return masked_anderson(f, z0, steps, _mix, None)


def broyden(f: Function, z0: Tensor, steps: int) -> Tensor:
    """The last iterate of the good Broyden method after `steps` evaluations of f; without line search.

    Solves g(z) = f(z) − z = 0 with an inverse Jacobian −I + U Vᵀ that gains a rank a step (Bai et al.,
    arXiv 1909.01377, appendix A).
    """
    batch = z0.shape[0]
    x = z0.reshape(batch, -1)
    left = x.new_zeros(batch, steps, x.shape[1])
    right = torch.zeros_like(left)

    def g(x: Tensor) -> Tensor:
        return f(x.view_as(z0)).reshape(batch, -1) - x

    def times(a: Tensor, b: Tensor, vector: Tensor) -> Tensor:
        """`(−I + Σ a_k b_kᵀ) vector`"""
        weights = torch.bmm(b, vector[:, :, None])
        return torch.bmm(weights.mT, a)[:, 0] - vector

    gx = g(x)
    step = gx.clone()
    for k in range(steps - 1):
        x = x + step
        before, gx = gx, g(x)
        if _residual(x, gx + x).item() < 0:
            break
        change = gx - before
        v = times(right[:, :k], left[:, :k], step)  # by the inverse's transpose
        u = step - times(left[:, :k], right[:, :k], change)
        u = u / torch.einsum("bn,bn->b", v, change)[:, None]
        left[:, k], right[:, k] = u, v
        step = -times(left[:, : k + 1], right[:, : k + 1], gx)
    return x.view_as(z0)
