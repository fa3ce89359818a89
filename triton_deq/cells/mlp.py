"""The multilayer-perceptron cell."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_count

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softplus": functional.softplus,
}


class MLPCell(nn.Module):
    """One layer `z⁺ = act(W z + U x + b)`, or with `hidden` the block `z⁺ = V act(W z + U x + b)`.

    The second is the f of the paper's synthetic experiment (arXiv 2106.14342, section 5.1). With
    `layer_norm` the result is normalised over its width.

    Args:
        width: D, entries of z.
        input_width: entries of x.
        activation: "tanh", "relu", "gelu", "silu" or "softplus".
        layer_norm: whether a LayerNorm follows.
        hidden: H, the inner width of the two-matrix block; None for one matrix.

    Shapes: z `[B, D]`, x `[B, input_width]`, u `[B, D]` (or `[B, H]`).

    Raises:
        TypeError, ValueError: a width below 1, or an unknown activation.
    """

    def __init__(
        self,
        width: int,
        input_width: int,
        activation: str = "tanh",
        layer_norm: bool = False,
        hidden: int | None = None,
    ):
        super().__init__()
        check_count("width", width)
        check_count("input_width", input_width)
        if hidden is not None:
            check_count("hidden", hidden)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
        inner = width if hidden is None else hidden
        self.width = width
        self.activation = activation
        self.state = nn.Linear(width, inner, bias=False)
        self.injection = nn.Linear(input_width, inner)
        self.output = None if hidden is None else nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width) if layer_norm else None

    def inject(self, x: Tensor) -> Tensor:
        """`u = U x + b`, all that does not depend on z."""
        return self.injection(x)

    def select(self, u: Tensor, samples: Tensor) -> Tensor:
        """u for these samples of the batch alone."""
        return u[samples]

    def initial_state(self, u: Tensor) -> Tensor:
        """Zeros, `[B, D]`."""
        return u.new_zeros(*u.shape[:-1], self.width)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """The next state from z and `u = inject(x)`."""
        z = ACTIVATIONS[self.activation](self.state(z) + u)
        if self.output is not None:
            z = self.output(z)
        return z if self.norm is None else self.norm(z)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
