"""In which precision f is evaluated, and what float16 can hold of a gradient."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which autocast has products taken there; None without it."""
    if not _has_autocast(device) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """What `autocast_dtype` told is so again."""
    if not _has_autocast(device):
        return nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _has_autocast(device: torch.device) -> bool:
    """Not "meta", for one. torch.compile of torch 2.11 cannot ask; what it compiles for has it."""
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)


def in_units(grad: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Where float16 is about, `g / s` and s, a power of two of the size of each sample's largest entry.

    u is s times that of g / s. A u that float16 cannot hold would end its sample's solve, and what is left of
    it be taken for a gradient. So it is not made before `from_units` makes it infinite, which is what
    `torch.amp.GradScaler` looks for. autocast: of the forward pass.
    """
    if torch.float16 not in (grad.dtype, autocast) or grad.numel() == 0:
        return grad, None
    largest = grad.detach().flatten(1).abs().amax(1).float()
    unit = largest / torch.frexp(largest).mantissa / 2
    unit = torch.where(unit > 0, unit, 1)  # false for NaN, as where g is 0 or not finite
    unit = unit.to(grad.dtype).view(-1, *(1,) * (grad.ndim - 1))
    return grad / unit, unit


def from_units(u: Tensor, unit: Tensor | None) -> Tensor:
    """What `in_units` has divided by s, times s."""
    return u if unit is None else u * unit
