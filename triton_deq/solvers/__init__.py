"""Fixed-point solvers: frozen records of numbers, one loop that runs them, and what comes back."""

from .anderson import Anderson, Picard
from .loop import Solver, solve
from .solution import NotConverged, Solution

__all__ = ["Anderson", "NotConverged", "Picard", "Solution", "Solver", "solve"]
