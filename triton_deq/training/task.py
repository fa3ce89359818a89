"""What the trainer asks of a model and its data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Scalars = dict[str, Tensor | float]
"""Named numbers; tensors are scalars, on any device, without gradients."""


@dataclass(frozen=True)
class Loss:
    """The loss of one step.

    Attributes:
        value: the scalar to differentiate, penalties included.
        scalars: called after the backward pass, for what then is known; it should not wait for the device.
    """

    value: Tensor
    scalars: Callable[[], Scalars]


class Task(Protocol):
    """A model with its data.

    Under data-parallel training each rank has a task of its own, with its share of the data.

    Attributes:
        model: what is trained.
        configuration: all that makes the task what it is, as JSON can hold it; a checkpoint of another one
            is refused.
    """

    model: nn.Module
    configuration: dict[str, Any]

    def loss(self, module: nn.Module) -> Loss:
        """Take the next batch and run `module`, which is the model or its data-parallel wrapper, on it."""

    def validate(self) -> dict[str, float]:
        """Scalars of the validation set, the same on each rank; the least "loss" is the best.

        Gradients are off and the model in evaluation mode. Random numbers drawn here change no others.
        """

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """What to log, given the means of the scalars over some steps."""

    def set_pretraining(self, on: bool) -> None:
        """Train the model unrolled, or as an equilibrium."""

    def state_dict(self) -> dict[str, Any]:
        """Where in the data it is, and what is carried from batch to batch: tensors and plain Python."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
