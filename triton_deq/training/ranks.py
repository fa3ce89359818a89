"""Data-parallel training: which rank this is, and what ranks tell each other beside gradients."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """The ranks of the process group that is there, else one. Make it on all ranks at once.

    What is said here goes by the CPU (gloo), so that a rank's words never wait for its device.
    """

    def __init__(self) -> None:
        self._together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._together else 0
        self.world = dist.get_world_size() if self._together else 1
        self._group = dist.new_group(backend="gloo") if self._together else None

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        if not self._together:
            return flag
        held = torch.tensor(int(flag))
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self._group)
        return bool(held)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Of each value; the names must be the same on all ranks."""
        if not self._together or not values:
            return values
        names = sorted(values)
        held = torch.tensor([values[name] for name in names], dtype=torch.float64)
        dist.all_reduce(held, group=self._group)
        means = dict(zip(names, (held / self.world).tolist(), strict=True))
        return {name: means[name] for name in values}

    def gather(self, held: Any) -> list[Any]:
        """What each rank holds, in order, on rank 0; elsewhere an empty list."""
        if not self._together:
            return [held]
        everything = [None] * self.world if self.rank == 0 else None
        dist.gather_object(held, everything, group=self._group)
        return everything or []

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over ranks."""
        if not self._together:
            return model
        # A step may leave parameters out, as an adaptive softmax does with words that no target is one of.
        return DistributedDataParallel(model, find_unused_parameters=True)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the group under torchrun, else do nothing; gives the device that is this rank's."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
