"""An MLP cell's solves in one launch: the general loop's solution, and when they are not taken."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import triton_deq as td

pytestmark = pytest.mark.kernels


def contraction(width=7, dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(5)
    cell = td.MLPCell(width, 3, **options).to(device, dtype)
    with torch.no_grad():
        cell.state.weight.mul_(0.7)
    return cell


def both_ways(cell, x, solver=None, z0=None, **options):
    """In one launch and by the general loop."""
    with torch.no_grad():
        return [
            td.DEQ(cell, solver, backend=backend, **options)(x, z0).solution
            for backend in ("triton", "reference")
        ]


def assert_same(one, general):
    assert (one.path, general.path) == ("one launch", "steps")
    assert one.nfe == general.nfe
    for name in ("steps", "status"):
        assert torch.equal(getattr(one, name), getattr(general, name)), name
        assert getattr(one, name).dtype == getattr(general, name).dtype
    torch.testing.assert_close(one.value, general.value, equal_nan=True, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(one.residual, general.residual, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (td.Anderson(), {}),
        (td.Anderson(history=3, mixing=0.7, ridge=1e-8, ridge_scale="absolute"), {"residual": "absolute"}),
        (td.Anderson(history=8), {"tol": 0, "max_steps": 5}),
        (td.Picard(mixing=0.9), {"max_steps": 12}),
    ],
    ids=["anderson", "damped", "all-steps", "picard"],
)
def test_same_solution_as_the_general_loop(solver, options, device):
    cell = contraction(device=device)
    x = torch.randn(17, 3, dtype=torch.float64, device=device)
    assert_same(*both_ways(cell, x, solver, **{"tol": 1e-6, **options}))


@pytest.mark.parametrize(
    "options",
    [{"hidden": 20}, {"layer_norm": True}, {"hidden": 5, "layer_norm": True}, {"activation": "gelu"}],
    ids=str,
)
def test_every_form_of_the_cell(options, device):
    cell = contraction(device=device, **options)
    if cell.norm is not None:
        nn.init.uniform_(cell.norm.weight, 0.1, 0.5)
        nn.init.normal_(cell.norm.bias)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    assert_same(*both_ways(cell, x, tol=1e-6))


def test_bad_samples_stop_alone(device):
    cell = contraction(device=device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    x[1] = math.nan
    z0 = torch.zeros(5, 7, dtype=torch.float64, device=device)
    one, general = both_ways(cell, x, z0=z0, tol=1e-6)
    assert_same(one, general)
    assert one.status.tolist() == [0, td.Status.NONFINITE, 0, 0, 0]
    assert one.residual[1] == math.inf
    with torch.no_grad():
        diverging = contraction(device=device, activation="softplus")
        diverging.state.weight.fill_(5.0)
        assert_same(*both_ways(diverging, x[2:], td.Picard(), tol=1e-6))
        with pytest.raises(td.NotConverged):
            td.solve(td.deq.Injected(diverging, diverging.inject(x)), z0, throw=True, backend="triton")


def test_trace_is_the_general_loops(device):
    cell = contraction(device=device)
    u = cell.inject(torch.randn(18, 3, dtype=torch.float64, device=device)).detach()
    u[0] *= 1e-3  # converges before the others
    z0 = torch.zeros(18, 7, dtype=torch.float64, device=device)
    f = td.deq.Injected(cell, u)
    one, general = (
        td.solve(f, z0, tol=1e-6, trace=True, backend=backend) for backend in ("triton", "reference")
    )
    assert_same(one, general)
    assert one.trace.shape == (one.nfe, 18)
    torch.testing.assert_close(one.trace, general.trace, rtol=1e-4, atol=1e-10)


def test_gradients_are_the_general_loops(device):
    grads = []
    for backend in ("triton", "reference"):
        cell = contraction(device=device, hidden=9)
        nn.utils.parametrizations.weight_norm(cell.state)
        gradient = td.ImplicitGradient(tol=1e-10, max_steps=60)
        deq = td.DEQ(cell, tol=1e-10, max_steps=60, gradient=gradient, backend=backend)
        torch.manual_seed(1)
        x = torch.randn(3, 3, dtype=torch.float64, device=device, requires_grad=True)
        out = deq(x)
        out.value.square().sum().backward()
        path = "one launch" if backend == "triton" else "steps"
        assert (out.solution.path, out.solution.backward.path) == (path, path)
        assert out.solution.backward.converged.all()
        grads.append([x.grad, *(parameter.grad for parameter in cell.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "what", ["reference", "batch", "compact", "debug", "hook", "broyden", "history", "own", "3d"]
)
def test_when_it_is_not_taken(what, device):
    class Own(td.MLPCell):
        def forward(self, z, u):
            return 0.5 * super().forward(z, u)

    options = {
        "reference": {"backend": "reference"},
        "batch": {"norm_over": "batch"},
        "compact": {"compact": 0.5},
        "debug": {"debug": True},
        "broyden": {"solver": td.Broyden()},
        "history": {"solver": td.Anderson(history=9), "max_steps": 12},
    }.get(what, {})
    cell = (Own if what == "own" else td.MLPCell)(4, 3).to(device)
    if what == "hook":
        cell.register_forward_hook(lambda module, args, value: 0.5 * value)
    deq = td.DEQ(cell, **{"backend": "triton", **options})
    x = torch.randn(*((2, 2) if what == "3d" else (2,)), 3, device=device)
    with torch.no_grad():
        solution = deq(x).solution
        torch.testing.assert_close(cell(solution.value, cell.inject(x)), solution.value, rtol=0, atol=5e-3)
    assert solution.path == "steps"
    assert solution.converged.all()


def test_a_copied_model_keeps_its_kernels(device):
    deq = td.DEQ(contraction(device=device, dtype=torch.float32), backend="triton")
    x = torch.randn(2, 3, device=device)
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert other(x).solution.path == "one launch"


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"hidden": 300}, {}], ids=str)
def test_a_cell_leaves_its_value_where_it_is_told(options, device):
    cell = contraction(width=5, device=device, **options)
    z, u = torch.randn(3, 5, device=device).double(), cell.inject(torch.randn(3, 3, device=device).double())
    for out in (torch.full_like(z, math.nan), torch.full((5, 3), math.nan, device=device).double().t()):
        with torch.no_grad():
            cell.write(z, u, out)
            torch.testing.assert_close(out, cell(z, u))
