"""What is measured: a case is one operation on one size, its variants are the ways to do it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from triton_deq.timing import Call, Stopwatch

from .problems import Problem
from .roofline import Work

SCALES = ("tiny", "quick", "full")


@dataclass(frozen=True)
class Setting:
    """What a run is asked for.

    Attributes:
        device: where to run.
        scale: "tiny" (a rehearsal, also for interpreted kernels), "quick" or "full".
        seed: of all inputs.
        compiled: variants under torch.compile too, "only", or not at all.
    """

    device: torch.device
    scale: str
    seed: int
    watch: Stopwatch
    compiled: str = "too"

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


class Solved(NamedTuple):
    """What a solving variant's call returns."""

    value: Tensor
    steps: int


@dataclass(frozen=True)
class Variant:
    """One way to do it.

    Attributes:
        name: "triton-deq", or the peer; "bare f" is what all of them have in common.
        prepare: returns the call to be timed. It may raise; then the row tells why there is no time.
        backend: what it runs on.
        compiles: whether its first call compiles something worth telling.
    """

    name: str
    prepare: Callable[[], Call]
    backend: str = "pytorch"
    compiles: bool = False


@dataclass(frozen=True)
class Case:
    """One operation on one size.

    Attributes:
        problem: what `Solved.value` is a solution of, for the residual.
        work: what the call must move and compute at least, where that is known.
    """

    group: str
    op: str
    mode: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    variants: tuple[Variant, ...]
    problem: Problem | None = None
    work: Work | None = None

    @property
    def key(self) -> tuple[str, str, str, tuple[int, ...]]:
        """What tells it from the other cases of its group, as a row has it."""
        return self.op, self.mode, str(self.dtype).removeprefix("torch."), self.shape


def ours(setting: Setting, on_cpu: str = "auto") -> list[tuple[str, str]]:
    """The names and backends of this library's variants: on a GPU the kernels, and the reference too.

    on_cpu: there, what a user gets; or "reference" for an op that has nothing else.
    """
    if setting.gpu:
        return [("triton-deq", "triton"), ("triton-deq reference", "reference")]
    from triton_deq.backend import interpreting

    # A rehearsal runs the interpreted kernels; elsewhere on a CPU they are nothing to time.
    rehearsal = setting.scale == "tiny" and interpreting()
    return [("triton-deq", "triton" if rehearsal else on_cpu)]


def kernels_alone(setting: Setting) -> list[tuple[str, str]]:
    """The first of those: for whole models, where the reference would take a GPU's minutes."""
    return ours(setting)[:1]
