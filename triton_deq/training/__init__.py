"""One trainer for all models: `train(task, options, folder)`, and the command `triton-deq train`."""

from .command import add_arguments, run
from .errors import CheckpointError, Interrupted, NonFinite, TrainingError
from .image_classifier import ImageClassifierTask, evaluate_by_nfe
from .language_model import LanguageModelTask
from .loop import train
from .options import TrainingOptions
from .plots import plot
from .task import Loss, Task

__all__ = [
    "CheckpointError",
    "ImageClassifierTask",
    "Interrupted",
    "LanguageModelTask",
    "Loss",
    "NonFinite",
    "Task",
    "TrainingError",
    "TrainingOptions",
    "add_arguments",
    "evaluate_by_nfe",
    "plot",
    "run",
    "train",
]
