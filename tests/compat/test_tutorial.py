"""The tutorial's Anderson on ours, held against its published formulas in float64."""

import pytest
import torch
from torch import nn

from tests.compat.locuslab_formulas import mixed
from tests.compat.test_locuslab import problem
from triton_deq.compat import tutorial as compat


def anderson(f, x0, m=5, lam=1e-4, max_iter=50, tol=1e-2, beta=1.0):
    xs, fs, residuals = [x0, f(x0)], [f(x0), f(f(x0))], []
    for step in range(2, max_iter):
        recent = slice(max(step - m, 0), step)
        rows = [
            mixed(
                [x[sample].flatten() for x in xs[recent]],
                [y[sample].flatten() for y in fs[recent]],
                lam,
                beta,
            )
            for sample in range(len(x0))
        ]
        xs.append(torch.stack(rows).view_as(x0))
        fs.append(f(xs[-1]))
        residuals.append(relative(xs[-1], fs[-1]))
        if residuals[-1] < tol:
            break
    return xs[-1], residuals


def relative(x, value):
    return (value - x).norm().item() / (1e-5 + value.norm().item())


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=0, atol=1e-10)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tol": 1e-6}, {"m": 3, "lam": 1e-2, "beta": 0.8, "max_iter": 12}, {"beta": 1.5, "tol": 0.0}],
    ids=str,
)
def test_anderson(options, backend):
    """Far from a fixed point, too, where the last iterate need not be the best."""
    for norm in (0.7, 3.0):
        f, x0 = problem(norm=norm)
        assert_same(compat.anderson(f, x0, backend=backend, **options), anderson(f, x0, **options))


@pytest.mark.kernels
def test_the_kernels(device):
    f, x0 = problem((2, 3, 2))
    options = {"max_iter": 8, "tol": 1e-4, "m": 3, "beta": 0.9}
    ours = compat.anderson(lambda z: f(z.cpu()).to(device), x0.to(device), backend="triton", **options)
    assert_same(ours, anderson(f, x0, **options))


class DEQFixedPoint(nn.Module):
    """The tutorial's module in its own order: a solve, f with a graph, and a hook that solves backwards."""

    def __init__(self, f, solver, **options):
        super().__init__()
        self.f, self.solver, self.options = f, solver, options

    def forward(self, x):
        with torch.no_grad():
            z, self.forward_res = self.solver(lambda z: self.f(z, x), torch.zeros_like(x), **self.options)
        z = self.f(z, x)
        at = z.clone().detach().requires_grad_()
        value = self.f(at, x)

        def backward(gradient):
            step = lambda y: torch.autograd.grad(value, at, y, retain_graph=True)[0] + gradient  # noqa: E731
            g, self.backward_res = self.solver(step, gradient, **self.options)
            return g

        z.register_hook(backward)
        return z


def test_the_module_that_calls_it():
    weight = (torch.randn(6, 6, dtype=torch.float64) / 5).requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    seen = []
    for solver in (compat.anderson, anderson):
        deq = DEQFixedPoint(lambda z, x: torch.tanh(z @ weight + x), solver, tol=1e-4, max_iter=25)
        loss = deq(x).square().sum()
        seen.append(
            (torch.cat([g.flatten() for g in torch.autograd.grad(loss, (weight, x))]), deq.backward_res)
        )
        assert deq.forward_res[-1] < 1e-4
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=1e-10)
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-6)


def test_a_sample_that_is_not_finite_is_left_out():
    f, x0 = problem()

    def spoilt(z):
        value = f(z)
        value[1] = torch.inf
        return value

    z, residuals = compat.anderson(spoilt, x0, tol=1e-3, backend="reference")
    assert residuals[-1] < 1e-3
    assert z[1].isnan().all()
    torch.testing.assert_close(f(z)[::2], z[::2], rtol=0, atol=2e-2)

    z, residuals = compat.anderson(lambda z: z * torch.nan, x0, backend="reference")
    assert z.isnan().all()
    assert len(residuals) == 1
    assert residuals[0] != residuals[0]


def test_a_singular_gram_matrix():
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    z, residuals = compat.anderson(lambda z: 0.5 * z + 1, x0, lam=0.0, tol=1e-9, backend="reference")
    assert residuals[-1] < 1e-9
    torch.testing.assert_close(z, torch.full_like(x0, 2.0), rtol=0, atol=1e-8)


def test_half_precision_and_an_empty_batch():
    f, x0 = problem()
    half, residuals = compat.anderson(
        lambda z: f(z.double()).bfloat16(), x0.bfloat16(), tol=2e-2, backend="reference"
    )
    assert half.dtype == torch.bfloat16
    assert residuals[-1] < 2e-2
    empty, residuals = compat.anderson(lambda z: 1 / 0, x0[:0])
    assert empty.shape == (0, 5, 4)
    assert residuals == []


def test_before_there_is_a_step_to_judge():
    """The tutorial's fails with a NameError."""
    f, x0 = problem()
    for evaluations, expected in ((1, x0), (2, f(x0))):
        z, residuals = compat.anderson(f, x0, max_iter=evaluations, beta=0.5, backend="reference")
        assert residuals == []
        torch.testing.assert_close(z, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: compat.anderson(f, [x]), TypeError, "x0 must be a tensor, got list"),
        (lambda f, x: compat.anderson(f, x, beta=0.0), ValueError, r"beta=0.0 is outside \(0"),
        (lambda f, x: compat.anderson(f, x, m=0), ValueError, "m=0 is too small"),
        (lambda f, x: compat.anderson(f, x, lam=-1.0), ValueError, "lam=-1.0 is outside"),
        (lambda f, x: compat.anderson(f, x, max_iter=0), ValueError, "max_iter=0 is too small"),
        (lambda f, x: compat.anderson(f, x.long()), TypeError, "x0 has dtype torch.int64"),
        (lambda f, x: compat.anderson(lambda z: z[:1], x), ValueError, "has shape"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*problem())
