"""The paper's synthetic curve."""

import torch
from torch import Tensor

from ..checks import check_count
from .split import Split, split


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
    return split(x, y, validation, seed)


def curve(x: Tensor) -> Tensor:
    """`3/2 x³ + x² − 5x + 2 sin x − 3`, the function behind `synthetic`."""
    return 1.5 * x**3 + x**2 - 5 * x + 2 * torch.sin(x) - 3
