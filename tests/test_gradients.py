"""The gradients of a fixed point: against each other, finite differences and the theorem."""

import copy
import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck

import triton_deq as td
from tests.problems import linear_map, tanh_map

TIGHT = {"tol": 1e-13, "max_steps": 200, "backend": "reference"}
IMPLICIT = td.ImplicitGradient(tol=1e-13, max_steps=200)


def gradients_of(z, *leaves):
    return torch.autograd.grad((z.sin() * torch.linspace(1, 2, z.shape[-1], dtype=z.dtype)).sum(), leaves)


@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden(), td.Picard()], ids=str)
def test_implicit_gradient_is_the_theorems(solver):
    """(I − J)⁻ᵀ by a dense solve for each sample."""
    f, weight, bias = tanh_map(3, 6)
    gradient = td.ImplicitGradient(solver=solver, tol=1e-13, max_steps=400)
    options = {**TIGHT, "max_steps": 400}
    z = td.fixed_point(f, torch.zeros(3, 6, dtype=torch.float64), solver, gradient=gradient, **options)
    cotangent = torch.randn_like(z)
    (grad,) = torch.autograd.grad(z, bias, cotangent)
    for sample in range(3):
        slope = 1 - z[sample].detach() ** 2
        jacobian = slope[:, None] * weight.detach()
        u = torch.linalg.solve((torch.eye(6, dtype=torch.float64) - jacobian).T, cotangent[sample])
        torch.testing.assert_close(grad[sample], slope * u, rtol=1e-9, atol=1e-11)


def test_implicit_gradient_against_finite_differences():
    _, weight, bias = tanh_map(2, 4)

    def solved(weight, bias):
        z0 = torch.zeros(2, 4, dtype=torch.float64)
        return td.fixed_point(lambda z: torch.tanh(z @ weight.T + bias), z0, gradient=IMPLICIT, **TIGHT)

    assert gradcheck(solved, (weight, bias))


@pytest.mark.parametrize("solver", [td.Anderson(3), td.Broyden(2), td.Picard(0.9)], ids=str)
def test_unrolled_gradient_against_finite_differences(solver):
    """Of the iterate after a few steps, far from the fixed point, z0 included."""
    _, weight, bias = tanh_map(2, 3)
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def solved(weight, bias, z0):
        return td.fixed_point(
            lambda z: torch.tanh(z @ weight.T + bias),
            z0,
            solver,
            tol=0,
            max_steps=5,
            gradient=td.UnrolledGradient(),
            backend="reference",
        )

    assert gradcheck(solved, (weight, bias, z0))


def test_all_gradients_agree_at_convergence():
    f, weight, bias = tanh_map(3, 6)
    z0 = torch.zeros(3, 6, dtype=torch.float64)
    exact = gradients_of(td.fixed_point(f, z0, gradient=IMPLICIT, **TIGHT), weight, bias)
    for gradient in (td.UnrolledGradient(), td.PhantomGradient(steps=300)):
        other = gradients_of(td.fixed_point(f, z0, gradient=gradient, **TIGHT), weight, bias)
        for mine, wanted in zip(other, exact, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_implicit_gradient_with_the_kernels(backend, device):
    f, weight, bias = tanh_map(2, 5, device=device)
    z0 = torch.zeros(2, 5, dtype=torch.float64, device=device)
    gradient = td.ImplicitGradient(tol=1e-8)
    z = td.fixed_point(f, z0, tol=1e-8, gradient=gradient, backend=backend)
    exact = td.fixed_point(f, z0, gradient=IMPLICIT, **TIGHT)
    for mine, wanted in zip(
        gradients_of(z.cpu(), weight, bias), gradients_of(exact.cpu(), weight, bias), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_phantom_gradient_of_one_step_is_the_gradient_of_f():
    f, weight, bias = tanh_map(2, 5)
    z0 = torch.zeros(2, 5, dtype=torch.float64)
    z, solution = td.fixed_point(f, z0, gradient=td.PhantomGradient(), return_solution=True, **TIGHT)
    for mine, wanted in zip(
        gradients_of(z, weight, bias), gradients_of(f(solution.value), weight, bias), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_phantom_gradient_is_damped():
    """Two steps z ← (1 − β) z + β f(z), differentiated by hand for a linear f."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(1, 1, dtype=torch.float64)
    z = td.fixed_point(lambda z: scale * z + 1, z0, gradient=td.PhantomGradient(2, 0.3), **TIGHT)
    z.sum().backward()
    fixed = 2.0  # 1 / (1 - scale)
    assert math.isclose(scale.grad.item(), 0.3 * fixed * (1 + (0.7 + 0.3 * 0.5)), rel_tol=1e-9)


def backward_by(solver, f, z0):
    """The backward solve of the sum of a fixed point, and the gradient in x of f(z) + x."""
    x = torch.zeros_like(z0, requires_grad=True)
    gradient = td.ImplicitGradient() if solver is None else td.ImplicitGradient(solver)
    z, solution = td.fixed_point(
        lambda z: f(z) + x, z0, gradient=gradient, backend="reference", return_solution=True
    )
    z.sum().backward()
    return solution.backward, x.grad


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.95])
def test_the_default_ridge_costs_no_products_where_the_jacobian_contracts(radius):
    f, _, matrix = linear_map(radius, 4, 30)
    z0 = torch.zeros(4, 30, dtype=torch.float64)
    damped, gradient = backward_by(None, f, z0)
    undamped, _ = backward_by(td.Anderson(), f, z0)
    assert damped.nfe <= undamped.nfe + 1
    wanted = torch.linalg.solve(torch.eye(30, dtype=torch.float64) - matrix.T, torch.ones_like(z0).T).T
    if damped.converged.all():
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())


def test_the_default_ridge_holds_back_what_a_jacobian_close_to_the_identity_would_blow_up():
    """As where a forward solve stopped short of the fixed point; the direction's exact share is 1000."""
    slopes = torch.cat([torch.linspace(-0.9, 0.9, 11), torch.tensor([0.999])]).double()
    z0 = torch.zeros(4, 12, dtype=torch.float64)
    damped, gradient = backward_by(None, lambda z: slopes * z, z0)
    undamped, exact = backward_by(td.Anderson(), lambda z: slopes * z, z0)
    assert undamped.converged.all()
    assert exact.abs().max() > 900
    assert not damped.converged.any(), "which the solution says"
    assert gradient.abs().max() < 30
    steep = slopes.abs() < 0.5
    torch.testing.assert_close(gradient[:, steep], exact[:, steep], rtol=0.1, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale):
    _, weight, bias = tanh_map(2, 5)
    weight, bias = (leaf.detach().float().requires_grad_() for leaf in (weight, bias))
    z = td.fixed_point(
        lambda z: torch.tanh(z @ weight.T + bias), torch.zeros(2, 5), tol=1e-6, backend="reference"
    )
    (plain,) = torch.autograd.grad(z.sum(), weight, retain_graph=True)
    (scaled,) = torch.autograd.grad(scale * z.sum(), weight)
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-4, atol=1e-6)


def half_gradients(z, x, scales, **options):
    """The gradients of sums of z, each scaled by a power of two, in units of that scale."""
    scales = torch.tensor(scales, dtype=z.dtype, device=z.device)
    gradients = [
        torch.autograd.grad(z, x, each.expand_as(z), retain_graph=True, **options) for each in scales
    ]
    return [gradient.detach() / each for (gradient,), each in zip(gradients, scales, strict=True)]


@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden(), td.Picard()], ids=repr)
def test_float16_holds_a_loss_of_any_scale_or_says_that_it_does_not(solver, double_backward, backend, device):
    """u is five times the loss's gradient: at 2¹⁴ too large for float16, which GradScaler must see."""
    x = torch.zeros(3, 5, dtype=torch.float16, device=device, requires_grad=True)
    gradient = td.ImplicitGradient(solver, max_steps=40, double_backward=double_backward)
    z, solution = td.fixed_point(
        lambda z: 0.8 * z + x,
        torch.zeros_like(x),
        gradient=gradient,
        return_solution=True,
        backend=backend,
    )
    scales = (1.0, 2.0**-17, 2.0**12, 2.0**14, math.inf, math.nan)
    plain, small, large, *lost = half_gradients(z, x, scales, create_graph=double_backward)
    torch.testing.assert_close(plain, torch.full_like(plain, 5), rtol=0.01, atol=0)
    torch.testing.assert_close(small, plain, rtol=2.0**-8, atol=0)  # of which float16 has fewer bits there
    assert torch.equal(large, plain)
    assert not torch.stack(lost).isfinite().any()
    of_nothing = torch.autograd.grad(z, x, torch.zeros_like(z), retain_graph=True)[0]
    assert torch.equal(of_nothing, torch.zeros_like(x))
    torch.autograd.grad(z, x, torch.full_like(z, 4096.0))
    torch.testing.assert_close(solution.backward.value, 4096 * plain)  # in the loss's units


@pytest.mark.parametrize("fields", [{"warm_start": True}, {"shine": "start"}, {"shine": "alone"}], ids=str)
def test_float16_and_where_u_starts(fields):
    """What is known of u before is in the loss's units, and the solve is not."""
    x = torch.zeros(3, 5, dtype=torch.float16, requires_grad=True)
    gradient = td.ImplicitGradient(td.Picard(), max_steps=60, **fields)
    z, solution = td.fixed_point(
        lambda z: 0.7 * z + x,
        torch.ones_like(x),
        td.Broyden(),
        tol=1e-4,
        gradient=gradient,
        return_solution=True,
        backend="reference",
    )
    plain, large = half_gradients(z, x, (1.0, 2.0**12))
    accuracy = 0.2 if fields.get("shine") == "alone" else 0.02  # of an estimate, or of a solve
    torch.testing.assert_close(plain, torch.full_like(x, 1 / 0.3), rtol=accuracy, atol=0)
    torch.testing.assert_close(large, plain, rtol=0.01, atol=0)
    if "warm_start" in fields:
        torch.autograd.grad(z, x, torch.full_like(z, 2.0**12))
        assert solution.backward.nfe == 1


def test_float16_solution_that_is_thrown_has_the_units_of_the_loss():
    x = torch.zeros(3, 5, dtype=torch.float16, requires_grad=True)
    gradient = td.ImplicitGradient(td.Picard(), max_steps=2, throw=True)
    z = td.fixed_point(lambda z: 0.8 * z + x, torch.zeros_like(x), gradient=gradient)
    with pytest.raises(td.NotConverged) as raised:
        z.backward(torch.full_like(z, 4096.0))
    assert (raised.value.solution.value > 4096).all()


def test_float16_in_torch_func():
    x = torch.zeros(3, 5, dtype=torch.float16)
    pull = torch.func.vjp(lambda x: td.fixed_point(lambda z: 0.8 * z + x, torch.zeros_like(x)), x)[1]
    plain, large, lost = (pull(torch.full_like(x, scale))[0] / scale for scale in (1.0, 2.0**12, 2.0**14))
    assert torch.equal(large, plain)
    assert lost.isinf().all()


GRADIENTS = [
    td.ImplicitGradient(),
    td.ImplicitGradient(double_backward=True),
    td.PhantomGradient(),
    td.PhantomGradient(2, mixing=0.9),
    td.UnrolledGradient(),
]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_may_choose_the_dtype_of_a_value(packed, gradient, device):
    """A model that works without autocast works with it; the state keeps its dtype."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 5, device=device)
    x = torch.randn(4, 5, device=device)
    z0 = torch.zeros_like(x)

    def slope(autocast):
        layer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            f = lambda z: torch.tanh(layer(0.5 * z) + layer(x))  # noqa: E731
            assert f(z0).dtype == (torch.bfloat16 if autocast else torch.float32)
            if packed:
                z, other = td.fixed_point(lambda z: (f(z[0]), 0.5 * z[1] + 1), (z0, z0), gradient=gradient)
                assert other.dtype == torch.float32
            else:
                z = td.fixed_point(f, z0, gradient=gradient)
        assert z.dtype == torch.float32
        z.square().sum().backward()
        return layer.weight.grad.clone()

    wanted = slope(False)
    assert (slope(True) - wanted).norm() < 0.03 * wanted.norm()


def test_float16_autocast_with_a_gradient_scaler(backend, device):
    """It halves its scale until u fits, and then the gradient is right."""
    torch.manual_seed(0)
    gradient = td.ImplicitGradient(td.Anderson())
    deq = td.DEQ(td.MLPCell(8, 4), max_steps=40, gradient=gradient, backend=backend).to(device)
    with torch.no_grad():  # u is some four times the loss's gradient, which alone fits from the start
        deq.cell.state.weight.copy_(0.75 * torch.eye(8))
        deq.cell.injection.bias.zero_()
    x = 0.02 * torch.randn(3, 4, device=device)
    optimizer = torch.optim.SGD(deq.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**17)
    before = copy.deepcopy(deq.cell)
    steps = 0
    while torch.equal(deq.cell.state.weight, before.state.weight):
        steps += 1
        assert steps < 10
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            out = deq(x)
        scaler.scale(out.value.float().square().sum()).backward()
        scaler.unscale_(optimizer)
        found = [each.grad.clone() for each in deq.parameters()]
        scaler.step(optimizer)
        scaler.update()
    assert steps > 1
    exact = td.DEQ(before.double(), tol=1e-9, max_steps=60, backend="reference")
    exact(x.double()).value.square().sum().backward()
    found, wanted = (
        torch.cat([each.flatten().double().cpu() for each in grads])
        for grads in (found, [each.grad for each in exact.parameters()])
    )
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_backward_twice_and_frozen_parameters():
    f, weight, bias = tanh_map(2, 5)
    z = td.fixed_point(f, torch.zeros(2, 5, dtype=torch.float64), **TIGHT)
    first = torch.autograd.grad(z.sum(), bias, retain_graph=True)
    second = torch.autograd.grad(z.sum(), bias)
    assert torch.equal(first[0], second[0])
    weight.requires_grad_(False)
    td.fixed_point(f, torch.zeros(2, 5, dtype=torch.float64), **TIGHT).sum().backward()
    assert weight.grad is None
    assert bias.grad is not None


class ClosedForm:
    """`z ↦ tanh(z/2 + x)` with its product written out."""

    def __init__(self, x):
        self.x = x

    def __call__(self, z):
        return torch.tanh(0.5 * z + self.x)

    def vjp(self, z):
        value = self(z)
        return value, lambda vector: 0.5 * (1 - value.square()) * vector


def of_input(x, make=lambda x: lambda z: torch.tanh(0.5 * z + x)):
    return td.fixed_point(make(x), torch.zeros_like(x), gradient=IMPLICIT, **TIGHT).square().sum()


def linear_of_input(x, make=lambda x: lambda z: torch.tanh(0.5 * z) + x):
    """Neither its gradient nor the Jacobian has a graph that leads to x: but z* depends on it."""
    return td.fixed_point(make(x), torch.zeros_like(x), gradient=IMPLICIT, **TIGHT).sum()


def second_by_backward(function, x):
    x = x.requires_grad_()
    torch.autograd.grad(function(x), x, create_graph=True)[0].sum().backward()


def second_by_grad(function, x):
    """The engine goes only where a gradient is asked for."""
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize(
    "function",
    [of_input, lambda x: of_input(x, ClosedForm), linear_of_input],
    ids=["f", "vjp", "linear"],
)
@pytest.mark.parametrize(
    "ask",
    [
        second_by_backward,
        second_by_grad,
        torch.autograd.functional.hessian,
        lambda function, x: torch.func.grad(lambda x: torch.func.grad(function)(x).sum())(x),
        lambda function, x: torch.func.jacrev(torch.func.jacrev(function))(x),
    ],
    ids=["backward", "grad", "hessian", "func.grad", "jacrev"],
)
def test_second_derivatives_are_refused_rather_than_wrong(ask, function):
    x = torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        ask(function, x)


def test_so_are_those_in_what_the_loss_does_with_it():
    """Which u depends on through its right-hand side alone."""
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def of_x(x, head):
        z = td.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), gradient=IMPLICIT, **TIGHT)
        return (z @ head).sum()

    (grad,) = torch.autograd.grad(of_x(x, head), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        torch.autograd.grad(grad.square().sum(), head)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        torch.func.grad(lambda head: torch.func.grad(of_x)(x.detach(), head).square().sum())(head.detach())
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        torch.func.jvp(
            lambda head: torch.func.grad(of_x)(x.detach(), head), (head.detach(),), (head.detach(),)
        )


def by_forward_ad(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


@pytest.mark.parametrize(
    "ask",
    [
        lambda function, x: torch.func.jvp(function, (x,), (x.cos(),))[1],
        lambda function, x: (torch.func.jacfwd(function)(x) * x.cos()).sum(),
        lambda function, x: torch.func.vmap(lambda v: torch.func.jvp(function, (x,), (v,))[1])(x.cos()[None])[
            0
        ],
        by_forward_ad,
    ],
    ids=["jvp", "jacfwd", "vmap", "forward_ad"],
)
@pytest.mark.parametrize(
    "function",
    [of_input, lambda x: of_input(x, ClosedForm), linear_of_input],
    ids=["f", "vjp", "linear"],
)
def test_forward_mode(ask, function):
    x = torch.randn(2, 5, dtype=torch.float64)
    expected = (torch.func.grad(function)(x) * x.cos()).sum()
    torch.testing.assert_close(ask(function, x), expected, rtol=1e-9, atol=1e-11)


def test_forward_mode_of_a_constant():
    x = torch.randn(2, 5, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda v: of_input(x) * v.sum(), (x,), (x,))
    torch.testing.assert_close(tangent, of_input(x) * x.sum())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda x: torch.func.hessian(of_input)(x), "forward mode around reverse mode"),
        (lambda x: torch.func.jacrev(torch.func.jacfwd(of_input))(x), "differentiated a second time"),
        (lambda x: torch.func.jacfwd(torch.func.jacfwd(of_input))(x), "differentiated a second time"),
        (
            lambda x: torch.func.grad(lambda x: torch.func.jvp(of_input, (x,), (x,))[0])(x),
            "differentiated a second time",
        ),
    ],
    ids=["hessian", "jacrev of jacfwd", "jacfwd of jacfwd", "grad of the value"],
)
def test_forward_mode_that_is_refused(ask, message):
    with pytest.raises(RuntimeError, match=message):
        ask(torch.randn(2, 5, dtype=torch.float64))


def test_a_gradient_of_what_comes_after_can_be_differentiated():
    """Its own derivative goes through the fixed point once."""
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def squared_norm(x):
        z = td.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), gradient=IMPLICIT, **TIGHT)
        (grad,) = torch.autograd.grad((z @ head).square().sum(), head, create_graph=True)
        return grad.square().sum()

    assert gradcheck(squared_norm, x)


def test_without_gradients_nothing_is_recorded():
    f, *_ = tanh_map(2, 5)
    with torch.no_grad():
        assert not td.fixed_point(f, torch.zeros(2, 5, dtype=torch.float64), **TIGHT).requires_grad


class Halved(torch.autograd.Function):
    """Names no input but z: what else it might hand gradients to is its own affair."""

    @staticmethod
    def forward(ctx, z):
        return z / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@pytest.mark.parametrize("double_backward", [False, True])
def test_where_all_is_frozen_nothing_waits_for_a_backward_solve(double_backward):
    gradient = td.ImplicitGradient(double_backward=double_backward)
    f, weight, bias = tanh_map(2, 5)
    start = torch.zeros(2, 5, dtype=torch.float64)
    bias.requires_grad_(False)
    assert td.fixed_point(f, start, gradient=gradient).requires_grad
    weight.requires_grad_(False)
    z, solution = td.fixed_point(f, start, gradient=gradient, return_solution=True, **TIGHT)
    assert not z.requires_grad
    assert (z - f(z)).abs().max() < 1e-9
    head = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (z @ head).sum().backward()
    assert torch.equal(head.grad, z.sum(dim=0))
    assert solution.backward is None

    encoder = torch.ones(5, dtype=torch.float64, requires_grad=True)
    x = torch.tanh(encoder * 0.3).expand(2, 5)
    z = td.fixed_point(lambda z: f(z) + x, start, gradient=gradient)
    assert torch.autograd.grad(z.sum(), encoder)[0].abs().min() > 0
    assert td.fixed_point(lambda z: Halved.apply(f(z)), start, gradient=gradient).requires_grad


@pytest.mark.parametrize(
    "gradient", [td.ImplicitGradient(), td.PhantomGradient(), td.UnrolledGradient()], ids=str
)
def test_empty_batch(gradient):
    weight = torch.randn(3, 3, requires_grad=True)
    z = td.fixed_point(
        lambda z: torch.tanh(z @ weight), torch.zeros(0, 3), gradient=gradient, backend="reference"
    )
    assert z.shape == (0, 3)
    z.sum().backward()


def test_one_nan_sample_leaves_the_others_solved():
    f, *_ = tanh_map(3, 5)
    poison = torch.tensor([[0.0], [math.nan], [0.0]], dtype=torch.float64)
    options = {"tol": 1e-10, "backend": "reference", "return_solution": True}
    for gradient in (td.ImplicitGradient(), td.UnrolledGradient()):
        z, solution = td.fixed_point(
            lambda z: f(z) + poison, torch.zeros(3, 5, dtype=torch.float64), gradient=gradient, **options
        )
        assert solution.status.tolist() == [0, 3, 0]
        assert z.isfinite().all()


@pytest.mark.parametrize("solver", [td.Anderson(3, mixing=0.8), td.Broyden(3), td.Picard()], ids=str)
@pytest.mark.parametrize("norm_over", ["sample", "batch"])
def test_unrolled_takes_the_same_iterates(solver, norm_over):
    f, *_ = tanh_map(3, 8)
    z0 = torch.zeros(3, 8, dtype=torch.float64)
    options = {"tol": 1e-5, "norm_over": norm_over, "trace": True, "backend": "reference"}
    unrolled, solution = td.fixed_point(
        f, z0, solver, gradient=td.UnrolledGradient(), return_solution=True, **options
    )
    solved = td.solve(f, z0, solver, **options)
    torch.testing.assert_close(solution.trace, solved.trace, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(unrolled.detach(), solved.value)
    assert torch.equal(solution.steps, solved.steps)


def test_unrolled_keeps_the_best_iterate_where_later_ones_are_worse():
    """Residuals fall at first and grow then, in every sample at once."""
    steps = torch.tensor([0.9, 0.2, 3.0, 2.0], dtype=torch.float64)

    def function():
        taken = iter(steps)
        return lambda z: z + next(taken) * torch.ones_like(z)

    options = {"tol": 0.0, "max_steps": 4, "residual": "absolute", "backend": "reference"}
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    value, solution = td.fixed_point(
        function(), z0, td.Picard(), gradient=td.UnrolledGradient(), return_solution=True, **options
    )
    torch.testing.assert_close(value, torch.full_like(z0, 0.9))
    torch.testing.assert_close(solution.residual, torch.full((2,), 0.2 * 3**0.5, dtype=torch.float64))
    torch.testing.assert_close(td.solve(function(), z0, td.Picard(), **options).value, value)


def test_unrolled_that_ends_where_it_began_has_a_gradient_of_zero():
    f, weight, _ = tanh_map(2, 4)
    z0 = torch.zeros(2, 4, dtype=torch.float64)
    z = td.fixed_point(f, z0, gradient=td.UnrolledGradient(), max_steps=1)
    assert torch.equal(z, z0)
    (gradient,) = torch.autograd.grad(z.sum(), weight)
    assert torch.equal(gradient, torch.zeros_like(weight))
