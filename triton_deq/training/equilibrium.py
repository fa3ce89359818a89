"""What the tasks of all models with an equilibrium share."""

from typing import Any

import torch
from torch import Tensor, nn

from .ranks import Ranks
from .task import Scalars


class EquilibriumTask:
    """A model that may have a phase without a solve, a penalty and a spectral radius; each may be missing."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._ranks = Ranks()

    def set_pretraining(self, on: bool) -> None:
        if hasattr(self.model, "pretraining"):
            self.model.pretraining = on  # type: ignore[assignment]
        if self._penalty is not None:
            self._penalty.pretraining = on

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _penalty(self) -> Any:
        return getattr(self.model, "penalty", None)

    @property
    def _equilibrium(self) -> bool:
        return hasattr(self.model, "spectral_radius") and not getattr(self.model, "pretraining", False)

    def _scalars(self, loss: Tensor, out: Any) -> Scalars:
        """Of a training step, after its backward pass."""
        scalars: Scalars = {"loss": loss, **solve_scalars(out.solution)}
        if out.solution is not None and self._penalty is not None:
            scalars["penalty"] = out.penalty.detach()
        return scalars


def solve_scalars(solution: Any) -> Scalars:
    """What a solve, and its backward solve if there was one, say of themselves: evaluations of f, the median
    residual and the share of samples that did not converge."""
    scalars: Scalars = {}
    for prefix, solve in (("", solution), ("backward_", getattr(solution, "backward", None))):
        if solve is not None:
            scalars[f"{prefix}nfe"] = float(solve.nfe)
            scalars[f"{prefix}residual"] = solve.residual.median()
            scalars[f"{prefix}unconverged"] = 1 - solve.converged.float().mean()
    return scalars
