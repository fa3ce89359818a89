"""The multilayer perceptron's kernels: a layer, its product, and whole solves."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import jacobian as reference_jacobian
from ..reference import mlp as reference_mlp
from ..reference import mlp_probe as reference_mlp_probe
from ..reference.activations import ACTIVATIONS
from ..solvers import Anderson, solve
from .case import BOUNDS, LEAST_WIDTH, Case, Row, name_of, poisoned, relative_error, row


def check_mlp(case: Case) -> Iterator[Row]:
    """The layer with every activation, its derivatives, its norm, and its product; widths of at most 300."""
    from ..ops import mlp as op

    batch, depth = case.shape[0], min(case.shape[1], 300)
    width = depth + 2
    z, u, weight, gain, offset = _draws(
        case, (batch, depth), (batch, width), (width, depth), (width,), (width,)
    )
    vectors, shift = _draws(case, (2 * batch, width), (2 * batch, depth), first=5)
    weight = weight / math.sqrt(depth)
    vectors, shift = vectors.unflatten(0, (2, batch)), shift.unflatten(0, (2, batch))
    inner = (z.double() @ weight.double().mT + u.double()).requires_grad_()

    # One vector of all activations: where a derivative crosses zero, its relative error means nothing.
    outputs: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for function in ACTIVATIONS.values():
        value, slope, curvature = (poisoned(z, batch, width) for _ in range(3))
        op.mlp_fwd(z, weight, u, function, out=value, slope=slope, curvature=curvature)
        wanted = function.derivative(inner)
        bent = (
            torch.autograd.grad(wanted.sum(), inner)[0] if wanted.requires_grad else torch.zeros_like(inner)
        )
        for quantity, out, expected in (
            ("value", value, function(inner)),
            ("slope", slope, wanted),
            ("curvature", curvature, bent),
        ):
            outputs.setdefault(quantity, ([], []))
            outputs[quantity][0].append(out)
            outputs[quantity][1].append(expected.detach())
    for quantity, (found, wanted_all) in outputs.items():
        error = relative_error(torch.stack(found), torch.stack(wanted_all))
        yield row(case, "mlp", "mlp", quantity, error)

    if width > 2:  # the norm of two entries is a sign
        out = op.mlp_fwd(z, weight, u, function, op.Norm(gain, offset, 1e-5), out=poisoned(z, batch, width))
        parameters = gain.double(), offset.double()
        expected = torch.nn.functional.layer_norm(function(inner).detach(), (width,), *parameters, 1e-5)
        yield row(case, "mlp", "mlp", "norm", relative_error(out, expected))

    out = op.mlp_vjp(vectors, slope, weight, shift, "triton", out=poisoned(z, 2, batch, depth))
    expected = reference_mlp.mlp_vjp(vectors.double(), slope.double(), weight.double()) + shift.double()
    yield row(case, "mlp", "mlp_vjp", "product", relative_error(out, expected))


def check_mlp_probe(case: Case, probes: int = 2) -> Iterator[Row]:
    """The fused estimate of the layer's Jacobian norm and its gradients; widths of 16 to 300.

    Weights keep the activations' arguments near 1: where those are large, act″ is all cancellation.
    """
    from ..ops import mlp_probe as op

    batch, depth = case.shape[0], min(max(case.shape[1], LEAST_WIDTH), 300)
    z, weight, u = _draws(case, (batch, depth), (depth + 2, depth), (batch, depth + 2))
    z, weight, u = (tensor.requires_grad_() for tensor in (z, weight / math.sqrt(depth), u))
    seed = torch.tensor([(case.seed + 1) * 0x5DEECE66D], device=case.device)
    upstream = case.randn(probes, batch, stream=9).abs() + 1
    like = torch.empty(batch, depth + 2)
    for function, distribution in ((ACTIVATIONS["gelu"], "gaussian"), (ACTIVATIONS["tanh"], "rademacher")):
        norms = op.MLPJacobianFunction.apply(z, weight, u, seed, probes, distribution, function)
        found = torch.autograd.grad((norms * upstream).sum(), (z, weight, u))

        wide = tuple(tensor.detach().double().requires_grad_() for tensor in (z, weight, u))
        vectors = torch.stack(
            [
                reference_jacobian.probe(like.shape, seed, m, distribution, torch.float64)
                for m in range(probes)
            ]
        )
        wanted = reference_mlp_probe.mlp_jacobian_norms(wide[0], wide[1], wide[2], vectors, function)
        expected = torch.autograd.grad((wanted * upstream.double()).sum(), wide)
        # Squares: twice the relative error, and in float64 that of the probes, which are float32's.
        bound = 2 * max(BOUNDS[name_of(case.dtype)], BOUNDS["float32"])
        for quantity, out, right in zip(
            ("norms", "of z", "of W", "of u"), (norms, *found), (wanted, *expected), strict=True
        ):
            label = f"{distribution[:5]} {quantity}"
            kernel = "mlp_probe" if quantity == "norms" else "mlp_probe_vjp"
            yield row(case, "mlp", kernel, label, relative_error(out.detach(), right.detach()), bound)


def check_mlp_solve(case: Case) -> Iterator[Row]:
    """Three steps of whole solves, forward and adjoint, against the general loop in float64.

    With few steps rounding has not been amplified yet; one sample meets a NaN.
    """
    from ..ops import mlp_solve as op
    from ..ops.mlp import Norm

    batch, width = case.shape[0], min(case.shape[1], 60)
    function, rule = ACTIVATIONS["tanh"], op.Rule(2, 0.9, 1e-6, True, 0.0, 3, True)
    options: dict[str, Any] = {"tol": 0.0, "max_steps": 3, "backend": "reference"}
    for hidden, normed in ((0, False), (width + 3, True)):
        inner = hidden or width
        z0, u, weight, output = _draws(case, (batch, width), (batch, inner), (inner, width), (width, inner))
        gain, offset, grad = _draws(case, (width,), (width,), (batch, width), first=4)
        if batch > 2:
            z0[1] = grad[1] = math.nan
        weight, output, gain = weight / (3 * math.sqrt(width)), output / math.sqrt(inner), gain / 3
        norm = Norm(gain, offset, 0.1) if normed else None
        layer = op.Layer(weight, u, function, output if hidden else None, norm)
        wide = _Widened(layer)
        with torch.no_grad():
            at = z0.double().nan_to_num()
            slope, normal, inverse = wide.linearise(at)
        sums = torch.float64 if case.dtype == torch.float64 else torch.float32
        stored, normal, inverse = slope.to(case.dtype), normal.to(case.dtype), inverse.to(sums)
        linear = op.Linearised(
            weight,
            output if hidden else None,
            stored,
            gain if normed else None,
            normal if normed else None,
            inverse if normed else None,
            grad,
        )
        transposed = _Transposed(wide, stored.double(), normal.double(), inverse.double(), grad.double())

        kinds: tuple[tuple[str, Any, Tensor, Any], ...]
        kinds = (("", layer, z0, wide), (" adjoint", linear, grad, transposed))
        for kind, cell, start, f in kinds:
            label = f"{'hidden+norm' if hidden else 'plain'}{kind}"
            value, record, traced = op.mlp_solve(start, cell, rule, trace=True)
            wanted = solve(f, start.double(), Anderson(history=2, mixing=0.9), trace=True, **options)
            assert traced is not None
            assert wanted.trace is not None
            bound = 2 * BOUNDS[name_of(case.dtype)]  # of three evaluations
            if width == 1:  # the Gram matrix is singular but for the ridge, and its solution errs by as much
                bound = max(bound, 4 * torch.finfo(torch.float64).eps / rule.ridge)
            yield row(case, "mlp", "mlp_solve", f"{label} x", relative_error(value, wanted.value), bound)
            # A residual is a difference of states, and rounded as they are: against the larger of them, and
            # where few entries are all but solved for, by as much as it has itself.
            out, expected = (trace[0] / (1 + trace[0]) for trace in (traced, wanted.trace))
            size = expected[expected.isfinite()].square().mean().sqrt().item()
            bound = max(bound, torch.finfo(case.dtype).eps / 2 / size) if size else bound
            yield row(case, "mlp", "mlp_solve", f"{label} r", relative_error(out, expected), bound)
            differing = (record.status.cpu() != wanted.status.cpu()).sum().item()
            differing += (record.steps.cpu() != wanted.steps.cpu()).sum().item()
            yield row(case, "mlp", "mlp_solve", f"{label} status", float(differing), 0.0)


class _Widened:
    """The cell of a whole solve in float64, by ordinary operators."""

    def __init__(self, layer: Any):
        self.weight, self.u = layer.weight.double(), layer.u.double()
        self.activation, self.norm = layer.activation, layer.norm
        self.output = None if layer.output is None else layer.output.double()

    def __call__(self, z: Tensor) -> Tensor:
        value = self._before_norm(z)
        if self.norm is None:
            return value
        parameters = self.norm.gain.double(), self.norm.offset.double()
        return torch.nn.functional.layer_norm(value, value.shape[-1:], *parameters, self.norm.epsilon)

    def _before_norm(self, z: Tensor) -> Tensor:
        value = reference_mlp.mlp(z, self.weight, self.u, self.activation)
        return value if self.output is None else value @ self.output.mT

    def linearise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """act′, and the LayerNorm's n and 1/σ at z, if there is one."""
        _, slope = reference_mlp.mlp_and_slope(z, self.weight, self.u, self.activation)
        value = self._before_norm(z)
        deviation = (
            value.var(-1, correction=0, keepdim=True) + (self.norm.epsilon if self.norm else 0)
        ).sqrt()
        return slope, (value - value.mean(-1, keepdim=True)) / deviation, 1 / deviation


class _Transposed:
    """`x ↦ x J + g`, J being that cell's Jacobian where its layers have these slopes, n and 1/σ."""

    def __init__(self, cell: _Widened, slope: Tensor, normal: Tensor, inverse: Tensor, grad: Tensor):
        self.cell, self.slope, self.normal, self.inverse, self.grad = cell, slope, normal, inverse, grad

    def __call__(self, vector: Tensor) -> Tensor:
        if self.cell.norm is not None:
            g = vector * self.cell.norm.gain.double()
            along = (g * self.normal).mean(-1, keepdim=True)
            vector = self.inverse * (g - g.mean(-1, keepdim=True) - self.normal * along)
        vector = vector if self.cell.output is None else vector @ self.cell.output
        return reference_mlp.mlp_vjp(vector, self.slope, self.cell.weight) + self.grad


def _draws(case: Case, *shapes: tuple[int, ...], first: int = 0) -> list[Tensor]:
    """Independent random tensors."""
    return [case.randn(*shape, stream=first + stream) for stream, shape in enumerate(shapes)]
