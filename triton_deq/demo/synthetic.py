"""The paper's one-dimensional experiment (arXiv 2106.14342, section 5.1 and figures 4 and 5).

A scalar DEQ learns a curve with six evaluations of f at most. All weights γ of the Jacobian penalty fit the
curve at the sixth evaluation; the larger γ, the flatter is `f(z; x)` in z, and the fewer steps the solver
needs. The solver is the plain iteration `z ← f(z)`, because its path is the zigzag of figure 5: for a scalar
state Anderson is the secant method, which crosses even a steep piecewise linear f in a few steps.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import triton_deq as td

from ..data import Split, synthetic

WEIGHTS = (0.0, 1.0, 2.0, 4.0)
CAP = 6
"""Evaluations of f in the forward and in the backward solve while training."""
TOL = 1e-3
PATIENCE = 100
"""Evaluations at validation, where the question is how many are needed."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small operators gain nothing from several threads, and on a shared machine lose by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(
    weight: float,
    epochs: int,
    seed: int = 0,
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> td.DEQ:
    """A scalar DEQ trained with penalty weight γ; the same seed gives the same start and order of the data.

    As in the paper: 4096 pairs in batches of 64, 50 hidden ReLU units, Adam, cosine learning rate, all
    parameters from N(0, 0.01), 6 steps forward and 6 backward, a penalty in 40% of the steps. So that few
    epochs suffice the learning rate starts at 1e-2, not 1e-3.
    """
    data = synthetic(seed=seed)
    x, y = data.x.to(device), data.y.to(device)
    torch.manual_seed(seed)
    deq = td.DEQ(
        td.MLPCell(1, 1, activation="relu", hidden=50),
        td.Picard(),
        tol=TOL,
        max_steps=CAP,
        gradient=td.ImplicitGradient(td.Picard(), max_steps=CAP),
        penalty=td.JacobianPenalty(weight, probability=0.4, seed=seed),
        backend=backend_for(device),
    )
    for parameter in deq.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    deq.to(device)

    batches = len(x) // 64
    optimiser = torch.optim.Adam(deq.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).to(device).split(64):
            out = deq(x[batch])
            loss = nn.functional.mse_loss(out.value, y[batch]) + out.penalty
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        tick()
    return deq.eval()


def backend_for(device: str) -> str:
    """Kernels on a GPU; on a CPU never the interpreted ones, which are for checking, not for training."""
    return "reference" if device == "cpu" else "auto"


@dataclass(frozen=True)
class Outcome:
    """What a trained scalar DEQ does on the validation set.

    Attributes:
        weight: γ.
        model: the DEQ.
        capped_error, equilibrium_error: root mean square error of y after `CAP` evaluations, and after up to
            `PATIENCE`.
        slope: |∂f/∂z| at the capped solution, which for a scalar is the spectral radius; the mean.
        steps: evaluations needed for each sample, `[n]`; `PATIENCE` where it never got there.
        converged: the share of samples that got there.
        anderson_steps: the mean with Anderson in place of the plain iteration, for comparison.
        trace: the residual at each step, `[PATIENCE, n]`.
    """

    weight: float
    model: td.DEQ
    capped_error: float
    equilibrium_error: float
    slope: float
    steps: Tensor
    converged: float
    anderson_steps: float
    trace: Tensor


@torch.no_grad()
def examine(weight: float, model: td.DEQ, data: Split, device: str = "cpu") -> Outcome:
    """Hold a trained model against the validation set."""
    x, y = data.valid_x.to(device), data.valid_y.to(device)
    capped = model(x).value
    f, z0 = slice_of(model, x)
    solution = solve(f, z0, td.Picard(), device)
    assert solution.trace is not None  # asked for in solve
    anderson = solve(f, z0, td.Anderson(), device)
    return Outcome(
        weight=weight,
        model=model,
        capped_error=(capped - y).square().mean().sqrt().item(),
        equilibrium_error=(solution.value - y).square().mean().sqrt().item(),
        slope=td.spectral_radius(f, capped, steps=1).mean().item(),
        steps=solution.steps.cpu(),
        converged=solution.converged.float().mean().item(),
        anderson_steps=anderson.steps.float().mean().item(),
        trace=solution.trace.cpu(),
    )


def solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver, device: str) -> td.Solution:
    """To `TOL`, with patience."""
    return td.solve(f, z0, solver, tol=TOL, max_steps=PATIENCE, trace=True, backend=backend_for(device))


def slice_of(model: td.DEQ, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`z ↦ f(z; x)` and where its solve starts."""
    cell: Any = model.cell
    u = cell.inject(x)
    return lambda z: cell(z, u), cell.initial_state(u)


@torch.no_grad()
def zigzag(model: td.DEQ, x: float, steps: int = 12) -> list[tuple[float, float]]:
    """The corners `(z, f(z))` of the plain iteration on one slice x."""
    device = next(model.parameters()).device
    f, z = slice_of(model, torch.full((1, 1), x, device=device))
    corners = []
    for _ in range(steps):
        value = f(z)
        corners.append((z.item(), value.item()))
        z = value
    return corners


@torch.no_grad()
def surface(model: td.DEQ, x: Tensor, z: Tensor) -> Tensor:
    """`f(z; x)` on a grid, `[len(z), len(x)]`."""
    columns = x.repeat(len(z), 1).reshape(-1, 1)
    rows = z[:, None].repeat(1, len(x)).reshape(-1, 1)
    f, _ = slice_of(model, columns)
    return f(rows).reshape(len(z), len(x))
