"""The multilayer perceptron's layer as an op, its vector-Jacobian product, and a whole solve in one launch.

Inside torch.compile, under autocast and in the transforms of torch.func the ordinary operators run: those
know what to make of them.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..backend import recorded
from ..reference import mlp as reference
from ..reference.activations import ACTIVATIONS, Activation
from ..reference.record import Record, accumulate_dtype
from .jacobian import probe, squared_norm_fwd
from .launch import kernels_serve, launch, next_power_of_2, precision
from .products import tiles

MOST_NORM = 512
"""The widest LayerNorm that one program's rows can hold."""
MOST_WIDTH = 256
"""The widest state of a solve in one launch."""
MOST_HISTORY = 8
"""The longest history there."""
SAMPLES = 16
"""Samples of a program there: the least number of rows that a matrix product takes."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm's gain and offset, `[N]` both, and its ε."""

    gain: Tensor
    offset: Tensor
    epsilon: float


def served(z: Tensor, activation: Activation, backend: str, *others: Tensor | None) -> bool:
    """Whether the kernels can compute a layer of these tensors here, and should."""
    known = activation == ACTIVATIONS.get(activation.name)  # equal, since a copied model has a copy of it
    return kernels_serve(z, backend, *others) and known


def _fit(z: Tensor, weight: Tensor, u: Tensor) -> bool:
    """Whether the kernel can read these as a layer's; what does not fit is left to PyTorch's own rules."""
    same = u.shape[:-1] == z.shape[:-1] or (
        torch.broadcast_shapes(u.shape[:-1], z.shape[:-1]) == z.shape[:-1]
    )
    return same and (u.shape[-1], z.shape[-1]) == weight.shape


def mlp(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: Activation,
    norm: Norm | None = None,
    backend: str = "auto",
) -> Tensor:
    """`act(z Wᵀ + u)`, or with `norm` its LayerNorm; differentiable to any order.

    Args:
        z: `[..., K]`, floating, any strides.
        weight: W `[N, K]`, of z's dtype.
        u: `[..., N]`, of z's dtype, with z's leading dimensions or some that broadcast to them.
        activation: one of `ACTIVATIONS`, or one of your own, which the reference computes.
        norm: fused into the product where no gradient is recorded and N ≤ 512, else applied by PyTorch.

    float32 products are summed of three TF32 products each, whose error is that of float32, or of one where
    `torch.backends.cuda.matmul.fp32_precision` is "tf32"; 16-bit ones add up in float32.
    """
    if not (served(z, activation, backend, weight, u) and _fit(z, weight, u)):
        value = reference.mlp(z, weight, u, activation)
    elif recorded(z, weight, u):
        value, _ = MLPFunction.apply(z, weight, u, activation)
    elif norm is None or len(weight) <= MOST_NORM:
        return mlp_fwd(z, weight, u, activation, norm)
    else:
        value = mlp_fwd(z, weight, u, activation)
    if norm is None:
        return value
    return torch.nn.functional.layer_norm(value, value.shape[-1:], norm.gain, norm.offset, norm.epsilon)


def mlp_and_slope(
    z: Tensor, weight: Tensor, u: Tensor, activation: Activation, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`act(a)` and `act′(a)`, both differentiable; arguments as in `mlp`."""
    if not (served(z, activation, backend, weight, u) and _fit(z, weight, u)):
        return reference.mlp_and_slope(z, weight, u, activation)
    return MLPFunction.apply(z, weight, u, activation)


def mlp_vjp(
    vector: Tensor,
    slope: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`(v ⊙ act′(a)) W`, the layer's vector-Jacobian product, plus `shift`; differentiable.

    Args:
        vector: v `[..., *slope.shape]`, of any number of probes.
        slope: `act′(a)` `[..., N]`.
        weight: W `[N, K]`.
        shift: `[..., K]`, shaped like the product, or None.
        out: where the product is left; only without gradients.
    """
    alike = served(vector, ACTIVATIONS["relu"], backend, slope, weight, shift)
    fit = vector.shape[vector.dim() - slope.dim() :] == slope.shape and slope.shape[-1] == len(weight)
    if recorded(vector, slope, weight, shift) or not alike or not fit:
        return reference.mlp_vjp(vector, slope, weight, shift, out)
    if out is not None and not out.is_contiguous():  # the kernel writes rows one after another
        return out.copy_(mlp_vjp_fwd(vector, slope, weight, shift, None))
    return mlp_vjp_fwd(vector, slope, weight, shift, out)


# ------------------------------------------------------------------------------------------- the launches


def mlp_fwd(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: Activation,
    norm: Norm | None = None,
    out: Tensor | None = None,
    slope: Tensor | None = None,
    curvature: Tensor | None = None,
) -> Tensor:
    """The value by the kernel, into `out` if given; act′ and act″ into the others. Those are contiguous."""
    rows, injected = _rows(z), _rows(u.expand(*z.shape[:-1], u.shape[-1]))
    batch, depth = rows.shape
    width = weight.shape[0]
    value = z.new_empty(*z.shape[:-1], width) if out is None else out
    weight = weight.contiguous()
    grid, constants = tiles(batch, width, depth, z.dtype, whole=norm is not None)
    launch(
        _kernels().mlp_kernel,
        grid,
        rows,
        weight,
        injected,
        weight if norm is None else norm.gain.contiguous(),
        weight if norm is None else norm.offset.contiguous(),
        value,
        value if slope is None else slope,
        value if curvature is None else curvature,
        batch,
        width,
        depth,
        ACTIVATION=activation.name,
        SLOPE=slope is not None,
        CURVATURE=curvature is not None,
        NORM=norm is not None,
        EPSILON=0.0 if norm is None else norm.epsilon,
        **constants,
    )
    return value


def mlp_vjp_fwd(
    vector: Tensor, slope: Tensor, weight: Tensor, shift: Tensor | None, out: Tensor | None
) -> Tensor:
    """The product by the kernel, into `out` if given."""
    rows, slopes = _rows(vector), _rows(slope)
    depth, width = weight.shape
    product = vector.new_empty(*vector.shape[:-1], width) if out is None else out
    grid, constants = tiles(len(rows), width, depth, vector.dtype)
    launch(
        _kernels().mlp_vjp_kernel,
        grid,
        rows,
        slopes,
        weight.contiguous(),
        product if shift is None else _rows(shift.expand(product.shape)),
        product,
        len(rows),
        len(slopes),
        width,
        depth,
        SHIFT=shift is not None,
        **constants,
    )
    return product


class MLPFunction(torch.autograd.Function):
    """`(z, W, u) ↦ (act(a), act′(a))`, so that the Jacobian's own derivative needs no double backward.

    With ḡ, s̄ the gradients of both: `ā = ḡ ⊙ act′(a) + s̄ ⊙ act″(a)`, then `z̄ = ā W`, `W̄ = āᵀ z`, `ū = ā`.
    """

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, u: Tensor, activation: Activation):
        slope, curvature = (z.new_empty(*z.shape[:-1], weight.shape[0]) for _ in range(2))
        value = mlp_fwd(z, weight, u, activation, slope=slope, curvature=curvature)
        ctx.save_for_backward(z, weight, u, slope, curvature)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return value, slope

    @staticmethod
    def backward(ctx, grad: Tensor | None, slope_grad: Tensor | None):
        z, weight, u, slope, curvature = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return *_by_operators((z, weight, u), ctx.activation, (grad, slope_grad)), None
        inner = None if grad is None else grad * slope
        if slope_grad is not None:
            bent = slope_grad * curvature
            inner = bent if inner is None else inner.add_(bent)
        if inner is None:
            return None, None, None, None
        of_z, of_weight, of_u, _ = ctx.needs_input_grad
        return (
            inner @ weight if of_z else None,
            _rows(inner).mT @ _rows(z) if of_weight else None,
            inner.sum_to_size(u.shape) if of_u else None,
            None,
        )


# -------------------------------------------------------------------------------- a whole solve in one launch


@dataclass(frozen=True)
class Layer:
    """The cell that a whole solve iterates: `act(z Wᵀ + u)`, or `act(z Wᵀ + u) Vᵀ`, and a LayerNorm after it.

    weight: W `[N, N]`, or `[H, N]` with output. u: `[B, N]` or `[B, H]`. output: V `[N, H]` or None.
    """

    weight: Tensor
    u: Tensor
    activation: Activation
    output: Tensor | None
    norm: Norm | None


@dataclass(frozen=True)
class Linearised:
    """The same cell's Jacobian J at a state, for `x ↦ x J + g`.

    weight, output, gain: as in `Layer`; gain `[N]` is the LayerNorm's. slope: `act′(a)` `[B, N]` or `[B, H]`.
    normal: `[B, N]`, the LayerNorm's normalised value, and inverse `[B, 1]`, its 1/σ in the accumulation
    dtype, as `norm` gives them; None without one.
    """

    weight: Tensor
    output: Tensor | None
    slope: Tensor
    gain: Tensor | None
    normal: Tensor | None
    inverse: Tensor | None
    shift: Tensor


@dataclass(frozen=True)
class Rule:
    """How to solve: Anderson's numbers (history 1: Picard) and when to stop; as in `td.Anderson`, `solve`."""

    history: int
    mixing: float
    ridge: float
    relative_ridge: bool
    tol: float
    max_steps: int
    relative: bool


def mlp_solve_fits(z0: Tensor, cell: Layer | Linearised, rule: Rule) -> bool:
    """Whether such a solve can be done in one launch: width at most 256, history at most 8."""
    width = cell.weight.shape[1]
    return (
        z0.dim() == 2
        and z0.shape[1] == width <= MOST_WIDTH
        and rule.history <= MOST_HISTORY
        and (cell.output is not None or cell.weight.shape[0] == width)
    )


def mlp_solve(
    z0: Tensor, cell: Layer | Linearised, rule: Rule, trace: bool = False
) -> tuple[Tensor, Record, Tensor | None]:
    """The fixed point of each sample from z0 `[B, N]`, B ≥ 1, in one launch; not differentiable.

    Each sample takes the iterates that the general loop takes, up to rounding, and stops by itself.

    Returns the best iterates `[B, N]`, the record, and with `trace` the residuals `[max_steps, B]`, of which
    a stopped sample repeats its last.
    """
    batch, width = z0.shape
    history = min(rule.history, rule.max_steps)
    lanes = next_power_of_2(history)
    x = z0.clone(memory_format=torch.contiguous_format)
    record = Record(batch, rule.tol, x.device)
    best = x.clone()
    wide = accumulate_dtype(x.dtype)
    nothing, no_sums = x.new_empty(1), x.new_empty(1, dtype=wide)
    small = record.data.new_empty
    weight = cell.weight.contiguous()
    output = weight if cell.output is None else cell.output.contiguous()
    adjoint = isinstance(cell, Linearised)
    if isinstance(cell, Linearised):
        shift, slope, name = cell.shift.contiguous(), cell.slope.contiguous(), "tanh"
        normal = nothing if cell.normal is None else cell.normal.contiguous()
        inverse = no_sums if cell.inverse is None else cell.inverse.contiguous()
        gain, offset, epsilon = nothing if cell.gain is None else cell.gain.contiguous(), nothing, 0.0
        normed = cell.gain is not None
        scratch = torch.empty_like(x)
    else:
        shift, slope, name = cell.u.contiguous(), nothing, cell.activation.name
        normal, inverse, scratch = nothing, no_sums, nothing
        normed = cell.norm is not None
        gain = nothing if cell.norm is None else cell.norm.gain.contiguous()
        offset = nothing if cell.norm is None else cell.norm.offset.contiguous()
        epsilon = 0.0 if cell.norm is None else cell.norm.epsilon
    traced = small(rule.max_steps if trace else 1, batch)
    launch(
        _kernels().mlp_solve_kernel,
        (-(-batch // SAMPLES),),
        x,
        best,
        x.new_empty(history, batch, width),
        x.new_empty(history, batch, width),
        small(batch, history, history),
        small(batch, lanes),
        record.data,
        traced,
        weight,
        output,
        shift,
        slope,
        gain,
        offset,
        normal,
        inverse,
        scratch,
        batch,
        rule.max_steps,
        ADJOINT=adjoint,
        WIDTH=width,
        HIDDEN=0 if cell.output is None else weight.shape[0],
        ACTIVATION=name,
        NORM=normed,
        EPSILON=epsilon,
        HISTORY=history,
        LANES=lanes,
        MIXING=rule.mixing,
        RELATIVE=rule.relative,
        RIDGE=rule.ridge,
        RELATIVE_RIDGE=rule.relative_ridge,
        TRACE=trace,
        SAMPLES=SAMPLES,
        BLOCK=max(16, next_power_of_2(width)),
        BLOCK_K=16 if x.dtype == torch.float64 else 32,
        BLOCK_H=16 if x.dtype == torch.float64 else 32,
        num_warps=4 if width <= 32 else 8,
        **precision(x.dtype),
    )
    if not trace:
        return best, record, None
    step = torch.arange(rule.max_steps, device=x.device)[:, None]
    return best, record, torch.where(step < record.steps, traced, record.residual)


class MLPJacobianFunction(torch.autograd.Function):
    """`(z, W, u) ↦ ‖ε_mᵀ J_b‖²` `[M, B]`, `J_b = diag(act′(a_b)) W`, for probes that a seed stands for.

    With `t_m = ε_m ⊙ act′(a)`, `p_m = t_m W` and the gradient ḡ of the norms: `p̄_m = 2 ḡ_m p_m`,
    `ā = act″(a) ⊙ Σ_m ε_m ⊙ (p̄_m Wᵀ)`, then `z̄ = ā W`, `ū = ā` and `W̄ = āᵀ z + Σ_m t_mᵀ p̄_m`.
    """

    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        weight: Tensor,
        u: Tensor,
        seed: Tensor,
        probes: int,
        distribution: str,
        activation: Activation,
    ) -> Tensor:
        vectors, curvature = mlp_probe_fwd(z, weight, u, seed, probes, distribution, activation)
        products = vectors @ weight
        ctx.save_for_backward(z, weight, u, seed, vectors, curvature, products)
        ctx.distribution, ctx.activation = distribution, activation
        return squared_norm_fwd(products.flatten(0, 1)).view(probes, len(z))

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, weight, u, seed, vectors, curvature, products = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            probes = torch.stack(
                [probe(vectors[m], seed, m, ctx.distribution, "triton") for m in range(len(vectors))]
            )
            z, weight, u = _aliases(z, weight, u)
            norms = reference.mlp_jacobian_norms(z, weight, u, probes, ctx.activation)
            leaves = [tensor for tensor in (z, weight, u) if tensor.requires_grad]
            found = iter(torch.autograd.grad(norms, leaves, grad, create_graph=True, materialize_grads=True))
            return *(next(found) if each.requires_grad else None for each in (z, weight, u)), *(None,) * 4
        scaled = (2 * grad).to(products.dtype)[:, :, None] * products
        inner = mlp_probe_vjp_fwd(scaled, weight, curvature, seed, ctx.distribution)
        of_z, of_weight, of_u = ctx.needs_input_grad[:3]
        weight_grad = None
        if of_weight:
            weight_grad = torch.addmm(inner.mT @ z, vectors.flatten(0, 1).mT, scaled.flatten(0, 1))
        return inner @ weight if of_z else None, weight_grad, inner if of_u else None, *(None,) * 4


def mlp_jacobian_norms(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: Activation,
    seed: Tensor,
    probes: int,
    distribution: str,
    backend: str = "auto",
) -> Tensor | None:
    """`‖ε_mᵀ J_b‖²` `[M, B]` of the layer's Jacobian in z, in the accumulation dtype; differentiable.

    Args:
        z, weight, u, activation: as in `mlp`, z `[B, K]` and u `[B, N]`.
        seed: int64 `[1]`; it stands for the probes ε `[M, B, N]`, which are those of `probe`.
        probes, distribution: as in `jacobian_norm`.

    Returns None where the kernels do not serve; in float64 too, since their probes have float32's precision.
    """
    fits = (
        z.dim() == 2 and z.dtype != torch.float64 and u.shape == (len(z), len(weight)) and _fit(z, weight, u)
    )
    if not fits or not served(z, activation, backend, weight, u):
        return None
    return MLPJacobianFunction.apply(z, weight, u, seed, probes, distribution, activation)


def mlp_probe_fwd(
    z: Tensor,
    weight: Tensor,
    u: Tensor,
    seed: Tensor,
    probes: int,
    distribution: str,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """`ε_m ⊙ act′(a)` `[M, B, N]` and `act″(a)` `[B, N]` by the kernel."""
    (batch, depth), width = z.shape, len(weight)
    vectors, curvature = z.new_empty(probes, batch, width), z.new_empty(batch, width)
    grid, constants = tiles(batch, width, depth, z.dtype)
    launch(
        _kernels().mlp_probe_kernel,
        grid,
        z.contiguous(),
        weight.contiguous(),
        u.contiguous(),
        seed,
        vectors,
        curvature,
        batch,
        width,
        depth,
        -(-batch * width // 4),
        ACTIVATION=activation.name,
        PROBES=probes,
        GAUSSIAN=distribution == "gaussian",
        **constants,
    )
    return vectors, curvature


def mlp_probe_vjp_fwd(
    products: Tensor, weight: Tensor, curvature: Tensor, seed: Tensor, distribution: str
) -> Tensor:
    """`act″(a) ⊙ Σ_m ε_m ⊙ (p̄_m Wᵀ)` `[B, N]` by the kernel, from p̄ `[M, B, K]`."""
    (probes, batch, depth), width = products.shape, len(weight)
    inner = torch.empty_like(curvature)
    grid, constants = tiles(batch, width, depth, products.dtype)
    launch(
        _kernels().mlp_probe_vjp_kernel,
        grid,
        products.contiguous(),
        weight.contiguous(),
        curvature,
        seed,
        inner,
        batch,
        width,
        depth,
        -(-batch * width // 4),
        PROBES=probes,
        GAUSSIAN=distribution == "gaussian",
        **constants,
    )
    return inner


def _by_operators(
    tensors: tuple[Tensor, Tensor, Tensor], activation: Activation, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """`MLPFunction`'s gradients by ordinary operators, which can be differentiated."""
    tensors = z, weight, u = _aliases(*tensors)
    outputs = reference.mlp_and_slope(z, weight, u, activation)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not pairs or not leaves:
        return (None,) * len(tensors)
    values, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(values, leaves, given, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in tensors)


def _aliases(z: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with graph nodes of their own: where u depends on z, z's own gradient must not go by way of u.

    The engine adds that part itself.
    """
    return z.view_as(z), weight.view_as(weight), u.view_as(u)


def _rows(tensor: Tensor) -> Tensor:
    """`[..., N]` as contiguous rows `[rows, N]`."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


@cache
def _kernels() -> ModuleType:
    from ..kernels import mlp

    return mlp
