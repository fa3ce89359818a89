"""Probes and squared norms as ops: what the stochastic Jacobian-norm estimate is made of."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import backend as backends
from ..reference import jacobian as reference
from ..reference.record import accumulate_dtype
from .launch import launch, next_power_of_2, partition, wide_dtype

DISTRIBUTIONS = ("gaussian", "rademacher")


def probe(
    like: Tensor, seed: Tensor, index: int = 0, distribution: str = "gaussian", backend: str = "auto"
) -> Tensor:
    """A random probe ε of `like`'s shape, dtype and device, with mean 0 and variance 1.

    The seed stands for the probe: the same seed and index give the same entries, from the kernel or the
    reference, on any device. Philox4x32-10, Box-Muller for the Gaussian.

    Args:
        like: any floating tensor.
        seed: int64 `[1]` on the same device.
        index: the number of the probe among those drawn from one seed.
        distribution: "gaussian" or "rademacher" (±1).

    Raises:
        ValueError: an unknown distribution or backend.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is unknown: choose 'gaussian' or 'rademacher'")
    name, _ = backends.choose(like, backend)
    if name == "reference" or like.dtype == torch.float64:  # the kernel's probes have float32's precision
        return reference.probe(like.shape, seed, index, distribution, like.dtype)
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if out.numel() == 0:
        return out
    rows = like.shape[0] if like.dim() else 1
    columns = out.numel() // rows
    block = max(2, min(next_power_of_2(columns), 2048))
    pairs = rows // 16 * 8 + min(rows % 16, 8)
    launch(
        _kernels().probe_kernel,
        (pairs * -(-columns // block),),
        out,
        seed,
        index,
        rows,
        columns,
        GAUSSIAN=distribution == "gaussian",
        BLOCK=block,
    )
    return out


def squared_norm_fwd(rows: Tensor) -> Tensor:
    """`[B]` from contiguous rows `[B, N]`, both at least 1, by the kernel."""
    batch, entries = rows.shape
    cut = partition(batch, entries)
    partial = torch.empty(batch, cut.parts, dtype=accumulate_dtype(rows.dtype), device=rows.device)
    launch(
        _kernels().squared_norm_kernel,
        (batch, cut.parts),
        rows,
        partial,
        entries,
        cut.parts,
        cut.chunk,
        BLOCK=cut.block,
        WIDE=wide_dtype(rows.dtype),
    )
    return partial.sum(dim=1)


class SquaredNormFunction(torch.autograd.Function):
    """`s_b = Σ_n v_bn²`; its gradient `2 s̄_b v_b` is plain PyTorch, so derivatives of any order exist."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return squared_norm_fwd(rows.contiguous())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return (2 * grad).to(rows.dtype)[:, None] * rows


def squared_norm(value: Tensor, backend: str = "auto") -> Tensor:
    """`‖v_b‖²` of each sample as `[B]`, summed in float32 (float64 for float64); differentiable.

    Args:
        value: `[B, ...]`, floating; any strides.

    Raises:
        ValueError: an unknown backend.
    """
    rows = value.flatten(1)
    name, _ = backends.choose(value, backend)
    if name == "reference" or rows.numel() == 0:
        return reference.squared_norm(rows)
    return SquaredNormFunction.apply(rows)


@cache
def _kernels() -> ModuleType:
    from ..kernels import jacobian

    return jacobian
