"""The Transformer cell against the published formula written out, and its product against autograd."""

import copy
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

import triton_deq as td
from tests.counters import Counter
from triton_deq.backend import ambient
from triton_deq.cells.transformer import Memory
from triton_deq.deq import Injected
from triton_deq.reference import attention as attention_reference
from triton_deq.verification.case import relative_error

BATCH, LENGTH, PAST, WIDTH, HEADS, HEAD = 2, 5, 3, 8, 2, 3
PLACES = pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])


@pytest.fixture(autouse=True)
def _where_the_kernels_are(device, request):
    """Every tensor that a test makes is on the GPU where there is one."""
    # Some versions of torch.compile cannot look into this context.
    traced = request.function is test_a_training_step_compiles_into_one_graph
    with nullcontext() if device == "cpu" or traced else torch.device(device):
        yield


def cell_and_input(pre_norm=False, dtype=torch.float64, past=PAST, inner=12, **options):
    torch.manual_seed(3)
    cell = td.TransformerCell(WIDTH, HEADS, inner, HEAD, pre_norm=pre_norm, init_std=0.3, **options).to(dtype)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)
    memory = Memory(
        torch.randn(BATCH, past, WIDTH, dtype=dtype), torch.randn(BATCH, past, 2 * HEADS * HEAD, dtype=dtype)
    )
    return cell, (x, memory), torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)


def written_out(cell, z, x, memory):
    """One sequence and one head at a time, memory and tokens in one row, as Transformer-XL describes it."""
    heads, head, across = cell.heads, cell.head_width, cell.heads * cell.head_width
    past, length = memory.value.shape[1], z.shape[1]
    injected = functional.linear(x, cell.injection.weight, cell.injection.bias)
    before = torch.cat([torch.zeros(len(x), past, across, dtype=x.dtype), memory.injection], dim=-1)
    everything = torch.cat([memory.value, z], dim=1)
    if cell.pre_norm:
        everything = functional.layer_norm(everything, (cell.width,))
    qkv = everything @ cell.qkv.weight.mT + torch.cat([before, injected], dim=1)

    angle = torch.arange(past + length, dtype=torch.float32)[:, None] * torch.tensor(
        [10000 ** (-2 * i / cell.width) for i in range(cell.width // 2)]
    )
    encodings = torch.cat([angle.sin(), angle.cos()], dim=1).to(z.dtype) @ cell.positions.weight.mT
    mixed = torch.zeros(len(x), length, across, dtype=z.dtype)
    for b in range(len(x)):
        for h in range(heads):
            part = slice(h * head, (h + 1) * head)
            q, k, v = (rows[:, part] for rows in qkv[b].split(across, dim=-1))
            for i in range(length):
                scores = []
                for j in range(past + i + 1):
                    content = (q[past + i] + cell.content_bias[h]) @ k[j]
                    position = (q[past + i] + cell.position_bias[h]) @ encodings[past + i - j, part]
                    scores.append((content + position) / math.sqrt(head))
                visible = len(scores) if cell.window is None else min(len(scores), cell.window)
                weights = torch.softmax(torch.stack(scores[-visible:]), dim=0)
                mixed[b, i, part] = weights @ v[past + i + 1 - visible : past + i + 1]
    s = functional.layer_norm(z + cell.out(mixed), (cell.width,))
    value = s + cell.down(torch.relu(cell.up(s)))
    return value if cell.pre_norm else functional.layer_norm(value, (cell.width,))


@PLACES
@pytest.mark.parametrize("weight_norm", [False, True], ids=["plain", "weight norm"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_value_is_the_papers(pre_norm, weight_norm, window, backend):
    cell, (x, memory), z = cell_and_input(pre_norm, weight_norm=weight_norm, window=window)
    nn.init.normal_(cell.up.bias)
    with ambient(backend):
        value = cell(z, cell.inject((x, memory)))
        out = torch.full_like(z, torch.nan)
        with torch.no_grad():
            cell.write(z, cell.inject((x, memory)), out)
    torch.testing.assert_close(value, written_out(cell, z, x, memory))
    torch.testing.assert_close(out, value)


@pytest.mark.kernels
@PLACES
@pytest.mark.parametrize("dropped", [False, True], ids=["kept", "dropped"])
def test_the_hidden_layer_is_passed_over_by_products_alone(pre_norm, dropped):
    """It is far wider than the state: forward and backward write it once each, and only products read it."""
    cell, x, z = cell_and_input(pre_norm, inner=100, dropout=0.3 if dropped else 0.0)
    hidden = torch.empty(BATCH, LENGTH, 100)
    with ambient("triton"), torch.no_grad():
        u = cell.inject(x)
        with Counter(hidden) as counter:
            cell(z, u)
            value, pullback = cell.vjp(z, u)
            pullback(value)
    # What the kernels write, and nothing that an operator returns.
    assert counter.now.allocated == ["new_empty", "new_empty", "empty_like"]
    assert counter.now.launches.count("feedforward_kernel") == 2
    assert counter.now.launches.count("feedforward_vjp_kernel") == 1


@PLACES
def test_memory_stands_for_the_tokens_before(pre_norm):
    """Two segments with memory give what one long sequence gives, where the past is the same."""
    cell, (x, _), z = cell_and_input(pre_norm)
    whole = cell(z, cell.inject(x))
    first = cell.inject(x[:, :2])
    memory = cell.memory(z[:, :2], first, None, LENGTH)
    second = cell(z[:, 2:], cell.inject((x[:, 2:], memory)))
    torch.testing.assert_close(cell(z[:, :2], first), whole[:, :2])
    torch.testing.assert_close(second, whole[:, 2:])
    assert not memory.value.requires_grad
    assert not memory.injection.requires_grad


def test_memory_keeps_the_newest():
    cell, (x, memory), z = cell_and_input()
    u = cell.inject((x, memory))
    kept = cell.memory(z, u, memory, LENGTH + 1)
    torch.testing.assert_close(kept.value, torch.cat([memory.value[:, -1:], z], dim=1))
    assert kept.injection.shape == (BATCH, LENGTH + 1, 2 * HEADS * HEAD)
    assert cell.memory(z, u, memory, 2).value.shape[1] == 2
    assert cell.memory(z, u, memory, 0).value.shape[1] == 0


@pytest.mark.kernels
def test_zeros_behind_each_head_for_the_kernels_alone():
    """Rows of 3 entries of 8 bytes get a fourth; what the next segment is left has none."""
    cell, (x, memory), z = cell_and_input()
    kept = []
    for served, depth in (("triton", HEAD + 1), ("reference", HEAD)):
        with ambient(served):
            u = cell.inject((x, memory))
        assert u.context.positions.shape[-1] == u.context.memory_keys.shape[-1] == depth
        assert u.qkv.shape[-1] == len(u.weights.qkv) == 3 * HEADS * depth
        kept.append(cell.memory(z, u, memory, LENGTH + 1))
    torch.testing.assert_close(kept[0].injection, kept[1].injection)


@pytest.mark.kernels
@pytest.mark.parametrize(("pre_norm", "recorded"), [(False, True), (True, False)], ids=["post", "pre"])
def test_zeros_behind_the_width_change_nothing(pre_norm, recorded):
    """Rows of 6 float32 entries get two more, in a room that all steps share or in a graph."""
    torch.manual_seed(5)
    cell = td.TransformerCell(6, 2, 10, 3, pre_norm=pre_norm, dropout=0.3, init_std=0.5)
    x, z = torch.randn(2, BATCH, LENGTH, 6)
    found = []
    for served in ("triton", "reference"):
        with ambient(served), torch.set_grad_enabled(recorded):
            torch.manual_seed(6)  # of the masks
            u = cell.inject(x)
            assert (u.room is not None) == (served == "triton")
            assert u.weights.up.shape[-1] == len(u.weights.down) == (8 if served == "triton" else 6)
            out = torch.empty_like(z)
            with torch.no_grad():
                cell.write(z, u, out)
            value, pullback = cell.vjp(z, u)
            product = pullback(x)
            gradients = []
            if recorded:
                loss = value.square().sum() + product.square().sum()
                gradients = torch.autograd.grad(loss, list(cell.parameters()))
        found.append([value, out, product, *gradients])
    assert max(map(relative_error, *found)) < 1e-5
    torch.testing.assert_close(found[0][0], found[0][1])


@PLACES
@pytest.mark.parametrize("dropped", [False, True], ids=["kept", "dropped"])
def test_value_and_product_are_autograds(pre_norm, dropped, backend):
    options = {"dropout": 0.3, "attention_dropout": 0.2} if dropped else {}
    cell, x, z = cell_and_input(pre_norm, weight_norm=True, **options)
    z.requires_grad_()
    u = cell.inject(x)
    with ambient(backend):
        value, pullback = cell.vjp(z, u)
        vectors = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)
        products = pullback(vectors)
        with torch.no_grad():  # as a backward solve asks for them
            torch.testing.assert_close(pullback(vectors), products)
            slot = torch.full_like(z, math.nan)
            pullback.plus(vectors[1]).write(vectors[0], slot)
        torch.testing.assert_close(slot, products[0] + vectors[1])
        torch.testing.assert_close(pullback.plus(vectors[1])(vectors[0]), slot)
        torch.testing.assert_close(value, cell(z, u))
    with ambient("reference"):
        wanted = cell(z, u)
    torch.testing.assert_close(value, wanted)
    for vector, product in zip(vectors, products, strict=True):
        (expected,) = torch.autograd.grad(wanted, z, vector, retain_graph=True)
        torch.testing.assert_close(product, expected)


@pytest.mark.kernels
@PLACES
@pytest.mark.parametrize("training", [False, True])
def test_gradients_with_dropout_and_in_evaluation_without(pre_norm, training):
    """By the kernels, which are told what a mask is where it is not 0, and by the reference."""
    cell, x, z = cell_and_input(pre_norm, dropout=0.3)
    cell.train(training)
    leaves = [z.requires_grad_(), *cell.parameters()]
    found = []
    for served in ("triton", "reference"):
        torch.manual_seed(7)  # of the masks
        with ambient(served):
            value = cell(z, cell.inject(x))
            found.append(torch.autograd.grad((value**3).sum(), leaves))
    torch.testing.assert_close(*found)


@PLACES
def test_the_penalty_and_its_gradients_are_the_double_backwards(pre_norm, backend):
    cell, x, z = cell_and_input(pre_norm, weight_norm=True, dropout=0.3, attention_dropout=0.2)
    u = cell.inject(x)
    leaves = [z.requires_grad_(), *cell.parameters()]

    def estimate(f, served):
        with ambient(served):
            norm = td.jacobian_norm(f, z, generator=torch.Generator().manual_seed(1), backend=served)
        return norm, torch.autograd.grad(norm, leaves, retain_graph=True, materialize_grads=True)

    closed, closed_grads = estimate(Injected(cell, u), backend)
    plain, plain_grads = estimate(lambda z: cell(z, u), "reference")
    torch.testing.assert_close(closed, plain)
    for found, wanted in zip(closed_grads, plain_grads, strict=True):
        torch.testing.assert_close(found, wanted)


@PLACES
def test_a_training_step_compiles_into_one_graph(pre_norm):
    torch._dynamo.reset()
    cell, x, z = cell_and_input(pre_norm)

    def loss(z, x, memory):
        f = Injected(cell, cell.inject((x, Memory(*memory))))
        norm = td.jacobian_norm(f, z, distribution="rademacher", backend="reference")
        return f(z).square().mean() + 0 * norm, norm

    def gradients(step):
        cell.zero_grad()
        value, norm = step(z, x[0], tuple(x[1]))
        value.backward()
        assert norm > 0
        return [parameter.grad.clone() for parameter in cell.parameters()]

    compiled = gradients(torch.compile(loss, backend="aot_eager", fullgraph=True))
    for found, wanted in zip(compiled, gradients(loss), strict=True):
        torch.testing.assert_close(found, wanted)


@PLACES
def test_the_implicit_gradient_is_the_unrolled_ones(pre_norm):
    cell, x, _ = cell_and_input(pre_norm, weight_norm=True)
    with torch.no_grad():  # much injected, little of z: a contraction
        cell.injection.weight.normal_()
        cell.down.parametrizations.weight.original0.mul_(0.3)
        cell.qkv.parametrizations.weight.original0.mul_(0.1)

    def gradients(gradient):
        cell.zero_grad()
        deq = td.DEQ(cell, td.Picard(), tol=1e-14, max_steps=120, gradient=gradient, backend="reference")
        out = deq(x)
        assert out.solution.residual.max() < 1e-10
        (out.value[..., 0] ** 3).sum().backward()
        return [parameter.grad.clone() for parameter in cell.parameters()]

    implicit = gradients(td.ImplicitGradient(tol=1e-13, max_steps=200))
    for found, wanted in zip(implicit, gradients(td.UnrolledGradient()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_dropout_is_one_mask_a_solve_and_none_in_evaluation():
    cell, x, z = cell_and_input(dropout=0.5, attention_dropout=0.5)
    u = cell.inject(x)
    assert torch.equal(cell(z, u), cell(z, u))
    assert not torch.equal(cell(z, cell.inject(x)), cell(z, u))
    cell.eval()
    assert torch.equal(cell(z, cell.inject(x)), cell(z, cell.inject(x)))


def test_some_samples_alone():
    cell, x, z = cell_and_input(dropout=0.4)
    u = cell.inject(x)
    chosen = torch.tensor([1])
    torch.testing.assert_close(cell(z[chosen], cell.select(u, chosen)), cell(z, u)[chosen])
    cell.attention_dropout = 0.5
    with pytest.raises(ValueError, match="leave compact out"):
        cell.select(cell.inject(x), chosen)


def test_autocast_leaves_the_state_in_float32():
    cell, x, z = cell_and_input(dtype=torch.float32, weight_norm=True)
    exact = cell(z, cell.inject(x))
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, pullback = cell.vjp(z, cell.inject(x))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0.1)
    assert pullback(torch.ones_like(z)).dtype == torch.float32
    value.sum().backward()
    assert all(parameter.grad is not None for parameter in cell.parameters())


def test_a_subclass_keeps_its_own_forward():
    class Shifted(td.TransformerCell):
        def forward(self, z, u):
            return super().forward(z, u) + 1

    assert Shifted(WIDTH, HEADS, 12).vjp is None


def test_copies_and_pickles():
    cell, x, z = cell_and_input(weight_norm=True)
    value = cell(z, cell.inject(x))
    for copied in (copy.deepcopy(cell), pickle.loads(pickle.dumps(copy.deepcopy(cell.state_dict())))):
        if isinstance(copied, dict):
            fresh, _, _ = cell_and_input(weight_norm=True)
            nn.init.zeros_(fresh.content_bias)
            fresh.load_state_dict(copied)
            copied = fresh
        torch.testing.assert_close(copied(z, copied.inject(x)), value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 7, "heads": 1, "inner": 4}, "width=7 must be even"),
        ({"width": 8, "heads": 3, "inner": 4}, "heads=3: give head_width"),
        ({"width": 8, "heads": 2, "inner": 0}, "inner=0"),
        ({"width": 8, "heads": 2, "inner": 4, "dropout": 1.0}, "drops everything"),
        ({"width": 8, "heads": 2, "inner": 4, "window": 0}, "window=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        td.TransformerCell(**arguments)


def test_bad_input_is_named():
    cell, (x, memory), z = cell_and_input()
    with pytest.raises(ValueError, match=r"x is \(2, 5, 7\)"):
        cell.inject(x[..., :7])
    with pytest.raises(ValueError, match=r"memory\.value has shape \(2, 3, 6\)"):
        cell.inject((x, memory._replace(value=memory.value[..., :6])))
    with pytest.raises(ValueError, match=r"memory\.value has shape \(1, 3, 8\)"):
        cell.inject((x, memory._replace(value=memory.value[:1])))
    with pytest.raises(ValueError, match=r"memory\.injection has shape None"):
        cell.inject((x, memory._replace(injection=None)))
    with pytest.raises(TypeError, match="give the cell's Memory"):
        cell.inject((x, memory.value))
    with pytest.raises(ValueError, match=r"z has shape \(2, 4, 8\)"):
        cell(z[:, :4], cell.inject(x))
    cell.up = nn.Sequential(cell.up)
    with pytest.raises(TypeError, match="'up' of the cell was replaced"):
        cell.inject(x)


def test_products_take_the_attention_that_was_evaluated(monkeypatch):
    calls, evaluate = [], attention_reference.attention_evaluated
    monkeypatch.setattr(
        attention_reference, "attention_evaluated", lambda *given: calls.append(1) or evaluate(*given)
    )
    cell, x, z = cell_and_input()
    with ambient("reference"), torch.no_grad():
        value, pullback = cell.vjp(z, cell.inject(x))
        for _ in range(2):
            pullback(torch.randn_like(value))
    assert len(calls) == 1


@pytest.mark.parametrize("pre_norm", [False, True])
def test_no_tokens(pre_norm, backend):
    cell, (x, memory), _ = cell_and_input(pre_norm)
    with ambient(backend):
        for tokens, before in ((x[:, :0], None), (x[:, :0], memory), (x[:0], None)):
            u = cell.inject((tokens, before))
            assert cell(cell.initial_state(u), u).shape == tokens.shape
