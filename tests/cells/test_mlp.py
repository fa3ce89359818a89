"""The MLP cell's vector-Jacobian product in closed form, against autograd."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import triton_deq as td
from triton_deq.backend import ambient
from triton_deq.reference.activations import ACTIVATIONS

SHAPES = pytest.mark.parametrize(
    ("layer_norm", "hidden"), [(False, None), (True, None), (False, 7), (True, 7)], ids=str
)


def cell_and_states(activation="tanh", layer_norm=False, hidden=None, device="cpu"):
    torch.manual_seed(4)
    cell = td.MLPCell(5, 3, activation, layer_norm, hidden).double().to(device)
    if layer_norm:
        nn.init.normal_(cell.norm.weight)
        nn.init.normal_(cell.norm.bias)
    z = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    u = cell.inject(torch.randn(4, 3, dtype=torch.float64, device=device)).detach().requires_grad_()
    return cell, z, u


@SHAPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_product_are_autograds(activation, layer_norm, hidden):
    cell, z, u = cell_and_states(activation, layer_norm, hidden)
    value, pullback = cell.vjp(z, u)
    wanted = cell(z, u)
    torch.testing.assert_close(value, wanted)
    vectors = torch.randn(3, 4, 5, dtype=torch.float64)
    products = pullback(vectors)
    for vector, product in zip(vectors, products, strict=True):
        (expected,) = torch.autograd.grad(wanted, z, vector, retain_graph=True)
        torch.testing.assert_close(product, expected)


@SHAPES
@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "softplus"])
def test_derivatives_of_the_product(activation, layer_norm, hidden):
    cell, z, u = cell_and_states(activation, layer_norm, hidden)
    vector = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def product(z, u, vector):
        return cell.vjp(z, u)[1](vector)

    with ambient("reference"):  # tests/ops/test_mlp.py has the kernels' own
        assert gradcheck(product, (z, u, vector))
        assert gradgradcheck(product, (z, u, vector))


class Plain:
    """The same function without its closed form."""

    def __init__(self, cell, u):
        self.cell, self.u = cell, u

    def __call__(self, z):
        return self.cell(z, self.u)


class Closed(Plain):
    def vjp(self, z):
        return self.cell.vjp(z, self.u)


@SHAPES
@pytest.mark.parametrize("probes", [1, 3])
def test_penalty_and_its_gradients_are_those_of_double_backward(probes, layer_norm, hidden, backend, device):
    cell, z, u = cell_and_states("silu", layer_norm, hidden, device)
    leaves = [z, u, *(p for name, p in cell.named_parameters() if "injection" not in name)]
    found = []
    for f in (Closed(cell, u), Plain(cell, u)):
        generator = torch.Generator().manual_seed(9)
        norm = td.jacobian_norm(f, z, probes, generator=generator, backend=backend)
        found.append((norm, *torch.autograd.grad(norm, leaves, allow_unused=True)))
    for closed, plain in zip(*found, strict=True):
        if closed is None or plain is None:  # the LayerNorm's bias does not enter
            assert closed is None or not closed.any()
            assert plain is None or not plain.any()
        else:
            torch.testing.assert_close(closed, plain)


def test_norm_is_that_of_the_full_jacobian():
    cell, z, u = cell_and_states("gelu", layer_norm=True)
    generator = torch.Generator().manual_seed(1)
    norm = td.jacobian_norm(Closed(cell, u), z, 4000, "rademacher", generator=generator, backend="reference")
    full = torch.func.vmap(torch.func.jacrev(lambda z, u: cell(z[None], u[None])[0]))(z, u)
    torch.testing.assert_close(norm, full.square().sum() / z.numel(), rtol=0.05, atol=0)


def test_a_training_step_of_a_deq_needs_no_engine_in_its_backward_solve(monkeypatch, backend, device):
    x = torch.randn(3, 3, dtype=torch.float64, device=device)
    grads = []
    for closed in (True, False):
        cell, *_ = cell_and_states(device=device)
        if not closed:
            monkeypatch.setattr(td.MLPCell, "vjp", None)
        gradient = td.ImplicitGradient(tol=1e-12, max_steps=14)
        penalty = td.JacobianPenalty(0.5)
        deq = td.DEQ(cell, tol=1e-12, max_steps=14, gradient=gradient, penalty=penalty, backend=backend)
        torch.manual_seed(2)
        out = deq(x)
        with monkeypatch.context() as patch:
            if closed:
                patch.setattr(torch.autograd, "grad", None)
            (out.value.square().sum() + out.penalty).backward()
        assert out.solution.backward.nfe > 3
        grads.append([parameter.grad for parameter in cell.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_in_bfloat16_as_by_autograd(autocast, hidden, monkeypatch):
    """Under autocast the backward pass, which runs outside of it, meets weights of another dtype."""
    grads = []
    for closed in (True, False):
        torch.manual_seed(0)
        cell = td.MLPCell(12, 3, "silu", hidden=hidden, layer_norm=not autocast)
        cell = cell if autocast else cell.bfloat16()
        if not closed:
            monkeypatch.setattr(td.MLPCell, "vjp", None)
        gradient = td.ImplicitGradient(tol=1e-2, max_steps=12)
        penalty = td.JacobianPenalty(0.5, probes=2)
        deq = td.DEQ(cell, tol=1e-2, gradient=gradient, penalty=penalty, backend="reference")
        x = torch.randn(4, 3, dtype=cell.state.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = deq(x)
            loss = out.value.float().square().mean() + out.penalty
        loss.backward()
        grads.append(torch.cat([p.grad.float().flatten() for p in cell.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() < 5e-2 * grads[1].norm()


def test_penalty_under_torch_compile_in_one_graph():
    cell, z, u = cell_and_states()

    def step(z, u):
        return td.jacobian_norm(Closed(cell, u), z, 2, backend="reference")

    torch.manual_seed(0)
    wanted = torch.autograd.grad(step(z, u), cell.state.weight)[0]
    torch.manual_seed(0)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z, u), cell.state.weight)[0], wanted)


def test_no_closed_form_where_it_would_be_another_function():
    class Own(td.MLPCell):
        def forward(self, z, u):
            return 0.5 * super().forward(z, u)

    class OwnLayer(nn.Linear):
        def forward(self, z):
            return -super().forward(z)

    assert Own(4, 3).vjp is None
    hooked, replaced, normalised = td.MLPCell(4, 3), td.MLPCell(4, 3), td.MLPCell(4, 3)
    hooked.state.register_forward_hook(lambda module, args, value: value + 1)
    replaced.state = OwnLayer(4, 4, bias=False)
    nn.utils.parametrizations.weight_norm(normalised.state)
    assert hooked.vjp is None
    assert replaced.vjp is None
    assert normalised.vjp is not None

    gradient = td.ImplicitGradient(tol=1e-9, max_steps=50)
    cell = Own(4, 3).double()
    deq = td.DEQ(cell, tol=1e-9, max_steps=50, gradient=gradient, backend="reference")
    x = torch.randn(2, 3, dtype=torch.float64)
    implicit = torch.autograd.grad(deq(x).value.sum(), cell.state.weight)[0]
    deq.gradient = td.UnrolledGradient()
    unrolled = torch.autograd.grad(deq(x).value.sum(), cell.state.weight)[0]
    torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("what", ["hook", "layer", "bias", "spectral norm"])
def test_what_is_done_to_a_layer_is_done(what, backend, device):
    """Also what only a call of the layer does: a hook, another class, the older spectral norm."""

    class Halved(nn.Linear):
        def forward(self, z):
            return 0.5 * super().forward(z)

    cell = td.MLPCell(5, 3).to(device)
    if what == "hook":
        cell.state.register_forward_hook(lambda module, args, value: value + 1)
    elif what == "layer":
        cell.state = Halved(5, 5, bias=False).to(device)
    elif what == "bias":
        cell.state = nn.Linear(5, 5).to(device)
    else:
        nn.utils.spectral_norm(cell.state)
    cell.eval()  # in training each call moves a spectral norm
    x, z = torch.randn(2, 3, device=device), torch.randn(2, 5, device=device)
    with torch.no_grad():
        u = cell.inject(x)
        torch.testing.assert_close(cell(z, u), torch.tanh(cell.state(z) + u))
        value = td.DEQ(cell, tol=1e-5, max_steps=40, backend=backend).eval()(x).value
        torch.testing.assert_close(torch.tanh(cell.state(value) + u), value, rtol=0, atol=1e-3)


def test_an_activation_of_ones_own():
    sine = td.Activation("sine", torch.sin, torch.cos)
    cell = td.MLPCell(4, 3, sine)
    assert "activation='sine'" in repr(cell)
    z, u = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    value, pullback = cell.vjp(z, u)
    torch.testing.assert_close(value, torch.sin(z @ cell.state.weight.T + u))
    (expected,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(pullback(torch.ones(2, 4)), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: td.MLPCell(3, 3, "sine"), ValueError, "activation='sine' is unknown: choose one of tanh"),
        (lambda: td.MLPCell(3, 3, torch.sin), TypeError, r"td\.Activation, which has a derivative"),
        (
            lambda: td.Activation("sine", torch.sin, None),
            TypeError,
            "derivative=None of the activation 'sine'",
        ),
        (lambda: td.MLPCell(3, 4).inject(torch.ones(2, 5)), ValueError, r"x has 5 .*input_width is 4"),
        (lambda: td.MLPCell(3, 4)(torch.ones(2, 5), torch.ones(2, 3)), ValueError, r"z has 5 .*width is 3"),
        (lambda: td.MLPCell(3, 4)(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"u has 4 .*width is 3"),
        (
            lambda: td.DEQ(td.MLPCell(3, 4))(torch.ones(3, 4), torch.ones(2, 3)),
            ValueError,
            r"z has shape \(2, 3\), and u \(3, 3\): give z u's leading dimensions",
        ),
        (
            lambda: td.DEQ(td.MLPCell(3, 4, hidden=7))(torch.ones(3, 4), torch.ones(1, 3)),
            ValueError,
            r"z has shape \(1, 3\), and u \(3, 7\)",
        ),
        (lambda: td.MLPCell(3, 4)(torch.ones(3), torch.ones(1, 3)), ValueError, r"and u \(1, 3\)"),
        (lambda: td.MLPCell(3, 4)(torch.ones(4, 3), torch.ones(2, 3)), ValueError, r"and u \(2, 3\)"),
        (
            lambda: td.MLPCell(3, 4, hidden=7).write(torch.ones(2, 3), torch.ones(2, 3), torch.empty(2, 3)),
            ValueError,
            r"u has 3 .*hidden is 7",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_samples_of_a_state_may_share_an_injection():
    cell, z, u = cell_and_states()
    for fewer in (u[:1], u[0]):
        torch.testing.assert_close(cell(z, fewer), cell(z, u[:1].expand(4, 5)))
    several = torch.stack([z, 2 * z])
    torch.testing.assert_close(cell(several, u), torch.stack([cell(z, u), cell(2 * z, u)]))


def test_a_normalised_weight_is_made_once_an_evaluation(monkeypatch):
    made = []
    real = torch._weight_norm
    monkeypatch.setattr(torch, "_weight_norm", lambda *given: (made.append(1), real(*given))[1])
    cell = td.MLPCell(4, 3)
    torch.nn.utils.parametrizations.weight_norm(cell.state)
    z, u = torch.randn(2, 4), cell.inject(torch.randn(2, 3))
    made.clear()
    cell(z, u)
    assert len(made) == 1
    with torch.no_grad():
        cell.write(z, u, torch.empty_like(z))
    assert len(made) == 2
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)  # where no kernel serves, too
    with torch.no_grad():
        cell.write(z, u, torch.empty_like(z))
    assert len(made) == 3


def test_one_injection_for_all_samples_is_written_too(device):
    cell = td.MLPCell(4, 3).to(device)
    z, u = torch.randn(5, 4, device=device), torch.randn(1, 4, device=device)
    out = torch.empty_like(z)
    with torch.no_grad():
        cell.write(z, u, out)
    torch.testing.assert_close(out, cell(z, u).detach(), rtol=1e-5, atol=1e-6)
