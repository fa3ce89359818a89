"""Readers for the data of the demo, the tests and the trainer: digits, a curve, and texts."""

from .corpus import EOS, SPLITS, UNKNOWN, Corpus
from .images import digits
from .regression import curve, synthetic
from .segments import Segments
from .split import Split
from .topics import help_topics
from .wiki import wikitext

__all__ = [
    "EOS",
    "SPLITS",
    "UNKNOWN",
    "Corpus",
    "Segments",
    "Split",
    "curve",
    "digits",
    "help_topics",
    "synthetic",
    "wikitext",
]
