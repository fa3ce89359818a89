"""Which implementation serves a tensor, and why.

`triton` are the kernels: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
`reference` is plain PyTorch and works everywhere.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")

_INSTALLED = importlib.util.find_spec("triton") is not None
"""Asked for at every op, where torch.compile could not trace the search."""

_ambient: ContextVar[str] = ContextVar("ambient", default="auto")


def ambient(requested: str) -> AbstractContextManager[None]:
    """While entered, "auto" means `requested`: so a cell inside a solve runs as the solve was asked to."""
    # torch.compile cannot trace a context variable, and takes the ordinary operators whatever is asked for.
    return nullcontext() if torch.compiler.is_compiling() else _ambient_is(requested)


@contextmanager
def _ambient_is(requested: str) -> Iterator[None]:
    token = _ambient.set(_ambient.get() if requested == "auto" else requested)
    try:
        yield
    finally:
        _ambient.reset(token)


def interpreting() -> bool:
    """True where Triton's interpreter was asked for, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def choose(tensor: Tensor, requested: str = "auto") -> tuple[str, str]:
    """Return `(name, reason)`: the backend that serves `tensor`, "triton" or "reference".

    Args:
        tensor: any tensor of the computation; only its device counts.
        requested: "auto" takes Triton on a GPU tensor (and in the interpreter), else the reference.

    Raises:
        ValueError: an unknown name, or "triton" where no kernel can run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}")
    if requested == "auto" and not torch.compiler.is_compiling():  # which cannot trace a context variable
        requested = _ambient.get()
    if requested == "reference":
        return "reference", "asked for by name"

    obstacle = _obstacle(tensor)
    if requested == "triton":
        if obstacle:
            raise ValueError(
                f"backend='triton' cannot run here: {obstacle}. Use backend='auto' or 'reference', move the "
                "tensor to a GPU, or set TRITON_INTERPRET=1 before the first import to interpret the kernels"
            )
        return "triton", "asked for by name"
    if obstacle:
        return "reference", obstacle
    return "triton", "interpreted kernels" if tensor.device.type == "cpu" else "the tensor is on a GPU"


def kernels_can(tensor: Tensor) -> bool:
    """Whether kernels can run on this tensor at all, whatever was asked for."""
    return not _obstacle(tensor)


def _obstacle(tensor: Tensor) -> str:
    """What keeps the kernels from running on this tensor; empty if nothing does."""
    kind = tensor.device.type
    if kind == "cpu" and not interpreting():  # the usual case on a CPU, before the search for a package
        return "the tensor is on the CPU and TRITON_INTERPRET is not set"
    if kind not in ("cpu", "cuda"):  # ROCm devices carry the name "cuda" too
        return f"there are no kernels for a tensor on {kind!r}"
    return "" if _INSTALLED else "the package triton is not installed"
