"""Fixed-point problems with a known gain: what every variant of a case solves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import triton_deq as td
from triton_deq.deq import Injected
from triton_deq.timing import Call

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """`f(z) = tanh(A z + b)` from z0 = 0, A a linear map of norm at most its gain, so f contracts.

    kind: how A acts: "pointwise" (a weight per entry), "dense" (a matrix), "mlp cell" (the same, as a
        `td.MLPCell`, which knows its vector-Jacobian product), "convolution" (3×3, same size).
    """

    kind: str
    weight: Tensor
    bias: Tensor
    cell: td.MLPCell | None = None

    @property
    def f(self) -> Function:
        return self._value if self.cell is None else Injected(self.cell, self.bias)

    def _value(self, z: Tensor) -> Tensor:
        if self.kind == "pointwise":
            return torch.tanh(self.weight * z + self.bias)
        if self.kind == "dense":
            return torch.tanh(functional.linear(z, self.weight) + self.bias)
        return torch.tanh(functional.conv2d(z, self.weight, padding=1) + self.bias)

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.bias)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def residual(self, z: Tensor) -> float:
        """The worst sample's `‖f(z) − z‖ / ‖f(z)‖`, the norms in float64."""
        with torch.no_grad():
            value = self.f(z).double().flatten(1)
        return ((value - z.double().flatten(1)).norm(dim=1) / value.norm(dim=1)).max().item()


class Cell(nn.Module):
    """A problem as a DEQ's cell, whose input is the bias."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.kind = problem.kind
        self.register_buffer("weight", problem.weight)

    def inject(self, bias: Tensor) -> Tensor:
        return bias

    def forward(self, z: Tensor, bias: Tensor) -> Tensor:
        weight = self.get_buffer("weight")
        return Problem(self.kind, weight, bias)._value(z)


def in_graphs(problem: Problem, solver: td.Anderson | td.Broyden, tol: float, max_steps: int) -> Call:
    """A `td.DEQ` with `graph=True`, which captures once and keeps; its value and evaluations of f."""
    cell = problem.cell or Cell(problem)
    deq = td.DEQ(cell, solver, tol=tol, max_steps=max_steps, graph=True).eval()

    @torch.no_grad()
    def call() -> tuple[Tensor, int]:
        out = deq(problem.bias)
        return out.value, out.solution.nfe

    return call


def make(
    kind: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gain: float = 0.95,
    grad: bool = False,
) -> Problem:
    """A random problem of this shape, `[B, N]`, or `[B, C, H, W]` for a convolution.

    grad: whether its parameters require gradients.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    bias = 0.5 * randn(*shape)
    if kind == "pointwise":
        weight = gain * torch.rand(shape[1], generator=generator)
    elif kind in ("dense", "mlp cell"):
        weight = randn(shape[1], shape[1])
        weight *= gain / _norm(lambda z: z @ weight.T, lambda z: z @ weight, randn(1, shape[1]))
    elif kind == "convolution":
        channels = shape[1]
        weight = randn(channels, channels, 3, 3)
        weight *= gain / _norm(
            lambda z: functional.conv2d(z, weight, padding=1),
            lambda z: functional.conv_transpose2d(z, weight, padding=1),
            randn(1, *shape[1:]),
        )
    else:
        raise ValueError(
            f"kind={kind!r} is unknown: choose 'pointwise', 'dense', 'mlp cell' or 'convolution'"
        )
    weight, bias = (tensor.to(device, dtype).requires_grad_(grad) for tensor in (weight, bias))
    if kind != "mlp cell":
        return Problem(kind, weight, bias)
    cell = td.MLPCell(shape[1], 1).to(device, dtype)
    cell.state.weight = nn.Parameter(weight.detach(), requires_grad=grad)
    return Problem(kind, cell.state.weight, bias, cell)


def _norm(linear: Function, transposed: Function, z: Tensor, steps: int = 30) -> float:
    """The spectral norm by power iteration, which comes from below: close enough for a gain."""
    for _ in range(steps):
        z = transposed(linear(z))
        z = z / z.norm()
    return linear(z).norm().item()
