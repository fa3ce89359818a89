"""The norm of the layer's Jacobian `diag(act′(a)) W`, estimated with given probes, in PyTorch."""

from torch import Tensor

from .activations import Activation
from .jacobian import squared_norm
from .mlp import mlp_and_slope, mlp_vjp


def mlp_jacobian_norms(
    z: Tensor, weight: Tensor, u: Tensor, probes: Tensor, activation: Activation
) -> Tensor:
    """`‖ε_mᵀ J_b‖²` `[M, B]` of the layer's Jacobian, for probes ε `[M, B, N]`."""
    _, slope = mlp_and_slope(z, weight, u, activation)
    products = mlp_vjp(probes, slope, weight)
    return squared_norm(products.flatten(0, 1)).view(products.shape[:2])
