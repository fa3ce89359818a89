"""TorchDEQ's three solvers."""

from typing import Any

import torch
from torch import Tensor

from ...backend import choose
from ...checks import check_count, check_number
from ...weight_caches import as_solve
from ..iteration import (
    AndersonIteration,
    BoundedBroydenIteration,
    BroydenIteration,
    Function,
    Iteration,
    PicardIteration,
)
from ..options import refuse_unknown
from .judging import Answer, Watch


@as_solve
def anderson_solver(
    func: Function,
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: list[int] | None = None,
    m: int = 6,
    lam: float = 1e-4,
    tau: float = 1.0,
    return_final: bool = False,
    *,
    strict: bool = True,
    backend: str = "auto",
    **unknown: Any,
) -> Answer:
    """Anderson mixing with TorchDEQ's options: `x⁺ = Σ α_i (τ f(x_i) + (1 − τ) x_i)`.

    `α = argmin ‖Σ α_i (f(x_i) − x_i)‖² + lam ‖α‖²`, `Σ α_i = 1` (Walker & Ni, SIAM J. Numer. Anal. 49 (2011),
    eq. 2.2). The first two evaluations are plain steps.

    Args:
        func: from a state to a state.
        x0: `[B, ...]` or `[B]`, real floating; a scalar is a batch of one.
        max_iter: the most evaluations of func.
        tol: the solve ends when every sample's residual is below.
        stop_mode: "abs", `‖f(x) − x‖`, or "rel", that over `‖f(x)‖ + 1e-9`.
        indexing: evaluations after which the state is kept, and returned in a list.
        m: how many iterates take part.
        lam: an absolute ridge on the Gram matrix.
        tau: the weight of f(x) against x.
        return_final: take all steps, and return the last value.
        strict: an option that none of TorchDEQ's solvers has is an error; else a warning. One that another
            of them has is a warning always: programs hand `tau` to whichever solver they are told to use.
        backend: "auto", "triton", "reference" or "numba"; see `solve`.

    Returns:
        `(f(x) at each sample's lowest residual, the states at indexing, torchdeq.solver.stat.SolverStat)`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an unknown option.
    """
    refuse_unknown(anderson_solver, unknown, strict, SOLVERS)
    check_count("m", m)
    check_number("lam", lam, 0)
    check_number("tau", tau, 0, 1, open_low=True)
    watch = Watch(x0, max_iter, tol, stop_mode, indexing, return_final)
    if x0.numel() == 0:
        return watch.nothing(max_iter)
    iteration = AndersonIteration(
        func,
        x0,
        evaluations=max_iter,
        history=m,
        mixing=tau,
        ridge=lam,
        relative=stop_mode == "rel",
        over_batch=False,
        unjudged=2,
        backend=backend,
    )
    return watch.run(iteration, max_iter, gives_value=True)


@as_solve
def broyden_solver(
    func: Function,
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: list[int] | None = None,
    LBFGS_thres: int | None = None,
    ls: bool = False,
    return_final: bool = False,
    *,
    strict: bool = True,
    backend: str = "auto",
    **unknown: Any,
) -> Answer:
    """Good Broyden with TorchDEQ's options: `x⁺ = x − B⁻¹ (f(x) − x)`, beginning with `B⁻¹ = −I`.

    Args:
        func, x0, tol, stop_mode, return_final, strict, backend: as in `anderson_solver`.
        max_iter: the most steps, each an evaluation of func (with `ls` up to a few), after one at x0.
        indexing: as in `anderson_solver`, counted with the one at x0.
        LBFGS_thres: how many rank-one terms B⁻¹ may have before the oldest is overwritten; None: max_iter.
            With fewer than max_iter the terms are kept and used by PyTorch operators, not by our kernels.
        ls: search along each step until the squared residual of the batch goes down.

    Returns:
        `(x at each sample's lowest residual, the states at indexing, torchdeq.solver.stat.SolverStat)`.

    Raises:
        As `anderson_solver`.
    """
    refuse_unknown(broyden_solver, unknown, strict, SOLVERS)
    if LBFGS_thres is not None:
        check_count("LBFGS_thres", LBFGS_thres)
    watch = Watch(x0, max_iter, tol, stop_mode, indexing, return_final, uncounted=1)
    if x0.numel() == 0:
        return watch.nothing(max_iter + 1)
    iteration: Iteration
    if LBFGS_thres is not None and LBFGS_thres < max_iter:
        iteration = BoundedBroydenIteration(func, x0, terms=LBFGS_thres, line_search=ls, backend=backend)
    else:
        iteration = BroydenIteration(
            func,
            x0,
            evaluations=max_iter + 1,
            line_search=ls,
            relative=stop_mode == "rel",
            over_batch=False,
            backend=backend,
        )
    return watch.run(iteration, max_iter + 1, gives_value=False, stalls=True)


@as_solve
def fixed_point_iter(
    func: Function,
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: list[int] | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    *,
    strict: bool = True,
    backend: str = "auto",
    **unknown: Any,
) -> Answer:
    """Plain iteration `x⁺ = τ f(x) + (1 − τ) x`, with TorchDEQ's options.

    The residual is that of the damped step, `‖x⁺ − x‖`, relative to `‖x⁺‖`, as in TorchDEQ.

    Args:
        func, x0, max_iter, tol, stop_mode, indexing, tau, return_final, strict, backend: as in
            `anderson_solver`.

    Returns:
        `(x⁺ at each sample's lowest residual, the states at indexing, torchdeq.solver.stat.SolverStat)`.

    Raises:
        As `anderson_solver`.
    """
    refuse_unknown(fixed_point_iter, unknown, strict, SOLVERS)
    check_number("tau", tau, 0, 1, open_low=True)
    watch = Watch(x0, max_iter, tol, stop_mode, indexing, return_final)
    if x0.numel() == 0:
        return watch.nothing(max_iter)
    damped = func if tau == 1 else lambda x: torch.lerp(x, func(x).to(x.dtype), tau)
    iteration: Iteration
    if backend != "numba" and choose(x0, backend)[0] == "reference":  # whose plain iteration copies nothing
        iteration = PicardIteration(damped, x0, backend)
    else:
        iteration = AndersonIteration(
            damped,
            x0,
            evaluations=max_iter,
            history=1,
            mixing=1.0,
            ridge=0.0,
            relative=stop_mode == "rel",
            over_batch=False,
            unjudged=0,
            backend=backend,
        )
    return watch.run(iteration, max_iter, gives_value=True)


SOLVERS = (anderson_solver, broyden_solver, fixed_point_iter)
