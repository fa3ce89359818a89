"""A digits classifier trained with few solver steps, with and without the Jacobian penalty.

The regime is the paper's (arXiv 2106.14342): the solver stops after six evaluations, forward and backward,
whether it has converged or not. A cell that is free to do so learns to be right at the sixth step, and
drifts away from having a fixed point at all; the penalty keeps the fixed point within reach.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import triton_deq as td

from ..data import Split
from .synthetic import backend_for

WIDTH = 200
WEIGHT = 16.0
CAP = 6
TOL = 1e-3
PATIENCE = 60
"""Evaluations at validation, where the question is how many are needed."""


@dataclass(frozen=True)
class Epoch:
    """What the validation set says after an epoch.

    Attributes:
        epoch: 0 is before training.
        accuracy: with `CAP` evaluations of f; `accuracy_at_rest`: with up to `PATIENCE`.
        steps: evaluations needed to reach `TOL`, the median over samples (at most `PATIENCE`).
        converged: the share of samples that reached it.
        residual: relative, after `CAP` evaluations, the median over samples.
        radius: spectral radius of ∂f/∂z where the capped solve ends, the mean over 32 samples.
    """

    epoch: int
    accuracy: float
    accuracy_at_rest: float
    steps: float
    converged: float
    residual: float
    radius: float
    path: str


class Classifier(nn.Module):
    """A DEQ on the pixels, and a linear layer that reads its equilibrium."""

    def __init__(self, weight: float, seed: int, device: str):
        super().__init__()
        torch.manual_seed(seed)
        self.deq = td.DEQ(
            td.MLPCell(WIDTH, 64, activation="relu"),
            tol=TOL,
            max_steps=CAP,
            gradient=td.ImplicitGradient(max_steps=CAP),
            penalty=td.JacobianPenalty(weight, seed=seed),
            backend=backend_for(device),
        )
        self.head = nn.Linear(WIDTH, 10)
        self.to(device)


def train(
    weight: float, epochs: int, data: Split, seed: int = 0, device: str = "cpu", lr: float = 3e-3
) -> Iterator[Epoch]:
    """Yields the state of things before training and after each epoch.

    The same seed gives the same start and the same order of the data for every weight.
    """
    model = Classifier(weight, seed, device)
    x, y = data.x.flatten(1).to(device), data.y.to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    order = torch.Generator().manual_seed(seed)
    yield examine(model, data, 0, device)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(x), generator=order).to(device).split(64):
            out = model.deq(x[batch])
            loss = nn.functional.cross_entropy(model.head(out.value), y[batch]) + out.penalty
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        yield examine(model, data, epoch, device)


@torch.no_grad()
def examine(model: Classifier, data: Split, epoch: int, device: str) -> Epoch:
    """Hold a model against the validation set."""
    model.eval()
    x, y = data.valid_x.flatten(1).to(device), data.valid_y.to(device)
    capped = model.deq(x)
    cell: Any = model.deq.cell
    u = cell.inject(x)
    rest = td.solve(
        lambda z: cell(z, u), cell.initial_state(u), tol=TOL, max_steps=PATIENCE, backend=backend_for(device)
    )
    few = u[:32]
    radius = td.spectral_radius(lambda z: cell(z, few), capped.value[:32], steps=20)

    def accuracy(z: Tensor) -> float:
        return (model.head(z).argmax(1) == y).float().mean().item()

    return Epoch(
        epoch=epoch,
        accuracy=accuracy(capped.value),
        accuracy_at_rest=accuracy(rest.value),
        steps=rest.steps.float().median().item(),
        converged=rest.converged.float().mean().item(),
        residual=capped.solution.residual.median().item(),
        radius=radius.mean().item(),
        path=capped.solution.path,
    )
