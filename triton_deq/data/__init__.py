"""Readers for the data of the demo, the tests and the trainer: images, a curve, and texts."""

from .augment import CIFAR10, DIGITS, IMAGENET, Augmentation
from .batches import Batches, ImageData, TensorImages
from .cifar import cifar10
from .corpus import EOS, SPLITS, UNKNOWN, Corpus
from .image_folders import BrokenImage, ImageFolder
from .imagenet import FolderImages, imagenet
from .images import digits
from .regression import curve, synthetic
from .segments import Segments
from .split import Split
from .topics import help_topics
from .wiki import wikitext

__all__ = [
    "CIFAR10",
    "DIGITS",
    "EOS",
    "IMAGENET",
    "SPLITS",
    "UNKNOWN",
    "Augmentation",
    "Batches",
    "BrokenImage",
    "Corpus",
    "FolderImages",
    "ImageData",
    "ImageFolder",
    "Segments",
    "Split",
    "TensorImages",
    "cifar10",
    "curve",
    "digits",
    "help_topics",
    "imagenet",
    "synthetic",
    "wikitext",
]
