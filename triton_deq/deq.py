"""A deep equilibrium model: a cell, a solver, a gradient and a penalty."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import backend as backends
from .backend import BACKENDS
from .checks import check_choice, check_floating_dtype
from .gradients import Gradient, check_gradient, fixed_point
from .implicit import ImplicitGradient
from .jacobian import JacobianPenalty
from .reference.record import accumulate_dtype
from .solvers import Anderson, Solution, Solver
from .solvers.graph_cache import GraphCache
from .solvers.loop import check_solver
from .solvers.packing import State, packed
from .solvers.stopping import Stopping
from .trees import register


@dataclass(frozen=True)
class DEQOutput:
    """What a DEQ gives.

    Attributes:
        value: the equilibrium, like z0, differentiable in the cell's parameters and in x.
        solution: how the solve went.
        penalty: a scalar to add to the loss; zero without a `JacobianPenalty`, or while not training.
        injection: u, what the cell made of x; None of an exported program.
    """

    value: Tensor
    solution: Solution
    penalty: Tensor
    injection: Any


register(DEQOutput, left_out=("injection",))


@dataclass(frozen=True, eq=False)  # torch.compile hashes what it calls, before it has fields
class Injected:
    """`z ↦ cell(z, u)`: an f with all that its cell can do, and the same for some of the samples."""

    cell: Any
    u: Any
    _evaluated: list[Any] = field(default_factory=list, init=False, repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        return self.cell(z, self.u)

    @property
    def vjp(self) -> Any:
        """`z ↦ (value, ε ↦ εᵀJ)` where the cell knows it, else None."""
        product = getattr(self.cell, "vjp", None)
        return None if product is None or self._hooked else partial(self._linearised, product)

    def _linearised(self, product: Any, z: Tensor) -> Any:
        """The cell's own answer; the same once more where it is asked the same with gradients.

        So the gradient and the penalty share one evaluation at the equilibrium, and one backward pass of it.
        Who asks a third time may have changed the weights meanwhile.
        """
        if backends.transformed() or not torch.is_grad_enabled() or z.requires_grad:
            return product(z, self.u)
        asked = (z.data_ptr(), z._version, z.shape, z.stride(), z.dtype)
        if self._evaluated and self._evaluated[0] == asked:
            answer = self._evaluated[1]
            self._evaluated.clear()
            return answer
        answer = product(z, self.u)
        self._evaluated[:] = (asked, answer, z)  # z stays, and so does its address
        return answer

    @property
    def jacobian_norms(self) -> Any:
        """`(z, seed, probes, distribution) ↦ ‖ε_mᵀ J_b‖²`, or None, where the cell has kernels for it."""
        norms = None if self._hooked else getattr(self.cell, "jacobian_norms", None)
        return None if norms is None else lambda z, *of: norms(z, self.u, *of)

    @property
    def write(self) -> Any:
        """`(z, out)`, which leaves the value in out, where the cell can do that."""
        write = None if self._hooked else getattr(self.cell, "write", None)
        if write is None:
            raise AttributeError("the cell has no write(z, u, out), or a hook that it would pass by")
        return lambda z, out: write(z, self.u, out)

    @property
    def whole_solve(self) -> Any:
        """The cell's offer of a whole solve, if it makes one."""
        offer = None if self._hooked else getattr(self.cell, "whole_solve", None)
        return None if offer is None else partial(self._offered, offer)

    def _offered(self, offer: Any, z0: Tensor, solver: Any, stopping: Any, trace: bool) -> Any:
        return offer(z0, self.u, solver, stopping, trace)

    @property
    def _hooked(self) -> bool:
        """What is hooked onto the cell runs when it is called, and only then."""
        return bool(self.cell._forward_hooks or self.cell._forward_pre_hooks)

    @property
    def module(self) -> nn.Module:
        """Whose parameters and buffers are read; with `inputs` and `given`, what a graph cache asks."""
        return self.cell

    @property
    def inputs(self) -> Any:
        return self.u

    def given(self, inputs: Any) -> "Injected":
        return Injected(self.cell, inputs)

    def select(self, samples: Tensor) -> "Injected":
        return Injected(self.cell, self.cell.select(self.u, samples))


def _check_not_sharded(cell: nn.Module) -> None:
    """FSDP gathers a module's weights for each call of it and drops them after; a solve is many calls."""
    if cell._forward_pre_hooks and any(kind.__name__ == "FSDPModule" for kind in type(cell).__mro__):
        raise TypeError(
            f"cell={type(cell).__name__} is sharded by itself, and its weights would be gone in the backward "
            "solve: call fully_shard on the DEQ or on a module around it, and not on the cell"
        )


class DEQ(nn.Module):
    """`z* = cell(z*, cell.inject(x))` (Bai et al., arXiv 1909.01377).

    Args:
        cell: a module with `inject(x) -> u`, which is computed once, and `forward(z, u) -> z`. It may have
            `initial_state(u) -> z0`; else the solve starts from zeros like u. For `compact` it needs
            `select(u, samples)`, u for those samples of the batch alone. If it has `vjp(z, u)`, which
            returns its value and `ε ↦ εᵀJ`, gradient and penalty use that. `write(z, u, out)` and
            `whole_solve(z0, u, solver, stopping, trace)` are as in `solve`, with u. Where z0 is several
            tensors, these three are not asked.
        solver: `Anderson()` by default.
        tol, max_steps, residual, norm_over, check_every, compact, debug: as in `solve`.
        graph: as in `solve`, but graphs are kept for inputs of the same shapes and dtypes (of the last 8
            kinds of solve), in memory that holds a solver state each. Those of an `ImplicitGradient`'s
            backward solve are kept as well if the cell has `vjp`, which is asked once more for it, within a
            graph. A cell that reads tensors other than z, u, its parameters and buffers is captured anew for
            each solve. Inside torch.compile it is a loop, as in `solve`, of the backward solve too, each step
            of which evaluates f once more.
        gradient: `ImplicitGradient()` by default.
        penalty: a `JacobianPenalty`, taken at the equilibrium while training.
        state_dtype: of the state and the solver's history in both solves; None for z0's. `torch.bfloat16`
            under autocast halves what the solver moves, and rounds little more than f does; tolerances below
            about 1e-2 are then out of reach, also in the backward solve. The cell has to return states of
            it, as those of this library do. The value comes back in z0's dtype.
        backend: "auto", "triton", "reference" or "numba"; see `solve`.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: Solver | None = None,
        *,
        tol: float = 1e-3,
        max_steps: int = 30,
        residual: str = "relative",
        norm_over: str = "sample",
        check_every: int = 1,
        compact: float | None = None,
        debug: bool = False,
        graph: bool = False,
        gradient: Gradient | None = None,
        penalty: JacobianPenalty | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if not callable(getattr(cell, "inject", None)):
            raise TypeError(
                f"cell={type(cell).__name__} has no inject(x): a cell needs inject(x) -> u and "
                "forward(z, u) -> z; for a plain f(z) call td.fixed_point"
            )
        if penalty is not None and not isinstance(penalty, JacobianPenalty):
            raise TypeError(f"penalty={penalty!r} must be a td.JacobianPenalty or None")
        if state_dtype is not None:
            check_floating_dtype("state_dtype", state_dtype)
        check_choice("backend", backend, BACKENDS)
        self.cell = cell
        self.penalty = penalty
        self.solver = check_solver("solver", Anderson() if solver is None else solver)
        self.gradient = check_gradient(ImplicitGradient() if gradient is None else gradient)
        self.stopping = Stopping(tol, max_steps, residual, norm_over, check_every)
        if compact is not None and not callable(getattr(cell, "select", None)):
            raise TypeError(
                f"compact={compact!r} needs a cell with select(u, samples), and {type(cell).__name__} has "
                "none: add it, or leave compact out"
            )
        self.compact = compact
        self.debug = debug
        self.graph = GraphCache() if graph else False
        self.state_dtype = state_dtype
        self.backend = backend

    def forward(self, x: Any, z0: State | None = None) -> DEQOutput:
        """Solve for the equilibrium of x, from z0 or from the cell's initial state."""
        cell: Any = self.cell
        _check_not_sharded(cell)
        return self.from_injection(cell.inject(x), z0)

    def from_injection(self, u: Any, z0: State | None = None) -> DEQOutput:
        """The same from `u = cell.inject(x)`."""
        if z0 is None:
            z0 = self._initial_state(u)
        f, z0, packing = packed("z0", Injected(self.cell, u), z0)
        try:
            value, solution = fixed_point(
                f,
                z0 if self.state_dtype is None else z0.to(self.state_dtype),
                self.solver,
                tol=self.stopping.tol,
                max_steps=self.stopping.max_steps,
                residual=self.stopping.residual,
                norm_over=self.stopping.norm_over,
                check_every=self.stopping.check_every,
                compact=self.compact,
                debug=self.debug,
                graph=self.graph,
                gradient=self.gradient,
                backend=self.backend,
                return_solution=True,
            )
        except (RuntimeError, TypeError) as error:
            if self.state_dtype is not None and "type" in str(error):
                error.add_note(
                    f"state_dtype={self.state_dtype}: the cell has to take and return states of that dtype: "
                    "call the model under torch.autocast, or let the cell convert z and its value"
                )
            raise
        if self.penalty is not None and self.training and torch.is_grad_enabled():
            with backends.ambient(self.backend):
                penalty = self.penalty(f, solution.value, self.backend)
        else:
            penalty = value.new_zeros((), dtype=accumulate_dtype(value.dtype))
        value = value.to(z0.dtype)
        if packing is not None:
            value, solution = packing.unpack(value), packing.solution(solution)
        return DEQOutput(value, solution, penalty, u)

    def _initial_state(self, u: Any) -> State:
        initial_state: Any = getattr(self.cell, "initial_state", None)
        if initial_state is not None:
            return initial_state(u)
        if isinstance(u, Tensor):
            return torch.zeros_like(u)
        raise TypeError(
            f"cell.inject(x) gave {type(u).__name__}, which no z0 can be shaped after: pass z0, or give the "
            "cell initial_state(u) -> z0"
        )

    def extra_repr(self) -> str:
        stop = f"tol={self.stopping.tol}, max_steps={self.stopping.max_steps}"
        state = "" if self.state_dtype is None else f", state_dtype={self.state_dtype}"
        return f"solver={self.solver}, {stop}, gradient={self.gradient}{state}"
