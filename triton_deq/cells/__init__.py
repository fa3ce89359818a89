"""Cells: one layer f(z, u) of a DEQ each, with `inject(x) -> u` for what does not depend on z."""

from ..reference.activations import Activation
from .mlp import MLPCell

__all__ = ["Activation", "MLPCell"]
