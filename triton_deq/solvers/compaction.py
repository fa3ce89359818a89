"""Dropping finished samples from a solve, so that f is no longer evaluated on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..reference.record import Record
from ..status import RUNNING

Function = Callable[[Tensor], Tensor]


def check_compact(compact: float | None, f: Any, norm_over: str) -> None:
    """Raise unless a solve can be compacted as asked."""
    if compact is None:
        return
    check_number("compact", compact, 0, 1, open_low=True)
    if norm_over == "batch":
        raise ValueError(
            f"compact={compact!r} drops samples that have stopped, and norm_over='batch' stops all at once: "
            "leave compact out or give norm_over='sample'"
        )
    if not callable(getattr(f, "select", None)):
        raise TypeError(
            f"compact={compact!r} needs an f with a method select(samples) that gives f for those samples of "
            f"the batch alone, and {f!r} has none: add it, or leave compact out"
        )


@dataclass
class Whole:
    """What is known of all samples while the solver's state holds only some of them.

    f: of all samples. share: of the samples held, at which to shrink.
    index: `[b]`, which samples the state holds. best, record: of all, up to date where index is not.
    """

    f: Any
    share: float
    index: Tensor
    best: Tensor
    record: Record

    @classmethod
    def of(cls, f: Any, state: Any, share: float) -> "Whole":
        index = torch.arange(len(state.x), device=state.x.device)
        return cls(f, share, index, torch.empty_like(state.best), state.record.select(index))

    def worth_it(self, running: int) -> bool:
        """Whether so few samples run that the state should shrink to them."""
        return running <= self.share * len(self.index) and running < len(self.index)

    def shrink(self, solver: Any, state: Any, backend: str) -> tuple[Function, Any]:
        """f and the state of the samples that still run; the rest is kept here."""
        self.take_in(state)
        kept = (state.record.status == RUNNING).nonzero()[:, 0].to(state.x.device)
        self.index = self.index[kept]
        return self.f.select(self.index), solver.select(state, kept, backend)

    def take_in(self, state: Any) -> None:
        """Bring `best` and `record` up to date."""
        self.best[self.index] = state.best
        self.record_of(state)

    def record_of(self, state: Any) -> Record:
        """The record of all samples, brought up to date."""
        self.record.data[:, self.index.to(self.record.data.device)] = state.record.data
        return self.record
