"""Activations with their derivatives, which a vector-Jacobian product in closed form needs.

The kernels know those of `ACTIVATIONS` by name, with their second derivatives: kernels/primitives.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, both differentiable in their argument.

    Attributes:
        name: for error messages and `repr`.
        function: `a ↦ act(a)`.
        derivative: `a ↦ act′(a)`.

    Raises:
        TypeError: a function or derivative that cannot be called.
    """

    name: str
    function: Elementwise
    derivative: Elementwise

    def __post_init__(self):
        for field in ("function", "derivative"):
            if not callable(getattr(self, field)):
                raise TypeError(
                    f"{field}={getattr(self, field)!r} of the activation {self.name!r} cannot be called: "
                    "give a function from a tensor to a tensor of the same shape"
                )

    def __call__(self, a: Tensor) -> Tensor:
        return self.function(a)


def _tanh_slope(a: Tensor) -> Tensor:
    return 1 - torch.tanh(a).square()


def _relu_slope(a: Tensor) -> Tensor:
    return (a > 0).to(a.dtype)


def _gelu_slope(a: Tensor) -> Tensor:
    """Φ(a) + a φ(a)"""
    density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density


def _silu_slope(a: Tensor) -> Tensor:
    logistic = torch.sigmoid(a)
    return logistic * (1 + a * (1 - logistic))


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("tanh", torch.tanh, _tanh_slope),
        Activation("relu", torch.relu, _relu_slope),
        Activation("gelu", functional.gelu, _gelu_slope),
        Activation("silu", functional.silu, _silu_slope),
        Activation("softplus", functional.softplus, torch.sigmoid),
    )
}


def find_activation(given: str | Activation) -> Activation:
    """The activation of this name, or the one given.

    Raises:
        ValueError: an unknown name. TypeError: neither a name nor an `Activation`.
    """
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        if given in ACTIVATIONS:
            return ACTIVATIONS[given]
        raise ValueError(f"activation={given!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
    raise TypeError(
        f"activation={given!r} must be one of {', '.join(ACTIVATIONS)}, or a td.Activation, which has a "
        "derivative too"
    )
