"""Fixed-point problems with known answers."""

import numpy as np
import torch
from torch import Tensor


def linear_map(radius: float, batch: int, entries: int, dtype=torch.float64, device="cpu"):
    """`f(z) = z Aᵀ + b` with a random A of the given spectral radius, its fixed point, and A."""
    matrix = torch.randn(entries, entries, dtype=torch.float64)
    matrix *= radius / torch.linalg.eigvals(matrix).abs().max()
    offset = torch.randn(batch, entries, dtype=torch.float64)
    answer = torch.linalg.solve(torch.eye(entries, dtype=torch.float64) - matrix, offset.T).T
    a, b = matrix.to(device, dtype), offset.to(device, dtype)

    def f(z: Tensor) -> Tensor:
        return z @ a.T + b

    return f, answer.to(device), matrix


def tanh_map(batch: int, entries: int, gain: float = 0.8, dtype=torch.float64, device="cpu"):
    """`f(z) = tanh(z Wᵀ + b)`, a contraction for gain < 1, with its parameters."""
    weight = torch.randn(entries, entries, dtype=torch.float64)
    weight = (gain * weight / torch.linalg.matrix_norm(weight, 2)).to(device, dtype).requires_grad_()
    bias = torch.randn(batch, entries, dtype=torch.float64).to(device, dtype).requires_grad_()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + bias)

    return f, weight, bias


def recomputed_residual(f, z: Tensor, kind: str = "relative") -> Tensor:
    """The residual of each sample from its definition, in float64 after one evaluation of f."""
    with torch.no_grad():
        value = f(z).double().flatten(1)
    norm = (value - z.double().flatten(1)).norm(dim=1)
    return norm / value.norm(dim=1) if kind == "relative" else norm


def bratu(size: int, strength: float = 3.0):
    """`−Δu = λ exp(u)` on the unit square by five-point differences, as `u = (−Δ)⁻¹ λ exp(u)`."""
    line = 2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    laplacian = (size + 1) ** 2 * (np.kron(line, np.eye(size)) + np.kron(np.eye(size), line))
    inverse = torch.from_numpy(np.linalg.inv(laplacian))
    return lambda z: strength * z.exp() @ inverse, torch.zeros(1, size * size, dtype=torch.float64)
