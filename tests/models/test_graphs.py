"""Models whose solves, or all of which, are in graphs; on a CPU a stand-in does what they would."""

import operator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import triton_deq as td
from tests import standin
from triton_deq.models import (
    CONFIGURATIONS,
    IMAGE_CONFIGURATIONS,
    DEQTransformerLM,
    MDEQClassifier,
    MDEQSegmenter,
)
from triton_deq.ops import attention, feedforward, fusion, groupnorm, norm

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("graphs")]
SMALL = replace(
    IMAGE_CONFIGURATIONS["digits"],
    channels=(4, 4),
    groups=2,
    expansion=1,
    head=(2, 2),
    final=8,
    init_std=0.1,
    max_steps=5,
    tol=1e-9,
)


@pytest.fixture
def graphs(device, monkeypatch):
    if device != "cuda":
        standin.install(monkeypatch)
        # tests/cells has these kernels; here they would only take their time.
        for op in (attention, feedforward, fusion, groupnorm, norm):
            monkeypatch.setattr(op, "kernels_serve", lambda *given, **options: False)
        # What is captured are operators, which round bfloat16 more often than compiled code.
        monkeypatch.setattr(groupnorm, "compiled_serves", lambda *given: False)


def pair(device, configuration=SMALL, kind=MDEQClassifier):
    """A model without graphs and one with them, of the same weights: of z little, much is injected."""
    solver = td.Picard()  # a cycle of 4 steps, and a rest
    plain, graphed = (
        kind(configuration, solver=solver, graph=each).to(device).eval() for each in (False, True)
    )
    with torch.no_grad():
        plain.stem[-2].weight.mul_(5)
        for block in plain.cell.blocks:
            block.second.conv.parametrizations.weight.original0.mul_(0.05)
        for unit in plain.cell.post:
            unit.norm.weight.mul_(0.1)
    graphed.load_state_dict(plain.state_dict())
    return plain, graphed


def images(device, batch=2):
    return 4 * torch.randn(batch, 1, 4, 4, device=device)


@contextmanager
def tf32():
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def agree(plain, graphed, x, within=1e-4, **options):
    with torch.no_grad():
        wanted, found = plain(x, **options), graphed(x, **options)
    close = {"rtol": within, "atol": within}  # oneDNN's convolutions round by where their operands lie
    torch.testing.assert_close(found.logits, wanted.logits, **close)
    torch.testing.assert_close(found.state, wanted.state, **close)
    assert len(x) == 1 or (found.state[0] - found.state[1]).abs().max() > 0.1  # it is of these images
    return found


@pytest.mark.parametrize("initialiser", [0.0, 1.0])
def test_the_same_as_without_and_none_is_stale(initialiser, device):
    plain, graphed = pair(device, replace(SMALL, initialiser=initialiser))
    first = agree(plain, graphed, images(device))
    kept = first.logits.clone(), first.state.clone()
    agree(plain, graphed, images(device))
    captured = len(standin.captures)
    with torch.no_grad():  # in place: the graphs see it
        for model in (plain, graphed):
            model.stem[0].weight.mul_(0.5)
            model.stem[1].running_var.mul_(2)
            model.cell.blocks[0].first.conv.parametrizations.weight.original0.mul_(0.5)
            model.head.classify.bias.add_(1)
    later = agree(plain, graphed, images(device))
    assert len(standin.captures) == captured
    agree(plain, graphed, images(device), z0=later.state)
    assert torch.equal(first.logits, kept[0])
    assert torch.equal(first.state, kept[1])


def test_narrow_state_under_autocast(device):
    plain, graphed = pair(device)
    for model in (plain, graphed):
        model.deq.state_dtype = torch.bfloat16
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        for _ in range(3):
            found = agree(plain, graphed, images(device), within=2e-2)
    assert found.solution.path == "graph"
    assert found.solution.value.dtype == torch.bfloat16
    assert found.state.dtype == torch.float32


def test_all_but_the_looks_is_replayed(device):
    """A stem or head that ran by itself would be seen by its modules."""
    _, graphed = pair(device)
    x, calls = images(device), []
    with torch.no_grad():
        graphed(x)
        for part in (graphed.stem, graphed.head):
            forward = part.forward
            object.__setattr__(part, "forward", lambda *given, f=forward: (calls.append(1), f(*given))[1])
        graphed(x)  # the new attribute is a setting: captured anew
        assert calls
        calls.clear()
        graphed(x)
    assert not calls


def test_what_is_elsewhere_or_otherwise_is_captured_anew(device):
    plain, graphed = pair(device)
    agree(plain, graphed, images(device))
    for model in (plain, graphed):
        model.head.classify.weight = nn.Parameter(torch.ones_like(model.head.classify.weight))
    agree(plain, graphed, images(device))
    for model in (plain, graphed):
        model.stem[1].eps = 1.0
    agree(plain, graphed, images(device))
    agree(plain, graphed, images(device, batch=1))
    with torch.autocast(device, torch.bfloat16):
        agree(plain, graphed, images(device), within=0.1)
    with torch.inference_mode():
        graphed(images(device))
    agree(plain, graphed, images(device))
    captured = len(standin.captures)
    with tf32():
        agree(plain, graphed, images(device), within=0.1 if device == "cuda" else 1e-4)
    assert device == "cuda" or len(standin.captures) > captured


@pytest.mark.parametrize("first", ["plain", "graphed"])
def test_what_is_kept_of_weights_for_a_while_is_in_no_graph(first, device):
    """Casts by autocast and normalised weights, when the graphs are captured and before."""
    plain, graphed = pair(device)
    x = images(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16), parametrize.cached():
        if first == "plain":
            graphed.deq.graph, graphs = False, graphed.deq.graph
            graphed(x)
            graphed.deq.graph = graphs
        agree(plain, graphed, x, within=0.1)
    assert device == "cuda" or len(standin.captures) == 2  # before and after the solve
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for model in (plain, graphed):
            for parameter in model.parameters():
                parameter.mul_(-0.7)
        agree(plain, graphed, x, within=0.1)


def test_the_equilibrium_alone_after_the_whole(device):
    """The solve's graphs read what the injection's leave, and are not misled by another injection."""
    plain, graphed = pair(device)
    for _ in range(2):
        agree(plain, graphed, images(device))
    graphs = graphed.deq.graph
    (solve,), (before, _) = graphs._entries.values(), graphs._calls.values()
    assert all(map(operator.is_, solve.f.u.weights, before.value[0].weights))
    features = torch.randn(2, 4, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    for epsilon in (1e-5, 1.0):
        for model in (plain, graphed):
            model.cell.blocks[0].norm.eps = epsilon
        for _ in range(2):  # the second time from graphs
            with torch.no_grad():
                wanted, found = plain.deq(features), graphed.deq(features)
            torch.testing.assert_close(found.value, wanted.value, rtol=1e-4, atol=1e-4)
            agree(plain, graphed, images(device))


def test_another_injection_is_written_nowhere_but_into_copies(device):
    """Of a convolution without weight normalisation the injection holds the parameter itself."""
    plain, graphed = pair(device)
    agree(plain, graphed, images(device))
    held = {name: value.detach().clone() for name, value in graphed.named_parameters()}
    with torch.no_grad():
        u = plain.cell.inject(torch.randn(2, 4, 4, 4, device=device))
        other = u._replace(weights=tuple(weight + 0.01 for weight in u.weights))
        for each in (u, other):
            wanted, found = (model.deq.from_injection(each) for model in (plain, graphed))
            torch.testing.assert_close(found.value, wanted.value, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, held[name]) for name, value in graphed.named_parameters())
    agree(plain, graphed, images(device))


def test_what_a_graph_would_not_repeat_runs_as_it_is(device):
    plain, graphed = pair(device)
    seen = []
    agree(plain, graphed, images(device))
    hooks = [
        part.register_forward_hook(lambda *of: seen.append(1)) for part in (graphed.stem[0], graphed.head)
    ]
    for count in (2, 4, 6):
        agree(plain, graphed, images(device))
        assert len(seen) == count
    for hook in hooks:
        hook.remove()
    graphed.deq.register_forward_hook(lambda *of: seen.append(1))
    agree(plain, graphed, images(device))
    assert len(seen) == 7


def test_a_head_that_waits_for_the_device_runs_as_it_is(device):
    class Waiting(nn.Module):
        def forward(self, maps):
            mean = maps[0].mean((1, 2, 3))
            return mean[:, None] if mean[0].item() < 1e9 else maps[0]

    plain, graphed = pair(device)
    plain.head = graphed.head = Waiting().eval()
    for _ in range(3):
        agree(plain, graphed, images(device))


def test_a_head_that_reads_something_else_runs_as_it_is(device):
    class Reading(nn.Module):
        def forward(self, maps):
            return maps[0].mean((2, 3)) * elsewhere[0]

    plain, graphed = pair(device)
    plain.head = graphed.head = Reading().eval()
    for scale in range(3):
        elsewhere = [torch.full((1,), float(scale), device=device)]
        agree(plain, graphed, images(device))


def test_training_runs_as_it_is(device):
    """Statistics move once a call, and gradients are there."""
    plain, graphed = pair(device)
    x = images(device)
    for model in (plain, graphed):
        model.train()
        with torch.no_grad():
            model(x)
            model(x)
        model.eval()
        model(x).logits.sum().backward()
    assert plain.stem[1].num_batches_tracked == graphed.stem[1].num_batches_tracked == 2
    torch.testing.assert_close(graphed.stem[0].weight.grad, plain.stem[0].weight.grad)


def test_segmentation(device):
    plain, graphed = pair(device, replace(SMALL, head=(), classes=3, penalty=0.0), MDEQSegmenter)
    for _ in range(2):
        agree(plain, graphed, images(device))


def language_models(device):
    configuration = replace(
        CONFIGURATIONS["tiny"],
        vocabulary=60,
        cutoffs=(10, 30),
        width=16,
        heads=2,
        head_width=8,
        inner=24,
        dropout=0.3,
        max_steps=5,
        tol=1e-9,
    )
    plain, graphed = (
        DEQTransformerLM(configuration, solver=td.Picard(), graph=graph).to(device) for graph in (False, True)
    )
    graphed.load_state_dict(plain.state_dict())
    return plain, graphed


def language_loss(model):
    tokens = torch.randint(60, (2, 6), device=model.cell.qkv.weight.device)
    return model(tokens[:, :-1], tokens[:, 1:]).nll.mean()


def image_models(device):
    return pair(device, replace(SMALL, dropout=0.3, penalty=0.0))


def image_loss(model):
    return model(images(model.stem[0].weight.device)).logits.square().sum()


@pytest.mark.parametrize(("make", "loss_of"), [(image_models, image_loss), (language_models, language_loss)])
def test_steps_of_training(make, loss_of, device):
    """Dropout, the backward outside of the forward's autocast, parameters that move."""
    models = make(device)
    captured = []
    for model in models:
        model.train()
        model.deq.gradient = td.ImplicitGradient(td.Picard(), tol=1e-9, max_steps=5)
    for step in range(4):
        grads = []
        for model in models:
            torch.manual_seed(step)
            with torch.autocast(device, torch.bfloat16, enabled=step == 3):
                loss = loss_of(model)
            grads.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
        for found, wanted in zip(grads[1], grads[0], strict=True):
            size = wanted.norm().item()
            assert (found - wanted).norm().item() <= (0.1 if step == 3 else 1e-3) * size + 1e-5
        captured.append(len(standin.captures))
        with torch.no_grad():
            for model in models:
                for parameter, grad in zip(model.parameters(), grads[0], strict=True):
                    parameter.sub_(grad, alpha=0.01)
    assert device == "cuda" or captured[1] == captured[2] < captured[3]
