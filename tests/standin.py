"""A stand-in for CUDA graphs on a CPU: what a capture holds is recorded, undone, and repeated by a replay.

As with a real graph, Python runs at the capture alone, tensors keep their places, and reading a value from
the host is an error. Kernels are recorded as launches with the arguments that they had.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from triton_deq import implicit
from triton_deq.cells import mlp as cell
from triton_deq.ops import anderson, broyden, jacobian, mlp, mlp_probe, mlp_solve, weightnorm
from triton_deq.ops.launch import launch_anew
from triton_deq.solvers import graph, loop
from triton_deq.weight_caches import without_caches

OPS = (anderson, broyden, jacobian, mlp, mlp_probe, mlp_solve, weightnorm)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.repeats: list[Callable[[], None]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero"):
            raise RuntimeError("operation not permitted when stream is capturing")
        written = [
            given
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.save([*written, *(value for key, value in kwargs.items() if key == "out")])
        out = func(*args, **kwargs)
        fresh = not any(result.alias_info is not None for result in func._schema.returns)

        def repeat() -> None:
            again = func(*args, **kwargs)
            if fresh:
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)

        self.repeats.append(repeat)
        return out

    def launch(self, kernel, grid, *args, **constants) -> None:
        self.save(args)
        self.repeats.append(lambda: LAUNCH(kernel, grid, *args, **constants))
        with _disable_current_modes():  # the interpreter itself uses operators
            LAUNCH(kernel, grid, *args, **constants)

    def save(self, tensors) -> None:
        with _disable_current_modes():
            for tensor in tree_leaves(tensors):
                if isinstance(tensor, Tensor) and id(tensor) not in self._before:
                    self._before[id(tensor)] = (tensor, tensor.detach().clone())

    def undo(self) -> None:
        with _disable_current_modes():
            for tensor, value in reversed(self._before.values()):
                tensor.data.copy_(value)  # whose version stays as it was: nothing has happened


LAUNCH = anderson.launch
captures: list[int] = []
"""How many operations each capture held."""


def capture(steps: Callable[[], None], device: torch.device) -> Callable[[], None]:
    recorder = Recorder()
    patches = [mock.patch.object(op, "launch", recorder.launch) for op in OPS]
    patches += [mock.patch.object(op, "launch_at", launch_anew) for op in (anderson, broyden)]
    for patch in patches:
        patch.start()
    try:
        with recorder, without_caches():
            steps()
    finally:
        mock.patch.stopall()
        recorder.undo()
    captures.append(len(recorder.repeats))

    @torch.no_grad()
    def replay() -> None:
        for repeat in recorder.repeats:
            repeat()

    return replay


def step_by_step(monkeypatch) -> None:
    """Let what could be solved in one launch be solved in steps, which graphs can hold."""
    monkeypatch.setattr(cell.MLPCell, "whole_solve", None)
    monkeypatch.setattr(cell.Adjoint, "whole_solve", None)


def install(monkeypatch) -> None:
    """Let `graph=True` capture with the stand-in."""
    captures.clear()
    monkeypatch.setattr(graph, "capture", capture)
    for module in (graph, implicit):
        monkeypatch.setattr(module, "captures", lambda device: True)
    monkeypatch.setattr(loop, "usable", lambda device, backend, compact: True)
