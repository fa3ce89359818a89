"""The norm of the multilayer perceptron's Jacobian, estimated in closed form, and its gradient."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import mlp_probe as reference
from ..reference.activations import Activation
from .jacobian import probe, squared_norm_fwd
from .launch import launch, most_warps
from .mlp import aliases, fit, served
from .products import tiles


class MLPJacobianFunction(torch.autograd.Function):
    """`(z, W, u) ↦ ‖ε_mᵀ J_b‖²` `[M, B]`, `J_b = diag(act′(a_b)) W`, for probes that a seed stands for.

    With `t_m = ε_m ⊙ act′(a)`, `p_m = t_m W` and the gradient ḡ of the norms: `p̄_m = 2 ḡ_m p_m`,
    `ā = act″(a) ⊙ Σ_m ε_m ⊙ (p̄_m Wᵀ)`, then `z̄ = ā W`, `ū = ā` and `W̄ = āᵀ z + Σ_m t_mᵀ p̄_m`.
    """

    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        weight: Tensor,
        u: Tensor,
        seed: Tensor,
        probes: int,
        distribution: str,
        activation: Activation,
    ) -> Tensor:
        vectors, curvature = mlp_probe_fwd(z, weight, u, seed, probes, distribution, activation)
        products = vectors @ weight
        ctx.save_for_backward(z, weight, u, seed, vectors, curvature, products)
        ctx.distribution, ctx.activation = distribution, activation
        return squared_norm_fwd(products.flatten(0, 1)).view(probes, len(z))

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, weight, u, seed, vectors, curvature, products = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            probes = torch.stack(
                [probe(vectors[m], seed, m, ctx.distribution, "triton") for m in range(len(vectors))]
            )
            z, weight, u = aliases(z, weight, u)
            norms = reference.mlp_jacobian_norms(z, weight, u, probes, ctx.activation)
            leaves = [tensor for tensor in (z, weight, u) if tensor.requires_grad]
            found = iter(torch.autograd.grad(norms, leaves, grad, create_graph=True, materialize_grads=True))
            return *(next(found) if each.requires_grad else None for each in (z, weight, u)), *(None,) * 4
        scaled = (2 * grad).to(products.dtype)[:, :, None] * products
        inner = mlp_probe_vjp_fwd(scaled, weight, curvature, seed, ctx.distribution)
        of_z, of_weight, of_u = ctx.needs_input_grad[:3]
        weight_grad = None
        if of_weight:
            weight_grad = torch.addmm(inner.mT @ z, vectors.flatten(0, 1).mT, scaled.flatten(0, 1))
        return inner @ weight if of_z else None, weight_grad, inner if of_u else None, *(None,) * 4


def mlp_jacobian_norms(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: Activation,
    seed: Tensor,
    probes: int,
    distribution: str,
    backend: str = "auto",
) -> Tensor | None:
    """`‖ε_mᵀ J_b‖²` `[M, B]` of the layer's Jacobian in z, in the accumulation dtype; differentiable.

    Args:
        z, weight, u, activation: as in `mlp`, z `[B, K]` and u `[B, N]`.
        seed: int64 `[1]`; it stands for the probes ε `[M, B, N]`, which are those of `probe`.
        probes, distribution: as in `jacobian_norm`.

    Returns None where the kernels do not serve; in float64 too, since their probes have float32's precision.
    """
    fits = (
        z.dim() == 2 and z.dtype != torch.float64 and u.shape == (len(z), len(weight)) and fit(z, weight, u)
    )
    if not fits or not served(z, activation, backend, weight, u):
        return None
    return MLPJacobianFunction.apply(z, weight, u, seed, probes, distribution, activation)


def mlp_probe_fwd(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    seed: Tensor,
    probes: int,
    distribution: str,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """`ε_m ⊙ act′(a)` `[M, B, N]` and `act″(a)` `[B, N]` by the kernel."""
    (batch, depth), width = z.shape, len(weight)
    vectors, curvature = z.new_empty(probes, batch, width), z.new_empty(batch, width)
    grid, constants = _tiles(batch, width, depth, z)
    launch(
        _kernels().mlp_probe_kernel,
        grid,
        z.contiguous(),
        weight.contiguous(),
        u.contiguous(),
        seed,
        vectors,
        curvature,
        batch,
        width,
        depth,
        ACTIVATION=activation.name,
        PROBES=probes,
        GAUSSIAN=distribution == "gaussian",
        **constants,
    )
    return vectors, curvature


def mlp_probe_vjp_fwd(
    products: Tensor, weight: Tensor, curvature: Tensor, seed: Tensor, distribution: str
) -> Tensor:
    """`act″(a) ⊙ Σ_m ε_m ⊙ (p̄_m Wᵀ)` `[B, N]` by the kernel, from p̄ `[M, B, K]`."""
    (probes, batch, depth), width = products.shape, len(weight)
    inner = torch.empty_like(curvature)
    grid, constants = _tiles(batch, width, depth, products)
    launch(
        _kernels().mlp_probe_vjp_kernel,
        grid,
        products.contiguous(),
        weight.contiguous(),
        curvature,
        seed,
        inner,
        batch,
        width,
        depth,
        PROBES=probes,
        GAUSSIAN=distribution == "gaussian",
        **constants,
    )
    return inner


def _tiles(rows: int, columns: int, depth: int, like: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """With smaller tiles and more warps than other products: probes are made in registers, and take time."""
    grid, constants = tiles(rows, columns, depth, like, most=64)
    warps = constants["BLOCK_B"] * constants["BLOCK_N"] // 512
    return grid, {**constants, "num_warps": min(max(4, warps), most_warps())}


@cache
def _kernels() -> ModuleType:
    from ..kernels import mlp_probe

    return mlp_probe
