"""Where the kernels leave a state's iterates: in two places by turns.

The next iterate goes where the one before is. So the present one, while it is the best, is copied nowhere:
`keep` in kernels/primitives.py copies it to `best` when a later one is worse, or when its sample stops.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..reference.record import Record


class Places(Protocol):
    """What the states of Anderson's and Broyden's method have alike."""

    x: Tensor
    other: Tensor
    best: Tensor
    record: Record
    active: Tensor
    turned: bool


def stays(state: Places, step: int) -> bool:
    """Whether the next iterate takes the place of the present one, and what is best there is copied.

    So it is once in a cycle of an odd number of steps, after which each place must have its first turn again.
    """
    cycle = len(state.active)
    return cycle % 2 == 1 and step % cycle == cycle - 1


def next_place(state: Places, step: int) -> Tensor:
    """Where this step leaves the next iterate."""
    return state.x if stays(state, step) else state.other


def turn(state: Places, step: int, last: bool) -> None:
    """After a step: its next iterate, which the last one has not, is the present one."""
    if not (last or stays(state, step)):
        state.x, state.other, state.turned = state.other, state.x, not state.turned


def turn_back(state: Places) -> None:
    """The places as they were before the first step."""
    if state.turned:
        state.x, state.other, state.turned = state.other, state.x, False


def best_so_far(state: Places) -> Tensor:
    """Each sample's best iterate `[B, N]` after a step; `state.best` has it of those that have stopped."""
    if len(state.other) == 0:  # of a state that is not the kernels'
        return state.best
    return torch.where(state.record.away[:, None] != 0, state.other, state.best)
