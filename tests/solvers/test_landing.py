"""An f that leaves its value in the solver's ring."""

import pytest
import torch

import triton_deq as td
from tests.counters import Counter
from triton_deq.backend import interpreting

HISTORY = 3
SOLVERS = {
    "anderson": td.Anderson(HISTORY),
    "mixed": td.Anderson(HISTORY, mixing=0.7),
    "broyden": td.Broyden(3),
}


class Writing:
    """`f(z) = tanh(w z + b)`, with or without a copy."""

    def __init__(self, entries, device):
        self.weight = torch.linspace(-0.9, 0.9, entries, device=device)
        self.bias = torch.randn(2, entries, device=device)
        self.landed = 0

    def __call__(self, z):
        return torch.tanh(self.weight * z + self.bias)

    def write(self, z, out):
        self.landed += 1
        torch.tanh(torch.addcmul(self.bias, self.weight, z, out=out), out=out)


@pytest.mark.parametrize("entries", [40, 2100])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_steps_with_fewer_bytes(name, entries, backend, device):
    f = Writing(entries, device)
    z0 = torch.zeros(2, entries, device=device)
    options = {"tol": 1e-5, "max_steps": 9, "trace": True, "backend": backend}
    with Counter(z0) as plain_counts:
        plain = td.solve(plain_counts.beside(f), z0, SOLVERS[name], **options)  # a function has no write
    counter = Counter(z0)
    with counter:
        solution = td.solve(Landing(f, counter), z0, SOLVERS[name], **options)
    assert f.landed == solution.nfe
    torch.testing.assert_close(solution.value, plain.value, rtol=1e-5, atol=1e-6)
    assert torch.equal(solution.steps, plain.steps)
    torch.testing.assert_close(solution.trace, plain.trace, rtol=1e-2, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(solution.residual, plain.residual, rtol=1e-2, atol=1e-6)
    counted = backend == "reference" or (backend == "triton" and interpreting())
    if entries == 2100 and name != "mixed" and device == "cpu" and counted:
        saved = plain_counts.steps[5].moved - counter.steps[5].moved
        assert saved >= (1 if backend == "triton" else 2) * z0.numel() * z0.element_size()


class Landing:
    """f whose evaluations are not counted."""

    def __init__(self, f, counter):
        self.f = f
        self._write = counter.beside(lambda pair: f.write(*pair))

    def write(self, z, out):
        self._write((z, out))


def test_channels_last_lands_in_its_layout(backend, device):
    z0 = torch.zeros(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    bias = torch.randn(2, 3, 4, 5, device=device)
    formats = []

    class F:
        def write(self, z, out):
            formats.append(out.is_contiguous(memory_format=torch.channels_last))
            out.copy_(0.5 * z.tanh() + bias)

    solution = td.solve(F(), z0, tol=1e-5, backend=backend)
    assert all(formats)
    expected = td.solve(lambda z: 0.5 * z.tanh() + bias, z0, tol=1e-5, backend=backend)
    torch.testing.assert_close(solution.value, expected.value)


def test_a_narrower_state_than_the_references_ring_is_copied(device):
    f = Writing(20, device)
    f.weight, f.bias = f.weight.bfloat16(), f.bias.bfloat16()
    z0 = torch.zeros(2, 20, dtype=torch.bfloat16, device=device)
    assert td.solve(f, z0, tol=1e-1, backend="reference").converged.all()
    assert f.landed == 0
