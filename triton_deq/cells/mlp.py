"""The multilayer-perceptron cell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..ops.mlp import Norm, mlp, mlp_and_slope, mlp_fwd, mlp_vjp, normalises, served
from ..ops.mlp_probe import mlp_jacobian_norms
from ..ops.mlp_solve import Layer, Linearised, Rule, mlp_solve, mlp_solve_fits
from ..ops.norm import norm, norm_vjp
from ..reference.activations import ACTIVATIONS, Activation, find_activation
from ..reference.record import Record
from .layers import does_as


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
        device, dtype: of the parameters, as in PyTorch's modules.

    On a GPU a layer is one kernel: product, injection, activation, and without gradients the LayerNorm. The
    cell knows its vector-Jacobian product in closed form (`vjp`), which is a kernel too: a backward solve
    then runs without the autograd engine, and the Jacobian penalty without double backward. Where a state
    fits one program (width up to 256), the kernels do a whole solve by Anderson or Picard in one launch, and
    that of the backward pass likewise (`whole_solve`).

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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count("width", width)
        check_count("input_width", input_width)
        if hidden is not None:
            check_count("hidden", hidden)
        inner = width if hidden is None else hidden
        self.width = width
        self.activation = find_activation(activation)
        kind: Any = {"device": device, "dtype": dtype}
        self.state = nn.Linear(width, inner, bias=False, **kind)
        self.injection = nn.Linear(input_width, inner, **kind)
        self.output = None if hidden is None else nn.Linear(hidden, width, bias=False, **kind)
        self.norm = nn.LayerNorm(width, **kind) if layer_norm else None

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
        _check_width("u", u, "width" if self.output is None else "hidden", self.injection.out_features)
        _check_samples(z, u)
        state = _taken(z, u)
        if not self._layers_as_built:
            value = self.activation(self.state(state) + u)
        elif self.output is None:
            return mlp(state, self.state.weight, u, self.activation, self._norm).to(z.dtype)
        else:
            value = mlp(state, self.state.weight, u, self.activation)
        value = value if self.output is None else self.output(value)
        return (value if self.norm is None else self.norm(value)).to(z.dtype)

    def write(self, z: Tensor, u: Tensor, out: Tensor) -> None:
        """The next state into `out`, contiguous; without gradients."""
        # The weight is asked for last: it may be made anew each time, and `forward` asks for it as well.
        if (
            self.output is None
            and z.shape == u.shape == out.shape
            and z.shape[-1] == self.width
            and out.is_contiguous()
            and served(z, self.activation, "auto", u)
            and self._as_built
            and served(z, self.activation, "auto", weight := self.state.weight)
            and (self.norm is None or normalises(weight))
        ):
            mlp_fwd(z, weight, u, self.activation, self._norm, out=out)
        else:
            out.copy_(self.forward(z, u))

    @property
    def _norm(self) -> Norm | None:
        return None if self.norm is None else Norm(self.norm.weight, self.norm.bias, self.norm.eps)

    @property
    def _layers_as_built(self) -> bool:
        """Whether the layers do no more than their weights say: none is a foreign one or has a hook."""
        linear = [self.state, *([] if self.output is None else [self.output])]
        return all(does_as(nn.Linear, layer) and layer.bias is None for layer in linear) and (
            self.norm is None or (does_as(nn.LayerNorm, self.norm) and self.norm.bias is not None)
        )

    @property
    def _as_built(self) -> bool:
        """Whether this is still the cell of the formula, also as a whole."""
        return self._layers_as_built and does_as(MLPCell, self)

    @property
    def vjp(self) -> Callable[[Tensor, Tensor], tuple[Tensor, "Pullback"]] | None:
        """`(z, u) ↦ (value, ε ↦ εᵀJ)`, or None where the closed form would not be this cell's.

        ε: `[..., B, D]`, of any number of probes. With `s = act′(W z + u)`: `εᵀJ = (s ⊙ Vᵀε) W`, and before
        that the LayerNorm's own product. Both results are differentiable in z, u and the parameters.
        None if a subclass has its own forward, or a layer or hook is not as built.
        """
        return self._vjp if self._as_built else None

    def _vjp(self, z: Tensor, u: Tensor) -> tuple[Tensor, "Pullback"]:
        value, slope = mlp_and_slope(_taken(z, u), self.state.weight, u, self.activation)
        if self.output is not None:
            value = self.output(value)
        output = None if self.output is None else self.output.weight
        if self.norm is None:
            return value.to(z.dtype), Pullback(self.state.weight, output, slope, z.dtype)
        gain, offset = self.norm.weight, self.norm.bias
        normed, normal, inverse = norm(value, gain=gain, offset=offset, epsilon=self.norm.eps)
        if torch.is_autocast_enabled(value.device.type):  # which has a rule of its own for the value's dtype
            normed = self.norm(value)
        standard = (normal, inverse, gain)
        return normed.to(z.dtype), Pullback(self.state.weight, output, slope, z.dtype, standard)

    def jacobian_norms(
        self, z: Tensor, u: Tensor, seed: Tensor, probes: int, distribution: str
    ) -> Tensor | None:
        """`‖ε_mᵀ J_b‖²` `[M, B]` by kernels of their own, or None where those do not serve."""
        if self.output is not None or self.norm is not None or not self._as_built:
            return None
        return mlp_jacobian_norms(z, self.state.weight, u, self.activation, seed, probes, distribution)

    def whole_solve(
        self, z0: Tensor, u: Tensor, solver: Any, stopping: Any, trace: bool
    ) -> tuple[Tensor, Record, Tensor | None] | None:
        """A whole solve in one launch, or None where it is not on offer; see `mlp_solve`.

        solver: Anderson or Picard, as a record of numbers.
        """
        rule = _rule(solver, stopping)
        parameters = [self.state.weight, *([] if self.output is None else [self.output.weight])]
        parameters += [] if self.norm is None else [self.norm.weight, self.norm.bias]
        if rule is None or not self._as_built or not served(z0, self.activation, "auto", u, *parameters):
            return None
        output = None if self.output is None else self.output.weight
        layer = Layer(self.state.weight, u, self.activation, output, self._norm)
        if u.shape != (*z0.shape[:-1], self.state.weight.shape[0]) or not mlp_solve_fits(z0, layer, rule):
            return None
        return mlp_solve(z0, layer, rule, trace)

    def extra_repr(self) -> str:
        return f"activation={self.activation.name!r}"


def _taken(z: Tensor, u: Tensor) -> Tensor:
    """z in the dtype of the products, that of u: autocast casts it, and without it a state may be narrow."""
    return z if torch.is_autocast_enabled(z.device.type) else z.to(u.dtype)


def _check_width(name: str, value: Tensor, field: str, wanted: int) -> None:
    if value.dim() == 0 or value.shape[-1] != wanted:
        raise ValueError(
            f"{name} has {value.shape[-1] if value.dim() else 'no'} entries in its last dimension, and the "
            f"cell's {field} is {wanted}: give {name} of shape [..., {wanted}]"
        )


def _check_samples(z: Tensor, u: Tensor) -> None:
    """z has u's samples, or more that share those of u."""
    batch, given = z.shape[:-1], u.shape[:-1]
    if batch == given:  # the usual case
        return
    shared = zip(reversed(given), reversed(batch), strict=False)
    if len(given) > len(batch) or any(own not in (1, size) for own, size in shared):
        raise ValueError(
            f"z has shape {tuple(z.shape)}, and u {tuple(u.shape)}: give z u's leading dimensions"
        )


def _rule(solver: Any, stopping: Any) -> Rule | None:
    """The numbers of an Anderson iteration, if this solver is one."""
    anderson = getattr(solver, "as_anderson", None)
    if anderson is None or stopping.norm_over != "sample":
        return None
    return Rule(
        anderson.history,
        float(anderson.mixing),
        float(anderson.ridge),
        anderson.ridge_scale == "relative",
        stopping.tol,
        stopping.max_steps,
        stopping.residual == "relative",
    )


@dataclass(frozen=True, eq=False)  # torch.compile hashes what it calls, before it has fields
class Pullback:
    """`ε ↦ εᵀJ` of an `MLPCell` at a state, `[..., B, D]`; dtype is the state's.

    standard: n, 1/σ and the gain of its LayerNorm, as `norm_vjp` takes them, or None without one.
    """

    weight: Tensor
    output: Tensor | None
    slope: Tensor
    dtype: Any
    standard: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, vector: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if self.standard is not None:
            vector = norm_vjp(vector, *self.standard)
        if self.output is not None:
            vector = vector @ self.output.to(vector.dtype)
        if (vector.dtype, self.weight.dtype) == (self.dtype, self.dtype):
            return mlp_vjp(vector, self.slope, self.weight, shift, out=out).to(self.dtype)
        product = mlp_vjp(vector, self.slope, self.weight).to(self.dtype)
        product = product if shift is None else product + shift
        return product if out is None else out.copy_(product)

    def plus(self, shift: Tensor) -> "Adjoint":
        """`x ↦ xJ + g`."""
        return Adjoint(self, shift)


@dataclass(frozen=True, eq=False)
class Adjoint:
    """`x ↦ xJ + g`, the map of a backward solve; it may write into the solver's ring, or solve as a whole."""

    pullback: Pullback
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.pullback(x, self.shift)

    def write(self, x: Tensor, out: Tensor) -> None:
        self.pullback(x, self.shift, out)

    def whole_solve(
        self, x0: Tensor, solver: Any, stopping: Any, trace: bool
    ) -> tuple[Tensor, Record, Tensor | None] | None:
        """As `MLPCell.whole_solve`."""
        back, rule = self.pullback, _rule(solver, stopping)
        normal, inverse, gain = back.standard or (None, None, None)
        alike = (back.weight, back.output, back.slope, gain, normal, self.shift)
        if rule is None or not served(x0, ACTIVATIONS["relu"], "auto", *alike):
            return None
        cell = Linearised(back.weight, back.output, back.slope, gain, normal, inverse, self.shift)
        if self.shift.shape != x0.shape or not mlp_solve_fits(x0, cell, rule):
            return None
        return mlp_solve(x0, cell, rule, trace)
