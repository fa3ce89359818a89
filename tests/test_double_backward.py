"""Second derivatives through an `ImplicitGradient`: against finite differences and the unrolled gradient."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import triton_deq as td
from tests.problems import tanh_map
from triton_deq import implicit

TOLERANCE = {"tol": 1e-13, "max_steps": 200}
TIGHT = {**TOLERANCE, "backend": "reference"}
TWICE = td.ImplicitGradient(**TOLERANCE, double_backward=True)


class ClosedForm:
    """`z ↦ tanh(z sin(x) / 2 + x)` with its product written out."""

    def __init__(self, x):
        self.x = x

    def __call__(self, z):
        return torch.tanh(0.5 * self.x.sin() * z + self.x)

    def vjp(self, z):
        value = self(z)
        return value, lambda vector: 0.5 * self.x.sin() * (1 - value.square()) * vector


def solved(x, gradient=TWICE, **options):
    return td.fixed_point(
        ClosedForm(x).__call__, torch.zeros_like(x), gradient=gradient, **{**TIGHT, **options}
    )


def points(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden(), td.Picard()], ids=str)
def test_second_derivatives_against_finite_differences(solver):
    """In the weights, which J depends on, and in the cotangent."""
    _, weight, bias = tanh_map(2, 3, gain=0.3)
    gradient = td.ImplicitGradient(solver, 1e-13, 400, double_backward=True)

    def value(weight, bias):
        f = lambda z: torch.tanh(z @ weight.T + bias * z.sin() + bias)  # noqa: E731
        z0 = torch.zeros(2, 3, dtype=torch.float64)
        return td.fixed_point(f, z0, solver, gradient=gradient, **{**TIGHT, "max_steps": 400})

    assert gradcheck(value, (weight, bias))
    assert gradgradcheck(value, (weight, bias))


def test_a_loss_on_the_gradient_beside_one_on_the_value():
    """As of energies and forces: both go into one backward pass, the value's u and what the forces need."""

    def loss(x, scale):
        energy = (scale * solved(x)).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.square().sum() + energy

    assert gradcheck(loss, (points(3, 4), points(4)))


@pytest.mark.parametrize("make", [lambda x: ClosedForm(x).__call__, ClosedForm], ids=["f", "vjp"])
def test_hessian_and_forward_mode_of_autograd(make):
    def function(x, gradient):
        return td.fixed_point(make(x), torch.zeros_like(x), gradient=gradient, **TIGHT).sin().sum()

    x = points(2, 3)
    both = [
        torch.autograd.functional.hessian(lambda x: function(x, gradient), x)  # noqa: B023
        for gradient in (TWICE, td.UnrolledGradient())
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)
    exact = torch.autograd.functional.jacobian(solved, x).flatten(2).flatten(0, 1) @ torch.ones(6).double()
    _, product = torch.autograd.functional.jvp(solved, x, torch.ones_like(x))
    torch.testing.assert_close(product.flatten(), exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_of_a_cell_with_kernels(backend, layer_norm, device):
    torch.manual_seed(0)
    cell = td.MLPCell(6, 3, activation="tanh", layer_norm=layer_norm).to(device, torch.float64)
    with torch.no_grad():
        cell.state.weight.mul_(0.3)
    x = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def second(gradient, backend, **options):
        deq = td.DEQ(cell, gradient=gradient, backend=backend, **options)
        (force,) = torch.autograd.grad(deq(x).value.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(force.square().sum(), list(cell.parameters()))

    expected = second(td.UnrolledGradient(), "reference", solver=td.Picard(), tol=0, max_steps=500)
    options = {"tol": 1e-13, "max_steps": 60}
    found = second(td.ImplicitGradient(**options, double_backward=True), backend, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_each_pass_solves_no_more_than_it_must(dtype, monkeypatch):
    """One system for the gradient, also if it is to be differentiated; of its derivative J's and Jᵀ's."""
    solves = []
    for name in ("solve", "solve_and_keep"):
        original = getattr(implicit, name)
        monkeypatch.setattr(
            implicit,
            name,
            lambda *args, original=original, **options: (solves.append(1), original(*args, **options))[1],
        )
    x = torch.randn(4, 8).to(dtype).requires_grad_()
    gradient = td.ImplicitGradient(tol=1e-2, double_backward=True)
    z = solved(x, gradient, tol=1e-2)
    assert len(solves) == 1
    (plain,) = torch.autograd.grad(z.square().sum(), x, retain_graph=True)
    assert len(solves) == 2
    (grad,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    assert len(solves) == 3
    torch.testing.assert_close(grad, plain)
    torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    assert len(solves) == 6  # with z's own: the loss is not linear in z


def test_a_sample_of_small_gradient_keeps_its_second_derivative():
    """Beside one whose is larger by more than rounding hides."""
    x = points(2, 4)
    scale = torch.tensor([[1e12], [1.0]], dtype=torch.float64)

    def second(x, scale):
        energy = (scale * solved(x)).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.autograd.grad((force / scale.square()).square().sum() + energy, x)[0]

    together = second(x, scale)
    alone = second(x.detach()[1:].requires_grad_(), scale[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-9, atol=1e-9)


def test_what_one_pass_takes_away_is_no_bound_for_the_next():
    """The second derivative alone, small beside the gradient that was asked for first."""
    x = points(2, 4)
    (grad,) = torch.autograd.grad((1e20 * solved(x)).sum(), x, create_graph=True)
    (scaled,) = torch.autograd.grad((1e-20 * grad).square().sum(), x)
    (grad,) = torch.autograd.grad(solved(x).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-11)


def test_one_nan_sample_and_an_empty_batch():
    x = points(3, 4)
    clean = torch.autograd.functional.hessian(lambda x: solved(x).square().sum(), x)
    with torch.no_grad():
        x[1] = torch.nan
    spoiled = torch.autograd.functional.hessian(lambda x: solved(x).square().sum(), x)
    for sample in (0, 2):
        torch.testing.assert_close(spoiled[sample, :, sample], clean[sample, :, sample])
    empty = points(0, 4)
    (grad,) = torch.autograd.grad(solved(empty).sum(), empty, create_graph=True)
    assert torch.autograd.grad(grad.sum(), empty)[0].shape == (0, 4)


def test_its_solves_are_reported():
    x = points(2, 4)
    z, solution = solved(x, return_solution=True)
    (grad,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert solution.backward.converged.all()
    first = solution.backward
    grad.sum().backward()
    assert solution.backward is not first
    assert first.backward.converged.all()


def test_a_third_derivative_is_refused():
    x = points(2, 4)
    (grad,) = torch.autograd.grad(solved(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a third time"):
        torch.autograd.grad(second.sum(), x)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="shine='alone' makes none"):
        td.ImplicitGradient(shine="alone", double_backward=True)
    with pytest.raises(ValueError, match="double_backward=True of an ImplicitGradient is for torch.autograd"):
        torch.func.grad(lambda x: solved(x).sum())(points(2, 4).detach())


def test_warm_start_and_shine_begin_the_solve_that_is_differentiated():
    x = points(2, 4)
    shine = td.ImplicitGradient(**TOLERANCE, shine="start", double_backward=True)
    warm = td.ImplicitGradient(**TOLERANCE, warm_start=True, double_backward=True)
    expected = torch.autograd.functional.hessian(lambda x: solved(x).square().sum(), x)
    for gradient, options in ((shine, {"solver": td.Broyden()}), (warm, {}), (warm, {})):
        found = torch.autograd.functional.hessian(
            lambda x: solved(x, gradient, **options).square().sum(),  # noqa: B023
            x,
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    z, solution = solved(x, warm, return_solution=True)
    torch.autograd.grad(z.sum(), x, create_graph=True, retain_graph=True)
    cold = solution.backward.nfe
    torch.autograd.grad(z.sum(), x, create_graph=True)
    assert solution.backward.nfe < cold
