"""Argument checks. Each names the argument, the value it got, and what to pass instead."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .precision import autocast_dtype


def check_state(name: str, z: Any) -> None:
    """A state is a real floating tensor `[B, ...]`."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(z).__name__}: pass a floating tensor [B, ...]")
    if not z.is_floating_point() or z.element_size() < 2:
        remedy = f"torch.view_as_real({name})" if z.is_complex() else f"{name}.float()"
        raise TypeError(
            f"{name} has dtype {z.dtype}: a state must be real and floating, of 16 bits at least; convert "
            f"it, e.g. {remedy}"
        )
    if z.dim() == 0:
        raise ValueError(f"{name} is a scalar: a state needs a batch dimension; pass {name}.reshape(1, 1)")
    if torch.compiler.is_compiling():  # which cannot trace what follows
        return
    if z.layout != torch.strided or z.is_nested or z.device.type == "meta":
        what = "nested samples" if z.is_nested else f"the layout {z.layout}"
        what = "no data, being on 'meta'" if z.device.type == "meta" else what
        raise TypeError(f"{name} has {what}: a state must be a dense tensor; pass one, e.g. torch.zeros(...)")


def as_state(value: Any, z: Tensor) -> Tensor:
    """f(z), checked to look like z; of z's dtype also where autocast has chosen another one."""
    if isinstance(value, Tensor) and value.dtype != z.dtype and autocast_dtype(z.device) is not None:
        check_value(value, z, same_dtype=False)
        return value.to(z.dtype)
    check_value(value, z)
    return value


def check_value(value: Any, z: Tensor, *, same_dtype: bool = True, name: str = "f(z)") -> None:
    """f(z) must look like z; without `same_dtype` it may have another floating dtype, as under autocast."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor like z, got {type(value).__name__}: return the next state only"
        )
    if value.shape != z.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, z has {tuple(z.shape)}: a fixed point needs them equal; "
            "check f, or the shape of z0"
        )
    if not (value.dtype == z.dtype if same_dtype else value.is_floating_point()):
        raise TypeError(
            f"{name} has dtype {value.dtype}, z has {z.dtype}: cast one of them, e.g. let f end in "
            ".to(z.dtype)"
        )
    if value.device != z.device:
        raise ValueError(f"{name} is on {value.device}, z on {z.device}: move z0, or f's parameters")


def check_graph(value: Tensor, z: Tensor) -> None:
    """A value that is to be differentiated by z has a graph."""
    if not z.requires_grad:
        raise ValueError(
            "z.requires_grad=False, so no graph leads from value to z: take z = z.detach().requires_grad_(), "
            "compute value = f(z) from that, or call jacobian_norm(f, z), which takes any z"
        )
    if not value.requires_grad:
        raise ValueError(
            "value.requires_grad=False: it was detached, computed under torch.no_grad(), or does not depend "
            "on z; compute value = f(z) with gradients enabled"
        )


def check_reached(product: Tensor | None) -> Tensor:
    """A vector-Jacobian product of a value that was computed from z."""
    if product is None:
        raise ValueError(
            "value does not depend on z: it was computed from another tensor (z.detach() and z.clone() are "
            "others); pass the very z that f was called with"
        )
    return product


def explain_compiled(product: Tensor) -> None:
    """Let a backward pass through that of a compiled function end in an error with a remedy."""
    seen: set[Any] = set()
    waiting = [product.grad_fn] if "torch._dynamo" in sys.modules else []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith("CompiledFunctionBackwardBackward"):
            product.register_hook(_refuse_compiled)
            return
        seen.add(node)
        waiting += [each for each, _ in node.next_functions]


def _refuse_compiled(grad: Tensor) -> None:
    raise RuntimeError(
        "value was computed by a function that torch.compile has made, which has no double backward: call "
        "jacobian_norm(f, z), which runs f as it was written"
    )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int, got {type(value).__name__}: pass e.g. int({name})")
    if value < least:
        raise ValueError(f"{name}={value!r} is too small: it must be at least {least}")


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """A finite real number in [low, high], or in (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}={value!r} must be a number, got {type(value).__name__}: pass e.g. float({name})"
        )
    inside = (low < value if open_low else low <= value) and value <= high and value < math.inf
    if not inside:
        interval = f"{'(' if open_low else '['}{low:g}, {'∞)' if high == math.inf else f'{high:g}]'}"
        raise ValueError(f"{name}={value!r} is outside {interval}: pick a finite number inside")


def parse_count(least: int) -> Callable[[str], int]:
    """An argparse type: an int of at least `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small: it must be at least {least}")
        return number

    return parse


def parse_rows_file(text: str) -> str:
    """An argparse type: a file that can be there, or '-'. So it is known before the rows are made."""
    folder = Path(text).parent
    if text != "-" and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    return text


def check_floating_dtype(name: str, value: Any) -> None:
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise TypeError(
            f"{name}={value!r} must be None, torch.float16, torch.bfloat16, torch.float32 or torch.float64"
        )


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
