"""`parametrize.cached()` around solves: no gradient is lost, and weights are made less often."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import triton_deq as td
from triton_deq.compat import locuslab


class Halved(nn.Module):
    """A weight made of another one."""

    made = 0

    def forward(self, weight):
        self.made += 1
        return 0.5 * weight


def halved_cell():
    torch.manual_seed(0)
    cell = td.MLPCell(6, 4)
    parametrize.register_parametrization(cell.state, "weight", Halved())
    weight = cell.state.parametrizations.weight
    weight[0].made = 0  # it was, when it was registered
    return cell, weight


@pytest.mark.parametrize(
    "gradient",
    [td.ImplicitGradient(), td.PhantomGradient(), td.UnrolledGradient()],
    ids=lambda gradient: type(gradient).__name__,
)
def test_gradients_under_cached_are_those_without(gradient, monkeypatch):
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)
    found, made = [], []
    for caches in (False, True):
        cell, weight = halved_cell()
        penalty = td.JacobianPenalty(weight=0.5, probability=1.0)
        deq = td.DEQ(cell, max_steps=9, tol=0.0, gradient=gradient, penalty=penalty)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        cached = parametrize.cached() if caches else torch.enable_grad()
        torch.manual_seed(2)
        with cached:
            before = td.solve(lambda z, cell=cell, x=x: cell(z, cell.inject(x)), torch.zeros(3, 6))
            td.spectral_radius(lambda z, cell=cell, x=x: cell(z, cell.inject(x)), before.value, steps=3)
            out = deq(x)
            (out.value.square().sum() + out.penalty).backward()
        found.append(weight.original.grad)
        made.append(weight[0].made)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)
    assert made[1] < made[0] / 3
    assert made[1] <= 4  # by two solves, by the products of the spectral radius, and with gradients
    assert not parametrize._cache


def test_a_weight_made_with_gradients_before_serves_the_solve():
    cell, weight = halved_cell()
    with parametrize.cached():
        made = cell.state.weight
        td.solve(lambda z: cell(z, torch.ones(3, 6)), torch.zeros(3, 6))
        assert cell.state.weight is made
    assert weight[0].made == 1


def test_an_f_that_raises_leaves_the_cache_as_it_was():
    cell, weight = halved_cell()

    def f(z):
        cell(z, z)
        raise KeyError("mine")

    with parametrize.cached():
        with pytest.raises(KeyError, match="mine"):
            td.solve(f, torch.zeros(3, 6))
        assert not parametrize._cache
        assert cell.state.weight.requires_grad
    assert weight[0].made == 2


@pytest.mark.parametrize("solve", ["anderson", "broyden", "fixed_point_iter"])
def test_torchdeqs_solvers_lose_no_gradient(solve):
    torchdeq = pytest.importorskip("torchdeq")
    from triton_deq.compat.torchdeq import install

    install()
    cell, weight = halved_cell()
    deq = torchdeq.get_deq(f_solver=f"triton_{solve}", f_max_iter=5)
    with parametrize.cached():
        values, _ = deq(lambda z: cell(z, torch.ones(3, 6)), torch.zeros(3, 6))
        values[-1].square().sum().backward()
    assert weight.original.grad.abs().max() > 0


@pytest.mark.parametrize(
    "solve",
    [locuslab.anderson, lambda f, z0: locuslab.broyden(f, z0, threshold=5)],
    ids=["anderson", "broyden"],
)
def test_locuslabs_solvers_lose_no_gradient(solve):
    cell, weight = halved_cell()

    def f(z):
        return cell(z, torch.ones(3, 6))

    with parametrize.cached():
        found = solve(lambda z: f(z[:, 0])[:, None], torch.zeros(3, 1, 6))["result"]
        f(found[:, 0]).square().sum().backward()
    assert weight.original.grad.abs().max() > 0
