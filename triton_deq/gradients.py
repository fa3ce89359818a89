"""How a fixed point is differentiated, and `fixed_point`, the differentiable solve.

A gradient is a frozen record with one method, `fixed_point(f, z0, solver, backend, **options)`, which
returns the value with its graph, and the solution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import backend as backends
from .checks import as_state, check_count, check_number, check_state
from .implicit import ImplicitGradient
from .solvers import Anderson, Solution, Solver, solve
from .solvers.loop import check_solver
from .solvers.packing import Map, State, packed, unpacked_errors
from .solvers.unrolled import unrolled_solve

Function = Callable[[Tensor], Tensor]


class Gradient(Protocol):
    """What `fixed_point` asks of a gradient."""

    def fixed_point(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]: ...


@dataclass(frozen=True)
class PhantomGradient:
    """Backpropagation through `steps` damped steps of f from the fixed point; cheap and inexact.

    `z ← (1 − β) z + β f(z)`, steps times, the fixed point itself taken as a constant (Geng et al., "On
    Training Implicit Models", arXiv 2111.05177). One undamped step is Jacobian-free backpropagation
    (Fung et al., arXiv 2103.12803). The value returned is the last of these steps.

    Attributes:
        steps: k ≥ 1, evaluations of f with a graph.
        mixing: β in (0, 1], the weight of f(z).
    """

    steps: int = 1
    mixing: float = 1.0

    def __post_init__(self):
        check_count("steps", self.steps)
        check_number("mixing", self.mixing, 0, 1, open_low=True)

    def fixed_point(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]:
        solution = solve(f, z0, solver, backend=backend, **options)
        z = solution.value
        for _ in range(self.steps):
            value = as_state(f(z), z)
            z = torch.lerp(z, value, self.mixing) if self.mixing < 1 else value
        return z, solution


@dataclass(frozen=True)
class UnrolledGradient:
    """Backpropagation through every step of the solver, z0 included: exact for the steps taken.

    Memory grows with the steps. It runs on PyTorch operators whatever the backend.
    """

    def fixed_point(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]:
        return unrolled_solve(f, z0, solver, **options)


def fixed_point(
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
    graph: Any = False,
    gradient: Gradient | None = None,
    backend: str = "auto",
    return_solution: bool = False,
) -> Any:
    """The fixed point `z = f(z)` of each sample, differentiable in whatever f closes over.

    With gradients disabled this is `solve(...).value`. With them, f is evaluated once more than
    `Solution.nfe` says (`PhantomGradient`: `steps` times more), to record its graph.

    Args:
        f, z0, solver, tol, max_steps, residual, norm_over, throw, trace: as in `solve`.
        check_every, compact, debug, backend: as in `solve`.
        graph: as in `solve`; with True an `ImplicitGradient` solves in a graph as well.
        gradient: `ImplicitGradient()` if not given, `PhantomGradient(...)` or `UnrolledGradient()`.
        return_solution: also return the `Solution`.

    Returns:
        What is like z0, a tensor or several, or that and the `Solution`.

    Raises:
        As `solve`; TypeError for something that is no gradient.
    """
    f, z0, packing = packed("z0", f, z0)
    check_state("z0", z0)
    backends.choose(z0, backend)
    solver = check_solver("solver", Anderson() if solver is None else solver)
    gradient = check_gradient(ImplicitGradient() if gradient is None else gradient)
    options: dict[str, Any] = {
        "tol": tol,
        "max_steps": max_steps,
        "residual": residual,
        "norm_over": norm_over,
        "throw": throw,
        "trace": trace,
        "check_every": check_every,
        "compact": compact,
        "debug": debug,
        "graph": graph,
    }
    with backends.ambient(backend), unpacked_errors(packing, throw):
        if torch.is_grad_enabled():
            value, solution = gradient.fixed_point(f, z0, solver, backend, **options)
        else:
            solution = solve(f, z0, solver, backend=backend, **options)
            value = solution.value
    if packing is not None:
        value, solution = packing.unpack(value), packing.solution(solution)
    return (value, solution) if return_solution else value


def check_gradient(gradient: Any) -> Gradient:
    if isinstance(gradient, type) or not hasattr(gradient, "fixed_point"):
        raise TypeError(
            f"gradient={gradient!r} is not a gradient: pass an instance of td.ImplicitGradient, "
            "td.PhantomGradient or td.UnrolledGradient"
        )
    return gradient
