"""A solve that autograd can follow through every step."""

from collections.abc import Callable

from torch import Tensor

from ..backend import transformed
from .debugging import check_map
from .functional import functional_solve
from .loop import Solver, refuse_traced, thrown
from .solution import Solution
from .stopping import Stopping


def unrolled_solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: Solver,
    *,
    tol: float,
    max_steps: int,
    residual: str,
    norm_over: str,
    throw: bool,
    trace: bool,
    check_every: int,
    compact: float | None,
    debug: bool,
    graph: bool,
) -> tuple[Tensor, Solution]:
    """Like `solve`, but the value carries the graph of every step; returns `(value, Solution)`.

    Raises:
        TypeError: a solver that is not one of the library's, besides what `solve` raises.
        ValueError: `compact` or `graph`, likewise.
    """
    for name, given in (("compact", compact), ("graph", graph or None)):
        if given is not None:
            raise ValueError(
                f"{name}={given!r} cannot be unrolled: leave it out, or use td.ImplicitGradient()"
            )
    if transformed():
        refuse_traced(throw=throw, debug=debug)
    stopping = Stopping(tol, max_steps, residual, norm_over, check_every)
    if debug and z0.numel() > 0:
        check_map(f, z0.detach(), norm_over)
    value, solution = functional_solve(
        f, z0, solver, stopping, trace=trace, looks=not transformed(), debug=debug
    )
    return value, thrown(solution, throw)
