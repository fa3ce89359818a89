"""A DEQ as it is commonly written in plain PyTorch; nothing in this file comes from triton_deq.

Anderson keeps batch-first buffers, forms the whole Gram matrix at each step and solves the bordered system
with `torch.linalg.solve`; the implicit gradient is a backward hook. Both follow the Deep Implicit Layers
tutorial (Kolter, Duvenaud, Johnson, 2020), which most DEQ code descends from.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Function = Callable[[Tensor], Tensor]


def anderson(
    f: Function, z0: Tensor, history: int = 6, tol: float = 1e-3, max_steps: int = 50, ridge: float = 1e-4
) -> tuple[Tensor, int]:
    """The fixed point and the evaluations of f; stops on `‖f(z) − z‖ / ‖f(z)‖` of the whole batch."""
    batch, entries = z0.shape[0], z0[0].numel()
    z = z0.new_zeros(batch, history, entries)
    value = z0.new_zeros(batch, history, entries)
    z[:, 0], value[:, 0] = z0.flatten(1), f(z0).flatten(1)
    z[:, 1], value[:, 1] = value[:, 0], f(value[:, 0].view_as(z0)).flatten(1)

    # [0 1ᵀ; 1 GGᵀ] [ν; α] = [1; 0] is the least-squares problem with Σα = 1.
    bordered = z0.new_zeros(batch, history + 1, history + 1)
    bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1
    right = z0.new_zeros(batch, history + 1, 1)
    right[:, 0] = 1
    damping = ridge * torch.eye(history, dtype=z0.dtype, device=z0.device)

    slot = 1
    for step in range(2, max_steps):
        n, slot = min(step, history), step % history
        residual = value[:, :n] - z[:, :n]
        bordered[:, 1 : n + 1, 1 : n + 1] = torch.bmm(residual, residual.mT) + damping[:n, :n]
        weights = torch.linalg.solve(bordered[:, : n + 1, : n + 1], right[:, : n + 1])[:, 1:, 0]

        z[:, slot] = (weights[:, None] @ value[:, :n])[:, 0]
        value[:, slot] = f(z[:, slot].view_as(z0)).flatten(1)
        if (value[:, slot] - z[:, slot]).norm().item() / (1e-5 + value[:, slot].norm().item()) < tol:
            break
    return z[:, slot].view_as(z0), step + 1


class DEQLayer(nn.Module):
    """`z = f(z, x)`, differentiated by the implicit function theorem in a backward hook."""

    def __init__(self, f: nn.Module, **options):
        super().__init__()
        self.f = f
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z, _ = anderson(lambda z: self.f(z, x), torch.zeros_like(x), **self.options)
        if not torch.is_grad_enabled():
            return z
        z = self.f(z, x)  # one step with a graph, for the parameters
        at = z.detach().requires_grad_()
        value = self.f(at, x)

        def hook(grad: Tensor) -> Tensor:
            def adjoint(u: Tensor) -> Tensor:
                return torch.autograd.grad(value, at, u, retain_graph=True)[0] + grad

            return anderson(adjoint, grad, **self.options)[0]

        z.register_hook(hook)
        return z


class ConvolutionCell(nn.Module):
    """`f(z, x) = tanh(x + C₂ gelu(norm(x + C₁ z)))`; if `separable`, each C is depthwise, then pointwise.

    No ReLU: where its input is close to zero, two fixed points that agree to rounding may fall on either side
    of the kink, and then their gradients differ by much more than the fixed points do.
    """

    def __init__(self, channels: int, separable: bool = False):
        super().__init__()
        self.first = _convolution(channels, separable)
        self.second = _convolution(channels, separable)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x + self.second(functional.gelu(self.norm(x + self.first(z)))))


def _convolution(channels: int, separable: bool) -> nn.Module:
    if not separable:
        return nn.Conv2d(channels, channels, 3, padding=1)
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1))


class Problem(NamedTuple):
    """An existing model: what computes x from the digits, the cell f, and what reads the equilibrium."""

    embed: nn.Module
    cell: ConvolutionCell
    head: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self for parameter in module.parameters()]


def digits_model(channels: int, scale: int, separable: bool, seed: int) -> Problem:
    """A convolutional DEQ on digits scaled up `scale` times: a state of `channels · (8 · scale)²` entries."""
    torch.manual_seed(seed)
    embed = nn.Sequential(nn.Upsample(scale_factor=scale), nn.Conv2d(1, channels, 3, padding=1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    cell = ConvolutionCell(channels, separable)
    for module in cell.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.data.mul_(0.5)
    return Problem(embed, cell, head)
