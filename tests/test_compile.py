"""A whole step with the penalty in one graph of torch.compile, its backward included."""

import pytest
import torch
from torch import nn

import triton_deq as td


class CountedBackend:
    """aot_eager, which counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def _forget_graphs():
    """A shape that another test has seen would be taken for a dynamic one."""
    torch._dynamo.reset()


def convolution():
    f = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh()).double()
    return f, torch.randn(2, 4, 3, 3, dtype=torch.float64), list(f.parameters())


def closure():
    inner, outer = (torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(3, 5, dtype=torch.float64)
    return lambda z: torch.tanh(z @ inner + x) @ outer, torch.randn_like(x), [inner, outer]


def module_in_train_mode():
    f = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 5), nn.GELU(), nn.LayerNorm(5)).double().train()
    return f, torch.randn(3, 5, dtype=torch.float64), list(f.parameters())


class Closed:
    """With its product in closed form."""

    def __init__(self, cell, u):
        self.cell, self.u = cell, u

    def __call__(self, z):
        return self.cell(z, self.u)

    def vjp(self, z):
        return self.cell.vjp(z, self.u)


def closed_form():
    cell = td.MLPCell(5, 3, layer_norm=True).double()
    z, u = torch.randn(2, 3, 5, dtype=torch.float64)
    return Closed(cell, u), z, [cell.state.weight, cell.norm.weight]


def training_step(f, penalty):
    """The differentiable part: the state comes from a solve and carries no graph."""
    return lambda z: f(z).square().mean() + penalty(f, z)


def norm(f, z):
    return 0.5 * td.jacobian_norm(f, z, 2, backend="reference")


def loss_and_gradients(step, z, parameters, seed=7):
    torch.manual_seed(seed)
    loss = step(z)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for p, g in pairs)]


def assert_alike(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [convolution, closure, module_in_train_mode, closed_form])
def test_a_step_is_one_graph(make):
    f, z, parameters = make()
    step, backend = training_step(f, norm), CountedBackend()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = loss_and_gradients(compiled, z, parameters)
    assert_alike(found, loss_and_gradients(step, z, parameters))
    without = training_step(f, lambda f, z: 0.0)
    unpenalised = loss_and_gradients(without, z, parameters)
    assert not torch.allclose(found[1], unpenalised[1])
    assert backend.graphs == 1


@pytest.mark.parametrize("make", [closure, pytest.param(convolution, marks=pytest.mark.slow)])
def test_with_inductor(make):
    f, z, parameters = make()
    step = training_step(f, norm)
    found = loss_and_gradients(torch.compile(step, fullgraph=True, backend="inductor"), z, parameters)
    assert_alike(found, loss_and_gradients(step, z, parameters))


def test_spectral_radius_says_that_it_does_not_compile():
    compiled = torch.compile(lambda z: td.spectral_radius(torch.cos, z), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="spectral_radius reads the device"):
        compiled(torch.zeros(2, 3))


def test_probes_are_new_at_every_call():
    f, z, _ = closure()
    compiled = torch.compile(lambda z: norm(f, z), fullgraph=True, backend="aot_eager")
    assert len({compiled(z).item() for _ in range(5)}) == 5


def test_a_penalty_draws_ahead_and_costs_nothing_where_it_does_not_fire():
    """Value, gradients, draws and counts are those of eager calls, and only a new τ compiles anew."""
    f, z, parameters = closure()
    mine, eager = (td.JacobianPenalty(0.3, probability=0.5, growth=0.1, seed=1) for _ in range(2))
    backend = CountedBackend()
    compiled = torch.compile(
        training_step(f, lambda f, z: mine(f, z, "reference")), fullgraph=True, backend=backend
    )
    step = training_step(f, lambda f, z: eager(f, z, "reference"))
    drawn = []
    for seed in range(12):
        compiled_before, seen = backend.graphs, set(drawn)
        drawn.append(mine.draw())
        eager.draw()  # or its own draw would move the probes
        found = loss_and_gradients(compiled, z, parameters, seed)
        assert_alike(found, loss_and_gradients(step, z, parameters, seed))
        assert (mine.calls, mine.fired) == (eager.calls, eager.fired)
        assert (backend.graphs > compiled_before) == (drawn[-1] not in seen)
    assert set(drawn) == {True, False}


def test_the_graph_without_a_draw_has_no_estimate():
    f, z, _ = closure()
    evaluations = []

    def counted(z):
        evaluations.append(1)  # while tracing, as often as f is in the graph
        return f(z)

    penalty = td.JacobianPenalty(0.3, probability=0.0)
    compiled = torch.compile(lambda z: penalty(counted, z, "reference"), fullgraph=True, backend="aot_eager")
    penalty.draw()
    assert compiled(z).item() == 0
    assert not evaluations
    penalty.probability = 1.0
    penalty.draw()
    assert compiled(z).item() > 0
    assert evaluations


def test_a_penalty_without_a_draw_is_never_frozen():
    f, z, _ = closure()
    penalty = td.JacobianPenalty(0.3, probability=0.5)
    step = training_step(f, lambda f, z: penalty(f, z, "reference"))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with pytest.raises(Exception, match=r"call penalty\.draw\(\) before"):
            compiled(z)
        penalty.draw()
        compiled(z)
    broken = torch.compile(step, backend="aot_eager")  # may break the graph, and then draws by itself
    before = penalty.fired
    bare = f(z).square().mean().item()
    values = [broken(z).item() for _ in range(20)]
    assert penalty.calls == 22
    assert sum(value > bare + 1e-9 for value in values) == penalty.fired - before
    assert 0 < penalty.fired - before < 20


def test_norm_of_a_value_says_that_it_does_not_compile():
    f, z, _ = closure()

    def step(z):
        return td.jacobian_norm_of(f(z), z)

    with pytest.raises(Exception, match="jacobian_norm_of needs a double backward"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(z.detach().requires_grad_())
