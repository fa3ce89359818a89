"""Backtracking along Broyden's step until the residual has gone down enough."""

import math
from collections.abc import Callable

SUFFICIENT = 1e-4
"""The share of the decrease that the slope promises which is enough."""

LEAST_SCALE = 1e-2
"""Below it the search is given up."""


def armijo(phi: Callable[[float], float], phi0: float) -> float | None:
    """The first s of 1, a quadratic's and then cubics' minima with `φ(s) ≤ φ(0) + c s φ′(0)`; None: none.

    φ(s) = ‖g(x + s·p)‖² with φ′(0) taken as −φ(0), as TorchDEQ and locuslab/deq take it.
    Nocedal & Wright, "Numerical Optimization", 2nd ed., section 3.5, whose trial values these are.
    """
    slope = -phi0
    scale, value = 1.0, phi(1.0)
    if value <= phi0 + SUFFICIENT * slope:
        return scale

    last_scale, last_value = scale, value
    scale = _quotient(-slope, 2 * (value - phi0 - slope))
    value = phi(scale)
    while scale > LEAST_SCALE:
        excess, last_excess = value - phi0 - slope * scale, last_value - phi0 - slope * last_scale
        factor = last_scale**2 * scale**2 * (scale - last_scale)
        cubic = _quotient(last_scale**2 * excess - scale**2 * last_excess, factor)
        square = _quotient(scale**3 * last_excess - last_scale**3 * excess, factor)
        trial = _quotient(math.sqrt(abs(square**2 - 3 * cubic * slope)) - square, 3 * cubic)
        trial_value = phi(trial)
        if trial_value <= phi0 + SUFFICIENT * slope * trial:
            return trial
        if scale - trial > scale / 2 or 1 - trial / scale < 0.96:  # too short or too long: halve
            trial = scale / 2
        last_scale, last_value = scale, value
        scale, value = trial, trial_value
    return None


def _quotient(over: float, under: float) -> float:
    return over / under if under != 0 else math.nan
