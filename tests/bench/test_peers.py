"""The peers solve what they are given, and stop as early as they can."""

import pytest
import torch

from bench.peers import PEERS, steps_to
from bench.peers.textbook import _mix, _residual, masked_anderson
from bench.peers.transformer import PlainTransformer
from bench.problems import make
from triton_deq.cells import TransformerCell
from triton_deq.demo.textbook import anderson

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["pointwise", "dense", "convolution"])
def test_problems_contract(kind):
    shape = (2, 4, 6, 6) if kind == "convolution" else (3, 32)
    problem = make(kind, shape, CPU, torch.float64, gain=0.8)
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    assert (problem.f(a) - problem.f(b)).norm() <= 0.85 * (a - b).norm()


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match="'pointwise', 'dense', 'mlp cell' or 'convolution'"):
        make("sparse", (2, 2), CPU)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_take_the_steps_they_are_told_and_get_there(peer):
    if peer.name.startswith("torchdeq"):
        pytest.importorskip("torchdeq")
    problem = make("dense", (3, 32), CPU, torch.float32, gain=0.8)
    calls = []

    def f(z):
        calls.append(1)
        return problem.f(z)

    value = peer.load()(f, problem.z0, 15)
    assert len(calls) == 15
    assert problem.residual(value) < 1e-3


def test_the_masked_form_is_the_textbook():
    problem = make("dense", (3, 32), CPU, torch.float64, gain=0.9)
    masked = masked_anderson(problem.f, problem.z0, 12, _mix, _residual)
    plain, steps = anderson(problem.f, problem.z0, tol=0.0, max_steps=12)
    assert steps == 12
    torch.testing.assert_close(masked, plain, rtol=1e-6, atol=1e-9)


def test_steps_to_is_the_first_step_that_suffices():
    problem = make("dense", (3, 32), CPU, torch.float64, gain=0.8)
    solve = PEERS[0].load()
    steps = steps_to(solve, problem.f, problem.z0, 1e-3)
    assert problem.residual(solve(problem.f, problem.z0, steps)) <= 1e-3
    assert problem.residual(solve(problem.f, problem.z0, steps - 1)) > 1e-3


def test_a_peer_that_does_not_get_there_says_so():
    problem = make("dense", (3, 32), CPU, torch.float32)
    with pytest.raises(RuntimeError, match="does not reach a residual of 1e-30 in 12"):
        steps_to(PEERS[0].load(), problem.f, problem.z0, 1e-30, most=12)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_the_plain_transformer_is_the_cells_function(pre_norm):
    torch.manual_seed(0)
    cell = TransformerCell(8, 2, 12, 3, pre_norm=pre_norm, weight_norm=True, init_std=0.3).double()
    before, tokens, z = (torch.randn(2, length, 8, dtype=torch.float64) for length in (4, 5, 5))
    z.requires_grad_()
    memory = cell.memory(before, cell.inject(before), None, 3)
    found = PlainTransformer(cell, tokens, memory)(z)
    wanted = cell(z, cell.inject((tokens, memory)))
    torch.testing.assert_close(found, wanted)
    vector = torch.randn_like(z)
    gradients = (torch.autograd.grad(value, [z, *cell.parameters()], vector) for value in (found, wanted))
    torch.testing.assert_close(*gradients)
