"""The solvers and losses of the authors' code (locuslab/deq, `lib/solvers.py` and `lib/jacobian.py`) on ours.

    from triton_deq.compat.locuslab import anderson, broyden, jac_loss_estimate, power_method

in place of `from lib.solvers import ...` and `from lib.jacobian import ...`. Bai et al., arXiv 1909.01377,
2006.08656 and 2106.14342. In float64 the iterates are those of their formulas; what differs is what goes
wrong there:

- Anderson runs on any PyTorch (theirs calls `torch.solve`, which is gone). A singular Gram matrix, or weights
  that would amplify rounding (that sum to more than 1e4), make a plain step of that sample.
- With a threshold that leaves no step to judge, or where nothing was finite, the best iterate comes back.
- A sample that is not finite is left out of the norms over the batch.
- Gram matrix and solve are in float32 or better, so bfloat16 and float16 states work; an empty batch too.
- An option that does not exist is an error.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..jacobian import jacobian_norm_of, spectral_pair_of
from ..weight_caches import as_solve
from .iteration import (
    INITIAL,
    STALLED,
    AndersonIteration,
    BroydenIteration,
    Function,
    Iteration,
    check_packed,
)
from .options import refuse_unknown

PROTECTION = {"abs": 1e6, "rel": 1e3}
"""Broyden breaks off above the first residual times this, times the last dimension of the state."""


@as_solve
def anderson(
    f: Function,
    x0: Tensor,
    m: int = 6,
    lam: float = 1e-4,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    beta: float = 1.0,
    *,
    name: str = "unknown",
    strict: bool = True,
    backend: str = "auto",
    **unknown: Any,
) -> dict[str, Any]:
    """Anderson mixing with the authors' options: `x⁺ = Σ α_i (β f(x_i) + (1 − β) x_i)`.

    `α = argmin ‖Σ α_i (f(x_i) − x_i)‖² + lam ‖α‖²` in each sample, `Σ α_i = 1` (Walker & Ni, SIAM J. Numer.
    Anal. 49 (2011), eq. 2.2). The first two evaluations are plain steps, and not judged.

    Args:
        f: from a state to a state.
        x0: `[B, ...]`, real floating.
        m: how many iterates take part.
        lam: an absolute ridge on the Gram matrix.
        threshold: the most evaluations of f.
        eps: the solve ends when the residual of the whole batch is below.
        stop_mode: "abs", `‖f(x) − x‖` over the batch, or "rel", that over `‖f(x)‖ + 1e-5`.
        beta: the weight of f(x) against x.
        name: what the caller calls the solve; it changes nothing, as in the original.
        strict: an unknown option is an error; else a warning.
        backend: "auto", "triton", "reference" or "numba"; see `solve`.

    Returns:
        A dict: `result`, the x with the lowest residual; `lowest`, that residual, and `nstep`, its step, of
        the first evaluation being 0; `prot_break`, False; `abs_trace` and `rel_trace`, lists of floats, one
        for each of `threshold − 2` steps, filled up with the lowest; `eps`; `threshold`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an unknown option.
    """
    refuse_unknown(anderson, unknown, strict)
    check_count("m", m)
    check_number("lam", lam, 0)
    check_number("beta", beta, 0, 1, open_low=True)
    watch = _Watch(x0, threshold, eps, stop_mode, least=1e-5)
    if x0.numel() == 0:
        return watch.answer(x0.clone(), length=threshold - 2)
    iteration = AndersonIteration(
        f,
        x0,
        evaluations=threshold,
        history=m,
        mixing=beta,
        ridge=lam,
        relative=stop_mode == "rel",
        over_batch=True,
        unjudged=2,
        backend=backend,
    )
    return watch.run(iteration, threshold, length=threshold - 2)


@as_solve
def broyden(
    f: Function,
    x0: Tensor,
    threshold: int,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    ls: bool = False,
    name: str = "unknown",
    *,
    strict: bool = True,
    backend: str = "auto",
    **unknown: Any,
) -> dict[str, Any]:
    """Good Broyden with the authors' options: `x⁺ = x − B⁻¹ (f(x) − x)`, beginning with `B⁻¹ = −I`.

    Args:
        f, x0, name, strict, backend: as in `anderson`.
        threshold: the most steps, each an evaluation of f (with `ls` up to a few), after one at x0.
        eps, stop_mode: as in `anderson`, but with 1e-9.
        ls: search along each step until the squared residual of the batch goes down.

    Returns:
        As `anderson`; `nstep` counts from 1; `prot_break` tells whether the residual grew so much that the
        solve was broken off; the traces have `threshold + 1` entries.

    Raises:
        As `anderson`.
    """
    refuse_unknown(broyden, unknown, strict)
    watch = _Watch(x0, threshold, eps, stop_mode, least=1e-9, guarded=True)
    if x0.numel() == 0:
        return watch.answer(x0.clone(), length=threshold + 1)
    iteration = BroydenIteration(
        f,
        x0,
        evaluations=threshold + 1,
        line_search=ls,
        relative=stop_mode == "rel",
        over_batch=True,
        backend=backend,
    )
    return watch.run(iteration, threshold + 1, length=threshold + 1)


class _Watch:
    """Judges a solve as the authors do, by one norm over the batch, and makes their dictionary.

    least: what is added to ‖f(x)‖ in a relative residual.
    guarded: whether a lack of progress, or a residual that explodes, ends the solve.
    """

    def __init__(
        self,
        x0: Any,
        threshold: Any,
        eps: Any,
        stop_mode: Any,
        *,
        least: float,
        guarded: bool = False,
    ):
        check_packed(x0)
        check_count("threshold", threshold)
        check_number("eps", eps, 0)
        check_choice("stop_mode", stop_mode, ("abs", "rel"))
        self.threshold, self.eps, self.stop_mode = threshold, eps, stop_mode
        self.least, self.guarded = least, guarded
        self.protection = PROTECTION[stop_mode] * (x0.shape[-1] if x0.dim() else 1)
        self.trace: dict[str, list[float]] = {"abs": [], "rel": []}
        self.broken_off = False

    def run(self, iteration: Iteration, evaluations: int, length: int) -> dict[str, Any]:
        """Evaluate until the batch is below the tolerance, or `evaluations` times."""
        # Where no evaluation would be judged, the last one is.
        iteration.unjudged = min(iteration.unjudged, evaluations - 1)
        lowest = INITIAL
        for evaluation in range(1, evaluations + 1):
            squares = iteration.evaluate()
            judged = evaluation > iteration.unjudged
            finite, residual = self._take(*squares, judged)
            ended = evaluation == evaluations or (judged and self._ended())
            improved = residual < lowest
            lowest = residual if improved else lowest
            iteration.move(finite & improved, last=ended)
            if evaluation == iteration.unjudged:
                lowest = INITIAL
            if ended:
                break
        return self.answer(iteration.unrows(iteration.best.clone()), length, first=iteration.unjudged)

    def _take(
        self, residual_sq: NDArray[np.float64], value_sq: NDArray[np.float64], judged: bool
    ) -> tuple[NDArray[np.bool_], float]:
        """Which samples are finite, and their residual, which goes into the trace where it is judged."""
        finite = np.isfinite(residual_sq)
        absolute = math.sqrt(residual_sq[finite].sum()) if finite.any() else math.nan
        relative = absolute / (math.sqrt(value_sq[finite].sum()) + self.least)
        if judged:
            self.trace["abs"].append(absolute)
            self.trace["rel"].append(relative)
        return finite, absolute if self.stop_mode == "abs" else relative

    def _ended(self) -> bool:
        trace = self.trace[self.stop_mode]
        newest = trace[-1]
        if newest < self.eps or math.isnan(newest):  # no sample is left that could go on
            return True
        if not self.guarded:
            return False
        steps, tolerances, ratio = STALLED
        last = trace[-steps:]
        if len(trace) > steps and newest < tolerances * self.eps and max(last) < ratio * min(last):
            return True
        self.broken_off = newest > trace[0] * self.protection
        return self.broken_off

    def answer(self, result: Tensor, length: int, first: int = 0) -> dict[str, Any]:
        """Their dictionary; the traces filled up to `length`; first: the number of the first judged step."""
        lowest = {mode: min([INITIAL, *filter(math.isfinite, trace)]) for mode, trace in self.trace.items()}
        chosen, judged = self.trace[self.stop_mode], lowest[self.stop_mode]
        padded = {mode: trace + [lowest[mode]] * (length - len(trace)) for mode, trace in self.trace.items()}
        return {
            "result": result,
            "lowest": judged,
            "nstep": chosen.index(judged) + first if judged in chosen else 0,
            "prot_break": self.broken_off,
            "abs_trace": padded["abs"],
            "rel_trace": padded["rel"],
            "eps": self.eps,
            "threshold": self.threshold,
        }


def jac_loss_estimate(f0: Tensor, z0: Tensor, vecs: int = 2, create_graph: bool = True) -> Tensor:
    """The authors' `jac_loss_estimate`: `‖ε^T ∂f0/∂z0‖² / z0.numel()`, the mean over `vecs` Gaussian ε.

    Bai, Koltun & Kolter, arXiv 2106.14342, eq. 6. The probes are made on z0's device, from one seed of its
    global generator. See `td.jacobian_norm_of`; `td.jacobian_norm(f, z)` needs no double backward where the
    cell is ours, or in `torch.compile`.

    Args:
        f0: f(z0), `[B, ...]`, with its graph.
        z0: `[B, ...]`, of requires_grad=True.
        vecs: how many probes.
        create_graph: whether the estimate can be differentiated.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    with torch.set_grad_enabled(create_graph):
        return jacobian_norm_of(f0, z0, probes=vecs)


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 200) -> tuple[Tensor, Tensor]:
    """The authors' `power_method`: an eigenvector of `∂f0/∂z0` transposed, and its eigenvalue's modulus.

    By Arnoldi iteration (see `td.spectral_radius`): their Rayleigh quotient is wrong where the largest
    eigenvalues are a complex pair. Then the vector is one of the plane that belongs to the pair.

    Args:
        f0: f(z0), `[B, ...]`, with its graph.
        z0: `[B, ...]`, of requires_grad=True.
        n_iters: how many vector-Jacobian products it may take.

    Returns:
        `(vector like z0, of length 1 in each sample; radius [B, 1])`.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    radius, vector = spectral_pair_of(f0, z0, n_iters)
    return vector, radius[:, None]
