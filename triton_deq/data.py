"""Readers for the data that the demo and the tests use: real digits, and the paper's synthetic curve."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_count


class Split(NamedTuple):
    """Inputs and targets to train on, and others to validate with."""

    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor

    def to(self, device: torch.device | str) -> "Split":
        return Split(*(tensor.to(device) for tensor in self))


def digits(validation: int = 360, seed: int = 0) -> Split:
    """The 1,797 scanned digits that scikit-learn ships: x `[n, 1, 8, 8]` in [0, 1], y int64 `[n]`.

    Args:
        validation: how many of them, drawn at random, validate.
        seed: of the draw.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: an argument outside its range.
    """
    check_count("validation", validation)
    check_count("seed", seed, least=0)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'triton-deq[demo]'") from error
    held = load_digits()
    x = torch.tensor(held.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(held.target, dtype=torch.int64)
    if validation >= len(x):
        raise ValueError(f"validation={validation} leaves nothing to train on: there are {len(x)} digits")
    return _split(x, y, validation, seed)


def synthetic(pairs: int = 5096, validation: int = 1000, seed: int = 0) -> Split:
    """The paper's scalar pairs (arXiv 2106.14342, section 5.1): `y = curve(x) + noise`, all `[n, 1]`.

    x is uniform on [-2, 2], which the paper leaves open, and the noise has standard deviation 0.05.

    Raises:
        TypeError, ValueError: an argument outside its range.
    """
    check_count("validation", validation)
    check_count("pairs", pairs, least=validation + 1)
    check_count("seed", seed, least=0)
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(pairs, 1, generator=generator) - 2
    y = curve(x) + 0.05 * torch.randn(pairs, 1, generator=generator)
    return _split(x, y, validation, seed)


def curve(x: Tensor) -> Tensor:
    """`3/2 x³ + x² − 5x + 2 sin x − 3`, the function behind `synthetic`."""
    return 1.5 * x**3 + x**2 - 5 * x + 2 * torch.sin(x) - 3


def _split(x: Tensor, y: Tensor, validation: int, seed: int) -> Split:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[:validation], order[validation:]
    return Split(x[kept], y[kept], x[held_out], y[held_out])
