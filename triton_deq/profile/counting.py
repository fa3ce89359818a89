"""What one call does, counted: operations, bytes, operators, host synchronisations, launches."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..memory import LiveStorages, peak_bytes

Call = Callable[[], Any]

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
"""Operators that make the host wait for a GPU, because what they return depends on the data."""


@dataclass(frozen=True)
class Counts:
    """Of one call.

    Attributes:
        flops: operations of the products and convolutions that PyTorch dispatches, two for a multiply-add; a
            Triton kernel is launched past the dispatcher, and its operations are not among them.
        moved: bytes of the operands and results of operators other than views, as if each came from memory
            once an operator; Triton kernels and what operators move inside themselves are not seen.
        operators: how many of them. syncs: how many make the host wait on a GPU.
        peak: most bytes held at once beyond what was held before.
        launches: on a GPU, what the host launched: kernels, and graphs as one each.
    """

    flops: int | None = None
    moved: int | None = None
    operators: int | None = None
    syncs: int | None = None
    peak: int | None = None
    launches: int | None = None


def count(eager: Call, call: Call, execution: str, device: torch.device) -> Counts:
    """Of `call`, which executes `eager` in that way.

    A replayed graph and compiled code dispatch nothing that could be counted: a graph's operations, bytes and
    memory are those of the eager call, and compiled code's bytes are not known.
    """
    with Traffic() as traffic:
        eager()
    flops = traffic.flops
    if device.type == "cuda":
        launches, syncs = _on_gpu(call, device)
        moved = None if execution == "compile" else traffic.moved
        operators = traffic.operators if execution == "eager" else None
        peak = peak_bytes(eager if execution == "graph" else call, device)  # a graph has its memory for good
        return Counts(flops, moved, operators, syncs, peak, launches)
    if execution == "compile":
        return Counts(flops)
    return Counts(flops, traffic.moved, traffic.operators, traffic.syncs, traffic.storages.peak)


class Traffic(TorchDispatchMode):
    """Adds up what operators compute, read and write while it is entered; views move nothing.

    Operations are counted by PyTorch's own formulas, but without the module hooks of its `FlopCounterMode`,
    which forbid a backward pass that calls `torch.autograd.grad`, as that of an implicit gradient does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = self.operators = self.syncs = 0
        self.storages = LiveStorages()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self.storages.add(outputs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs)
        name = func.overloadpacket.__name__
        if any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns):
            return outputs
        self.operators += 1
        self.syncs += name in WAITING
        if name.startswith(("empty", "new_empty", "detach")):  # which touch nothing
            return outputs
        written = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        # What is written in place is among the results; only copies, fills and `out=` do not read it.
        blind = name in ("copy_", "zero_", "fill_") or "out" in func._overloadname
        targets = {id(tensor) for tensor in written} if blind else set()
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.moved += sum(_bytes(tensor) for tensor in [*written, *read] if id(tensor) not in targets)
        self.moved += sum(_bytes(tensor) for tensor in written if id(tensor) in targets)
        return outputs


def _bytes(tensor: Tensor) -> int:
    """What there is of it: an expanded tensor repeats its entries."""
    there = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(there) * tensor.element_size() if tensor.numel() else 0


def _on_gpu(call: Call, device: torch.device) -> tuple[int | None, int | None]:
    """Launches and host synchronisations, as PyTorch's profiler sees them; None where it cannot."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call()
        names = [event.name for event in found.events() or []]
    except RuntimeError:
        return None, None
    return tally(names)


def tally(names: Iterable[str]) -> tuple[int, int]:
    """Launches and waits among the functions of the driver and runtime, CUDA's and HIP's.

    Waits for the whole device are the profiler's own.
    """
    launches = waits = 0
    for name in names:
        launches += "LaunchKernel" in name or "GraphLaunch" in name
        waits += "StreamSynchronize" in name or "EventSynchronize" in name
    return launches, waits
