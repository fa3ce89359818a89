"""Anderson and Picard written without in-place updates, so that autograd can follow every step."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_state, check_value
from ..reference.anderson import anderson_weights
from ..reference.record import Record, accumulate_dtype
from .anderson import Anderson
from .loop import Layout, Solver, empty_solution, evaluate, finish
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

    Takes the same iterates as `solve` up to rounding.

    Raises:
        TypeError: a solver that is neither Anderson nor Picard, besides what `solve` raises.
        ValueError: `compact` or `graph`, likewise.
    """
    check_state("z0", z0)
    for name, given in (("compact", compact), ("graph", graph or None)):
        if given is not None:
            raise ValueError(
                f"{name}={given!r} cannot be unrolled: leave it out, or use td.ImplicitGradient()"
            )
    anderson = _as_anderson(solver)
    stopping = Stopping(tol, max_steps, residual, norm_over, check_every)
    if z0.numel() == 0:
        value = f(z0)  # nothing to solve, but the value is still a function of what f closes over
        check_value(value, z0)
        return value, empty_solution(z0, trace)

    layout = Layout(z0)
    x = best = layout.rows(z0)
    wide = accumulate_dtype(z0.dtype)
    record = Record(x.shape[0], tol, torch.device("cpu"))
    residuals: list[Tensor] = []
    iterates: list[Tensor] = []
    traced: list[Tensor] = []
    for step in range(max_steps):
        fx = layout.rows(evaluate(f, layout.unrows(x), debug))
        difference = fx.to(wide) - x.to(wide)
        residuals = [*residuals, difference][-anderson.history :]
        iterates = [*iterates, x.to(wide) + anderson.mixing * difference][-anderson.history :]
        stacked = torch.stack(residuals, dim=1)
        gram = torch.bmm(stacked, stacked.mT).double()

        value_sq = torch.linalg.vector_norm(fx.detach().to(wide), dim=1).double().square()
        improved, moving = (
            torch.from_numpy(mask).to(x.device)[:, None]
            for mask in record.judge(
                *torch.stack((gram.detach()[:, -1, -1], value_sq)).cpu().numpy(),
                relative=stopping.residual == "relative",
                over_batch=stopping.norm_over == "batch",
            )
        )
        best = torch.where(improved, x, best)
        if trace:
            traced.append(record.residual.clone())
        if step + 1 == max_steps or not moving.any():
            break

        newest = len(residuals) - 1
        count = (record.count + 1).clamp(max=len(residuals))
        valid = (torch.arange(newest, -1, -1) < count[:, None]).to(x.device)
        weights, mixed = anderson_weights(
            gram, valid, newest, anderson.ridge, anderson.ridge_scale == "relative"
        )
        record.count.copy_(torch.where(mixed.cpu(), count, 1))
        following = torch.bmm(weights[:, None].to(wide), torch.stack(iterates, dim=1))[:, 0]
        x = torch.where(moving, following.to(x.dtype), x)

    value = layout.unrows(best)
    return value, finish(value.detach(), record, step + 1, traced if trace else None, throw)


def _as_anderson(solver: Solver) -> Anderson:
    anderson = getattr(solver, "as_anderson", None)
    if anderson is not None:
        return anderson
    raise TypeError(
        f"solver={solver!r} cannot be unrolled: use td.Anderson or td.Picard, or "
        "gradient=td.ImplicitGradient()"
    )
