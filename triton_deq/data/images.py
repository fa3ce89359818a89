"""Real images: the digits that scikit-learn ships."""

import torch

from ..checks import check_count
from .split import Split, split


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
    return split(x, y, validation, seed)
