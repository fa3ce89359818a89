"""Which implementation serves a tensor, and why.

`triton` are the kernels: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
`reference` is plain PyTorch and works everywhere.
"""

import importlib.util
import os

from torch import Tensor

BACKENDS = ("auto", "triton", "reference")


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


def _obstacle(tensor: Tensor) -> str:
    """What keeps the kernels from running on this tensor; empty if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    kind = tensor.device.type
    if kind == "cuda":  # ROCm devices carry this name too
        return ""
    if kind == "cpu":
        return "" if interpreting() else "the tensor is on the CPU and TRITON_INTERPRET is not set"
    return f"there are no kernels for a tensor on {kind!r}"
