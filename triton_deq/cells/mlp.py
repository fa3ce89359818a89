"""The multilayer-perceptron cell."""

from collections.abc import Callable

from torch import Tensor, nn

from ..checks import check_count
from ..reference.record import accumulate_dtype
from .activations import Activation, find_activation

Pullback = Callable[[Tensor], Tensor]


class MLPCell(nn.Module):
    """One layer `z⁺ = act(W z + U x + b)`, or with `hidden` the block `z⁺ = V act(W z + U x + b)`.

    The second is the f of the paper's synthetic experiment (arXiv 2106.14342, section 5.1). With
    `layer_norm` the result is normalised over its width.

    Args:
        width: D, entries of z.
        input_width: entries of x.
        activation: "tanh", "relu", "gelu", "silu", "softplus", or an `Activation` of your own.
        layer_norm: whether a LayerNorm follows.
        hidden: H, the inner width of the two-matrix block; None for one matrix.

    The cell knows its vector-Jacobian product in closed form (`vjp`): a backward solve then runs without the
    autograd engine, and the Jacobian penalty without double backward.

    Shapes: z `[B, D]`, x `[B, input_width]`, u `[B, D]` (or `[B, H]`).

    Raises:
        TypeError, ValueError: a width below 1, an unknown activation, z or u of another width.
    """

    def __init__(
        self,
        width: int,
        input_width: int,
        activation: str | Activation = "tanh",
        layer_norm: bool = False,
        hidden: int | None = None,
    ):
        super().__init__()
        check_count("width", width)
        check_count("input_width", input_width)
        if hidden is not None:
            check_count("hidden", hidden)
        inner = width if hidden is None else hidden
        self.width = width
        self.activation = find_activation(activation)
        self.state = nn.Linear(width, inner, bias=False)
        self.injection = nn.Linear(input_width, inner)
        self.output = None if hidden is None else nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width) if layer_norm else None

    def inject(self, x: Tensor) -> Tensor:
        """`u = U x + b`, all that does not depend on z."""
        _check_width("x", x, "input_width", self.injection.in_features)
        return self.injection(x)

    def select(self, u: Tensor, samples: Tensor) -> Tensor:
        """u for these samples of the batch alone."""
        return u[samples]

    def initial_state(self, u: Tensor) -> Tensor:
        """Zeros, `[B, D]`."""
        return u.new_zeros(*u.shape[:-1], self.width)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """The next state from z and `u = inject(x)`."""
        _check_width("z", z, "width", self.width)
        z = self.activation(self.state(z) + u)
        if self.output is not None:
            z = self.output(z)
        return z if self.norm is None else self.norm(z)

    @property
    def vjp(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Pullback]] | None:
        """`(z, u) ↦ (value, ε ↦ εᵀJ)`, or None where the closed form would not be this cell's.

        ε: `[..., B, D]`, of any number of probes. With `s = act′(W z + u)`: `εᵀJ = (s ⊙ Vᵀε) W`, and before
        that the LayerNorm's own product. Both results are differentiable in z, u and the parameters by
        ordinary operators. None if a subclass has its own forward, or a layer or hook is not as built.
        """
        layers = [layer for layer in (self.state, self.output) if layer is not None]
        plain = type(self).forward is MLPCell.forward and all(
            type(layer).forward is nn.Linear.forward for layer in layers
        )
        hooked = any(
            part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
            for part in self.modules()
        )
        return self._vjp if plain and not hooked else None

    def _vjp(self, z: Tensor, u: Tensor) -> tuple[Tensor, Pullback]:
        inner = self.state(z) + u
        value, slope = self.activation(inner), self.activation.derivative(inner)
        if self.output is not None:
            value = self.output(value)
        normalised, through_norm = (value, None) if self.norm is None else layer_norm_vjp(self.norm, value)

        def pullback(vector: Tensor) -> Tensor:
            if through_norm is not None:
                vector = through_norm(vector)
            if self.output is not None:
                vector = _times(vector, self.output.weight)
            return _times(vector * slope, self.state.weight).to(z.dtype)

        return normalised, pullback

    def extra_repr(self) -> str:
        return f"activation={self.activation.name!r}"


def _check_width(name: str, value: Tensor, field: str, wanted: int) -> None:
    if value.dim() == 0 or value.shape[-1] != wanted:
        raise ValueError(
            f"{name} has {value.shape[-1] if value.dim() else 'no'} entries in its last dimension, and the "
            f"cell's {field} is {wanted}: give {name} of shape [..., {wanted}]"
        )


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Their product in the dtype of the rows: a forward under autocast has a backward that is not."""
    return rows @ matrix.to(rows.dtype)


def layer_norm_vjp(norm: nn.LayerNorm, h: Tensor) -> tuple[Tensor, Pullback]:
    """`n = (h − mean) / σ`, `y = γ n + β`, and `ε ↦ (g − mean(g) − n mean(g n)) / σ` with `g = γ ε`.

    The product's statistics are in the accumulation dtype, as PyTorch's own are.
    """
    wide = h.to(accumulate_dtype(h.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    n = centred * inverse

    def pullback(vector: Tensor) -> Tensor:
        g = vector.to(wide.dtype) * norm.weight.to(wide.dtype)
        product = inverse * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
        return product.to(h.dtype)

    return norm(h), pullback
