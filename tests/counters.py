"""What a solve or a training step costs, counted: launches, operators, reads by the host, bytes, allocations.

    with Counter(z0) as counter:
        td.solve(counter.beside(f), z0)
    counter.steps[3].launches

Inside `beside(f)` nothing is counted, and each call of it begins a new step.
"""

import gc
import sys
from collections import Counter as Multiset
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton_deq.ops.launch
from triton_deq.memory import LiveStorages
from triton_deq.ops.launch import launch_anew

# Operators that make the host wait for a GPU, because what they return depends on the data.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


@dataclass
class Counts:
    """One step's figures, or a whole call's.

    Attributes:
        launches: names of the kernels launched.
        operators: names of the PyTorch operators dispatched, views apart.
        views: how many more were views, which move nothing.
        reads: times the host read the device and had to wait for it. On a CPU: what would wait on a GPU.
            `x.cpu().tolist()` counts twice there, since a CPU tensor's `.cpu()` is itself.
        moved: bytes of state-sized tensors that operators read and wrote, and all bytes that interpreted
            kernels loaded and stored (compiled kernels do not tell).
        allocated: the operators that returned a new storage at least as large as the state.
    """

    launches: list[str] = field(default_factory=list)
    operators: Multiset[str] = field(default_factory=Multiset)
    views: int = 0
    reads: list[str] = field(default_factory=list)
    moved: int = 0
    allocated: list[str] = field(default_factory=list)


class Counter:
    """Counts while it is entered; see the module.

    Args:
        state: a tensor like the solver's state; "state-sized" means at least as many entries.

    Attributes:
        steps: `Counts` from one call of `beside(f)` to the next; the first holds what came before any.
        peak: the most bytes held at once by storages that operators returned, f's included; on a GPU the
            allocator's own figure, which holds what was allocated before too.
    """

    def __init__(self, state: Tensor):
        self.device = state.device
        self.entries = state.numel()
        self.steps = [Counts()]
        self.paused = False
        self._storages = LiveStorages()
        self._exits = ExitStack()

    @property
    def now(self) -> Counts:
        return self.steps[-1]

    @property
    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._storages.peak

    def __enter__(self) -> "Counter":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._exits.enter_context(_Functions(self))
        self._exits.enter_context(_Operators(self))
        for module in list(sys.modules.values()):
            if getattr(module, "launch", None) is _launch and module.__name__.startswith("triton_deq"):
                self._exits.enter_context(mock.patch.object(module, "launch", self._count_launch))
            if getattr(module, "launch_at", None) is _launch_at and module.__name__.startswith("triton_deq"):
                self._exits.enter_context(mock.patch.object(module, "launch_at", launch_anew))
        self._exits.enter_context(_interpreted_bytes(self))
        gc.freeze()  # what is there already need not be looked at after each launch
        self._exits.callback(gc.unfreeze)
        return self

    def __exit__(self, *error) -> None:
        self._exits.close()

    def beside(self, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """f, but not counted; each call begins a new step."""

        def uncounted(z: Tensor) -> Tensor:
            self.steps.append(Counts())
            self.paused = True
            try:
                return f(z)
            finally:
                self.paused = False

        return uncounted

    def saw_operator(self, func, args: Any, kwargs: Any, outputs: Any) -> None:
        self._storages.add(outputs)
        if self.paused:
            return
        name = func.overloadpacket.__name__
        if any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns):
            self.now.views += 1
            return
        self.now.operators[name] += 1
        read = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        written = [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]
        if self._waits(name, read, written, kwargs):
            self.now.reads.append(name)
        # An argument that is written in place is among the outputs; only copies and `out=` do not read it.
        targets = {id(tensor) for tensor in written if name == "copy_" or "out" in func._overloadname}
        read_only = [tensor for tensor in read if id(tensor) not in targets]
        if not name.startswith(("empty", "new_empty")):  # which touch nothing
            self.now.moved += sum(self._size(tensor) for tensor in [*read_only, *written])
        known = {tensor.untyped_storage().data_ptr() for tensor in read}
        for tensor in written:
            if self._size(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.now.allocated.append(name)

    def _waits(self, name: str, read: list[Tensor], written: list[Tensor], kwargs: Any) -> bool:
        if not any(tensor.device == self.device for tensor in read):
            return False
        if name in WAITING:
            return True
        leaves = self.device.type != "cpu" and any(tensor.device.type == "cpu" for tensor in written)
        return leaves and not kwargs.get("non_blocking", False)

    def _size(self, tensor: Tensor) -> int:
        """In bytes; 0 for what is smaller than the state."""
        return tensor.numel() * tensor.element_size() if tensor.numel() >= self.entries else 0

    def _count_launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        self.now.launches.append(kernel.fn.__name__)
        self.paused, before = True, self.paused  # the interpreter copies its arguments: not our doing
        try:
            _launch(kernel, *args, **constants)
        finally:
            self.paused = before
        if self.device.type != "cuda":  # an interpreted launch leaves its storages in a cycle of functions
            gc.collect()


_launch, _launch_at = triton_deq.ops.launch.launch, triton_deq.ops.launch.launch_at


class _Operators(TorchDispatchMode):
    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self.counter.saw_operator(func, args, kwargs, outputs)
        return outputs


class _Functions(TorchFunctionMode):
    """Sees the reads that dispatch no operator where the tensor is on the CPU already."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (
            not self.counter.paused
            and self.counter.device.type == "cpu"
            and func in (Tensor.cpu, Tensor.tolist)
        ):
            self.counter.now.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def _interpreted_bytes(counter: Counter) -> Iterator[None]:
    """Adds up what Triton's interpreter really loads and stores, masks respected."""
    from triton_deq.backend import interpreting

    if not interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest, **options):
        loaded = load(self, pointers, mask, *rest, **options)
        counter.now.moved += int(mask.data.sum()) * loaded.data.itemsize
        return loaded

    def counting_store(self, pointers, value, mask, *rest, **options):
        counter.now.moved += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest, **options)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield
