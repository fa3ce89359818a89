"""`check_every`, `debug`, and what the backward solve reports."""

import math

import pytest
import torch

import triton_deq as td
from tests.problems import linear_map, tanh_map


@pytest.mark.parametrize("check_every", [1, 2, 3, 5, 8])
def test_at_most_check_every_steps_too_far_and_nothing_changes(check_every, backend, device):
    f, answer, _ = linear_map(0.5, 3, 6, device=device)
    calls = []

    def counted(z):
        calls.append(1)
        return f(z)

    options = {"tol": 1e-8, "max_steps": 60, "backend": backend}
    plain = td.solve(f, torch.zeros_like(answer), **options)
    solution = td.solve(counted, torch.zeros_like(answer), check_every=check_every, **options)
    assert solution.nfe == len(calls) <= solution.steps.max() + check_every
    if backend == "reference":
        assert solution.nfe == solution.steps.max()
    assert torch.equal(solution.steps, plain.steps)
    assert torch.equal(solution.value, plain.value)
    assert torch.equal(solution.residual, plain.residual)


def test_debug_tells_of_an_f_that_modifies_its_argument(backend, device):
    z0 = torch.ones(2, 3, device=device)
    with pytest.raises(RuntimeError, match="modified its argument z in place.*clone"):
        td.solve(lambda z: z.mul_(0.5) + 1, z0, debug=True, backend=backend)
    assert td.solve(lambda z: 0.5 * z + 1, z0, debug=True, backend=backend).converged.all()
    with pytest.raises(RuntimeError, match="modified its argument"):
        td.fixed_point(
            lambda z: z.mul_(0.5) + 1, z0, gradient=td.UnrolledGradient(), debug=True, backend=backend
        )


def unrolled(f, z0, **options):
    return td.fixed_point(f, z0, gradient=td.UnrolledGradient(), **options)


@pytest.mark.parametrize("solve", [td.solve, unrolled], ids=["solve", "unrolled"])
@pytest.mark.parametrize("batch", [2, 3, 8, 13])
def test_debug_tells_of_an_f_that_mixes_samples(solve, batch):
    """Also where one sample alone sees one other."""
    z0 = torch.zeros(batch, 2, 3, dtype=torch.float64)

    def meeting(one, other):
        links = torch.eye(batch, dtype=torch.float64) * 0.5
        links[one, other] = 1e-6
        return lambda z: torch.einsum("bc,cij->bij", links, z) + 1

    options = {"debug": True, "backend": "reference"}
    for one, other in ((0, batch - 1), (batch - 1, 0), (batch // 2, batch // 2 - 1)):
        f = meeting(one, other)
        with pytest.raises(
            RuntimeError, match=f"f mixes samples: the value of sample {one} changes.*z0.None"
        ):
            solve(f, z0, **options)
        solve(f, z0, norm_over="batch", **options)
    solve(lambda z: f(z[0])[None], z0[None], **options)
    solve(meeting(0, 0), z0, **options)
    solve(meeting(0, 0), z0.bfloat16().double(), **options)


@pytest.mark.parametrize("solve", [td.solve, unrolled], ids=["solve", "unrolled"])
def test_debug_tells_of_an_f_that_is_random(solve):
    z0 = torch.ones(4, 50)
    with pytest.raises(RuntimeError, match="f gave two values at one state.*once a solve"):
        solve(lambda z: torch.nn.functional.dropout(0.5 * z, 0.1) + 1, z0, debug=True, backend="reference")
    as_sums_in_no_order = 1e-4
    solve(lambda z: 0.5 * z + 1 + as_sums_in_no_order * torch.rand_like(z), z0, debug=True, tol=1e-3)


def test_debug_leaves_nans_and_counts_alone():
    z0 = torch.ones(3, 4)
    z0[1] = math.nan
    for norm_over in ("sample", "batch"):
        plain, debugged = (
            td.solve(lambda z: 0.5 * z + 1, z0, norm_over=norm_over, debug=debug) for debug in (False, True)
        )
        assert (debugged.nfe, debugged.status.tolist()) == (plain.nfe, plain.status.tolist())
    assert td.solve(torch.tanh, torch.ones(0, 3), debug=True).nfe == 0


@pytest.mark.parametrize("check_every", [0, -1])
def test_check_every_is_checked(check_every):
    with pytest.raises(ValueError, match="check_every"):
        td.solve(torch.tanh, torch.ones(1, 2), check_every=check_every)


def gradients(gradient, solver=None, scale=1.0, times=1, backend="reference"):
    """The solution of a small problem, and the gradients of its weight and bias.

    Most of it has nothing to do with kernels, whose solves an interpreter takes ten times as long for.
    """
    torch.manual_seed(3)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    f, weight, bias = tanh_map(3, 8, device=device)
    for _ in range(times):
        weight.grad = bias.grad = None
        z, solution = td.fixed_point(
            f,
            torch.zeros(3, 8, dtype=torch.float64, device=device),
            solver,
            tol=1e-11,
            max_steps=100,
            gradient=gradient,
            return_solution=True,
            backend=backend,
        )
        assert solution.backward is None
        (scale * z.square().sum()).backward()
    return solution, weight.grad.cpu() / scale, bias.grad.cpu() / scale


class TestBackward:
    def test_its_solution_is_reported(self, backend):
        solution, *_ = gradients(td.ImplicitGradient(tol=1e-10, max_steps=50), backend=backend)
        assert solution.backward.converged.all()
        assert (solution.backward.residual <= 1e-10).all()
        solution, *_ = gradients(td.ImplicitGradient(tol=1e-12, max_steps=2))
        assert solution.backward.nfe == 2
        assert not solution.backward.converged.any()

    def test_throw(self):
        with pytest.raises(td.NotConverged):
            gradients(td.ImplicitGradient(tol=1e-12, max_steps=2, throw=True))

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_the_scale_of_the_loss_does_not_matter(self, scale):
        gradient = td.ImplicitGradient(tol=1e-6)
        plain, *wanted = gradients(gradient)
        scaled, *found = gradients(gradient, scale=scale)
        assert scaled.backward.nfe == plain.backward.nfe
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)

    def test_warm_start_needs_fewer_steps_for_the_same_gradient(self):
        cold, *wanted = gradients(td.ImplicitGradient(tol=1e-9, max_steps=60), times=2)
        warm, *found = gradients(td.ImplicitGradient(tol=1e-9, max_steps=60, warm_start=True), times=2)
        assert warm.backward.nfe < cold.backward.nfe / 2
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)

    def test_warm_start_of_a_sample_that_the_loss_leaves_out(self):
        """Its u is 0, which no iterate from elsewhere is near by a relative residual."""
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        z, solution = td.fixed_point(
            lambda z: torch.tanh(0.5 * z + x),
            torch.zeros_like(x),
            gradient=td.ImplicitGradient(tol=1e-9, warm_start=True),
            return_solution=True,
            backend="reference",
        )
        torch.autograd.grad(z.sum(), x, retain_graph=True)
        (grad,) = torch.autograd.grad(z[1:].sum(), x)
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert grad[1:].all()
        assert solution.backward.converged.all()

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_warm_start_hides_no_gradient_that_is_not_finite(self, bad):
        """As an iterate it would be dropped for the finite one before it; and the next pass is well again."""
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        gradient = td.ImplicitGradient(tol=1e-9, max_steps=60, warm_start=True)
        z = td.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), gradient=gradient)
        well = torch.ones_like(z)
        ill = well.clone()
        ill[1, 2] = bad
        found = [torch.autograd.grad(z, x, each, retain_graph=True)[0] for each in (well, ill, well)]
        assert found[1].isfinite().all(dim=1).tolist() == [True, False, True]
        torch.testing.assert_close(found[2], found[0])


def with_broyden(backend="reference", **fields):
    gradient = td.ImplicitGradient(tol=1e-9, max_steps=60, **fields)
    return gradients(gradient, td.Broyden(memory=30), backend=backend)


class TestShine:
    """The forward Broyden's inverse, alone or as the start of the backward solve."""

    def test_start_needs_fewer_steps_for_the_same_gradient(self, backend):
        cold, *wanted = with_broyden()
        warm, *found = with_broyden(backend, shine="start")
        assert warm.backward.converged.all()
        assert warm.backward.steps.max() < cold.backward.steps.max()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)

    def test_alone_is_near_the_gradient_and_solves_nothing(self, backend):
        _, wanted, _ = with_broyden()
        solution, found, _ = with_broyden(backend, shine="alone")
        jacobian_free = gradients(td.PhantomGradient(), td.Broyden(memory=30))[1]
        assert solution.backward is None
        assert (found - wanted).norm() < 0.5 * (jacobian_free - wanted).norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_falls_back_where_the_inverse_is_large(self, dtype):
        """u = g / (1 − a), which Broyden's method knows in one direction after two steps."""

        def pairs(*numbers):
            return torch.tensor(numbers, dtype=dtype)[:, None].repeat(1, 2)

        factor = pairs(0.5, 0.7, 0.8, 0.8, -3.0, 1.5)
        shift = torch.ones_like(factor, requires_grad=True)
        z = td.fixed_point(
            lambda z: factor * z + shift,
            torch.zeros_like(factor),
            td.Broyden(),
            gradient=td.ImplicitGradient(shine="alone"),
        )
        z.backward(pairs(1.0, 1e-30, 1e-30, 1e30, 0.0, 1.0))
        expected = pairs(2.0, 1e-30 / 0.3, 1e-30, 1e30, 0.0, -2.0)
        torch.testing.assert_close(shift.grad, expected, rtol=1e-5, atol=0)

    def test_needs_a_broyden(self):
        with pytest.raises(TypeError, match=r"shine='start'.*td\.Broyden"):
            gradients(td.ImplicitGradient(shine="start"), td.Anderson())

    @pytest.mark.parametrize("fields", [{"shine": "maybe"}, {"shine": "start", "warm_start": True}])
    def test_fields_are_checked(self, fields):
        with pytest.raises(ValueError, match="shine"):
            td.ImplicitGradient(**fields)
