"""Graph mode. On a GPU graphs are captured; elsewhere a stand-in records and repeats what a graph would."""

import copy
import pickle
import warnings

import pytest
import torch

import triton_deq as td
from tests import standin
from tests.problems import tanh_map
from triton_deq.reference.activations import ACTIVATIONS

kernels = pytest.mark.kernels
SOLVERS = [td.Anderson(3), td.Broyden(2), td.Picard()]


@pytest.fixture
def graphs(device, monkeypatch):
    standin.step_by_step(monkeypatch)
    if device != "cuda":
        standin.install(monkeypatch)


@kernels
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("max_steps", [3, 8, 14])
def test_the_same_steps_as_without(solver, max_steps, device):
    """Fewer steps than a cycle, whole cycles, and cycles with a rest."""
    f, *_ = tanh_map(2, 9, gain=0.9, device=device)
    z0 = torch.zeros(2, 9, dtype=torch.float64, device=device)
    options = {"tol": 1e-4, "max_steps": max_steps, "trace": True, "backend": "triton"}
    plain, graphed = td.solve(f, z0, solver, **options), td.solve(f, z0, solver, **options, graph=True)
    assert torch.equal(graphed.value, plain.value)
    assert torch.equal(graphed.steps, plain.steps)
    assert torch.equal(graphed.status, plain.status)
    assert torch.equal(graphed.residual, plain.residual)
    steps = int(plain.steps.max())
    assert steps <= graphed.nfe <= max_steps
    assert torch.equal(graphed.trace[:steps], plain.trace[:steps])


def cell_and_inputs(device):
    cell = td.MLPCell(6, 3).to(device)
    xs = [torch.randn(2, 3, device=device) for _ in range(3)]
    return cell, xs


OPTIONS = {"tol": 1e-5, "max_steps": 13, "backend": "triton"}


@kernels
@pytest.mark.usefixtures("graphs")
def test_a_deq_uses_its_graphs_again_and_none_is_stale(device):
    cell, xs = cell_and_inputs(device)
    plain = td.DEQ(cell, td.Anderson(2), **OPTIONS)
    graphed = td.DEQ(cell, td.Anderson(2), **OPTIONS, graph=True)

    def agree(x):
        with torch.no_grad():
            first, second = graphed(x), plain(x)
        assert torch.equal(first.value, second.value)
        return first.value

    kept = agree(xs[0])
    value = kept.clone()
    for x in xs[1:]:
        agree(x)
    captured = len(standin.captures)
    agree(xs[0])
    assert torch.equal(kept, value)  # what was returned before is not overwritten
    assert len(standin.captures) == captured  # nothing was captured again

    with torch.no_grad():
        cell.state.weight.mul_(0.5)  # where it lies: the graph sees it
    agree(xs[1])
    assert len(standin.captures) == captured
    cell.state.weight = torch.nn.Parameter(0.3 * cell.state.weight.detach())  # elsewhere
    agree(xs[1])
    cell.activation = ACTIVATIONS["relu"]
    agree(xs[1])
    agree(xs[2][:1])  # another batch


class Plain(td.MLPCell):
    """A cell that computes in whatever dtype autocast says, and has no closed form."""

    vjp = None

    def forward(self, z, u):
        return torch.tanh(self.state(z) + u)


@kernels
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("make", [Plain, td.MLPCell])
def test_under_autocast_in_float16(make, device):
    """The value is cast within the graph, and the backward solve made in units of its gradient."""
    cell = make(6, 3).to(device)
    x = torch.randn(2, 3, device=device)
    found = []
    for graph in (False, True):
        deq = td.DEQ(cell, td.Anderson(2), **OPTIONS, state_dtype=torch.float32, graph=graph)
        cell.zero_grad()
        with torch.autocast(device, torch.float16):
            out = deq(x)
        (1024 * out.value.float().square().sum()).backward()
        assert out.solution.value.dtype == torch.float32
        found.append([out.solution.value, *(parameter.grad for parameter in cell.parameters())])
        assert (out.solution.path == "graph") == graph
    for plain, graphed in zip(*found, strict=True):
        # The products may be those of other kernels on a GPU.
        torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@kernels
@pytest.mark.usefixtures("graphs")
def test_a_cell_that_reads_something_else_is_captured_anew(device):
    class Reading(td.MLPCell):
        def forward(self, z, u):
            return super().forward(z, u) + self.extra()[0]

        def extra(self):
            return self.__dict__["tensors"]

    cell = Reading(6, 3).to(device)
    cell.__dict__["tensors"] = []
    deq = td.DEQ(cell, td.Picard(), **OPTIONS, graph=True)
    x = torch.randn(2, 3, device=device)
    with torch.no_grad():
        with pytest.raises(IndexError):  # a first solve that does not come to its end has shown nothing
            deq(x)
        cell.__dict__["tensors"] = [torch.zeros(6, device=device)]
        deq(x)
        for shift in (0.1, 0.2):
            cell.__dict__["tensors"] = [torch.full((6,), shift, device=device)]
            expected = td.DEQ(cell, td.Picard(), **OPTIONS)(x).value
            assert torch.equal(deq(x).value, expected)


@kernels
@pytest.mark.usefixtures("graphs")
def test_casts_of_autocast_are_made_within_the_graphs(device):
    """Of a cell that reads its weights itself, which autocast would cast once for the whole context."""

    class Plain(torch.nn.Linear):
        def inject(self, x):
            return x

        def forward(self, z, u):
            return torch.tanh(super().forward(z) + u)

    cell = Plain(6, 6).to(device)
    plain, graphed = (td.DEQ(cell, td.Anderson(2), **OPTIONS, graph=graph) for graph in (False, True))
    x = torch.randn(2, 6, device=device)
    for scale in (1, 0.5, 0.5):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            cell.weight.mul_(scale)
            assert torch.equal(graphed(x).value, plain(x).value)


@kernels
@pytest.mark.usefixtures("graphs")
def test_gradients_through_a_deq_in_graph_mode(device):
    cell, xs = cell_and_inputs(device)
    grads = []
    for graph in (False, True):
        gradient = td.ImplicitGradient(tol=1e-6, max_steps=13)
        deq = td.DEQ(cell, td.Anderson(2), **OPTIONS, gradient=gradient, graph=graph)
        for x in xs[:2]:
            loss = deq(x).value.square().sum()
        grads.append(torch.autograd.grad(loss, cell.parameters()))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@kernels
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_backward_solves_use_their_graphs_again_and_none_is_stale(autocast, device):
    """Steps of training, the forward under autocast and the backward outside of it."""
    cell, xs = cell_and_inputs(device)
    gradient = td.ImplicitGradient(tol=1e-9, max_steps=5)  # a cycle and a step
    options = {**OPTIONS, "max_steps": 5, "tol": 0, "gradient": gradient}  # always as many steps
    plain, graphed = (td.DEQ(cell, td.Anderson(2), **options, graph=graph) for graph in (False, True))
    captured = []
    for step in range(3):
        outs, grads = [], []
        for deq in (plain, graphed):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                outs.append(deq(xs[step]))
            grads.append(torch.autograd.grad(outs[-1].value.square().sum(), list(cell.parameters())))
        close = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(grads[1], grads[0], **close)
        assert outs[1].solution.backward.path == "graph"
        assert outs[1].solution.backward.nfe == 5
        captured.append(len(standin.captures))
        with torch.no_grad():
            for parameter, grad in zip(cell.parameters(), grads[0], strict=True):
                parameter.sub_(grad, alpha=0.2)
    assert captured[1] == captured[2]


@kernels
@pytest.mark.usefixtures("graphs")
def test_a_closed_form_that_waits_for_the_device_serves_each_solve_anew(device):
    class Waiting(td.MLPCell):
        @property
        def vjp(self):
            return self.look

        def look(self, z, u):
            value, product = td.MLPCell.vjp.fget(self)(z, u)
            return value, product if value.sum().item() < 1e9 else None

    grads, (_, xs) = [], cell_and_inputs(device)
    cell = Waiting(6, 3).to(device)
    for graph in (False, True):
        deq = td.DEQ(cell, td.Anderson(2), **{**OPTIONS, "max_steps": 5}, graph=graph)
        for x in xs[:2]:
            loss = deq(x).value.square().sum()
            grads.append(torch.autograd.grad(loss, cell.parameters()))
    torch.testing.assert_close(grads[2:], grads[:2], rtol=1e-4, atol=1e-5)


@kernels
@pytest.mark.usefixtures("graphs")
def test_an_f_that_cannot_be_captured_says_why(device):
    def f(z):
        return z / 2 if z.sum().item() < 1e9 else z

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        td.solve(
            f, torch.ones(2, 3, device=device), td.Picard(), tol=0, max_steps=9, graph=True, backend="triton"
        )


@kernels
@pytest.mark.usefixtures("graphs")
def test_an_f_that_changes_its_shape_at_the_capture(device):
    calls = []

    def f(z):
        calls.append(1)
        return z[:, :2] if len(calls) > 4 else z / 2

    with pytest.raises(ValueError, match=r"f\(z\) has shape \(2, 2\), z has \(2, 3\)"):
        td.solve(
            f, torch.ones(2, 3, device=device), td.Picard(), tol=0, max_steps=9, graph=True, backend="triton"
        )


def test_on_a_cpu_it_says_that_it_does_nothing():
    f, *_ = tanh_map(2, 5)
    z0 = torch.zeros(2, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="graph=True does nothing on cpu") as caught:
        solution = td.solve(f, z0, graph=True, backend="reference")
    assert caught[0].filename == __file__
    assert torch.equal(solution.value, td.solve(f, z0, backend="reference").value)


def test_what_cannot_go_together():
    z0 = torch.zeros(2, 5)
    f = td.DEQ(td.MLPCell(5, 5), compact=0.5, graph=True, backend="reference")
    with pytest.raises(ValueError, match=r"compact=0\.5 changes the batch"):
        f(z0)
    with pytest.raises(ValueError, match="cannot be unrolled"):
        td.fixed_point(torch.tanh, z0, gradient=td.UnrolledGradient(), graph=True)


def test_a_deq_in_graph_mode_can_be_copied_and_pickled():
    deq = td.DEQ(td.MLPCell(5, 3), graph=True)
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(other(x).value, deq(x).value)
