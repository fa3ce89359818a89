"""Every public module and differentiable function, small: what each test of this folder goes through."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import triton_deq as td
from triton_deq.models import (
    DEQTransformerLM,
    MDEQClassifier,
    MDEQSegmenter,
    TransformerXL,
    find_configuration,
    find_image_configuration,
)

IMAGES = replace(
    find_image_configuration("digits"),
    channels=(4, 8),
    head=(2, 2),
    final=4,
    max_steps=4,
    backward_max_steps=4,
)
WORDS = replace(
    find_configuration("tiny"), vocabulary=30, width=8, heads=2, head_width=4, inner=16, cutoffs=(10, 20),
    max_steps=4, backward_max_steps=4, segment=5, memory=5,
)  # fmt: skip


class OwnCell(nn.Module):
    """A user's, which knows nothing but how to inject and to step."""

    def __init__(self):
        super().__init__()
        self.inject = nn.Linear(3, 6)
        self.state = nn.Linear(6, 6)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.state(z) + u)


@dataclass(frozen=True)
class Instance:
    """make: a module in train mode. inputs: what it is called with. value: its floating answer to that."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    value: Callable[..., Tensor]


def deq(cell: nn.Module, penalty: bool = True) -> td.DEQ:
    regular = td.JacobianPenalty(0.5) if penalty else None
    gradient = td.ImplicitGradient(max_steps=4)
    return td.DEQ(cell, max_steps=4, gradient=gradient, penalty=regular, backend="reference")


def equilibrium(module: Any, *inputs: Any) -> Tensor:
    out = module(*inputs)
    return out.value + out.penalty.to(out.value.dtype)


def of_cell(module: Any, x: Tensor) -> Tensor:
    u = module.inject(x)
    return module(module.initial_state(u), u)


def of_language(module: Any, tokens: Tensor) -> Tensor:
    out = module(tokens, tokens.flip(1))
    return out.nll + out.penalty


def of_images(module: Any, images: Tensor) -> Tensor:
    out = module(images)
    return out.logits + out.penalty.to(out.logits.dtype)


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def images() -> tuple[Tensor]:
    return (torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last),)


def words() -> tuple[Tensor]:
    return (torch.randint(30, (2, 5)),)


MODULES = [
    Instance("MLPCell", lambda: td.MLPCell(6, 3, layer_norm=True), floats(4, 3), of_cell),
    Instance("TransformerCell", lambda: td.TransformerCell(8, 2, 16, 4), floats(2, 5, 8), of_cell),
    Instance("MDEQCell", lambda: td.MDEQCell((4, 8), 4, 2), floats(2, 4, 4, 4), of_cell),
    Instance("DEQ of MLPCell", lambda: deq(td.MLPCell(6, 3)), floats(4, 3), equilibrium),
    Instance(
        "DEQ of TransformerCell", lambda: deq(td.TransformerCell(8, 2, 16, 4)), floats(2, 5, 8), equilibrium
    ),
    Instance("DEQ of MDEQCell", lambda: deq(td.MDEQCell((4, 8), 4, 2)), floats(2, 4, 4, 4), equilibrium),
    Instance("DEQ of one's own cell", lambda: deq(OwnCell()), floats(4, 3), equilibrium),
    Instance("DEQTransformerLM", lambda: DEQTransformerLM(WORDS), words, of_language),
    Instance("TransformerXL", lambda: TransformerXL(replace(WORDS, layers=2)), words, of_language),
    Instance("MDEQClassifier", lambda: MDEQClassifier(IMAGES), images, of_images),
    Instance("MDEQSegmenter", lambda: MDEQSegmenter(replace(IMAGES, head=())), images, of_images),
]

NOT_MODULES = {
    # functions of a user's f, records and results
    "Activation", "Anderson", "Broyden", "DEQOutput", "ImplicitGradient", "NotConverged", "PhantomGradient",
    "Picard", "Solution", "Status", "UnrolledGradient", "fixed_point", "jacobian_norm", "jacobian_norm_of",
    "solve", "spectral_radius",
    # in every DEQ above
    "JacobianPenalty",
}  # fmt: skip
"""What else is public, and where it is tested: `test_functions.py`."""
