"""What the models are fed with: random images or tokens, or what a factory's model gives as its example."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..models.transformer import LanguageModel


class Task(Protocol):
    """A way to make inputs.

    Attributes:
        unit: what is counted per second; per_sample: how many of them a sample has.
    """

    @property
    def unit(self) -> str: ...

    @property
    def per_sample(self) -> int: ...

    def arguments(self, model: nn.Module, batch: int, device: torch.device) -> tuple[Any, ...]:
        """What `model` is called with; from PyTorch's global generator."""
        ...


@dataclass(frozen=True)
class Images:
    """Normal numbers `[B, C, H, W]`, channels-last."""

    channels: int
    height: int
    width: int
    unit = "images"
    per_sample = 1

    def arguments(self, model: nn.Module, batch: int, device: torch.device) -> tuple[Any, ...]:
        images = torch.randn(batch, self.channels, self.height, self.width)
        return (images.to(device).contiguous(memory_format=torch.channels_last),)


@dataclass(frozen=True)
class Tokens:
    """Ids `[B, T]`; our language models get targets, and a memory of the segment before, as well."""

    vocabulary: int
    segment: int
    unit = "tokens"

    @property
    def per_sample(self) -> int:
        return self.segment

    def arguments(self, model: nn.Module, batch: int, device: torch.device) -> tuple[Any, ...]:
        ids = torch.randint(self.vocabulary, (batch, 2 * self.segment + 1)).to(device)
        first, second = ids[:, : self.segment], ids[:, self.segment :]
        if not isinstance(model, LanguageModel):
            return (second[:, :-1],)
        with torch.no_grad():
            memory = model(first).memory
        return second[:, :-1], second[:, 1:], memory


@dataclass(frozen=True)
class Example:
    """`source.example_input(batch)`: a tensor, or a tuple of arguments."""

    source: Any
    unit = "samples"
    per_sample = 1

    def arguments(self, model: nn.Module, batch: int, device: torch.device) -> tuple[Any, ...]:
        given = self.source.example_input(batch)
        moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, given)
        return moved if isinstance(moved, tuple) else (moved,)


@dataclass(frozen=True)
class Narrow:
    """Another task, whose floating inputs are of this dtype."""

    task: Task
    dtype: torch.dtype

    @property
    def unit(self) -> str:
        return self.task.unit

    @property
    def per_sample(self) -> int:
        return self.task.per_sample

    def arguments(self, model: nn.Module, batch: int, device: torch.device) -> tuple[Any, ...]:
        return tree_map(self._narrowed, self.task.arguments(model, batch, device))

    def _narrowed(self, leaf: Any) -> Any:
        return leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def shape_of(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the first tensor among them."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return shapes[0] if shapes else ()


def prediction(output: Any) -> Tensor:
    """The tensor that a model's output is about: logits, the value of a DEQ, or the first one that there is.

    Raises:
        TypeError: there is none.
    """
    for name in ("logits", "value", "hidden"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(f"the model returned {type(output).__name__}, without a tensor: let forward return one")


def loss_of(output: Any) -> Tensor:
    """A scalar to differentiate: nll where the output has it, the cross-entropy of logits `[B, classes]` with
    some labels, else a mean square; and the output's `penalty` and `initial` where it has these."""
    nll = getattr(output, "nll", None)
    if isinstance(nll, Tensor):
        loss = nll.mean()
    else:
        value = prediction(output)
        if value.dim() == 2:
            labels = torch.arange(len(value), device=value.device) % value.shape[1]
            loss = nn.functional.cross_entropy(value.float(), labels)
        else:
            loss = value.float().square().mean()
    for name in ("penalty", "initial"):
        extra = getattr(output, name, None)
        if isinstance(extra, Tensor):
            loss = loss + extra
    return loss
