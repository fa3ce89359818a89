"""Triton kernels that make deep equilibrium models fast.

`solve` finds a fixed point, `fixed_point` one with a gradient, `DEQ` wraps a cell into a model.
"""

from .cells import Activation, MDEQCell, MLPCell, TransformerCell
from .deq import DEQ, DEQOutput
from .gradients import PhantomGradient, UnrolledGradient, fixed_point
from .implicit import ImplicitGradient
from .jacobian import JacobianPenalty, jacobian_norm, jacobian_norm_of, spectral_radius
from .solvers import Anderson, Broyden, NotConverged, Picard, Solution, solve
from .status import Status

__version__ = "0.1.0"

__all__ = [
    "DEQ",
    "Activation",
    "Anderson",
    "Broyden",
    "DEQOutput",
    "ImplicitGradient",
    "JacobianPenalty",
    "MDEQCell",
    "MLPCell",
    "NotConverged",
    "PhantomGradient",
    "Picard",
    "Solution",
    "Status",
    "TransformerCell",
    "UnrolledGradient",
    "fixed_point",
    "jacobian_norm",
    "jacobian_norm_of",
    "solve",
    "spectral_radius",
]
