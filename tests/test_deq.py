"""The module: cell, solver, gradient and penalty together."""

import copy
import pickle

import pytest
import torch
from torch import nn

import triton_deq as td
from triton_deq.backend import ambient
from triton_deq.memory import peak_bytes


def model(**options) -> td.DEQ:
    torch.manual_seed(0)
    return td.DEQ(td.MLPCell(6, 4), **{"tol": 1e-6, "backend": "reference", **options})


def test_output_is_an_equilibrium_and_trains():
    deq, x = model(penalty=td.JacobianPenalty(0.5)), torch.randn(5, 4)
    out = deq(x)
    torch.testing.assert_close(deq.cell(out.value, deq.cell.inject(x)), out.value, rtol=1e-4, atol=1e-5)
    assert out.solution.converged.all()
    assert out.penalty.item() > 0
    (out.value.square().sum() + out.penalty).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in deq.parameters())


def test_input_gets_its_gradient():
    deq = model().double()
    deq.gradient = td.ImplicitGradient(tol=1e-12, max_steps=100)
    deq.stopping = td.solvers.stopping.Stopping(tol=1e-12, max_steps=100)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: deq(x).value, x)


class OwnCell(nn.Module):
    """Without a product of its own."""

    def __init__(self):
        super().__init__()
        self.inner = td.MLPCell(6, 4)
        self.inject = self.inner.inject

    def forward(self, z, u):
        return torch.tanh(self.inner.state(z) + u)


@pytest.mark.parametrize("make", [lambda: td.MLPCell(6, 4), OwnCell], ids=["closed form", "own"])
def test_a_penalised_step_in_torch_func(make):
    """Where the product is torch.func's, and nothing may be written into."""
    torch.manual_seed(0)
    tight = {"tol": 1e-12, "max_steps": 60}
    deq = td.DEQ(
        make().double(), **tight, gradient=td.ImplicitGradient(**tight), penalty=td.JacobianPenalty(0.5)
    )
    x, parameters = torch.randn(3, 4, dtype=torch.float64), dict(deq.named_parameters())

    def loss(parameters):
        torch.manual_seed(1)
        out = torch.func.functional_call(deq, parameters, (x,))
        return out.value.square().sum() + out.penalty

    with ambient("reference"):
        found = torch.func.grad(loss)(parameters)
        wanted = torch.autograd.grad(loss(parameters), [*parameters.values()])
    torch.testing.assert_close([*found.values()], [*wanted], rtol=1e-8, atol=1e-10)
    assert deq.penalty.fired == deq.penalty.calls == 2


def test_evaluation_has_no_penalty_and_no_graph():
    deq = model(penalty=td.JacobianPenalty(0.5)).eval()
    assert deq(torch.randn(5, 4)).penalty.item() == 0
    with torch.no_grad():
        assert not deq.train()(torch.randn(5, 4)).value.requires_grad


def test_injection_is_computed_once():
    deq, calls = model(), []
    deq.cell.injection.register_forward_hook(lambda *_: calls.append(1))
    assert deq(torch.randn(5, 4)).solution.nfe > 1
    assert len(calls) == 1


def test_state_dict_pickle_and_deep_copy():
    deq, x = model(penalty=td.JacobianPenalty(0.5, probability=0.5)), torch.randn(3, 4)
    wanted = deq(x).value
    fresh = model(penalty=td.JacobianPenalty(0.5, probability=0.5))
    nn.init.zeros_(fresh.cell.state.weight)
    fresh.load_state_dict(deq.state_dict())
    for other in (fresh, copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert torch.equal(other(x).value, wanted)


def test_any_module_with_inject_is_a_cell():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.state = nn.Conv2d(3, 3, 3, padding=1)
            nn.init.normal_(self.state.weight, std=0.02)

        def inject(self, x):
            return x

        def forward(self, z, u):
            return torch.relu(self.state(z) + u)

    out = td.DEQ(Convolution(), backend="reference")(torch.randn(2, 3, 5, 5))
    assert out.value.shape == (2, 3, 5, 5)
    assert out.solution.converged.all()


def test_start_from_a_given_state():
    deq, x = model(), torch.randn(5, 4)
    first = deq(x)
    again = deq(x, first.value.detach())
    assert again.solution.nfe == 1


class Foreign(td.MLPCell):
    def forward(self, z, u):
        return torch.tanh(self.state(z) + u).to(z.dtype)


CELLS = {
    "transformer": (lambda: td.TransformerCell(16, 2, 32, dropout=0.1, init_std=0.2), (3, 5, 16)),
    "transformer, pre-norm": (
        lambda: td.TransformerCell(18, 2, 32, pre_norm=True, dropout=0.1, init_std=0.2),
        (3, 5, 18),
    ),
    "multiscale": (lambda: td.MDEQCell((4, 8), 2, dropout=0.1, init_std=0.05), (3, 4, 4, 4)),
}


def solved_and_differentiated(cell, x, autocast=True, **options):
    """The output, and the gradient of a weighted sum of the value and of the penalty."""
    deq = td.DEQ(cell, penalty=td.JacobianPenalty(1.0), **options)
    cell.zero_grad()
    torch.manual_seed(1)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = deq(x)
    weights = torch.linspace(-1, 1, out.value.numel(), device=x.device).view_as(out.value)
    ((out.value * weights).sum() + out.penalty).backward()
    grads = [each.grad.flatten() for each in cell.parameters() if each.grad is not None]
    return out, torch.cat(grads).clone()


@pytest.mark.parametrize("name", CELLS)
def test_narrow_state_rounds_little_more_than_autocast_does(name, backend, device):
    """At three steps: these maps do not contract, and further on any rounding shows."""
    make, shape = CELLS[name]
    torch.manual_seed(0)
    cell, x = make().to(device), torch.randn(shape, device=device)
    options = {"tol": 0.0, "max_steps": 3, "gradient": td.PhantomGradient(), "backend": backend}
    for solver in (td.Anderson(), td.Broyden(), td.Picard()) if backend == "reference" else (td.Anderson(),):
        exact, of_exact = solved_and_differentiated(cell, x, autocast=False, solver=solver, **options)
        wide, of_wide = solved_and_differentiated(cell, x, solver=solver, **options)
        options["state_dtype"] = torch.bfloat16
        narrow, of_narrow = solved_and_differentiated(cell, x, solver=solver, **options)
        del options["state_dtype"]
        assert [out.value.dtype for out in (wide, narrow)] == [torch.float32] * 2
        assert [out.penalty.dtype for out in (wide, narrow)] == [torch.float32] * 2
        assert [out.solution.value.dtype for out in (wide, narrow)] == [torch.float32, torch.bfloat16]
        rounded, more = ((out.value - exact.value).norm() / exact.value.norm() for out in (wide, narrow))
        assert more < 2 * rounded + 2**-8
        rounded, more = ((of - of_exact).norm() / of_exact.norm() for of in (of_wide, of_narrow))
        assert more < rounded + 0.15  # over many seeds autocast alone errs by up to 0.1


@pytest.mark.parametrize("name", CELLS)
def test_narrow_state_without_autocast(name, backend, device):
    """The cells compute in the dtype of their weights."""
    make, shape = CELLS[name]
    torch.manual_seed(0)
    cell, x = make().to(device).eval(), torch.randn(shape, device=device)
    with torch.no_grad():
        options = {"tol": 0.0, "max_steps": 3, "backend": backend}
        wide = td.DEQ(cell, **options)(x)
        narrow = td.DEQ(cell, state_dtype=torch.bfloat16, **options)(x)
    assert narrow.solution.value.dtype == torch.bfloat16
    assert 0 < (narrow.value - wide.value).norm() < 0.02 * wide.value.norm()


def test_narrow_state_in_the_backward_solve(backend, device):
    torch.manual_seed(0)
    cell, x = CELLS["transformer"][0]().to(device), torch.randn(2, 3, 16, device=device)
    options = {"tol": 5e-3, "gradient": td.ImplicitGradient(tol=5e-3), "backend": backend}
    wide, of_wide = solved_and_differentiated(cell, x, **options)
    narrow, of_narrow = solved_and_differentiated(cell, x, state_dtype=torch.bfloat16, **options)
    for out in (wide, narrow):
        assert out.solution.converged.all()
        assert out.solution.backward.converged.all()
    assert narrow.solution.backward.value.dtype == torch.bfloat16
    assert (of_narrow - of_wide).norm() < 0.05 * of_wide.norm()


@pytest.mark.kernels
def test_narrow_state_halves_both_histories(device):
    """The reference keeps them in float32."""
    cell = td.TransformerCell(16, 2, 8).to(device)
    x, peaks = torch.randn(8, 16, 16, device=device), []
    for state_dtype in (None, torch.bfloat16):
        deq = td.DEQ(cell, tol=0.0, max_steps=6, state_dtype=state_dtype, backend="triton")

        def call(deq=deq):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                deq(x)

        peaks.append(peak_bytes(call, torch.device(device)))
    history = 2 * 6 * x.numel()
    assert peaks[0] - peaks[1] >= 2 * history


def test_wide_state_around_a_cell_that_converts():
    class Converting(td.MLPCell):
        def forward(self, z, u):
            return super().forward(z.float(), u).to(z.dtype)

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    deq = td.DEQ(Converting(6, 4), tol=1e-6, state_dtype=torch.float64)
    out = deq(x)
    assert out.value.dtype == torch.float32
    assert out.solution.value.dtype == torch.float64
    assert out.solution.converged.all()
    out.value.sum().backward()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_cell_keeps_the_dtype_of_the_state(dtype, autocast, layer_norm, backend, device):
    torch.manual_seed(0)
    cell = td.MLPCell(6, 4, layer_norm=layer_norm).to(device)
    x, z, vector = (torch.randn(3, width, device=device) for width in (4, 6, 6))
    with ambient(backend):
        wanted, pullback = cell.vjp(z, cell.inject(x))
        of_z = pullback(vector)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            u = cell.inject(x)
            value, pullback = cell.vjp(z.to(dtype), u)
            found = [cell(z.to(dtype), u), value, pullback(vector.to(dtype))]
    for each, exact in zip(found, (wanted, wanted, of_z), strict=True):
        assert each.dtype == dtype
        torch.testing.assert_close(each.float(), exact, rtol=0.05, atol=0.05)


def test_state_dtype_that_cannot_be():
    for wrong in ("bf16", torch.int32, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="state_dtype=.* must be"):
            model(state_dtype=wrong)
    deq = model(state_dtype=torch.bfloat16)
    deq.cell = Foreign(6, 4)
    with pytest.raises(RuntimeError, match="call the model under torch.autocast"):
        deq(torch.randn(5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert deq(torch.randn(5, 4)).solution.value.dtype == torch.bfloat16


def test_with_the_kernels(backend, device):
    deq = model(backend=backend, tol=1e-4, penalty=td.JacobianPenalty(0.5)).to(device)
    out = deq(torch.randn(2, 4, device=device))
    (out.value.sum() + out.penalty).backward()
    assert out.solution.converged.all()
    assert all(parameter.grad.isfinite().all() for parameter in deq.parameters())


@pytest.mark.parametrize("hidden", [None, 9])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", "softplus"])
def test_mlp_cell_is_its_formula(activation, layer_norm, hidden):
    cell = td.MLPCell(5, 3, activation, layer_norm, hidden)
    z, x = torch.randn(4, 5), torch.randn(4, 3)
    act = getattr(torch.nn.functional, activation)
    wanted = act(z @ cell.state.weight.T + x @ cell.injection.weight.T + cell.injection.bias)
    if hidden is not None:
        wanted = wanted @ cell.output.weight.T
    if layer_norm:
        wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, False, keepdim=True) + 1e-5).sqrt()
    u = cell.inject(x)
    torch.testing.assert_close(cell(z, u), wanted, rtol=1e-5, atol=1e-5)
    assert cell.initial_state(u).shape == (4, 5)
    nn.utils.parametrizations.weight_norm(cell.state)
    torch.testing.assert_close(cell(z, u), wanted, rtol=1e-5, atol=1e-5)
