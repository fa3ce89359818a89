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
        self._under_way: deque[tuple[int, _Answer]] = deque()
        self._spare: list[_Answer] = []

    def running(self, active: int | Tensor) -> int | None:
        """How many samples went on when last seen, None while nothing new is known.

        To be asked after each step, with what the step returned.
        """
        if isinstance(active, int):
            return active
        self._step += 1
        if self._step % self._period == 0:
            answer = self._spare.pop() if self._spare else _Answer(active)
            answer.ask(active)
            self._under_way.append((self._step + self._lag, answer))
        if not self._under_way or self._under_way[0][0] > self._step:
            return None
        _, answer = self._under_way.popleft()
        self._spare.append(answer)
        return answer.wait()


class _Answer:
    """Where a number on the device is sent, to be read when it has arrived; it serves again and again.

    To pin memory anew for each step would take the host longer than to launch its kernels.
    """

    def __init__(self, like: Tensor):
        self._remote = like.device.type == "cuda"
        self._number = torch.empty((), dtype=like.dtype, device="cpu", pin_memory=self._remote)
        self._arrived = torch.cuda.Event() if self._remote else None

    def ask(self, number: Tensor) -> None:
        self._number.copy_(number, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(number.device))

    def wait(self) -> int:
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._number.item())
