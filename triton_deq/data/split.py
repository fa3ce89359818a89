"""Pairs to train on, and others to validate with."""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Inputs and targets to train on, and others to validate with."""

    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor

    def to(self, device: torch.device | str) -> "Split":
        return Split(*(tensor.to(device) for tensor in self))


def split(x: Tensor, y: Tensor, validation: int, seed: int) -> Split:
    """`validation` of the pairs, drawn at random, validate; the others train."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[:validation], order[validation:]
    return Split(x[kept], y[kept], x[held_out], y[held_out])
