"""Whole solves in one graph of torch.compile, in an exported program, and in the transforms of torch.func."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._functorch import config

import triton_deq as td
from tests.citizen.instances import MODULES
from triton_deq.reference.record import Record
from triton_deq.solvers import while_loop
from triton_deq.solvers.functional import Progress, judge
from triton_deq.solvers.graph_cache import GraphCache
from triton_deq.solvers.stopping import Stopping

STEPS = 6
SOLVERS = [td.Anderson(history=3), td.Broyden(memory=4), td.Picard(mixing=0.8)]
GRADIENTS = [td.ImplicitGradient(tol=1e-12, max_steps=STEPS), td.PhantomGradient(2), td.UnrolledGradient()]
ALL = [(solver, gradient) for solver in SOLVERS for gradient in GRADIENTS]
QUICK = [ALL[0], ALL[4]]


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, backend=backend, fullgraph=True)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs of which one converges at once and one is not finite."""
    weight = 0.3 * torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    x[0] = 0
    return weight, x


def fixed_point(weight, x, solver, gradient, **options):
    options = {"tol": 1e-3, "max_steps": STEPS, **options}
    return td.fixed_point(
        lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), solver, gradient=gradient, **options
    )


def slope(function, weight, *given, **options):
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(function(weight, *given, **options).square().sum(), weight)[0]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_solve_is_one_graph_with_the_same_answer(solver):
    weight, x = problem()
    x[1, 0] = torch.nan

    def solve(x):
        f = lambda z: torch.tanh(z @ weight + x)  # noqa: E731
        return td.solve(f, torch.zeros_like(x), solver, tol=1e-3, max_steps=STEPS, trace=True)

    eager, traced = solve(x), compiled(solve)(x)
    torch.testing.assert_close(traced.value, eager.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(traced.residual, eager.residual, rtol=1e-9, atol=1e-12)
    assert torch.equal(traced.steps, eager.steps)
    assert torch.equal(traced.status, eager.status)
    assert set(eager.status.tolist()) >= {td.Status.CONVERGED, td.Status.NONFINITE}
    assert traced.nfe == STEPS
    torch.testing.assert_close(traced.trace[: eager.nfe], eager.trace, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in ALL],
    ids=str,
)
def test_a_training_step_is_one_graph(solver, gradient):
    weight, x = problem()
    wanted = slope(fixed_point, weight, x, solver, gradient)
    found = slope(compiled(fixed_point), weight, x, solver, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: None, lambda: td.ImplicitGradient(max_steps=2)])
def test_what_is_not_given_is_made_within_the_graph(make):
    weight, x = problem()
    found = compiled(lambda x: fixed_point(weight, x, None, make()))(x)
    torch.testing.assert_close(found, fixed_point(weight, x, None, make()), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_with_inductor():
    weight, x = problem()
    wanted = slope(fixed_point, weight, x, SOLVERS[0], GRADIENTS[0])
    found = slope(compiled(fixed_point, "inductor"), weight, x, SOLVERS[0], GRADIENTS[0])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.fixture
def undonated():
    """As those set it whose torch compiles a backward pass with a loop wrongly otherwise."""
    with config.patch(donated_buffer=False):
        yield


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_solve_is_a_loop_that_ends(solver):
    weight, x = problem()
    x[1, 0] = torch.nan

    def solve(x, **options):
        f = lambda z: torch.tanh(z @ weight + x)  # noqa: E731
        return td.solve(f, 0.1 * x.nan_to_num(), solver, tol=1e-6, max_steps=30, trace=True, **options)

    eager, looped = solve(x), compiled(solve)(x, graph=True)
    torch.testing.assert_close(looped.value, eager.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(looped.residual, eager.residual, rtol=1e-6, atol=1e-12)
    assert torch.equal(looped.steps, eager.steps)
    assert torch.equal(looped.status, eager.status)
    assert set(eager.status.tolist()) >= {td.Status.CONVERGED, td.Status.NONFINITE}
    assert looped.path == "compiled loop"
    assert looped.nfe == eager.nfe < 30
    torch.testing.assert_close(looped.trace[: eager.nfe], eager.trace, rtol=1e-6, atol=1e-12)
    assert looped.trace.shape == (30, 4)
    assert torch.equal(looped.trace[-1], looped.trace[eager.nfe - 1])


def test_a_sample_that_has_stopped_stands_still_in_a_loop():
    def solve(x, **options):
        f = lambda z: 0.3 * torch.cos(z) + z.mean(0) / 2 + x  # noqa: E731
        return td.solve(f, torch.zeros_like(x), td.Picard(), tol=1e-3, max_steps=40, **options)

    x = 3 * torch.arange(4, dtype=torch.float64)[:, None] * torch.ones(3, dtype=torch.float64)
    eager, looped = solve(x), compiled(solve)(x, graph=True)
    assert eager.steps.max() > eager.steps.min() + 1
    assert torch.equal(looped.steps, eager.steps)
    torch.testing.assert_close(looped.value, eager.value, rtol=0, atol=1e-12)


def test_a_loop_that_ends_at_max_steps():
    solve = lambda x: td.solve(torch.cos, x, td.Picard(), tol=0, max_steps=5, graph=True)  # noqa: E731
    x = torch.rand(3, 2, 2)
    kept = x.clone()
    found = compiled(solve)(x)
    assert found.nfe == 5
    assert found.value.shape == x.shape
    assert torch.equal(x, kept)
    assert found.status.tolist() == [td.Status.MAX_STEPS] * 3
    assert compiled(solve)(x[:0]).value.shape == (0, 2, 2)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_does_not_mind_the_strides_of_a_value(batch, solver):
    """Which differ from the state's; and of one sample alone any stride of the first dimension is as good."""
    weight = torch.randn(6, 6, dtype=torch.float64) / 8
    solve = lambda x, **graph: td.solve(lambda z: (weight @ z.cos().T).T + x, x, solver, tol=1e-8, **graph)  # noqa: E731
    x = torch.randn(batch, 6, dtype=torch.float64)
    torch.testing.assert_close(compiled(solve)(x, graph=True).value, solve(x).value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("solver", "gradient"), [ALL[0], ALL[4]], ids=str)
def test_a_training_step_with_loops(undonated, solver, gradient, backend):
    weight, x = problem()
    options = {"tol": 1e-9, "max_steps": 40}
    if isinstance(gradient, td.ImplicitGradient):
        gradient = replace(gradient, max_steps=40)

    def looped(weight, x):
        return fixed_point(weight, x, solver, gradient, graph=True, **options)

    wanted = slope(fixed_point, weight, x, solver, gradient, **options)
    found = slope(compiled(looped, backend), weight, x)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("graph", "dynamic"), [(False, None), (True, None), (True, True)])
def test_batches_of_several_sizes(undonated, graph, dynamic):
    """With `dynamic` numbers are symbols, too, unless that is forbidden: gradients cannot take them."""
    cell = td.MLPCell(8, 4)
    options = {"max_steps": 2, "gradient": td.ImplicitGradient(max_steps=2)}
    deq, eager = td.DEQ(cell, graph=graph, **options), td.DEQ(cell, **options)

    def slopes(model, x):
        cell.zero_grad()
        model(x).value.square().sum().backward()
        return cell.state.weight.grad.clone()

    with torch._dynamo.config.patch(specialize_float=bool(dynamic)):
        function = torch.compile(deq, backend="aot_eager", dynamic=dynamic, fullgraph=True)
        for batch in (3, 5):
            x = torch.randn(batch, 4)
            torch.testing.assert_close(slopes(function, x), slopes(eager, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_dynamic_solve_has_symbols_for_its_numbers():
    deq = td.DEQ(td.MLPCell(8, 4), max_steps=3)
    function = torch.compile(deq, backend="eager", dynamic=True, fullgraph=True)
    for batch in (3, 5):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(function(x).value, deq(x).value)


def under_autocast(function, dtype):
    def called(*args):
        with torch.autocast("cpu", dtype):
            return function(*args)

    return called


@pytest.mark.parametrize(
    ("dtype", "graph", "where"),
    [
        (torch.bfloat16, False, "inside"),
        (torch.bfloat16, True, "around"),
        (torch.float16, True, "inside"),
        (torch.float16, False, "around"),
    ],
    ids=str,
)
def test_a_training_step_under_autocast(undonated, dtype, graph, where):
    """The backward pass is outside of it; f is evaluated there as it was in the forward one."""
    cell = td.MLPCell(8, 4)
    x = torch.randn(3, 4)

    def slopes(make, **options):
        deq = td.DEQ(cell, max_steps=3, gradient=td.ImplicitGradient(max_steps=3), **options)
        cell.zero_grad()
        make(lambda x: deq(x).value)(x).float().square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in cell.parameters()])

    around = lambda function: under_autocast(function, dtype)  # noqa: E731
    wanted = slopes(around)
    make = {"inside": lambda f: compiled(around(f)), "around": lambda f: around(compiled(f))}[where]
    found = slopes(make, graph=graph)
    assert (found - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm()
    assert not torch.equal(found, slopes(lambda function: function))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_pullback_called_outside_autocast(dtype):
    weight, x = (each.float() for each in problem())
    seen = []

    def f(z, x):
        product = z @ weight
        seen.append(product.dtype)
        return torch.tanh(product + x.to(product.dtype))  # which is not the state's dtype

    def solved(x):
        return td.fixed_point(lambda z: f(z, x), torch.zeros_like(x), max_steps=12)

    value, pull = under_autocast(torch.func.vjp, dtype)(solved, x)
    x.requires_grad_()
    wanted = torch.autograd.grad(under_autocast(solved, dtype)(x).sum(), x)[0]
    evaluations = len(seen)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], wanted, rtol=0.02, atol=0.02)
    assert len(seen) > evaluations
    assert set(seen) == {dtype}


def test_a_loop_does_not_give_wrong_gradients(monkeypatch):
    weight, x = problem()
    looped = compiled(lambda weight, x: fixed_point(weight, x, None, None, graph=True))
    monkeypatch.setattr(while_loop, "NEEDS_CARE", True)
    with (
        config.patch(donated_buffer=True),
        pytest.raises(Exception, match="gives wrong gradients with torch"),
    ):
        slope(looped, weight, x)
    torch._dynamo.reset()
    assert looped(weight, x).isfinite().all()  # without gradients there are none to be wrong


@pytest.mark.parametrize(("solver", "gradient"), ALL, ids=str)
def test_in_a_transform_of_torch_func(solver, gradient):
    weight, x = problem()
    wanted = slope(fixed_point, weight, x, solver, gradient)
    found = torch.func.grad(lambda w: fixed_point(w, x, solver, gradient).square().sum())(weight)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_over_several_weights_at_once():
    weight, x = problem()
    weights = torch.stack([weight, 0.5 * weight])
    found = torch.func.vmap(lambda w: fixed_point(w, x, SOLVERS[0], None))(weights)
    for one, own in zip(found, weights, strict=True):
        torch.testing.assert_close(one, fixed_point(own, x, SOLVERS[0], None), rtol=0, atol=1e-10)
    loss = lambda w: fixed_point(w, x, *ALL[0]).square().sum()  # noqa: E731
    for one, own in zip(torch.func.vmap(torch.func.grad(loss))(weights), weights, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(own), rtol=0, atol=1e-10)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("norm_over", ["sample", "batch"])
def test_both_judges_say_the_same(relative, norm_over):
    """`Record.judge` on the host, and `judge` as tensors, on every kind of residual."""
    stopping = Stopping(1e-3, 9, "relative" if relative else "absolute", norm_over)
    record, progress = Record(6, stopping.tol, torch.device("cpu")), Progress.begin(torch.zeros(6, 1))
    draw = np.random.default_rng(0)
    for step in range(6):
        residual_sq = draw.choice([1e-9, 1e-2, 1.0, 4.0, 1e18, np.nan, np.inf], 6) if step else np.ones(6)
        value_sq = draw.choice([0.0, 1.0, 9.0], 6) if step else np.ones(6)
        improved, moving = record.judge(
            residual_sq.copy(), value_sq.copy(), relative=relative, over_batch=norm_over == "batch"
        )
        squares = torch.from_numpy(residual_sq), torch.from_numpy(value_sq)
        improving, going, progress = judge(progress, *squares, stopping)
        assert improving.tolist() == improved.tolist()
        assert going.tolist() == moving.tolist()
        assert progress.status.tolist() == record.status.tolist()
        assert progress.steps.tolist() == record.steps.tolist()
        torch.testing.assert_close(progress.best, record.best, equal_nan=True)
        torch.testing.assert_close(progress.limit, record.limit)


def shortened(module: nn.Module) -> nn.Module:
    """Fewer steps: every one of them is traced."""
    deq = module if isinstance(module, td.DEQ) else getattr(module, "deq", None)
    if deq is not None:
        deq.stopping = replace(deq.stopping, max_steps=2)
        deq.gradient = replace(deq.gradient, max_steps=2)
    return module


QUICKLY = ("MLPCell", "TransformerCell", "MDEQCell", "DEQ of one's own cell")


@pytest.mark.parametrize(
    "instance",
    [pytest.param(i, marks=[] if i.name in QUICKLY else pytest.mark.slow, id=i.name) for i in MODULES],
)
def test_every_module_trains_in_one_graph(instance):
    module = shortened(instance.make()).double()
    module.eval()  # without dropout, whose masks a compiled function draws otherwise
    for part in module.modules():
        if isinstance(part, td.DEQ):
            part.training = True  # so that the penalty is taken
    inputs = [x.double() if x.is_floating_point() else x for x in instance.inputs()]
    parameters = list(module.parameters())

    def step(*given):
        return instance.value(module, *given)

    found = []
    for function in (step, compiled(step)):
        torch.manual_seed(2)
        penalty = getattr(module, "penalty", None)
        if penalty is not None:
            penalty.draw()
        value = function(*inputs)
        loss = value.float().square().mean()
        found.append((value, torch.autograd.grad(loss, parameters)))
    (value, gradients), (again, others) = found
    assert value.shape == again.shape
    if getattr(module, "penalty", None) is None:  # else the probes of the two are different ones
        torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-8)
        for one, other in zip(others, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


LOOPED = ("DEQ of MLPCell", "DEQ of TransformerCell", "DEQ of MDEQCell")


@pytest.mark.parametrize("instance", [i for i in MODULES if i.name in LOOPED], ids=lambda i: i.name)
def test_every_cell_is_solved_in_loops(undonated, instance):
    deq = instance.make().double()
    deq.penalty = None
    deq.stopping = replace(deq.stopping, tol=1e-4, max_steps=20)
    deq.gradient = replace(deq.gradient, tol=1e-9, max_steps=6)  # more would let a rounding grow
    (x,) = instance.inputs()
    found = []
    for graph in (False, GraphCache()):
        deq.graph = graph
        out = (compiled(deq) if graph else deq)(x.double())
        found.append((out, torch.autograd.grad(out.value.square().sum(), list(deq.parameters()))))
    (wanted, gradients), (looped, others) = found
    torch.testing.assert_close(looped.value, wanted.value, rtol=1e-6, atol=1e-8)
    assert looped.solution.path == "compiled loop"
    assert looped.solution.nfe == wanted.solution.nfe
    for one, other in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


EXPORTED = [i for i in MODULES if "DEQ" in i.name and i.name != "MDEQCell"]
LONG = ("DEQ of MDEQCell", "DEQ of TransformerCell", "MDEQSegmenter")


@pytest.mark.parametrize(
    "instance",
    [pytest.param(i, marks=[pytest.mark.slow] if i.name in LONG else [], id=i.name) for i in EXPORTED],
)
def test_an_exported_program_is_saved_and_serves_any_batch(instance):
    module, inputs = shortened(instance.make()).eval(), instance.inputs()
    batch = torch.export.Dim("batch", min=2, max=64)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=({0: batch},)), stream)
    stream.seek(0)
    program = torch.export.load(stream).module()
    larger = tuple(torch.cat([x, x[:1]]) for x in inputs)
    found, wanted = program(*larger), module(*larger)
    assert type(found) is type(wanted)
    name = next(name for name in ("value", "logits", "hidden") if hasattr(found, name))
    torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    assert found.solution.nfe == 2
    assert torch.equal(found.solution.status, wanted.solution.status)


@pytest.mark.parametrize("solver", [td.Anderson(3), td.Broyden(3), td.Picard()], ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_may_have_a_loop(strict, solver):
    module = td.DEQ(td.MLPCell(6, 4, activation="tanh"), solver, graph=True, max_steps=40, tol=1e-5).eval()
    x = torch.randn(3, 4)
    # PyTorch makes a loop for one batch size where it traces without Dynamo.
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if strict else None
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    assert [node.target for node in exported.graph.nodes].count(torch.ops.higher_order.while_loop) == 1
    larger = torch.cat([x, x[:1] + 1]) if strict else x + 1
    module.graph = False
    found, wanted = exported.module()(larger), module(larger)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-4, atol=1e-5)
    assert found.solution.nfe == wanted.solution.nfe < 40
    assert found.solution.path == "compiled loop"
    if not while_loop.NEEDS_CARE:  # earlier ones can neither save a loop nor compile it ahead of time
        stream = io.BytesIO()
        torch.export.save(exported, stream)
        stream.seek(0)
        again = torch.export.load(stream).module()(larger)
        assert torch.equal(again.value, found.value)


@pytest.mark.parametrize(
    "options", [{"throw": True}, {"compact": 0.5}, {"debug": True}, {"graph": True}], ids=str
)
def test_what_cannot_be_traced_says_so(options):
    weight, x = problem()
    (name,) = options
    with pytest.raises(Exception, match=f"{name}=.*needs the host between two steps"):
        torch.func.grad(lambda w: fixed_point(w, x, None, None, **options).sum())(weight)


@pytest.mark.parametrize(
    "gradient",
    [
        td.ImplicitGradient(warm_start=True),
        td.ImplicitGradient(shine="start"),
        td.ImplicitGradient(throw=True),
    ],
)
def test_gradients_that_cannot_be_traced_say_so(gradient):
    weight, x = problem()
    with pytest.raises(ValueError, match="need the host after the solve"):
        torch.func.grad(lambda w: fixed_point(w, x, td.Broyden(), gradient).sum())(weight)
