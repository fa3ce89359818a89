"""When a solve stops, and how the host learns of it."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number


@dataclass(frozen=True)
class Stopping:
    """tol ≥ 0 (0: take every step), max_steps ≥ 1, what the residual is, how late to look; see `solve`."""

    tol: float = 1e-3
    max_steps: int = 30
    residual: str = "relative"
    norm_over: str = "sample"
    check_every: int = 1

    def __post_init__(self):
        check_number("tol", self.tol, 0)
        check_count("max_steps", self.max_steps)
        check_choice("residual", self.residual, ("relative", "absolute"))
        check_choice("norm_over", self.norm_over, ("sample", "batch"))
        check_count("check_every", self.check_every)


class Lookout:
    """Learns how many samples go on without making a GPU wait, at most `check_every` steps late.

    The answer of every `period`-th step is copied to pinned memory and read `lag` steps later, when it has
    long arrived. The steps taken meanwhile find every sample frozen and change nothing.
    """

    def __init__(self, check_every: int):
        self._period = (check_every + 1) // 2
        self._lag = check_every - self._period + 1
        self._step = 0
        self._under_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def running(self, active: int | Tensor) -> int | None:
        """How many samples went on when last seen, None while nothing new is known.

        To be asked after each step, with what the step returned.
        """
        if isinstance(active, int):
            return active
        self._step += 1
        if self._step % self._period == 0:
            self._under_way.append((self._step + self._lag, *_sent_to_host(active)))
        if not self._under_way or self._under_way[0][0] > self._step:
            return None
        _, answer, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        return int(answer.item())


def _sent_to_host(active: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that will have arrived when the event has happened."""
    if active.device.type != "cuda":
        return active.clone(), None
    answer = torch.empty((), dtype=active.dtype, device="cpu", pin_memory=True)
    answer.copy_(active, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(active.device))
    return answer, event
