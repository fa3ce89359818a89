"""Cells: one layer f(z, u) of a DEQ each, with `inject(x) -> u` for what does not depend on z."""

from ..reference.activations import Activation
from .mdeq import MDEQCell
from .mlp import MLPCell
from .transformer import Memory, TransformerCell

__all__ = ["Activation", "MDEQCell", "MLPCell", "Memory", "TransformerCell"]
