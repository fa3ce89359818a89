"""The module: cell, solver, gradient and penalty together."""

import copy
import pickle

import pytest
import torch
from torch import nn

import triton_deq as td


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
