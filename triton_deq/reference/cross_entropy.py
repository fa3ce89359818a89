"""The negative log-likelihood of one class a row under a softmax, in PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ..backend import recorded, transformed
from .record import accumulate_dtype
from .rows import BLOCK

MANY = 1 << 22
"""Entries of which it pays to take some rows at a time: their probabilities stay in a core's cache then."""


def cross_entropy(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    """`log Σ_{v < classes} exp(l_v) − l_t` of each row, `[n]` in the accumulation dtype.

    logits: l `[n, ≥ classes]`. targets: t, int64 `[n]`, each in 0 … classes − 1.
    """
    if recorded(logits) or not in_blocks(logits):
        return _of(logits, targets, classes)
    return torch.cat([_of(some, wanted, classes) for some, wanted in _blocks(logits, targets)])


def cross_entropy_vjp(logits: Tensor, targets: Tensor, vector: Tensor, classes: int) -> Tensor:
    """The gradient of `⟨vector, value⟩` in the logits, `v (softmax(l) − 1[t])` `[n, ≥ classes]`."""
    out = torch.empty_like(logits)
    for some, wanted, v, place in _blocks(logits, targets, vector, out):
        wide = some[:, :classes].to(v.dtype)
        slopes = torch.softmax(wide, dim=1).mul_(v[:, None])
        slopes.scatter_add_(1, wanted[:, None], -v[:, None])
        place[:, :classes] = slopes
        place[:, classes:] = 0
    return out


def in_blocks(logits: Tensor) -> bool:
    """Whether to take some rows at a time."""
    return logits.device.type == "cpu" and logits.numel() > MANY and not transformed()


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, BLOCK // logits.shape[1])
    return zip(*(each.split(rows) for each in (logits, *others)), strict=True)


def _of(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    wide = logits[:, :classes].to(accumulate_dtype(logits.dtype))
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(wide, targets, reduction="none")
