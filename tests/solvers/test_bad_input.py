"""Bad input gets an error that names the argument, the value and the remedy."""

from functools import partial

import pytest
import torch

import triton_deq as td
from triton_deq import backend as backends

Z0 = torch.zeros(2, 3)

NESTED = torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)


def solve(f=lambda z: z / 2, z0=Z0, *args, **kwargs):
    return td.solve(f, z0, *args, backend=kwargs.pop("backend", "reference"), **kwargs)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[:, :2], ValueError, r"f\(z\) has shape \(2, 2\), z has \(2, 3\)"),
        (lambda z: z.double(), TypeError, r"f\(z\) has dtype torch.float64, z has torch.float32: cast"),
        (lambda z: z.to("meta"), ValueError, r"f\(z\) is on meta, z on cpu: move"),
        (lambda z: (z, z), TypeError, r"f\(z\) must be a tensor like z, got tuple"),
    ],
    ids=["shape", "dtype", "device", "tuple"],
)
@pytest.mark.parametrize("gradient", [None, td.UnrolledGradient()], ids=["solve", "unrolled"])
def test_what_f_returns(f, error, message, gradient):
    call = td.solve if gradient is None else partial(td.fixed_point, gradient=gradient)
    with pytest.raises(error, match=message):
        call(f, Z0, backend="reference")


@pytest.mark.parametrize("call", [td.solve, td.fixed_point, td.jacobian_norm, td.spectral_radius])
@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            "dtype torch.int64: a state must be real and floating",
        ),
        (
            torch.zeros((), dtype=torch.complex64),
            TypeError,
            r"^z0? has dtype torch.complex64: .*view_as_real",
        ),
        (torch.zeros(2, 3, dtype=torch.float8_e4m3fn), TypeError, "float8_e4m3fn: .* 16 bits at least"),
        (torch.zeros(2, 3).to_sparse(), TypeError, "layout torch.sparse_coo: a state must be a dense tensor"),
        (NESTED, TypeError, r"^z0? has nested samples: a state must be a dense tensor"),
        (torch.zeros(2, 3, device="meta"), TypeError, "no data, being on 'meta'"),
        (torch.tensor(1.0), ValueError, r"is a scalar: .*reshape\(1, 1\)"),
        ([1.0], TypeError, "must be a tensor or a tuple, list or dict of tensors, got list of float"),
    ],
    ids=["integer", "complex scalar", "float8", "sparse", "nested", "meta", "scalar", "list"],
)
def test_states(call, z0, error, message):
    with pytest.raises(error, match=message):
        call(lambda z: z, z0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: td.Anderson(history=0), ValueError, "history=0 is too small: it must be at least 1"),
        (lambda: td.Anderson(history=2.5), TypeError, r"history=2.5 must be an int, .*int\(history\)"),
        (lambda: td.Anderson(mixing=0), ValueError, r"mixing=0 is outside \(0, 1\]"),
        (lambda: td.Anderson(mixing=1.5), ValueError, r"mixing=1.5 is outside \(0, 1\]"),
        (lambda: td.Anderson(mixing=float("nan")), ValueError, "mixing=nan is outside"),
        (lambda: td.Anderson(ridge=-1e-3), ValueError, "ridge=-0.001 is outside"),
        (lambda: td.Anderson(ridge_scale="trace"), ValueError, "ridge_scale='trace'.*'relative', 'absolute'"),
        (lambda: td.Anderson(memory=3), TypeError, "memory"),
        (lambda: td.Picard(mixing="1"), TypeError, r"mixing='1' must be a number, .*float\(mixing\)"),
        (lambda: td.ImplicitGradient(tol=-1), ValueError, "tol=-1 is outside"),
        (lambda: td.ImplicitGradient(max_steps=0), ValueError, "max_steps=0 is too small"),
        (lambda: td.ImplicitGradient(solver="anderson"), TypeError, r"solver='anderson' is not a solver"),
        (lambda: td.PhantomGradient(steps=0), ValueError, "steps=0 is too small"),
        (lambda: td.PhantomGradient(mixing=0.0), ValueError, "mixing=0.0 is outside"),
        (lambda: td.JacobianPenalty(-1.0), ValueError, "weight=-1.0 is outside"),
        (lambda: td.JacobianPenalty(1.0, probability=2), ValueError, "probability=2 is outside"),
        (lambda: td.JacobianPenalty(1.0, probes=0), ValueError, "probes=0 is too small"),
        (lambda: td.JacobianPenalty(1.0, distribution="normal"), ValueError, "distribution='normal'"),
        (lambda: td.MLPCell(0, 3), ValueError, "width=0 is too small"),
        (lambda: td.MLPCell(3, 0), ValueError, "input_width=0 is too small"),
        (lambda: td.MLPCell(3, 3, activation="sine"), ValueError, "activation='sine'.*tanh"),
        (lambda: td.DEQ(torch.nn.Linear(3, 3)), TypeError, r"cell=Linear has no inject\(x\)"),
        (
            lambda: td.DEQ(td.MLPCell(3, 3), penalty=2.0),
            TypeError,
            "penalty=2.0 must be a td.JacobianPenalty",
        ),
        (lambda: td.DEQ(td.MLPCell(3, 3), gradient=td.ImplicitGradient), TypeError, "is not a gradient"),
        (lambda: td.DEQ(td.MLPCell(3, 3), tol=-1.0), ValueError, "tol=-1.0 is outside"),
        (lambda: td.DEQ(td.MLPCell(3, 3), backend="gpu"), ValueError, "backend='gpu' is unknown"),
        (lambda: solve(tol=-1e-3), ValueError, r"tol=-0.001 is outside \[0, ∞\)"),
        (lambda: solve(max_steps=0), ValueError, "max_steps=0 is too small"),
        (lambda: solve(residual="rel"), ValueError, "residual='rel' is unknown"),
        (lambda: solve(norm_over="all"), ValueError, "norm_over='all' is unknown"),
        (lambda: solve(solver=td.Anderson), TypeError, "is not a solver: pass an instance"),
        (lambda: solve(backend="cuda"), ValueError, "backend='cuda' is unknown: choose one of 'auto'"),
        (lambda: solve(step=3), TypeError, "step"),
        (lambda: td.jacobian_norm(torch.tanh, Z0, probes=0), ValueError, "probes=0 is too small"),
        (
            lambda: td.jacobian_norm(torch.tanh, Z0, distribution="x"),
            ValueError,
            "distribution='x' is unknown",
        ),
        (lambda: td.jacobian_norm(torch.tanh, Z0, generator=3), TypeError, "generator must be"),
        (lambda: td.spectral_radius(torch.tanh, Z0, steps=0), ValueError, "steps=0 is too small"),
    ],
)
def test_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_custom_solver_cannot_be_unrolled():
    class Other:
        start = step = None

    with pytest.raises(TypeError, match="cannot be unrolled or traced: use td.Anderson, td.Broyden"):
        td.fixed_point(torch.tanh, Z0, Other(), gradient=td.UnrolledGradient(), backend="reference")


def test_triton_where_nothing_can_run_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run here.*TRITON_INTERPRET"):
        td.solve(torch.tanh, Z0, backend="triton")
    assert backends.choose(Z0)[0] == "reference"
    assert "CPU" in backends.choose(Z0)[1]


def test_auto_follows_the_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(Z0)[0] == "triton"
    assert backends.choose(Z0, "reference")[0] == "reference"
    assert backends.choose(Z0.to("meta"))[0] == "reference"


def test_a_state_that_no_initial_state_can_be_made_for():
    class Cell(torch.nn.Module):
        def inject(self, x):
            return {"u": x}

        def forward(self, z, u):
            return z / 2 + u["u"]

    deq = td.DEQ(Cell(), backend="reference")
    with pytest.raises(TypeError, match="gave dict.*pass z0"):
        deq(torch.ones(2, 3))
    assert deq(torch.ones(2, 3), torch.zeros(2, 3)).solution.converged.all()
