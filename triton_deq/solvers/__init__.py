"""Fixed-point solvers: frozen records of numbers, one loop that runs them, and what comes back."""

from .anderson import Anderson, Picard
from .broyden import Broyden
from .loop import Solver, solve
from .solution import NotConverged, Solution

__all__ = ["Anderson", "Broyden", "NotConverged", "Picard", "Solution", "Solver", "solve"]
