"""Anderson of the Deep Implicit Layers tutorial on ours, for the many models that were copied from it.

    from triton_deq.compat.tutorial import anderson

in place of the function in that code; the module that calls it, with its backward hook, stays as it is. (Its
`forward_iteration` evaluates f and does little else: there is nothing to save.) Kolter, Duvenaud & Johnson,
"Deep Implicit Layers", NeurIPS 2020, chapter 4. In float64 the iterates and the residuals are those of its
formulas; what differs is what goes wrong there:

- It runs on any PyTorch (the tutorial's calls `torch.solve`, which is gone), on a state of any shape, and a
  singular Gram matrix makes a plain step of that sample.
- A sample that is not finite is left out of the norms over the batch, and comes back as NaN. The solve ends
  when none is left.
- Gram matrix and solve are in float32 or better, so bfloat16 and float16 states work; an empty batch too.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..weight_caches import as_solve
from .iteration import AndersonIteration, Function, check_packed

LEAST = 1e-5
"""What is added to ‖f(x)‖ in a relative residual."""


@as_solve
def anderson(
    f: Function,
    x0: Tensor,
    m: int = 5,
    lam: float = 1e-4,
    max_iter: int = 50,
    tol: float = 1e-2,
    beta: float = 1.0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, list[float]]:
    """Anderson mixing with the tutorial's options: `x⁺ = Σ α_i (β f(x_i) + (1 − β) x_i)`.

    `α = argmin ‖Σ α_i (f(x_i) − x_i)‖² + lam ‖α‖²` in each sample, `Σ α_i = 1` (Walker & Ni, SIAM J. Numer.
    Anal. 49 (2011), eq. 2.2). The first two evaluations are plain steps, and not judged.

    Args:
        f: from a state to a state.
        x0: `[B, ...]`, real floating.
        m: how many iterates take part.
        lam: an absolute ridge on the Gram matrix.
        max_iter: the most evaluations of f.
        tol: the solve ends when `‖f(x) − x‖ / (‖f(x)‖ + 1e-5)`, over the whole batch, is below.
        beta: the weight of f(x) against x; above 1 it goes further than f.
        backend: "auto", "triton", "reference" or "numba"; see `solve`.

    Returns:
        `(x, residuals)`: the last x that f was evaluated at, not f(x); and the residual of each evaluation
        but the first two, floats.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    check_packed(x0)
    check_count("m", m)
    check_number("lam", lam, 0)
    check_count("max_iter", max_iter)
    check_number("tol", tol, 0)
    check_number("beta", beta, 0, open_low=True)
    if x0.numel() == 0:
        return x0.clone(), []
    iteration = AndersonIteration(
        f,
        x0,
        evaluations=max_iter,
        history=m,
        mixing=beta,
        ridge=lam,
        relative=True,
        over_batch=True,
        unjudged=2,
        backend=backend,
    )
    residuals: list[float] = []
    for evaluation in range(1, max_iter + 1):
        residual_sq, value_sq = iteration.evaluate()
        going = iteration.going
        if evaluation > iteration.unjudged:
            absolute = math.sqrt(residual_sq[going].sum()) if going.any() else math.nan
            residuals.append(absolute / (math.sqrt(value_sq[going].sum()) + LEAST))
            if not residuals[-1] >= tol:  # or no sample is left that could go on
                break
        if evaluation < max_iter:
            iteration.move(None, last=False)
    x = iteration.x
    if not iteration.going.all():
        lost = torch.from_numpy(np.flatnonzero(~iteration.going)).to(x.device)
        x = x.index_fill(0, lost, math.nan)
    return iteration.unrows(x), residuals
