"""The negative log-likelihood of a language model's words as an op: logits in, one number a row out."""

import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..backend import recorded
from ..checks import check_count
from ..reference import cross_entropy as reference
from ..reference.record import accumulate_dtype
from .launch import kernels_serve, launch, next_power_of_2, wide_dtype

MAX_BLOCK = 4096


def cross_entropy(
    logits: Tensor, targets: Tensor, classes: int | None = None, backend: str = "auto"
) -> Tensor:
    """`−log softmax(l)_t = log Σ_v exp(l_v) − l_t` of each row; differentiable to any order in l.

    As `torch.nn.functional.cross_entropy(l.float(), t, reduction="none")`, without logits or probabilities in
    float32: of a vocabulary's size there are the logits, in the 16 bits that autocast's product has left, and
    their gradient.

    Args:
        logits: l `[n, V]`, floating. Rows of a multiple of 16 bytes are read fastest, and product kernels
            are faster too: the last columns may be padding.
        targets: t, int64 `[n]`, each in 0 … classes − 1; the kernels give NaN for another, without a look
            by the host.
        classes: how many of the V columns count; the others may hold anything finite, and their gradient is
            0. By default all.
        backend: "auto", "triton" or "reference".

    Returns:
        `[n]`, in float32, or float64 for float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or a number of classes that do not go together.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits is {logits.dtype} {tuple(logits.shape)}: pass a floating tensor [n, V]")
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}: pass an int64 tensor ({len(logits)},)"
        )
    classes = logits.shape[1] if classes is None else classes
    check_count("classes", classes)
    if classes > logits.shape[1]:
        raise ValueError(f"classes={classes} is more than logits {tuple(logits.shape)} has columns")
    served = kernels_serve(logits, backend, autocast=True) and targets.device == logits.device
    if recorded(logits) and (served or reference.in_blocks(logits)):
        return CrossEntropyFunction.apply(logits, targets, classes, served)
    if not served:
        return reference.cross_entropy(logits, targets, classes)
    return cross_entropy_fwd(logits, targets, classes)[0]


# ------------------------------------------------------------------------------------------- the launches


def cross_entropy_fwd(logits: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The value `[n]`, and each row's highest logit h and `log₂ Σ exp(l − h)`, `[2, n]`, by the kernel."""
    rows, width = logits.shape
    levels = logits.new_empty(2, rows, dtype=accumulate_dtype(logits.dtype))
    out = torch.empty_like(levels[0])
    block = max(128, min(next_power_of_2(classes), MAX_BLOCK))
    launch(
        _kernels().cross_entropy_kernel,
        (rows,),
        logits.contiguous(),
        targets.contiguous(),
        out,
        levels,
        classes,
        width,
        rows,
        **_constants(logits, block),
    )
    return out, levels


def cross_entropy_vjp_fwd(
    logits: Tensor, targets: Tensor, levels: Tensor, vector: Tensor, classes: int
) -> Tensor:
    """The gradient of `⟨vector, out⟩` in the logits `[n, V]` by the kernel."""
    rows, width = logits.shape
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block = max(128, min(next_power_of_2(width), MAX_BLOCK))
    parts = -(-width // block)
    launch(
        _kernels().cross_entropy_vjp_kernel,
        (rows * parts,),
        logits.contiguous(),
        targets.contiguous(),
        levels,
        vector.contiguous(),
        out,
        classes,
        width,
        rows,
        parts,
        **_constants(logits, block),
    )
    return out


def _constants(logits: Tensor, block: int) -> dict[str, object]:
    """A thread has up to sixteen places of a block."""
    return {
        "WIDE": wide_dtype(logits.dtype),
        "BLOCK": block,
        "ALIGN": math.gcd(16 // logits.element_size(), logits.shape[1]),
        "num_warps": max(1, min(8, block // 512)),
    }


class CrossEntropyFunction(torch.autograd.Function):
    """`l ↦ log Σ exp(l) − l_t`, by the kernels if served; nothing of l's size is kept but l."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, classes: int, served: bool) -> Tensor:
        levels = None
        if served:
            value, levels = cross_entropy_fwd(logits, targets, classes)
        else:
            value = reference.cross_entropy(logits, targets, classes)
        ctx.save_for_backward(logits, targets, levels)
        ctx.classes = classes
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, targets, levels = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            leaf = logits.view_as(logits)
            value = reference.cross_entropy(leaf, targets, ctx.classes)
            return *torch.autograd.grad(value, leaf, grad, create_graph=True), None, None, None
        if levels is None:
            slopes = reference.cross_entropy_vjp(logits, targets, grad, ctx.classes)
        else:
            slopes = cross_entropy_vjp_fwd(logits, targets, levels, grad, ctx.classes)
        return slopes, None, None, None


@cache
def _kernels() -> ModuleType:
    from ..kernels import cross_entropy

    return cross_entropy
