"""The negative log-likelihood of one class a row under a softmax, in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from .record import accumulate_dtype


def cross_entropy(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    """`log Σ_{v < classes} exp(l_v) − l_t` of each row, `[n]` in the accumulation dtype.

    logits: l `[n, ≥ classes]`. targets: t, int64 `[n]`, each in 0 … classes − 1.
    """
    wide = logits[:, :classes].to(accumulate_dtype(logits.dtype))
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(wide, targets, reduction="none")
