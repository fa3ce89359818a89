"""What `debug=True` finds out about f before a solve."""

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import evaluate


@torch.no_grad()
def check_map(f: Callable[[Tensor], Tensor], z0: Tensor, norm_over: str) -> None:
    """That f has one value at a state, and each sample's own unless the norm is over the batch.

    Of two samples, the numbers differ in some bit: so it is enough to move those with a bit set and look at
    the others, and the other way round, bit by bit, in `2 log₂ B` evaluations.

    Raises:
        RuntimeError: an f that is random, mixes samples, or modifies its argument.
    """
    value = evaluate(f, z0.clone(), True)
    rounding = 16 * torch.finfo(z0.dtype).eps * _norm(value)
    noise = _distance(evaluate(f, z0.clone(), True), value)  # of sums in no order, if that is all
    if (noise > (1e-2 * _norm(value)).maximum(rounding)).any():
        raise RuntimeError(
            "f gave two values at one state: no solver finds the fixed point of a map that changes. Draw "
            "dropout masks and other random numbers once a solve, outside of f"
        )
    if norm_over == "batch":
        return
    sample = torch.arange(len(z0), device=z0.device)
    moved = z0 + torch.arange(z0.numel(), device=z0.device).cos().view(z0.shape).to(z0.dtype)
    for bit in range((len(z0) - 1).bit_length()):
        for side in (0, 1):
            mine = (sample >> bit & 1) == side
            state = torch.where(mine.view(-1, *[1] * (z0.dim() - 1)), moved, z0)
            others = ~mine & (_distance(evaluate(f, state, True), value) > rounding + 10 * noise)
            if others.any():
                raise RuntimeError(
                    f"f mixes samples: the value of sample {int(others.nonzero()[0])} changes with other "
                    "samples of z, and each is solved as a problem of its own. Make samples that hang "
                    "together one sample, z0[None], or judge them together: norm_over='batch'"
                )


def _distance(value: Tensor, before: Tensor) -> Tensor:
    return _norm(value.nan_to_num() - before.nan_to_num())


def _norm(value: Tensor) -> Tensor:
    """`[B]`, of each sample."""
    return value.nan_to_num().flatten(1).double().norm(dim=1)
