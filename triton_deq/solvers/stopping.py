"""When a solve stops, and how the host learns of it."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number


@dataclass(frozen=True)
class Stopping:
    """tol ≥ 0 (0: take every step), max_steps ≥ 1, and what the residual is; see `solve`."""

    tol: float = 1e-3
    max_steps: int = 30
    residual: str = "relative"
    norm_over: str = "sample"

    def __post_init__(self):
        check_number("tol", self.tol, 0)
        check_count("max_steps", self.max_steps)
        check_choice("residual", self.residual, ("relative", "absolute"))
        check_choice("norm_over", self.norm_over, ("sample", "batch"))


class Lookout:
    """Asks after each step whether any sample goes on, without making a GPU wait.

    On a GPU the answer is copied to pinned memory and read LAG steps later, when it has long arrived. The
    steps taken meanwhile find every sample frozen and change nothing.
    """

    LAG = 2

    def __init__(self):
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def done(self, active: bool | Tensor) -> bool:
        if isinstance(active, bool):
            return not active
        if active.device.type != "cuda":
            return not active.item()
        answer = torch.empty((), dtype=active.dtype, pin_memory=True)
        answer.copy_(active, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(active.device))
        self._under_way.append((answer, event))
        if len(self._under_way) <= self.LAG:
            return False
        answer, event = self._under_way.popleft()
        event.synchronize()
        return not answer.item()
