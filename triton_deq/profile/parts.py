"""Where the time of a model with a DEQ goes: its parts alone, and what is left of the whole without them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import backend as backends
from ..deq import DEQ, Injected
from ..gradients import fixed_point
from ..implicit import ImplicitGradient
from ..solvers import Solution, solve
from ..solvers.graph import on_capture_stream
from ..timing import Stopwatch, graphed
from .calls import Step

Call = Callable[[], Any]


@dataclass
class Seen:
    """What a DEQ was called with in a step, without graphs, and how its solves went."""

    x: Any
    solution: Solution

    @property
    def backward_nfe(self) -> int | None:
        return None if self.solution.backward is None else self.solution.backward.nfe


def observe(step: Step) -> Seen | None:
    """Take one eager step and look at the DEQ in it; None without one."""
    deq = step.side.deq
    if deq is None:
        step.eager()
        return None
    found: dict[str, Any] = {}

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        found["x"] = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        found["solution"] = output.solution

    hooks = [
        deq.register_forward_pre_hook(before, with_kwargs=True),
        deq.register_forward_hook(after),
    ]
    try:
        step.eager()
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(**found) if found else None


@dataclass
class Parts:
    """The parts of a step, as calls to be timed beside the whole.

    Attributes:
        calls: by name: "f", all evaluations of a forward solve without the solver; "solve", the solve itself;
            in training the same of the backward solve, and the step without its penalty.
        evaluations: of f in "f" and "solve", which dropout can make another number than in the whole step.
        whole: the forward solve is one launch, in which f and the solver cannot be told apart.
    """

    calls: dict[str, Call]
    evaluations: int
    whole: bool


def take_apart(step: Step, seen: Seen, watch: Stopwatch) -> Parts | None:
    """None where there is nothing to take apart: under torch.compile, whose code has no such seams."""
    deq = step.side.deq
    if deq is None or step.setting.execution == "compile":
        return None
    training, cell = step.setting.training, deq.cell
    with torch.set_grad_enabled(training), step.autocast():
        u = cell.inject(seen.x)  # type: ignore[operator]
    f = Injected(cell, u)
    z = seen.solution.value.detach()

    def forward() -> Solution:
        with torch.no_grad(), step.autocast():
            return _solved(deq, f, torch.zeros_like(z))

    solution = forward()
    calls: dict[str, Call] = {
        "f": _evaluations(f, z, solution.nfe, deq, watch, step.autocast, bool(deq.graph)),
        "solve": forward,
    }
    if training:
        calls |= _backward(step, deq, f, z, seen, watch)
        if deq.penalty is not None:
            calls["without penalty"] = step.without_penalty
    return Parts(calls, solution.nfe, solution.path == "one launch")


def _solved(deq: DEQ, f: Injected, z0: Tensor) -> Solution:
    """As `DEQ.forward` does it, with everything that does not depend on z there already."""
    return fixed_point(
        f,
        z0,
        deq.solver,
        tol=deq.stopping.tol,
        max_steps=deq.stopping.max_steps,
        residual=deq.stopping.residual,
        norm_over=deq.stopping.norm_over,
        check_every=deq.stopping.check_every,
        compact=deq.compact,
        graph=deq.graph,
        backend=deq.backend,
        return_solution=True,
    )[1]


def _evaluations(
    f: Any, z: Tensor, times: int, deq: DEQ, watch: Stopwatch, context: Any, graph: bool
) -> Call:
    """f so many times, as the loop of a solver calls it; with `graph` in a CUDA graph, as the solver is."""
    write = getattr(f, "write", None)
    out = torch.empty_like(z)

    def evaluate() -> None:
        with torch.no_grad(), context(), backends.ambient(deq.backend):
            for _ in range(times):
                if write is None:
                    f(z)
                else:
                    write(z, out)

    return graphed(evaluate, watch) if graph and times else evaluate


def _backward(step: Step, deq: DEQ, f: Injected, z: Tensor, seen: Seen, watch: Stopwatch) -> dict[str, Call]:
    """The linear solve of an implicit gradient; nothing where the model has another."""
    gradient, times = deq.gradient, seen.backward_nfe
    if not isinstance(gradient, ImplicitGradient) or not times:
        return {}
    graph = bool(deq.graph)
    with (
        torch.enable_grad(),
        step.autocast(),
        backends.ambient(deq.backend),
        on_capture_stream(z.device, graph),
    ):
        at, closed = z.clone(), f.vjp
        if closed is None:
            at.requires_grad_()
            value = f(at)
            product = _by_autograd(value, at)
        else:
            product = closed(at)[1]
    grad = torch.randn_like(z)
    plus = getattr(product, "plus", None)
    mapped = (lambda u: product(u) + grad) if plus is None else plus(grad)

    def solved() -> Solution:
        return solve(
            mapped,
            grad,
            gradient.solver,
            tol=0.0,
            max_steps=times,
            graph=graph,
            backend=deq.backend,
        )

    outside = partial(torch.autocast, z.device.type, enabled=False)  # a backward pass has no autocast
    # The engine works on the stream that f ran on, and another capture cannot have it.
    alone = _evaluations(mapped, grad, times, deq, watch, outside, graph and closed is not None)
    return {"backward f": alone, "backward solve": solved}


def _by_autograd(value: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
    def product(u: Tensor) -> Tensor:
        return torch.autograd.grad(value, at, u, retain_graph=True, materialize_grads=True)[0]

    return product


def shares(
    whole: float, alone: Mapping[str, float], training: bool, nfe: int, parts: Parts | None
) -> dict[str, float]:
    """Milliseconds of each part, which add up to the whole.

    Args:
        whole: the step's time; alone: those of `Parts.calls`. What noise makes negative is zero, and parts
            that come out longer than the whole are shortened in proportion.
        nfe: evaluations of f in the whole step's forward solve.
    """
    if parts is None:
        return {"model": whole}
    scale = nfe / parts.evaluations if parts.evaluations else 1.0
    pieces: dict[str, float] = {}
    for prefix, factor in (("", scale), ("backward ", 1.0)):
        if f"{prefix}solve" not in alone:
            continue
        solved, bare = factor * alone[f"{prefix}solve"], factor * alone[f"{prefix}f"]
        if parts.whole and not prefix:
            pieces["f and solver"] = solved
        else:
            pieces[f"{prefix}f"] = min(bare, solved)
            pieces[f"{prefix}solver"] = max(solved - bare, 0.0)
    if "without penalty" in alone:
        pieces["penalty"] = max(whole - alone["without penalty"], 0.0)
    known = sum(pieces.values())
    if known > whole:
        pieces = {name: part * whole / known for name, part in pieces.items()}
    pieces["rest" if training else "injection+head"] = max(whole - known, 0.0)
    return pieces
