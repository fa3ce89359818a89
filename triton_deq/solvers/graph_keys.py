"""What a captured function depends on besides the values of its tensors, as keys of a dictionary."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.launch import allows_tf32
from ..precision import autocast_dtype

_EVERY = frozenset(vars(nn.Module()))
"""Attributes that every module has; of them only `training` is a setting."""
_PLAIN = {bool, int, float, str, type(None)}


def of_tensor(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def of_leaf(leaf: Any) -> Any:
    return of_tensor(leaf) if isinstance(leaf, Tensor) else leaf


def of_mode(device: torch.device) -> Any:
    """What products are computed in, and whether tensors are made that only inference mode may write."""
    cudnn: Any = torch.backends.cudnn
    return (
        autocast_dtype(device),
        allows_tf32(),
        cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )


@dataclass(frozen=True)
class Look:
    """What a graph depends on of a module.

    Attributes:
        key: of all its parts, where tensors lie, and every flag, number, name or function.
        repeatable: whether a call of it does no more than compute.
    """

    key: tuple[Any, ...]
    repeatable: bool


def look(module: nn.Module) -> Look:
    """Models have hundreds of parts with dozens of attributes, and are looked at before each replay: hence
    the short way past most of them."""
    key: list[Any] = []
    quiet = True
    for part in parts(module):
        quiet = quiet and repeatable(part)
        key += (type(part), part.training)
        for name, value in part.__dict__.items():
            if name not in _EVERY and (value.__class__ in _PLAIN or _is_setting(value)):
                key += (name, value)
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    key += (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
    return Look(tuple(key), quiet)


def repeatable(part: nn.Module) -> bool:
    """Whether nothing is trained there, and no hook is waiting, which a graph would not run."""
    return not (part.training or part._forward_hooks or part._forward_pre_hooks)


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """`module.modules()`, in an order that is as fixed, without making up names."""
    seen, waiting = set(), [module]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            yield part
            waiting += [each for each in part._modules.values() if each is not None]


def _is_setting(value: Any) -> bool:
    """Numbers, flags, names, functions, frozen records: what compares by value, or is never changed."""
    if isinstance(value, Tensor | nn.Module):
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True
