"""The loop without in-place updates and without the host's decisions: autograd and tracers can follow it.

It serves the unrolled gradient, and `solve` inside torch.compile, torch.export and the transforms of
torch.func. There the host cannot look, so all evaluations are taken; on samples that have stopped they change
nothing, so the answer is the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import as_state, check_state
from ..reference.anderson import LEAST_SQUARE, WEIGHT_LIMIT, anderson_weights
from ..reference.record import DIVERGENCE, accumulate_dtype
from ..status import RUNNING, Status
from .broyden import Broyden
from .layout import Layout, evaluate
from .solution import Solution, empty_solution
from .stopping import Stopping


class Progress(NamedTuple):
    """What is known of each sample, `[B]`; the rows of `Record`, which decides alike on the host."""

    status: Tensor
    residual: Tensor
    best: Tensor
    limit: Tensor
    steps: Tensor

    @classmethod
    def begin(cls, x: Tensor) -> "Progress":
        infinite = x.new_full((x.shape[0],), torch.inf, dtype=torch.float64)
        status = x.new_full((x.shape[0],), int(RUNNING), dtype=torch.int64)
        return cls(status, infinite, infinite, torch.zeros_like(infinite), torch.zeros_like(status))


def judge(
    progress: Progress, residual_sq: Tensor, value_sq: Tensor, stopping: Stopping
) -> tuple[Tensor, Tensor, Progress]:
    """`Record.judge` as tensors: the masks `improved` and `moving`, and what is known now.

    residual_sq, value_sq: `[B]` float64.
    """
    running = progress.status == int(RUNNING)
    counted = running & residual_sq.isfinite() & value_sq.isfinite()
    if stopping.norm_over == "batch":
        residual_sq, value_sq = (
            torch.where(counted, square, 0).sum().expand(counted.shape) for square in (residual_sq, value_sq)
        )
    norm, scale = residual_sq.sqrt(), value_sq.sqrt()
    residual = norm / (scale + (norm == 0)) if stopping.residual == "relative" else norm
    limit = torch.where(progress.limit == 0, DIVERGENCE * (norm + scale), progress.limit)
    tolerance = stopping.tol if stopping.tol > 0 else -1.0

    improved = counted & (residual < progress.best)
    converged = counted & (residual <= tolerance)
    moving = counted & ~converged & (norm <= limit)
    status = torch.where(converged, int(Status.CONVERGED), progress.status)
    status = torch.where(counted & ~converged & ~moving, int(Status.DIVERGED), status)
    status = torch.where(running & ~counted, int(Status.NONFINITE), status)
    return (
        improved,
        moving,
        Progress(
            status,
            torch.where(counted, residual, progress.residual),
            torch.where(improved, residual, progress.best),
            limit,
            progress.steps + running,
        ),
    )


def functional_solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: Any,
    stopping: Stopping,
    *,
    trace: bool,
    looks: bool,
    debug: bool = False,
) -> tuple[Tensor, Solution]:
    """Like `solve`; the value carries the graph of every step. Returns `(value, Solution)`.

    Takes the same iterates as `solve` up to rounding.

    looks: whether the host ends the loop when no sample runs. debug: as in `solve`.

    Raises:
        TypeError: a solver that is not one of the library's.
    """
    check_state("z0", z0)
    mixing = mixing_of(solver)
    if z0.numel() == 0:
        # There is nothing to solve, but the value is still a function of what f closes over.
        value = as_state(f(z0), z0)
        return value, empty_solution(value, trace)
    layout = Layout(z0)
    x = best = layout.rows(z0)
    progress, traced = Progress.begin(x), []
    for step in range(stopping.max_steps):
        fx = layout.rows(evaluate(f, layout.unrows(x), debug))
        improved, moving, progress = judge(progress, squares(fx, x), squares(fx), stopping)
        # Where the host looks and every sample goes on, the graph is spared two choices a step.
        every = looks and bool((improved & moving).all())
        best = x if every else torch.where(improved[:, None], x, best)
        traced.append(progress.residual)
        if step + 1 == stopping.max_steps or (looks and not every and not moving.any()):
            break
        following = mixing.following(x, fx).to(x.dtype)
        x = following if every else torch.where(moving[:, None], following, x)

    if fx.requires_grad and not best.requires_grad:  # no sample is better than at z0: a gradient of zero
        best = torch.where(torch.zeros_like(improved)[:, None], fx.to(best.dtype), best)
    value = layout.unrows(best)
    return value, solution_of(value, progress, step + 1, torch.stack(traced) if trace else None)


def squares(value: Tensor, x: Tensor | None = None) -> Tensor:
    """`‖value − x‖²` of rows, summed in float64, without a graph."""
    value = value.detach().to(accumulate_dtype(value.dtype))
    difference = value if x is None else value - x.detach().to(value.dtype)
    return torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64).square()


def solution_of(
    value: Tensor, progress: Progress, nfe: Any, trace: Tensor | None, path: str = "steps"
) -> Solution:
    return Solution(
        value=value.detach(),
        residual=progress.best,
        steps=progress.steps.to(torch.int32),
        status=progress.status.to(torch.int8),
        nfe=nfe,
        path=path,
        trace=trace,
    )


def mixing_of(solver: Any) -> "_Anderson | _Broyden":
    """What is between two evaluations of f."""
    anderson = getattr(solver, "as_anderson", None)
    if anderson is not None:
        return _Anderson(anderson)
    if isinstance(solver, Broyden):
        return _Broyden(solver.memory)
    raise TypeError(
        f"solver={solver!r} cannot be unrolled or traced: use td.Anderson, td.Broyden or td.Picard"
    )


class _Anderson:
    """The history of rows, the newest last, and how much of it each sample may use.

    As a loop of torch.compile carries it from step to step, it is full from the start, of zeros not in use.
    """

    def __init__(self, solver: Any):
        self._solver = solver
        self._residuals: list[Tensor] = []
        self._iterates: list[Tensor] = []
        self._count: Tensor | None = None

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        history = self._solver.history
        return () if history == 1 else (*_rings(x, history), x.new_zeros(x.shape[0], dtype=torch.int64))

    def take_up(self, *carried: Tensor) -> None:
        if carried:
            *rings, self._count = carried
            self._residuals, self._iterates = (list(ring.unbind(1)) for ring in rings)

    @property
    def carried(self) -> tuple[Tensor, ...]:
        if self._count is None:
            return ()
        return torch.stack(self._residuals, dim=1), torch.stack(self._iterates, dim=1), self._count

    def following(self, x: Tensor, fx: Tensor) -> Tensor:
        solver, wide = self._solver, accumulate_dtype(x.dtype)
        difference = fx.to(wide) - x.to(wide)
        iterate = x.to(wide) + solver.mixing * difference
        if solver.history == 1:
            return iterate
        self._residuals = [*self._residuals, difference][-solver.history :]
        self._iterates = [*self._iterates, iterate][-solver.history :]
        stacked = torch.stack(self._residuals, dim=1)
        gram = torch.bmm(stacked, stacked.mT).double()
        held = len(self._residuals)
        count = x.new_zeros(x.shape[0], dtype=torch.int64) if self._count is None else self._count
        count = (count + 1).clamp(max=held)
        valid = torch.arange(held - 1, -1, -1, device=x.device) < count[:, None]
        relative = solver.ridge_scale == "relative"
        weights, mixed = anderson_weights(gram, valid, held - 1, solver.ridge, relative)
        self._count = torch.where(mixed, count, 1)
        return torch.bmm(weights[:, None].to(wide), torch.stack(self._iterates, dim=1))[:, 0]


class _Broyden:
    """The last pairs, the newest last, and how many of them each sample may use; carried likewise."""

    def __init__(self, memory: int):
        self._memory = memory
        self._moves: list[Tensor] = []
        self._changes: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._count: Tensor | None = None

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        rings = _rings(x, self._memory)
        return *rings, *(ring[:, 0] for ring in rings), x.new_zeros(x.shape[0], dtype=torch.int64)

    def take_up(self, *carried: Tensor) -> None:
        moves, changes, x, fx, self._count = carried
        self._moves, self._changes, self._last = list(moves.unbind(1)), list(changes.unbind(1)), (x, fx)

    @property
    def carried(self) -> tuple[Tensor, ...]:
        assert self._last is not None
        assert self._count is not None
        # They may be what was handed in, and f's value may have any strides.
        last = (each.clone(memory_format=torch.contiguous_format) for each in self._last)
        return torch.stack(self._moves, dim=1), torch.stack(self._changes, dim=1), *last, self._count

    def following(self, x: Tensor, fx: Tensor) -> Tensor:
        wide = accumulate_dtype(x.dtype)
        x, fx = x.to(wide), fx.to(wide)
        last, self._last = self._last, (x, fx)
        if last is None:
            self._count = x.new_ones(x.shape[0], dtype=torch.int64)
            return fx
        self._moves = [*self._moves, x - last[0]][-self._memory :]
        self._changes = [*self._changes, fx - last[1]][-self._memory :]
        moves, changes = torch.stack(self._moves, dim=1), torch.stack(self._changes, dim=1)
        coefficients = self._coefficients(moves, changes, fx - x)
        return fx + torch.bmm(coefficients[:, None].to(wide), changes)[:, 0]

    def _coefficients(self, moves: Tensor, changes: Tensor, g: Tensor) -> Tensor:
        """c `[B, pairs]` float64 of the compact form; see triton_deq/reference/broyden.py."""
        assert self._count is not None
        products = torch.bmm(moves, moves.mT).double()
        squares = products.diagonal(dim1=1, dim2=2)
        held = squares.shape[1]
        age = torch.arange(held, 0, -1, device=g.device)
        used = (age <= self._count[:, None]) & (squares > LEAST_SQUARE)
        scale = torch.where(used, torch.where(used, squares, 1).rsqrt(), 0)
        matrix = products.triu() - torch.bmm(moves, changes.mT).double()
        matrix = torch.where(used[:, :, None] & used[:, None, :], matrix, 0)
        matrix = matrix * scale[:, :, None] * scale[:, None, :] + torch.diag_embed((~used).double())
        right = torch.where(used, torch.bmm(moves, g[:, :, None])[..., 0].double(), 0) * scale
        coefficients = scale * torch.linalg.solve_ex(matrix, right[..., None]).result[..., 0]
        useful = coefficients.abs().sum(1) <= WEIGHT_LIMIT
        self._count = torch.where(useful, (self._count + 1).clamp(max=self._memory), 1)
        return torch.where(useful[:, None], coefficients, 0)


def _rings(x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Zeros for two tensors of each of the last steps."""
    shape, wide = (x.shape[0], slots, x.shape[1]), accumulate_dtype(x.dtype)
    return x.new_zeros(shape, dtype=wide), x.new_zeros(shape, dtype=wide)
