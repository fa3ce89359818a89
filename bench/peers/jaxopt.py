"""jaxopt's Anderson, jitted, where it is installed."""

import os
from functools import partial
from typing import Any

import torch

from triton_deq.timing import Call

from ..cases import Solved, Variant
from ..problems import Problem

MOST = 60


def jaxopt_variant(problem: Problem, tol: float, history: int) -> Variant:
    """A whole solve of as few iterations as reach the residual `tol`, like the other peers'.

    One more evaluates f where they end, as all others must to know their residual.
    """
    return Variant("jaxopt", partial(_prepare, problem, tol, history), "jax", compiles=True)


def _prepare(problem: Problem, tol: float, history: int) -> Call:
    # Read when jax makes its pool of threads: as many as PyTorch has.
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))
    if torch.get_num_threads() == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax
    import jax.numpy as jnp
    import jaxopt

    weight, bias = (jnp.asarray(tensor.detach().cpu().numpy()) for tensor in problem.parameters)

    def f(z: Any) -> Any:
        if problem.kind == "pointwise":
            return jnp.tanh(weight * z + bias)
        if problem.kind == "dense":
            return jnp.tanh(z @ weight.T + bias)
        return jnp.tanh(jax.lax.conv(z, weight, (1, 1), "SAME") + bias)

    def to_torch(z: Any) -> torch.Tensor:
        return torch.from_numpy(jax.device_get(z).copy()).to(problem.bias)

    def solver(iterations: int) -> Any:
        return jaxopt.AndersonAcceleration(
            f, history_size=history, maxiter=iterations, tol=0.0, ridge=1e-6, implicit_diff=False
        )

    start = jnp.zeros_like(bias)
    stepping = solver(MOST)
    update = jax.jit(stepping.update)
    z, state = start, stepping.init_state(start)
    iterations, residual = 0, float("inf")
    while residual > tol and iterations < MOST:
        z, state = update(z, state)
        residual = problem.residual(to_torch(z))
        iterations += 1
    if residual > tol:
        raise RuntimeError(f"does not reach a residual of {tol:g} in {MOST} iterations")
    iterations += 1
    run = jax.jit(solver(iterations).run)

    result = to_torch(run(start)[0])

    def call() -> Solved:
        run(start)[0].block_until_ready()
        return Solved(result, iterations)

    return call
