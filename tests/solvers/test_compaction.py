"""Dropping finished samples: the same solution, fewer evaluations of each sample."""

import pytest
import torch

import triton_deq as td
from triton_deq.status import Status

SOLVERS = [td.Anderson(4), td.Broyden(5), td.Picard()]


class Rates:
    """`f(z) = r tanh(z) + b` with a rate for each sample, which tells how many rows it was called with."""

    def __init__(self, rates, offset, seen):
        self.rates, self.offset, self.seen = rates, offset, seen

    def __call__(self, z):
        self.seen.append(len(z))
        return self.rates[:, None] * torch.tanh(z) + self.offset

    def select(self, samples):
        return Rates(self.rates[samples], self.offset[samples], self.seen)


def problem(device, batch=12):
    rates = torch.linspace(0.05, 0.95, batch, dtype=torch.float64, device=device).flip(0)
    offset = torch.randn(batch, 6, dtype=torch.float64, device=device)
    return Rates(rates, offset, []), torch.zeros_like(offset)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_same_solution_from_fewer_rows(solver, backend, device):
    options = {"tol": 1e-7, "max_steps": 300 if backend == "reference" else 25, "trace": True}
    f, z0 = problem(device, batch=8)
    plain = td.solve(f, z0, solver, **options, backend=backend)
    everything = sum(f.seen)
    f.seen.clear()
    compact = td.solve(f, z0, solver, **options, compact=0.6, backend=backend)
    assert sum(f.seen) < 0.8 * everything
    assert f.seen == sorted(f.seen, reverse=True)
    assert torch.equal(compact.status, plain.status)
    assert torch.equal(compact.steps, plain.steps)
    torch.testing.assert_close(compact.value, plain.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(compact.trace, plain.trace[: compact.nfe], rtol=1e-6, atol=1e-14)
    assert compact.trace.shape == (compact.nfe, 8)


def test_a_sample_that_is_not_finite_is_dropped_and_remembered(backend, device):
    f, z0 = problem(device, batch=4)
    f.rates[2] = torch.nan
    solution = td.solve(f, z0, tol=1e-6, max_steps=60, compact=0.9, backend=backend)
    assert solution.status[2] == Status.NONFINITE
    assert torch.equal(solution.value[2], z0[2])
    assert solution.residual[2] == torch.inf
    assert solution.status.tolist().count(Status.CONVERGED) == 3
    assert f.seen[2] == 3  # on a GPU the host looks a step late


def test_a_look_that_is_late(device):
    f, z0 = problem(device)
    plain = td.solve(f, z0, tol=1e-8, max_steps=100, backend="reference")
    late = td.solve(f, z0, tol=1e-8, max_steps=100, check_every=4, compact=1.0, backend="reference")
    torch.testing.assert_close(late.value, plain.value, rtol=1e-9, atol=1e-12)


def test_channels_last(device):
    class Image(Rates):
        def __call__(self, z):
            self.seen.append(z.is_contiguous(memory_format=torch.channels_last))
            return self.rates[:, None, None, None] * torch.tanh(z) + self.offset

        def select(self, samples):
            return Image(self.rates[samples], self.offset[samples], self.seen)

    z0 = torch.zeros(6, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    f = Image(torch.linspace(0.1, 0.9, 6, device=device), torch.randn_like(z0), [])
    solution = td.solve(f, z0, tol=1e-5, compact=0.7, backend="reference")
    assert solution.converged.all()
    assert all(f.seen)
    assert solution.value.shape == z0.shape


def test_a_deq_whose_cell_can_select(backend, device):
    cell = td.MLPCell(8, 3).to(device)
    x = torch.randn(5, 3, device=device) * torch.tensor([0.01, 1, 30, 1, 30], device=device)[:, None]
    outs = [td.DEQ(cell, tol=1e-6, compact=share, backend=backend)(x) for share in (None, 0.9)]
    torch.testing.assert_close(outs[1].value, outs[0].value, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.value.square().sum(), cell.parameters()) for out in outs]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, z: td.solve(f, z, compact=0.0), ValueError, "compact"),
        (lambda f, z: td.solve(f, z, compact=2.0), ValueError, "compact"),
        (lambda f, z: td.solve(torch.tanh, z, compact=0.5), TypeError, r"select\(samples\)"),
        (lambda f, z: td.solve(f, z, compact=0.5, norm_over="batch"), ValueError, "norm_over='sample'"),
        (
            lambda f, z: td.fixed_point(f, z, compact=0.5, gradient=td.UnrolledGradient()),
            ValueError,
            "cannot be unrolled",
        ),
        (
            lambda f, z: td.fixed_point(
                f, z, td.Broyden(), compact=0.5, gradient=td.ImplicitGradient(shine="start")
            ),
            ValueError,
            "pairs of all samples",
        ),
        (lambda f, z: td.DEQ(torch.nn.Module(), compact=0.5), TypeError, "inject"),
        (lambda f, z: td.DEQ(Injecting(), compact=0.5), TypeError, r"select\(u, samples\)"),
    ],
)
def test_what_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call(*problem("cpu"))


class Injecting(torch.nn.Module):
    def inject(self, x):
        return x
