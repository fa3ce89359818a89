"""A cell's layer beside the same layer written plainly: an evaluation, a product, gradients, the penalty.

Each of the functions below takes a `Layer`, and whether the plain one is meant, to what is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_deq.backend import ambient
from triton_deq.deq import Injected
from triton_deq.timing import Call

from .cases import Setting, Variant, kernels_alone


@dataclass(frozen=True)
class Layer:
    """A cell with what is injected into it and a state, the same function written plainly, and how to run."""

    cell: Any
    x: Any
    z: Tensor
    plainly: Callable[[], Any]
    autocast: Callable[[], torch.autocast]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.z, *self.cell.parameters()]

    def function(self, plain: bool) -> Any:
        """f, with what is computed once a solve."""
        return self.plainly() if plain else Injected(self.cell, self.cell.inject(self.x))


Evaluation = Callable[[Layer, bool], Call]


def variants(setting: Setting, make: Callable[[], Layer], evaluation: Evaluation) -> Iterator[Variant]:
    """The cell by each backend, and the plain layer."""
    for name, backend in kernels_alone(setting):
        yield Variant(name, partial(prepare, make, evaluation, backend, False), backend)
    yield Variant("plain layer", partial(prepare, make, evaluation, "reference", True))


def prepare(make: Callable[[], Layer], evaluation: Evaluation, backend: str, plain: bool) -> Call:
    with ambient(backend):
        call = evaluation(make(), plain)

    def run() -> object:
        with ambient(backend):
            return call()

    return run


def evaluate(layer: Layer, plain: bool) -> Call:
    """As the loop of a solver does it: what is computed once a solve is there."""
    z = layer.z.detach()
    with torch.no_grad(), layer.autocast():
        f, out = layer.function(plain), torch.empty_like(z)

    def call() -> Tensor:
        with torch.no_grad(), layer.autocast():
            if plain:
                return f(z)
            f.write(z, out)
            return out

    return call


def multiply(layer: Layer, plain: bool) -> Call:
    """A vector by the Jacobian, as the loop of a backward solve does it."""
    with layer.autocast():
        if plain:
            f, z = layer.function(plain), layer.z
            value = f(z)
            vector = torch.randn_like(value)
            return lambda: torch.autograd.grad(value, z, vector, retain_graph=True)
        with torch.no_grad():
            value, pullback = layer.function(plain).vjp(layer.z)
    vector = torch.randn_like(value)
    return torch.no_grad()(lambda: pullback(vector))


def differentiate(layer: Layer, plain: bool) -> Call:
    """With the gradients of all parameters and of z."""

    def call() -> tuple[Tensor, ...]:
        with layer.autocast():
            value = layer.function(plain)(layer.z)
        return torch.autograd.grad(value.square().mean(), layer.leaves)

    return call


def penalise(layer: Layer, plain: bool) -> Call:
    """The same with one probe's Jacobian penalty: from the cell's own product, or by double backward."""

    def call() -> tuple[Tensor, ...]:
        with layer.autocast():
            f = layer.function(plain)
            if plain:
                value = f(layer.z)
                probe = torch.randn_like(value)
                (product,) = torch.autograd.grad(value, layer.z, probe, create_graph=True)
            else:
                value, pullback = f.vjp(layer.z)
                product = pullback(torch.randn_like(value))
        loss = value.square().mean() + product.square().sum() / product.numel()
        return torch.autograd.grad(loss, layer.leaves)

    return call
