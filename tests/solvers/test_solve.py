"""What `solve` promises, whichever solver and backend serve."""

import math
import pickle

import pytest
import torch
from scipy import optimize

import triton_deq as td
from tests.problems import bratu, linear_map, recomputed_residual, tanh_map

SOLVERS = [
    td.Anderson(),
    td.Anderson(history=3, mixing=0.7),
    td.Anderson(ridge_scale="absolute"),
    td.Broyden(),
    td.Broyden(memory=2),
    td.Picard(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_fixed_point_of_a_linear_map(solver, backend, device):
    f, answer, _ = linear_map(0.3, 2, 7, device=device)
    solution = td.solve(f, torch.zeros_like(answer), solver, tol=1e-7, max_steps=80, backend=backend)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, answer, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_over", ["sample", "batch"])
@pytest.mark.parametrize("residual", ["relative", "absolute"])
def test_residual_is_the_values_own(residual, norm_over, backend, device):
    f, *_ = tanh_map(3, 20, device=device)
    z0 = torch.randn(3, 20, dtype=torch.float64, device=device)
    solution = td.solve(
        f, z0, tol=1e-6, max_steps=6, residual=residual, norm_over=norm_over, trace=True, backend=backend
    )
    if norm_over == "sample":
        wanted = recomputed_residual(f, solution.value, residual)
    else:
        wanted = recomputed_residual(lambda z: f(z[0])[None], solution.value[None], residual).expand(3)
    torch.testing.assert_close(solution.residual, wanted, rtol=1e-8, atol=0)
    torch.testing.assert_close(solution.trace.min(dim=0).values, solution.residual)
    assert solution.trace.shape == (solution.nfe, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype, backend, device):
    if backend == "numba" and dtype.itemsize == 2:
        pytest.skip("Numba has no such dtype")
    f, weight, bias = tanh_map(2, 20, gain=0.5, device=device)
    f = tanh_in(dtype, weight, bias)
    z0 = torch.zeros(2, 20, dtype=dtype, device=device)
    tol = {torch.float16: 4e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    solution = td.solve(f, z0, tol=tol, backend=backend)
    assert solution.value.dtype == dtype
    assert solution.converged.all()
    assert (recomputed_residual(f, solution.value) <= 1.05 * tol).all()


def test_low_precision_with_frozen_samples(backend, device):
    if backend == "numba":
        pytest.skip("Numba has no bfloat16")
    rates = torch.tensor([[0.1], [0.8]], dtype=torch.bfloat16, device=device)
    solution = td.solve(
        lambda z: rates * z + 1,
        torch.zeros(2, 5, dtype=torch.bfloat16, device=device),
        tol=2e-2,
        backend=backend,
    )
    assert solution.converged.all()
    assert solution.steps[0] <= solution.steps[1]
    torch.testing.assert_close(
        solution.value[:, 0].double().cpu(), torch.tensor([1 / 0.9, 5.0]).double(), rtol=0.1, atol=0
    )


def tanh_in(dtype, weight, bias):
    weight, bias = weight.detach().to(dtype), bias.detach().to(dtype)
    return lambda z: torch.tanh(z @ weight.T + bias)


def test_a_sample_stops_by_itself_and_is_frozen(backend, device):
    rates = torch.tensor([0.05, 0.9, 0.5], dtype=torch.float64, device=device)[:, None]
    seen = []

    def f(z):
        seen.append(z.clone())
        return rates * z + 1

    z0 = torch.zeros(3, 4, dtype=torch.float64, device=device)
    solution = td.solve(f, z0, td.Picard(), tol=1e-3, max_steps=200, backend=backend)
    assert solution.converged.all()
    assert solution.steps[0] < solution.steps[2] < solution.steps[1] <= solution.nfe
    for sample, steps in enumerate(solution.steps.tolist()):
        for z in seen[steps - 1 :]:  # the iterate that converged, and what f sees from then on
            assert torch.equal(z[sample], solution.value[sample])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_holds_nobody_up(poison, backend, device):
    f, answer, _ = linear_map(0.5, 3, 6, device=device)
    calls = []

    def poisoned(z):
        value = f(z)
        calls.append(1)
        if len(calls) >= 4:
            value[1, 2] = poison
        return value

    for norm_over in ("sample", "batch"):
        calls.clear()
        solution = td.solve(
            poisoned, torch.zeros_like(answer), tol=1e-8, max_steps=50, norm_over=norm_over, backend=backend
        )
        assert solution.status.tolist() == [td.Status.CONVERGED, td.Status.NONFINITE, td.Status.CONVERGED]
        assert solution.steps[1] == 4
        assert solution.value.isfinite().all()
        torch.testing.assert_close(solution.value[[0, 2]], answer[[0, 2]], rtol=0, atol=1e-5)


def test_not_finite_from_the_start(backend, device):
    z0 = torch.ones(2, 3, device=device)
    solution = td.solve(lambda z: z * torch.tensor([[math.nan], [0.5]], device=device), z0, backend=backend)
    assert solution.status[0] == td.Status.NONFINITE
    assert torch.equal(solution.value[0], z0[0])
    assert solution.residual[0] == math.inf


def test_divergence_is_a_status_and_the_best_iterate_survives(backend, device):
    z0 = torch.ones(1, 3, dtype=torch.float64, device=device)
    solution = td.solve(lambda z: 3 * z, z0, td.Picard(), residual="absolute", max_steps=100, backend=backend)
    assert solution.status.tolist() == [td.Status.DIVERGED]
    assert solution.nfe < 20
    assert torch.equal(solution.value, z0)
    assert "JacobianPenalty" in solution.describe()


def test_max_steps_and_zero_tolerance(backend, device):
    f, answer, _ = linear_map(0.3, 2, 5, device=device)
    calls = []
    solution = td.solve(
        lambda z: (calls.append(1), f(z))[1], torch.zeros_like(answer), tol=0, max_steps=25, backend=backend
    )
    assert solution.nfe == len(calls) == 25
    assert solution.steps.tolist() == [25, 25]
    assert solution.status.tolist() == [td.Status.MAX_STEPS] * 2
    torch.testing.assert_close(solution.value, answer)


def test_throw(backend, device):
    f, answer, _ = linear_map(0.9, 2, 5, device=device)
    with pytest.raises(td.NotConverged, match="2 of 2 MAX_STEPS.*raise max_steps") as caught:
        td.solve(f, torch.zeros_like(answer), tol=1e-9, max_steps=3, throw=True, backend=backend)
    assert caught.value.solution.nfe == 3
    assert pickle.loads(pickle.dumps(caught.value)).solution.nfe == 3


def test_empty_batch_and_empty_state(backend, device):
    for shape in ((0, 5), (3, 0)):
        solution = td.solve(None, torch.empty(shape, device=device), trace=True, backend=backend)
        assert solution.value.shape == shape
        assert solution.residual.shape == solution.status.shape == solution.steps.shape == shape[:1]
        assert (solution.nfe, solution.trace.shape) == (0, (0, shape[0]))


def test_what_f_raises_passes_through(backend, device):
    class Own(Exception):
        pass

    def f(z):
        raise Own("mine")

    with pytest.raises(Own, match="mine"):
        td.solve(f, torch.zeros(2, 2, device=device), backend=backend)


def test_z0_of_any_strides_is_not_modified(backend, device):
    f, answer, _ = linear_map(0.5, 4, 6, device=device)
    z0 = torch.randn(6, 8, dtype=torch.float64, device=device).T[::2].requires_grad_()
    before = z0.detach().clone()
    solution = td.solve(f, z0, tol=1e-10, max_steps=60, backend=backend)
    assert torch.equal(z0, before)
    assert not solution.value.requires_grad
    torch.testing.assert_close(solution.value, answer, rtol=0, atol=1e-8)


def test_channels_last_stays_channels_last(backend, device):
    weight = torch.randn(3, 3, 3, 3, device=device) * 0.05
    z0 = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    formats = []

    def f(z):
        formats.append(z.is_contiguous(memory_format=torch.channels_last))
        return torch.tanh(torch.conv2d(z, weight, padding=1)) + z0 / 2

    solution = td.solve(f, z0, backend=backend)
    assert all(formats)
    assert solution.value.is_contiguous(memory_format=torch.channels_last)
    assert solution.converged.all()
    contiguous = td.solve(f, z0.contiguous(), backend=backend)
    torch.testing.assert_close(solution.value, contiguous.value, rtol=1e-4, atol=1e-5)


def test_f_may_ask_for_gradients_of_its_argument(backend, device):
    """Of an energy, say; each evaluation's are its own."""

    def f(z):
        with torch.enable_grad():
            z.requires_grad_()
            (0.5 * z.square() - z).sum().backward()
        return z.detach() - 0.25 * z.grad

    solution = td.solve(f, torch.zeros(3, 5, device=device), tol=1e-6, max_steps=60, backend=backend)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.ones(3, 5, device=device), rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_both_backends_take_the_same_steps(solver, device):
    f, *_ = tanh_map(3, 33, device=device)
    z0 = torch.zeros(3, 33, dtype=torch.float64, device=device)
    reference, triton = (
        td.solve(f, z0, solver, tol=1e-5, trace=True, backend=name) for name in ("reference", "triton")
    )
    steps = reference.nfe  # on a GPU the host may look a step or two late
    torch.testing.assert_close(triton.trace[:steps], reference.trace, rtol=1e-5, atol=1e-12)
    assert torch.equal(triton.steps, reference.steps)
    assert torch.equal(triton.status, reference.status)
    torch.testing.assert_close(triton.value, reference.value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [optimize.anderson, optimize.broyden1])
def test_bratu_agrees_with_scipy(method):
    f, z0 = bratu(9)
    calls = []

    def defect(z):
        calls.append(1)
        z = torch.from_numpy(z)
        return (f(z) - z).numpy()

    root = torch.from_numpy(method(defect, z0.numpy(), f_tol=1e-9, maxiter=200))
    solution = td.solve(f, z0, tol=1e-9, residual="absolute", max_steps=50, backend="reference")
    assert solution.converged.all()
    assert solution.nfe <= len(calls)
    torch.testing.assert_close(solution.value, root, rtol=1e-7, atol=1e-8)


def test_contraction_of_radius_099():
    """Where an absolute ridge of 1e-4 drowns the Gram matrix and never converges."""
    f, answer, _ = linear_map(0.99, 2, 60)
    solution = td.solve(f, torch.zeros_like(answer), tol=1e-6, max_steps=300, backend="reference")
    assert solution.converged.all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale, backend, device):
    f, *_ = tanh_map(2, 20, device=device)
    z0 = torch.zeros(2, 20, dtype=torch.float64, device=device)
    plain = td.solve(f, z0, tol=1e-8, backend=backend)
    scaled = td.solve(lambda z: scale * f(z / scale), z0, tol=1e-8, backend=backend)
    assert torch.equal(plain.steps, scaled.steps)
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-9, atol=1e-12)


def test_fewer_entries_than_history(backend, device):
    f, answer, _ = linear_map(0.9, 2, 1, device=device)
    solution = td.solve(f, torch.zeros_like(answer), td.Anderson(5), tol=1e-9, max_steps=60, backend=backend)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, answer, rtol=1e-6, atol=0)


def test_one_host_read_a_step(monkeypatch):
    """The reference reads the device once a step, for the stopping test, and the loop adds nothing."""
    reads = []
    for name in ("item", "tolist", "__bool__", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, **k: (reads.append(1), _f(self, *a, **k))[1]
        )
    f, answer, _ = linear_map(0.9, 4, 8)
    reads.clear()
    solution = td.solve(f, torch.zeros_like(answer), tol=0, max_steps=12, backend="reference")
    assert len(reads) <= solution.nfe


def test_statuses_have_remedies():
    assert all(status.remedy.endswith(".") for status in td.Status)
    assert [int(status) for status in td.Status] == [0, 1, 2, 3]


@pytest.mark.parametrize("solver", [td.Anderson(3), td.Picard()], ids=str)
@pytest.mark.parametrize("width", [5, 2100])  # one launch a step, or two
def test_a_plain_step_is_the_value_of_f_from_however_far(solver, width, backend, device):
    """Where f lies many times nearer to zero than x, `x + (f − x)` has few of f's digits."""
    value = torch.rand(2, width, device=device)
    z0 = torch.full_like(value, 1e7)
    solution = td.solve(lambda z: value.clone(), z0, solver, max_steps=2, backend=backend)
    assert torch.equal(solution.value, value)
    assert (solution.residual == 0).all()
