"""How a fixed point is differentiated, and `fixed_point`, the differentiable solve.

A gradient is a frozen record with one method, `fixed_point(f, z0, solver, backend, **options)`, which
returns the value with its graph, and the solution.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from . import backend as backends
from .backend import transformed
from .checks import check_choice, check_count, check_number, check_state, check_value
from .jacobian import closed_vjp
from .solvers import Anderson, Broyden, Solution, Solver, solve
from .solvers.functional import functional_solve
from .solvers.graph import captures, on_capture_stream
from .solvers.graph_cache import GraphCache
from .solvers.graph_keys import of_autocast
from .solvers.layout import Layout
from .solvers.loop import check_solver, solve_and_keep
from .solvers.stopping import Stopping
from .solvers.unrolled import unrolled_solve

Function = Callable[[Tensor], Tensor]


class Gradient(Protocol):
    """What `fixed_point` asks of a gradient."""

    def fixed_point(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]: ...


@dataclass(frozen=True)
class ImplicitGradient:
    """The exact gradient by the implicit function theorem, in memory that does not grow with the steps.

    `dℓ/dθ = uᵀ ∂f/∂θ` at the fixed point, where `uᵀ = uᵀJ + ∂ℓ/∂z*` is itself a fixed point of one
    vector-Jacobian product (Bai et al., arXiv 1909.01377, theorem 1). The solve for u starts at ∂ℓ/∂z*
    and its residual is relative, so the scale of the loss does not matter. z0 gets no gradient.
    `Solution.backward` tells how that solve went.

    Attributes:
        solver: for u; `Anderson()` by default.
        tol: relative residual at which u has converged.
        max_steps: the most vector-Jacobian products.
        throw: raise `NotConverged` in the backward pass where u did not reach the tolerance.
        warm_start: start at the u of the last backward pass of this record, if that had the same shape, dtype
            and device: for batches that repeat. Give each DEQ a record of its own.
        shine: with a `Broyden` forward, use its estimate of the inverse Jacobian as SHINE does (Ramzi et al.,
            arXiv 2106.00553): "start" begins the solve for u there; "alone" takes it for u, without any
            vector-Jacobian product and without a `Solution.backward`: cheap, and as good as the estimate is.
            Until the backward pass the pairs of the forward solve stay in memory.

    Raises:
        TypeError, ValueError: a field that cannot be; `shine` with a forward solver other than Broyden.
        RuntimeError: where the gradient itself is differentiated, or a derivative in forward mode asked for.
    """

    solver: Solver = field(default_factory=Anderson)
    tol: float = 1e-4
    max_steps: int = 30
    throw: bool = False
    warm_start: bool = False
    shine: str | None = None
    _last: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        check_solver("solver", self.solver)
        Stopping(self.tol, self.max_steps)
        if self.shine is not None:
            check_choice("shine", self.shine, ("start", "alone"))
            if self.warm_start:
                raise ValueError(
                    f"shine={self.shine!r} and warm_start=True both say where u starts: give one"
                )

    def fixed_point(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]:
        if self.shine is not None and not isinstance(solver, Broyden):
            raise TypeError(
                f"shine={self.shine!r} reuses the inverse Jacobian of td.Broyden, and solver={solver!r} "
                "keeps none: give solver=td.Broyden() or leave shine out"
            )
        if self.shine is not None and options["compact"] is not None:
            raise ValueError(
                f"shine={self.shine!r} needs the pairs of all samples, and compact={options['compact']!r} "
                "drops those of finished ones: give one of the two"
            )
        if transformed():
            return self._traced(f, z0, solver, backend, **options)
        # An f that writes into the ring would do so for stopped samples too, whose pairs SHINE needs.
        copied = f if self.shine is None else lambda z: f(z)
        solution, state = solve_and_keep(copied, z0, solver, backend=backend, **options)
        closed = closed_vjp(f)
        at = solution.value.detach().requires_grad_(closed is None)
        graph = options["graph"]
        with on_capture_stream(at.device, bool(graph)):
            value, pullback = (f(at), None) if closed is None else closed(at)
        check_value(value, at)
        estimate = None
        if isinstance(solver, Broyden) and self.shine is not None and state is not None:
            estimate = _Estimate(solver, state, Layout(at))
        again = None
        if closed is not None and isinstance(graph, GraphCache) and captures(at.device):
            again = _AdjointMap(f, at, of_autocast(at.device))
        adjoint = _Adjoint(self, solution, backend, graph, estimate, pullback, again)
        return _ImplicitFunction.apply(value, at, adjoint), solution

    def _traced(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]:
        """The same where torch.compile, torch.export or torch.func look on."""
        if self.shine is not None or self.warm_start or self.throw:
            raise ValueError(
                "shine, warm_start and throw of an ImplicitGradient need the host after the solve, and "
                "torch.compile, torch.export and torch.func take all at once: leave them out there"
            )
        solution = solve(f, z0, solver, backend=backend, **options)
        at = solution.value.detach()
        value = f(at)
        check_value(value, at)
        function = _TracedImplicitFunction if torch.compiler.is_compiling() else _TransformedImplicitFunction
        return function.apply(value, at, f, self), solution


@dataclass(frozen=True)
class _Estimate:
    """`u ≈ g (I − J)⁻¹` from what a Broyden solve has left behind."""

    solver: Broyden
    state: Any
    layout: Layout

    def __call__(self, grad: Tensor) -> Tensor:
        return self.layout.unrows(self.solver.adjoint(self.state, self.layout.rows(grad)))


@dataclass(frozen=True)
class _Adjoint:
    """The linear system `uᵀ = uᵀJ + gᵀ` of one backward pass."""

    gradient: ImplicitGradient
    forward: Solution
    backend: str
    graph: bool | GraphCache
    estimate: _Estimate | None
    pullback: Function | None
    again: "_AdjointMap | None"

    def solve(self, product: Function, grad: Tensor) -> Tensor:
        """u, given `product(u) = uᵀJ`; reports to the forward's `Solution.backward`."""
        gradient = self.gradient
        if gradient.shine == "alone" and self.estimate is not None:
            return self.estimate(grad)
        mapped = _plus(product, grad)
        if self.again is not None:
            mapped = self.again.like(mapped, grad)
        solution = solve(
            mapped,
            self._start(grad),
            gradient.solver,
            tol=gradient.tol,
            max_steps=gradient.max_steps,
            throw=gradient.throw,
            graph=self._graph(grad, mapped),
            backend=self.backend,
        )
        object.__setattr__(self.forward, "backward", solution)
        if gradient.warm_start:
            gradient._last["u"] = solution.value
        return solution.value

    def _graph(self, grad: Tensor, mapped: Any) -> Any:
        """The forward's graphs where they can be used again, or one for this solve."""
        if not captures(grad.device):
            return False
        return self.graph if isinstance(mapped, _AdjointMap) else bool(self.graph)

    def _start(self, grad: Tensor) -> Tensor:
        if self.estimate is not None:
            return self.estimate(grad)
        last = self.gradient._last.get("u")
        alike = last is not None and (last.shape, last.dtype, last.device) == (
            grad.shape,
            grad.dtype,
            grad.device,
        )
        return last if last is not None and alike else grad


@dataclass(eq=False)
class _AdjointMap:
    """`x ↦ xJ(z) + g` as a graph cache takes it, of a cell that knows J in closed form.

    In each backward pass what the product reads lies elsewhere: so f is evaluated at z once more, without
    gradients and in a graph, which leaves it in one place. Autocast is as it was in the forward pass.
    """

    f: Any
    z: Tensor
    autocast: tuple[Any, ...]
    shift: Tensor | None = None
    whole_solve: Any = None
    _map: Any = None

    def like(self, mapped: Any, shift: Tensor) -> "_AdjointMap":
        """With the offer that the map itself makes."""
        return replace(self, shift=shift, whole_solve=getattr(mapped, "whole_solve", None))

    @property
    def module(self) -> Any:
        return self.f.module

    @property
    def inputs(self) -> Any:
        return self.f.inputs, self.z, self.shift, *self.autocast

    def given(self, inputs: Any) -> "_AdjointMap":
        u, z, shift, *autocast = inputs
        return _AdjointMap(self.f.given(u), z, tuple(autocast), shift)

    def prepare(self) -> None:
        enabled, dtype = self.autocast
        closed: Any = closed_vjp(self.f)
        with torch.no_grad(), torch.autocast(self.z.device.type, dtype, enabled):
            self._map = _plus(closed(self.z)[1], self.shift)

    def __call__(self, x: Tensor) -> Tensor:
        return self._map(x)

    @property
    def write(self) -> Any:
        return self._map.write


def _plus(product: Any, shift: Any) -> Any:
    """`x ↦ xJ + g`. A closed form may know it whole: then it writes into the ring, or solves by itself."""
    whole = getattr(product, "plus", None)
    return (lambda x: product(x) + shift) if whole is None else whole(shift)


class _ImplicitFunction(torch.autograd.Function):
    """Forward: the fixed point `at`, as if it were `value = f(at)`. Backward: hand u to value's graph."""

    @staticmethod
    def forward(ctx, value: Tensor, at: Tensor, adjoint: _Adjoint) -> Tensor:
        ctx.value, ctx.at, ctx.adjoint = value, at, adjoint
        return at.detach().clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        def by_autograd(u: Tensor) -> Tensor:
            (result,) = torch.autograd.grad(ctx.value, ctx.at, u, retain_graph=True, materialize_grads=True)
            return result

        u = ctx.adjoint.solve(ctx.adjoint.pullback or by_autograd, grad)
        if torch.is_grad_enabled():  # asked for with create_graph=True
            u = _RefuseSecond.apply(u, ctx.value, grad)
        return u, None, None


class _TracedImplicitFunction(torch.autograd.Function):
    """The same, with the product written out by torch.func, which tracers can follow.

    A compiled function has no second derivatives that would have to be refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, at: Tensor, f: Function, gradient: ImplicitGradient) -> Tensor:
        return at.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, at, ctx.f, ctx.gradient = inputs
        ctx.save_for_backward(at)

    @staticmethod
    def backward(ctx, grad: Tensor):
        at = ctx.saved_tensors[0]
        pullback = torch.func.vjp(ctx.f, at)[1]
        gradient = ctx.gradient
        stopping = Stopping(gradient.tol, gradient.max_steps)
        u, _ = functional_solve(
            lambda u: pullback(u)[0] + grad, grad, gradient.solver, stopping, trace=False, looks=False
        )
        return u, None, None, None


class _TransformedImplicitFunction(_TracedImplicitFunction):
    """The same for the transforms of torch.func, which may ask for more than there is."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        value, at, ctx.f, ctx.gradient = inputs
        ctx.save_for_backward(at, value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, *rest = _TracedImplicitFunction.backward(ctx, grad)
        return _RefuseSecond.apply(u, ctx.saved_tensors[1], grad), *rest

    @staticmethod
    def jvp(ctx, *tangents: Any):
        raise RuntimeError(
            "an ImplicitGradient has no forward-mode derivative: take reverse mode, as torch.func.jacrev and "
            "torch.func.vjp do, or gradient=td.UnrolledGradient()"
        )


class _RefuseSecond(torch.autograd.Function):
    """u as it is, whose derivative is an error: it depends on all that f(z) and the gradient depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "an ImplicitGradient cannot be differentiated a second time: use "
            "gradient=td.UnrolledGradient(), or detach the first gradient"
        )

    @staticmethod
    def jvp(ctx, *tangents: Any):
        return _RefuseSecond.backward(ctx, tangents[0])


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
            z = torch.lerp(z, f(z), self.mixing) if self.mixing < 1 else f(z)
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
    f: Function,
    z0: Tensor,
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
        A tensor like z0, or `(tensor, Solution)`.

    Raises:
        As `solve`; TypeError for something that is no gradient.
    """
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
    with backends.ambient(backend):
        if torch.is_grad_enabled():
            value, solution = gradient.fixed_point(f, z0, solver, backend, **options)
        else:
            solution = solve(f, z0, solver, backend=backend, **options)
            value = solution.value
    return (value, solution) if return_solution else value


def check_gradient(gradient: Any) -> Gradient:
    if isinstance(gradient, type) or not hasattr(gradient, "fixed_point"):
        raise TypeError(
            f"gradient={gradient!r} is not a gradient: pass an instance of td.ImplicitGradient, "
            "td.PhantomGradient or td.UnrolledGradient"
        )
    return gradient
