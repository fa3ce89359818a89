"""TorchDEQ's Jacobian loss and power method."""

import torch
from torch import Tensor

from ...jacobian import jacobian_norm_of, spectral_pair_of


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """TorchDEQ's `jac_reg`: `‖ε^T ∂f0/∂z0‖² / z0.numel()`, the mean over `vecs` Gaussian ε.

    The probes are made on z0's device, from one seed of its global generator. See `td.jacobian_norm_of`;
    with z a state of its own, `td.jacobian_norm(f, z)` needs no double backward.

    Args:
        f0: f(z0), `[B, ...]`, with its graph.
        z0: `[B, ...]`, of requires_grad=True.
        vecs: how many probes.
        create_graph: whether the estimate can be differentiated.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    with torch.set_grad_enabled(create_graph):
        return jacobian_norm_of(f0, z0, probes=vecs)


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """TorchDEQ's `power_method`: an eigenvector of `∂f0/∂z0` transposed, and the modulus of its eigenvalue.

    By Arnoldi iteration (see `td.spectral_radius`): TorchDEQ's Rayleigh quotient is wrong where the largest
    eigenvalues are a complex pair. Then the vector is one of the plane that belongs to the pair.

    Args:
        f0: f(z0), `[B, ...]`, with its graph.
        z0: `[B, ...]`, of requires_grad=True.
        n_iters: how many vector-Jacobian products it may take.

    Returns:
        `(vector like z0, of length 1 in each sample; radius [B])`.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    radius, vector = spectral_pair_of(f0, z0, n_iters)
    return vector, radius
