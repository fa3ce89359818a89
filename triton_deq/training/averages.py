"""Means of scalars over steps."""

from typing import Any

import torch
from torch import Tensor

from .task import Scalars


class Averages:
    """The mean of each scalar over the steps that had it. Tensors stay where they are until they are read."""

    def __init__(self) -> None:
        self._sums: Scalars = {}
        self._counts: dict[str, int] = {}

    def add(self, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means, after which nothing is held."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        sums = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state["sums"].items()}
        self._counts = dict(state["counts"])
