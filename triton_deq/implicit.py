"""The implicit gradient: a second solve, of vector-Jacobian products, in place of the solver's steps."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

from .backend import pushed_forward, transformed
from .checks import as_state, check_choice
from .jacobian import closed_vjp
from .precision import autocast_dtype, autocast_to, from_units, in_units
from .reference.record import accumulate_dtype
from .solvers import Anderson, Broyden, Solution, Solver, solve
from .solvers.functional import functional_solve
from .solvers.graph import captures, on_capture_stream
from .solvers.graph_cache import GraphCache
from .solvers.layout import Layout
from .solvers.loop import check_solver, solve_and_keep, thrown
from .solvers.stopping import Stopping
from .solvers.while_loop import check_donation, looped_solve, loops

Function = Callable[[Tensor], Tensor]

SHINE_GROWTH = 4.0
"""How many times as long as ∂ℓ/∂z* a u of SHINE's may be. Where a forward solve ends short of a fixed point,
its estimate of the inverse is worst, and largest. The exact u of a random J is so long at a spectral radius
of 0.97.
"""


@dataclass(frozen=True)
class ImplicitGradient:
    """The exact gradient by the implicit function theorem, in memory that does not grow with the steps.

    `dℓ/dθ = uᵀ ∂f/∂θ` at the fixed point, where `uᵀ = uᵀJ + ∂ℓ/∂z*` is itself a fixed point of one
    vector-Jacobian product (Bai et al., arXiv 1909.01377, theorem 1). The solve for u starts at ∂ℓ/∂z*
    and its residual is relative, so the scale of the loss does not matter; where u does not fit float16 it is
    infinite, as `torch.amp.GradScaler` expects. z0 gets no gradient; where all
    that f closes over is frozen, z* requires none and there is no backward solve.
    `Solution.backward` tells how that solve went.

    Attributes:
        solver: for u; by default `Anderson(ridge=1e-2)`. Where z is not quite a fixed point yet, I − J may be
            close to singular, and the u of that J many times the gradient that is sought; so much ridge holds
            back the directions that it would grow in, and costs no products where J contracts well. For exact
            gradients at fixed points where the spectral radius of J is itself near 1, give `Anderson()`.
        tol: relative residual at which u has converged.
        max_steps: the most vector-Jacobian products.
        throw: raise `NotConverged` in the backward pass where u did not reach the tolerance.
        warm_start: start at the u of the last backward pass of this record, if that had the same shape, dtype
            and device: for batches that repeat. Give each DEQ a record of its own.
        shine: with a `Broyden` forward, use its estimate of the inverse Jacobian as SHINE does (Ramzi et al.,
            arXiv 2106.00553): "start" begins the solve for u there; "alone" takes it for u, without any
            vector-Jacobian product and without a `Solution.backward`: cheap, and as good as the estimate is.
            A sample whose u would be more than four times as long as ∂ℓ/∂z* takes that instead, as
            Jacobian-free backpropagation does. Until the backward pass the pairs of the forward solve stay in
            memory.
        double_backward: let the gradient be differentiated once more, as a loss on forces or a gradient
            penalty does (`create_graph=True`; f then needs second derivatives). f is evaluated with a graph
            twice instead of once, and a second derivative takes two more linear solves, of Jᵀ and of J.
            `Solution.backward` tells of the last one.

    Raises:
        TypeError, ValueError: a field that cannot be; `shine` with a forward solver other than Broyden.
        RuntimeError: where the gradient is differentiated without `double_backward`, or twice; where a
            derivative in forward mode is asked for around one in reverse mode, as by `torch.func.hessian`.
    """

    solver: Solver = field(default_factory=lambda: Anderson(ridge=1e-2))  # torch.compile calls no class here
    tol: float = 1e-4
    max_steps: int = 30
    throw: bool = False
    warm_start: bool = False
    shine: str | None = None
    double_backward: bool = False
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
        if self.double_backward and self.shine == "alone":
            raise ValueError(
                "double_backward=True differentiates the solve for u, and shine='alone' makes none: "
                "give shine='start', or leave one of the two out"
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
            value, product = (f(at), None) if closed is None else closed(at)
            value = as_state(value, at)
        if not _has_leaves_beside(at, value):
            return solution.value, solution  # nothing to hand a gradient to
        autocast = autocast_dtype(at.device)
        estimate = None
        if isinstance(solver, Broyden) and self.shine is not None and state is not None:
            estimate = _Estimate(solver, state, Layout(at))
        again = None
        if closed is not None and isinstance(graph, GraphCache) and captures(at.device):
            again = _AdjointMap(f, at, autocast)
        product = _engine_product(value, at) if product is None else product
        adjoint = _Adjoint(self, solution, backend, graph, estimate, again, autocast)
        z = _ImplicitFunction.apply(value, at, product, adjoint)
        if not self.double_backward:
            return z, solution
        # What f gives back is summed at a node of its own, before it meets what is taken away.
        at = z.view_as(z)
        with on_capture_stream(at.device, bool(graph)):
            value = as_state(f(at), at)
        return _DoubleImplicitFunction.apply(value, z, _engine_product(value, at), adjoint), solution

    def _traced(
        self, f: Function, z0: Tensor, solver: Solver, backend: str, **options: Any
    ) -> tuple[Tensor, Solution]:
        """The same where torch.compile, torch.export or torch.func look on."""
        if self.shine is not None or self.warm_start or self.throw:
            raise ValueError(
                "shine, warm_start and throw of an ImplicitGradient need the host after the solve, and "
                "torch.compile, torch.export and torch.func take all at once: leave them out there"
            )
        if self.double_backward:
            raise ValueError(
                "double_backward=True of an ImplicitGradient is for torch.autograd: with torch.compile, "
                "torch.export and torch.func use gradient=td.UnrolledGradient() for second derivatives"
            )
        solution = solve(f, z0, solver, backend=backend, **options)
        at = solution.value.detach()
        function = lambda z: as_state(f(z), z)  # noqa: E731
        value = function(at)
        autocast = autocast_dtype(at.device)
        if torch.compiler.is_compiling():
            looped = loops(options["graph"])
            if looped and value.requires_grad:
                check_donation()
            layout = Layout(at) if looped else None
            return _TracedImplicitFunction.apply(value, at, function, self, layout, autocast), solution
        if pushed_forward():
            value, tangent = forward_ad.unpack_dual(value)
            if tangent is not None:
                return self._pushed(function, at, value, tangent), solution
        return _TransformedImplicitFunction.apply(value, at, function, self, None, autocast), solution

    def _pushed(self, f: Function, at: Tensor, value: Tensor, tangent: Tensor) -> Tensor:
        """z* with its tangent `ż = J ż + (∂f/∂θ) θ̇`, of which the last term is that of f(z*)."""
        pullback = torch.func.vjp(f, at)[1]
        # J from Jᵀ, because forward mode nests in torch.func alone.
        product = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(at))[1]
        z_tangent, _ = functional_solve(
            lambda x: forward_ad.unpack_dual(product(x)[0]).primal + tangent,
            tangent,
            self.solver,
            Stopping(self.tol, self.max_steps),
            trace=False,
            looks=False,
        )
        at, z_tangent = (_RefuseDerivative.apply(each, value, tangent, False) for each in (at, z_tangent))
        return forward_ad.make_dual(at, z_tangent)


@dataclass(frozen=True)
class _Estimate:
    """`u ≈ g (I − J)⁻¹` from what a Broyden solve has left behind, or g where that is much longer."""

    solver: Broyden
    state: Any
    layout: Layout

    def __call__(self, grad: Tensor) -> Tensor:
        g = self.layout.rows(grad)
        u = self.solver.adjoint(self.state, g)
        # In float64, since the square of a small gradient may be 0 in float32.
        length, given = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in (u, g))
        fits = length <= SHINE_GROWTH * given  # false for NaN
        return self.layout.unrows(torch.where(fits[:, None], u, g))


@dataclass(frozen=True)
class _Adjoint:
    """The linear system `uᵀ = uᵀJ + gᵀ` of one backward pass.

    autocast: its dtype in the forward pass.
    """

    gradient: ImplicitGradient
    forward: Solution
    backend: str
    graph: bool | GraphCache
    estimate: _Estimate | None
    again: "_AdjointMap | None"
    autocast: torch.dtype | None
    taken: list[Tensor] = field(default_factory=list)

    def solve(self, product: Function, grad: Tensor) -> Tensor:
        """u, given `product(u) = uᵀJ`; reports to the forward's `Solution.backward`."""
        gradient = self.gradient
        grad, unit = in_units(grad, self.autocast)
        if gradient.shine == "alone" and self.estimate is not None:
            return from_units(self.estimate(grad), unit)
        mapped = _plus(product, grad)
        if self.again is not None:
            mapped = self.again.like(mapped, grad)
        solution = solve(
            mapped,
            self._start(grad, unit),
            gradient.solver,
            tol=gradient.tol,
            max_steps=gradient.max_steps,
            graph=self._graph(grad, mapped),
            backend=self.backend,
        )
        return self._report(solution, solution.value, unit)

    def solve_with_graph(self, product: Function, grad: Tensor) -> Tensor:
        """u as a function of all that the system is made of: itself a fixed point."""
        gradient = replace(self.gradient, double_backward=False, warm_start=False, shine=None)
        grad, unit = in_units(grad, self.autocast)
        u, solution = gradient.fixed_point(
            lambda x: product(x) + grad,
            self._start(grad.detach(), unit),
            gradient.solver,
            self.backend,
            tol=gradient.tol,
            max_steps=gradient.max_steps,
            throw=False,
            trace=False,
            debug=False,
            graph=False,
            compact=None,
        )
        return self._report(solution, u, unit)

    def _report(self, solution: Solution, u: Tensor, unit: Tensor | None) -> Tensor:
        """u for a loss of any scale, of which the forward's `Solution.backward` tells."""
        u = from_units(u, unit)
        object.__setattr__(solution, "value", u.detach())
        object.__setattr__(self.forward, "backward", solution)
        thrown(solution, self.gradient.throw)
        if self.gradient.warm_start:
            self.gradient._last["u"] = u.detach()
        return u

    def is_rounding(self, grad: Tensor) -> bool:
        """Whether `grad` is what rounding has left where all was taken away again."""
        if not self.taken:
            return False
        wide = accumulate_dtype(grad.dtype)
        left, taken = (
            torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=wide) for rows in (grad, self.taken.pop())
        )
        # A sample that is not finite says nothing: its u, which has been handed on already, is not either.
        return not bool((left > 4 * torch.finfo(grad.dtype).eps * taken).any())

    def _graph(self, grad: Tensor, mapped: Any) -> Any:
        """The forward's graphs where they can be used again, or one for this solve."""
        if not captures(grad.device):
            return False
        return self.graph if isinstance(mapped, _AdjointMap) else bool(self.graph)

    def _start(self, grad: Tensor, unit: Tensor | None) -> Tensor:
        if self.estimate is not None:
            return self.estimate(grad)
        last = self.gradient._last.get("u")
        if last is None or (last.shape, last.dtype, last.device) != (grad.shape, grad.dtype, grad.device):
            return grad
        last = last if unit is None else last / unit
        # Where g is 0 so is u, but no iterate on its way there is near by the relative residual: begin there.
        # Where g is not finite u must not be either, so there, too; nor does a solve begin at what is not.
        given, finite = grad != 0, grad.isfinite() & last.isfinite()
        taken = (given.flatten(1).any(dim=1) & finite.flatten(1).all(dim=1)).view(-1, *(1,) * (grad.ndim - 1))
        return torch.where(taken, last, grad)


@dataclass(eq=False)
class _AdjointMap:
    """`x ↦ xJ(z) + g` as a graph cache takes it, of a cell that knows J in closed form.

    In each backward pass what the product reads lies elsewhere: so f is evaluated at z once more, without
    gradients and in a graph, which leaves it in one place. Autocast is as it was in the forward pass.
    """

    f: Any
    z: Tensor
    autocast: torch.dtype | None
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
        return self.f.inputs, self.z, self.shift, self.autocast

    def given(self, inputs: Any) -> "_AdjointMap":
        u, z, shift, autocast = inputs
        return _AdjointMap(self.f.given(u), z, autocast, shift)

    def prepare(self) -> None:
        closed: Any = closed_vjp(self.f)
        with torch.no_grad(), autocast_to(self.autocast, self.z.device):
            self._map = _plus(closed(self.z)[1], self.shift)

    def __call__(self, x: Tensor) -> Tensor:
        return self._map(x)

    @property
    def write(self) -> Any:
        return self._map.write


def _has_leaves_beside(at: Tensor, value: Tensor) -> bool:
    """Whether a gradient of `value = f(at)` may reach any tensor but `at`; mostly known after a few nodes."""
    nodes: list[Any] = [value.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of a node that has nothing before it
        # A function written in Python may hand gradients to what it does not name as an input.
        if isinstance(node, BackwardCFunction) or (leaf is not None and leaf is not at):
            return True
        nodes.extend(before for before, _ in node.next_functions)
    return False


def _plus(product: Any, shift: Any) -> Any:
    """`x ↦ xJ + g`. A closed form may know it whole: then it writes into the ring, or solves by itself."""
    whole = getattr(product, "plus", None)
    return (lambda x: product(x) + shift) if whole is None else whole(shift)


def _engine_product(value: Tensor, at: Tensor) -> Function:
    """`u ↦ uᵀJ` from the graph of `value = f(at)`, differentiable where gradients are enabled."""

    def product(u: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(
            value, at, u, retain_graph=True, create_graph=torch.is_grad_enabled(), materialize_grads=True
        )
        return result

    return product


class _ImplicitFunction(torch.autograd.Function):
    """Forward: the fixed point `at`, as if it were `value = f(at)`. Backward: hand u to value's graph."""

    @staticmethod
    def forward(ctx, value: Tensor, at: Tensor, product: Function, adjoint: _Adjoint) -> Tensor:
        # The value itself, with its graph: where u's derivative is refused, it leads to all u depends on.
        ctx.value, ctx.product, ctx.adjoint = value, product, adjoint
        return at.detach().clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.adjoint.is_rounding(grad):
            return None, None, None, None
        u = ctx.adjoint.solve(ctx.product, grad)
        if torch.is_grad_enabled():  # asked for with create_graph=True
            u = _RefuseDerivative.apply(u, ctx.value, grad, ctx.adjoint.gradient.double_backward)
        return u, None, None, None


class _DoubleImplicitFunction(torch.autograd.Function):
    """The fixed point z of an `_ImplicitFunction` as it is, with a gradient that can be differentiated.

    `value = f(z)` has a graph that leads on to z. So the u that goes into it comes out at z as uᵀJ, which the
    implicit function theorem has no place for and which is taken away here. Nothing is left of it there, and
    no solve is made, until u ∂f/∂θ itself is differentiated: what that gives for z is solved for as usual.
    """

    @staticmethod
    def forward(ctx, value: Tensor, z: Tensor, product: Function, adjoint: _Adjoint) -> Tensor:
        ctx.product, ctx.adjoint = product, adjoint
        return z.detach().clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        adjoint = ctx.adjoint
        solve_for_u = adjoint.solve_with_graph if torch.is_grad_enabled() else adjoint.solve
        u = solve_for_u(ctx.product, grad)
        with torch.no_grad():
            taken = ctx.product(u)
        adjoint.taken[:] = [taken]
        return u, -taken, None, None


class _TracedImplicitFunction(torch.autograd.Function):
    """The same, with the product written out by torch.func, which tracers can follow.

    A compiled function has no second derivatives that would have to be refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor,
        at: Tensor,
        f: Function,
        gradient: ImplicitGradient,
        layout: Layout | None,
        autocast: torch.dtype | None,
    ) -> Tensor:
        return at.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, at, ctx.f, ctx.gradient, ctx.layout, ctx.autocast = inputs
        ctx.save_for_backward(at)

    @staticmethod
    def backward(ctx, grad: Tensor):
        at = ctx.saved_tensors[0]
        f, gradient = ctx.f, ctx.gradient
        stopping = Stopping(gradient.tol, gradient.max_steps)
        grad, unit = in_units(grad, ctx.autocast)

        def f_as_it_was(z: Tensor) -> Tensor:
            with autocast_to(ctx.autocast, z.device):
                return f(z)

        if ctx.layout is not None:
            # A loop cannot take up a product that was begun outside of it: f is evaluated in each step.
            product = lambda u: torch.func.vjp(f_as_it_was, at)[1](u)[0] + grad  # noqa: E731
            u = looped_solve(product, grad, gradient.solver, stopping, trace=False, layout=ctx.layout).value
        else:
            pullback = torch.func.vjp(f_as_it_was, at)[1]
            u, _ = functional_solve(
                lambda u: pullback(u)[0] + grad, grad, gradient.solver, stopping, trace=False, looks=False
            )
        return from_units(u, unit), None, None, None, None, None


class _TransformedImplicitFunction(_TracedImplicitFunction):
    """The same for the transforms of torch.func, which may ask for more than there is."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        value, at, ctx.f, ctx.gradient, ctx.layout, ctx.autocast = inputs
        ctx.save_for_backward(at, value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, *rest = _TracedImplicitFunction.backward(ctx, grad)
        return _RefuseDerivative.apply(u, ctx.saved_tensors[1], grad, False), *rest

    @staticmethod
    def jvp(ctx, *tangents: Any):
        raise RuntimeError(
            "forward mode around reverse mode, as in torch.func.hessian, is a second derivative of an "
            "ImplicitGradient: use torch.autograd.functional.hessian and double_backward=True, or "
            "gradient=td.UnrolledGradient()"
        )


class _RefuseDerivative(torch.autograd.Function):
    """u as it is, whose derivative is an error: it depends on all that f(z) and the gradient depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, value: Tensor, grad: Tensor, twice: bool) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.twice = inputs[-1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "an ImplicitGradient cannot be differentiated a third time: use gradient=td.UnrolledGradient()"
            if ctx.twice
            else "an ImplicitGradient cannot be differentiated a second time: give it double_backward=True, "
            "use gradient=td.UnrolledGradient(), or detach the first gradient"
        )

    @staticmethod
    def jvp(ctx, *tangents: Any):
        return _RefuseDerivative.backward(ctx, tangents[0])
