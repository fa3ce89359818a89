"""One inference or training step of a model, as a function without arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..deq import DEQ
from ..solvers.graph_cache import GraphCache
from ..timing import Stopwatch, graphed
from .plan import Setting
from .sides import Side
from .tasks import loss_of


class Impossible(Exception):
    """This way of execution is not there for this model or device; the message says why."""


class Step:
    """Inference under `no_grad`, or forward and backward with all gradients; no optimiser.

    Args:
        side, setting, device: what runs, how and where.

    Attributes:
        eager: one step as it is, but for a DEQ's graphs; also what `observe` looks at.
        call: the same in the setting's execution.
    """

    def __init__(self, side: Side, setting: Setting, watch: Stopwatch):
        self.side, self.setting = side, setting
        kind = watch.device.type
        # A capture may not keep casts that were made outside of it.
        self.autocast = partial(
            torch.autocast,
            kind,
            torch.bfloat16,
            enabled=setting.dtype in ("bf16", "bf16-state"),
            cache_enabled=setting.execution != "graph",
        )
        for part in side.model.modules():
            if isinstance(part, DEQ):
                part.graph = False
        if setting.execution == "graph" and kind != "cuda":
            raise Impossible(f"CUDA graphs need a GPU, and this is a {kind}")
        side.model.eval()
        with self.autocast():
            self.arguments = side.task.arguments(side.model, setting.batch, watch.device)
        side.model.train(setting.training)
        self.eager: Callable[[], None] = partial(self._run, side.model)
        self.call = self._executed(watch)

    def _executed(self, watch: Stopwatch) -> Callable[[], None]:
        if self.setting.execution == "compile":
            return self._compiled()
        if self.setting.execution == "graph":
            if self.side.deq is None:
                return graphed(self.eager, watch)
            self.side.deq.graph = GraphCache()
        return self.eager

    def _compiled(self) -> Callable[[], None]:
        """All but the solves, in which the host decides, and within them the f of a cell without `write`."""
        compiled = torch.compile(self.side.model)
        deqs = [part for part in self.side.model.modules() if isinstance(part, DEQ)]
        forwards = [torch.compiler.disable(deq.forward) for deq in deqs]
        calls: list[Any] = [
            None if hasattr(deq.cell, "write") else torch.compile(deq.cell._call_impl) for deq in deqs
        ]

        def run() -> None:
            for deq, forward, call in zip(deqs, forwards, calls, strict=True):
                deq.forward, deq.cell._compiled_call_impl = forward, call  # type: ignore[method-assign]
            try:
                self._run(compiled)
            finally:
                for deq in deqs:
                    del deq.forward
                    deq.cell._compiled_call_impl = None

        return run

    def _run(self, run: Callable[..., Any] | nn.Module) -> None:
        if self.setting.training:
            self.side.model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(self.setting.training):
            with self.autocast():
                output = run(*self.arguments)
                loss = loss_of(output) if self.setting.training else None
            del output
            if loss is not None:
                loss.backward()

    def dispatched(self) -> None:
        """The same step without graphs: all that it does goes through PyTorch's dispatcher."""
        graphs = None if self.side.deq is None else self.side.deq.graph
        if self.side.deq is not None:
            self.side.deq.graph = False
        try:
            self.eager()
        finally:
            if self.side.deq is not None and graphs is not None:
                self.side.deq.graph = graphs

    def without_penalty(self) -> None:
        """The same step without the Jacobian penalty."""
        assert self.side.deq is not None
        penalty, self.side.deq.penalty = self.side.deq.penalty, None
        try:
            self.call()
        finally:
            self.side.deq.penalty = penalty
