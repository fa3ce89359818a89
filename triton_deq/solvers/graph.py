"""Graph mode: a cycle of steps, f's and the solver's, captured in a CUDA graph and replayed until done.

After a cycle of steps the solver's kernels are launched with the same arguments again (the slots of its
ring have come round), so that one graph serves all later cycles. The host looks once a cycle.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..weight_caches import without_caches

Step = Callable[[int], Any]
"""Takes one step of a solve, given its number, without looking at the device."""

_streams: dict[torch.device, torch.cuda.Stream] = {}


def usable(device: torch.device, backend: str, compact: float | None) -> bool:
    """Whether a solve there can be captured as asked; warns where there is nothing to gain.

    Raises:
        ValueError: what cannot go together.
    """
    if compact is not None:
        raise ValueError(
            f"compact={compact!r} changes the batch and graph=True fixes it: give one of the two"
        )
    if not captures(device):
        warnings.warn(
            f"graph=True does nothing on {device.type}, where no launches can be saved: leave it out",
            stacklevel=5,
        )
        return False
    if backend == "reference":
        raise ValueError("graph=True needs the kernels, and backend='reference' decides on the host")
    return True


def captures(device: torch.device) -> bool:
    """Whether there are graphs to capture in; ROCm devices carry the name "cuda" too."""
    return device.type == "cuda"


def stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that captures on this device. What a captured backward pass goes through runs on it too."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


@contextmanager
def on_capture_stream(device: torch.device, graph: bool) -> Iterator[None]:
    """Autograd runs a node's backward on the stream of its forward: let that be the one that captures."""
    if not graph or device.type != "cuda":
        yield
        return
    ambient, side = torch.cuda.current_stream(device), stream(device)
    side.wait_stream(ambient)
    with torch.cuda.stream(side):
        yield
    ambient.wait_stream(side)


def capture(steps: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The device's work in `steps`, without doing it, as a CUDA graph; returns its replay.

    Raises:
        RuntimeError: steps that cannot be captured, with the message of whoever noticed.
    """
    graph = torch.cuda.CUDAGraph()
    with on_capture_stream(device, True), without_caches():
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            steps()
        except RuntimeError as error:
            _abandon(graph)
            raise RuntimeError(
                f"graph=True: f cannot be captured in a CUDA graph: {error}. A captured f may not read the "
                "device from the host (.item(), bool(), printing): change it, or leave graph out"
            ) from error
        except BaseException:
            _abandon(graph)
            raise
        graph.capture_end()
    return graph.replay


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    with suppress(RuntimeError):  # it says that the capture failed, which is known
        graph.capture_end()


@dataclass
class Replays:
    """The graphs of one solver state: of its first cycle of steps, of any later one, and of a rest.

    trail: `[cycle, B]` float64, where each step leaves the residuals; None if nobody asks for them.
    warm: whether a first cycle has been taken step by step, which compiles and loads what a capture may not.
    """

    device: torch.device
    cycle: int
    trail: Tensor | None = None
    warm: bool = False
    _replays: dict[tuple[bool, int], Callable[[], None]] = field(default_factory=dict)

    def run(self, one: Step, state: Any, max_steps: int) -> tuple[int, list[Tensor]]:
        """Take steps until every sample has stopped; how many, and the trace."""

        def step_by_step(first: int, count: int) -> None:
            for step in range(first, first + count):
                one(step)
                if self.trail is not None:
                    self.trail[step % self.cycle].copy_(state.record.residual)

        done = 0
        traced: list[Tensor] = []
        while done < max_steps:
            count = min(self.cycle, max_steps - done)
            # What follows the last whole cycle is worth a graph only if there will be another solve.
            if self.warm or (count == self.cycle and done > 0):
                self._replay(done, count, step_by_step)
            else:
                step_by_step(done, count)
            done += count
            if self.trail is not None:
                traced += self.trail[:count].clone().unbind()
            if state.active[(done - 1) % self.cycle].item() == 0:  # the one look of a cycle
                break
        self.warm = True
        return done, traced

    def _replay(self, done: int, count: int, steps: Callable[[int, int], None]) -> None:
        key = done == 0, count
        if key not in self._replays:
            self._replays[key] = capture(lambda: steps(done, count), self.device)
        self._replays[key]()
