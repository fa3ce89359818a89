"""What a check runs on, and the rows that it gives."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import emulation_seed, emulation_target

BOUNDS = {"float64": 1e-12, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
"""Largest relative error, ‖out − reference‖ / ‖reference‖, for each dtype."""
LEAST_WIDTH = 16
"""Of few entries a mean or a signed sum leaves cancellation, of which a relative error means nothing."""
RANDOM_WALK = 1 << 16
"""Up to so many terms a running sum stays within them; the error of one of more goes on as a random walk."""
SHAPES = ((1, 1), (3, 37), (2, 4100))
"""(batch, entries): the smallest, an odd one, and one that is cut into several unequal parts."""
LARGE = (70, 200)
"""With it products have tiles of every kind that a GPU's tensor cores take, and several steps along them."""
LAYOUTS = ("contiguous", "transposed", "strided")
"""Of the inputs: "strided" takes every other entry of a tensor whose other entries are NaN."""


@dataclass(frozen=True)
class Row:
    """One quantity that a kernel wrote, held against the reference.

    `error` is relative, except for a status: there it is the number of samples that differ, and the
    bound is 0.
    """

    op: str
    kernel: str
    dtype: str
    shape: tuple[int, int]
    layout: str
    quantity: str
    error: float
    bound: float
    device: str
    seed: int

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class Case:
    """What a check runs on.

    layout: how the inputs `[B, N]` lie in memory, one of `LAYOUTS`. multiprocessors: of the GPU that work is
    cut for; None for this one.
    """

    dtype: torch.dtype
    shape: tuple[int, int]
    device: torch.device
    seed: int
    layout: str = "contiguous"
    multiprocessors: int | None = None

    def randn(self, *shape: int, stream: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        value = torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        if self.layout == "transposed":
            return value.t().contiguous().t()
        if self.layout == "strided":
            return torch.stack((value, torch.full_like(value, math.nan)), dim=-1)[..., 0]
        return value


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖ in float64; equal entries, NaN and infinity included, count as exact."""
    out, expected = out.cpu().double(), expected.cpu().double()
    same = (out == expected) | (out.isnan() & expected.isnan())
    difference = torch.where(same, 0, out - expected).norm().item()
    if difference == 0:
        return 0.0
    scale = expected[expected.isfinite()].norm().item()
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf


def row(case: Case, op: str, kernel: str, quantity: str, error: float, bound: float | None = None) -> Row:
    device = f"CPU (emulated {emulation_target()})" if emulation_seed() else "CPU (interpreter)"
    if case.device.type == "cuda":
        device = torch.cuda.get_device_name(case.device)
    bound = BOUNDS[name_of(case.dtype)] if bound is None else bound
    return Row(
        op, kernel, name_of(case.dtype), case.shape, case.layout, quantity, error, bound, device, case.seed
    )


def sum_bound(case: Case, terms: int) -> float:
    """Of sums of so many random terms, one after another."""
    return BOUNDS[name_of(case.dtype)] * max(1.0, math.sqrt(terms / RANDOM_WALK))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def poisoned(like: Tensor, *shape: int) -> Tensor:
    """Where an output will be: NaN until it is written."""
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)
