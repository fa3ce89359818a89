"""The one loop that all solvers run in."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backend as backends
from ..backend import transformed
from ..checks import check_state
from ..reference.record import Record
from ..weight_caches import as_solve
from .anderson import Anderson
from .compaction import Whole, check_compact
from .debugging import check_map
from .functional import functional_solve
from .graph import Replays, usable
from .graph_cache import GraphCache
from .layout import Layout, evaluate
from .packing import Map, State, packed, unpacked_errors
from .solution import NotConverged, Solution, empty_solution
from .stopping import Lookout, Stopping
from .while_loop import looped_solve, loops


class Solver(Protocol):
    """What the loop asks of a solver: a record of numbers that can start a state and take a step."""

    def start(self, x: Tensor, stopping: Stopping, backend: str) -> Any: ...

    def step(self, state: Any, fx: Tensor, step: int, stopping: Stopping, backend: str) -> int | Tensor: ...


def solve(
    f: Map,
    z0: State,
    solver: Solver | None = None,
    *,
    tol: float = 1e-3,
    max_steps: int = 30,
    residual: str = "relative",
    norm_over: str = "sample",
    throw: bool = False,
    trace: bool = False,
    check_every: int = 1,
    compact: float | None = None,
    debug: bool = False,
    graph: bool = False,
    backend: str = "auto",
) -> Solution:
    """Find z with `f(z) = z` for each sample of a batch, without gradients.

    A sample stops by itself: at its tolerance, at a value that is not finite, or when it diverges. From
    then on it does not change. f is called on the solver's own buffer: it may not modify z, and must clone
    what it wants to keep of it.

    In torch.compile, torch.export and the transforms of torch.func the host cannot look, so there f is
    evaluated `max_steps` times, and the operators are PyTorch's; the answer is the same.

    Args:
        f: from a state to a tensor of the same shape, dtype (autocast may choose another) and device. The
            value of a sample may depend on that sample of the state alone: where samples hang together, as
            the nodes of a graph do, make them one sample. What it raises passes through. If it has a method
            `write(z, out)` that leaves f(z) in out, that is called where the solver has a place for the
            value, which saves a copy. If it has `whole_solve(z0, solver, stopping, trace)`, the kernels are
            first asked for all of the solve (not with compact or debug): it returns the values, a record and
            the trace, or None to decline.
        z0: `[B, ...]`, real floating, any strides; not modified. B may be 0. Or a complex tensor, or a tuple,
            list or dict of tensors, of one B, precision and device: then f takes and gives the same, and so
            has the value. They are views of one packed real `[B, N]`, so a residual is one norm over all.
        solver: `Anderson()` if not given, or `Broyden()`, or `Picard()`.
        tol: the residual at which a sample has converged; 0 takes all of max_steps.
        max_steps: the most evaluations of f.
        residual: "relative", `‖f(z) − z‖ / ‖f(z)‖` (Bai et al., arXiv 2106.14342, section 3), or
            "absolute", `‖f(z) − z‖`.
        norm_over: "sample", or "batch": one norm over all samples, which then stop together.
        throw: raise `NotConverged` where a sample did not reach the tolerance.
        trace: keep each evaluation's residuals in `Solution.trace`.
        check_every: on a GPU, how many evaluations of f may follow after the last sample has stopped, so that
            the host need not wait for the device; they change nothing. The reference stops at once.
        compact: when no more than this share of the samples held still runs, go on with those alone:
            `f.select(samples)`, samples being int64 indices into the batch, is then asked for a function of
            states `[len(samples), ...]`. Sums may be added in another order from then on. None: never.
        debug: raise if f is random, lets samples of z mix (not with `norm_over="batch"`), or modifies its
            argument; costs `2 + 2 log₂ B` evaluations at the start, which `nfe` does not count, and a copy
            and a comparison at each.
        graph: on a GPU, take all but the first few steps in a CUDA graph of f and the solver, so that no
            Python runs between them. The host looks once a cycle (a multiple of the history, at least 4
            steps), so f may be evaluated a cycle too often. f must be capturable: no read of the device by
            the host. The graph lasts for this solve; that of a `DEQ` is used again. On a CPU it warns and
            does nothing. Inside torch.compile and torch.export, on any device: take the steps in a
            `torch.while_loop`, which has f in it once and ends with the last sample that runs; without it
            all of max_steps are written out. There f may not change a buffer, as batch norm does in training.
        backend: "auto", "triton", "reference", or "numba": the reference with the solver's steps compiled for
            a CPU, in float32 or float64, and an `MDEQCell`'s GroupNorm, in bfloat16 too. "auto" takes that
            where it pays and Numba can be imported.

    Returns:
        A `Solution` with each sample's best finite iterate and how it ended.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
        NotConverged: with `throw=True`.
        RuntimeError: with `debug=True`, what that finds in f; with `graph=True`, one that cannot be captured;
            gradients through such a loop with a torch that compiles it wrongly.
    """
    f, z0, packing = packed("z0", f, z0)
    with unpacked_errors(packing, throw):
        solution, _ = solve_and_keep(
            f,
            z0,
            Anderson() if solver is None else solver,
            tol=tol,
            max_steps=max_steps,
            residual=residual,
            norm_over=norm_over,
            throw=throw,
            trace=trace,
            check_every=check_every,
            compact=compact,
            debug=debug,
            graph=graph,
            backend=backend,
        )
    return solution if packing is None else packing.solution(solution)


@as_solve
def solve_and_keep(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: Solver,
    *,
    throw: bool,
    trace: bool,
    compact: float | None,
    debug: bool,
    graph: bool | GraphCache,
    backend: str,
    **when: Any,
) -> tuple[Solution, Any]:
    """`solve`, and the state that the solver has left behind: None where there was nothing to solve, or
    where `compact` has dropped samples from it.

    when: the fields of `Stopping`.
    """
    check_state("z0", z0)
    check_solver("solver", solver)
    stopping = Stopping(**when)
    if transformed():
        looped = loops(graph)
        refuse_traced(throw=throw, compact=compact, debug=debug, graph=not looped and bool(graph))
        if looped:
            return looped_solve(f, z0, solver, stopping, trace=trace), None
        return functional_solve(f, z0, solver, stopping, trace=trace, looks=False)[1], None
    check_compact(compact, f, stopping.norm_over)
    name = _takes_steps(z0, solver, backend)
    if z0.numel() == 0:
        return empty_solution(z0, trace), None

    captured = graph if graph and usable(z0.device, name, compact) else False
    with backends.ambient(backend):
        return _solve(f, z0, solver, stopping, name, throw, trace, compact, debug, captured)


def _solve(
    f: Any,
    z0: Tensor,
    solver: Any,
    stopping: Stopping,
    name: str,
    throw: bool,
    trace: bool,
    compact: float | None,
    debug: bool,
    graph: bool | GraphCache,
) -> tuple[Solution, Any]:
    """The same with arguments that have been checked."""
    if debug:
        check_map(f, z0.detach(), stopping.norm_over)
    offer = getattr(f, "whole_solve", None)
    if name == "triton" and offer is not None and compact is None and not debug:
        whole_answer = offer(z0.detach(), solver, stopping, trace)
        if whole_answer is not None:
            value, record, traced = whole_answer
            return _from_one_launch(value, record, traced, throw), None

    layout = Layout(z0)
    if graph:
        solution, state = _solve_in_graphs(f, layout, z0, solver, stopping, name, trace, debug, graph)
        return thrown(solution, throw), state

    state = solver.start(layout.rows(z0.detach()), stopping, name)
    whole = None if compact is None else Whole.of(f, state, compact)
    residuals: list[Tensor] = []
    lookout = Lookout(stopping.check_every)
    nfe = 0
    for step in range(stopping.max_steps):
        fx = _value(f, layout, solver, state, step, debug)
        nfe += 1
        active = solver.step(state, fx, step, stopping, name)
        del fx  # while f runs again, its last value need not be there
        if trace:
            record = state.record if whole is None else whole.record_of(state)
            residuals.append(record.residual.clone())
        running = lookout.running(active)
        if running == 0:
            break
        if whole is not None and running is not None and whole.worth_it(running):
            f, state = whole.shrink(solver, state, name)
            layout = Layout(z0)
            if len(state.x) == 0:  # the rest stopped while the host was not looking
                break

    traced, path = residuals if trace else None, "compiled steps" if name == "numba" else "steps"
    if whole is None:
        return finish(layout.unrows(state.best), state.record, nfe, traced, throw, path), state
    whole.take_in(state)
    return finish(layout.unrows(whole.best), whole.record, nfe, traced, throw, path), None


def _takes_steps(z0: Tensor, solver: Any, backend: str) -> str:
    """The backend of this solver's steps."""
    if getattr(solver, "compiled", False):
        return backends.choose_step(z0, backend)
    if backend == "numba":
        raise ValueError(
            f"backend='numba' cannot serve here: {solver!r} has no compiled steps. Use backend='auto', or "
            "one of td.Anderson, td.Broyden and td.Picard"
        )
    return backends.choose(z0, backend)[0]


def _from_one_launch(value: Tensor, record: Record, traced: Tensor | None, throw: bool) -> Solution:
    nfe = int(record.steps.max().item())
    return finish(value, record, nfe, None if traced is None else list(traced[:nfe]), throw, "one launch")


def _solve_in_graphs(
    f: Any,
    layout: Layout,
    z0: Tensor,
    solver: Any,
    stopping: Stopping,
    backend: str,
    trace: bool,
    debug: bool,
    graph: bool | GraphCache,
) -> tuple[Solution, Any]:
    """The same with graphs: of this solve alone, or those that a cache has from earlier ones."""
    x = layout.rows(z0.detach())
    entry = graph.find(f, x, (solver, stopping, trace)) if isinstance(graph, GraphCache) else None
    if entry is not None and entry.replays is not None:
        state, replays = entry.state, entry.replays
        solver.restart(state, x, stopping)
    else:
        state = solver.start(x, stopping, backend)
        cycle = len(state.active)
        trail = state.record.data.new_empty(cycle, len(x)) if trace else None
        replays = Replays(z0.device, cycle, trail)
        if entry is not None:
            entry.state, entry.replays = state, replays

    def one(step: int) -> None:
        known = step >= replays.cycle or replays.warm  # then this is captured, and debug may not compare
        function = f if entry is None else entry.f if known else entry.watched
        fx = _value(function, layout, solver, state, step, debug and not known)
        solver.step(state, fx, step, stopping, backend)

    nfe, traced = replays.run(one, state, stopping.max_steps)
    if isinstance(graph, GraphCache) and entry is not None and not entry.knows_all():
        graph.forget(entry)
    value = layout.unrows(state.best if entry is None else state.best.clone())
    return finish(value, state.record, nfe, traced if trace else None, False, "graph"), state


def _value(f: Any, layout: Layout, solver: Any, state: Any, step: int, debug: bool) -> Tensor:
    """f at the state's iterate, as rows: put into the solver's ring by f itself if it can do that."""
    z = layout.lasting(state.x)
    landing = solver.landing(state, step) if hasattr(f, "write") else None
    if landing is None:
        return layout.rows(evaluate(f, z, debug))
    out = layout.lasting(landing)

    def written(z: Tensor) -> Tensor:
        f.write(z, out)
        return out

    evaluate(written, z, debug)
    return landing


def refuse_traced(**options: Any) -> None:
    """Raise where an option asks for something between two steps that a tracer cannot see."""
    for name, given in options.items():
        if given is not None and given is not False:
            raise ValueError(
                f"{name}={given!r} needs the host between two steps, and torch.compile, torch.export and "
                "torch.func take all of them at once: leave it out there"
            )


def finish(
    value: Tensor,
    record: Record,
    nfe: int,
    traced: list[Tensor] | None,
    throw: bool,
    path: str = "steps",
) -> Solution:
    """The solution that a record tells of."""
    at = value.device
    solution = Solution(
        value=value,
        residual=record.best.to(at, copy=True),
        steps=record.steps.to(at, torch.int32),
        status=record.status.to(at, torch.int8),
        nfe=nfe,
        path=path,
        trace=None if traced is None else torch.stack(traced).to(at),
    )
    return thrown(solution, throw)


def thrown(solution: Solution, throw: bool) -> Solution:
    if throw and not solution.converged.all():
        raise NotConverged(solution)
    return solution


def check_solver(name: str, solver: Any) -> Solver:
    if isinstance(solver, type) or not (hasattr(solver, "start") and hasattr(solver, "step")):
        raise TypeError(f"{name}={solver!r} is not a solver: pass an instance such as td.Anderson(history=6)")
    return solver
