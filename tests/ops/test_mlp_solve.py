"""Whole solves of the perceptron's cell in one launch: against the general loop."""

import pytest
import torch

from tests.bounds import assert_within_bounds
from triton_deq.ops import mlp_solve as op
from triton_deq.reference.activations import ACTIVATIONS
from triton_deq.verification import BOUNDS, Case, check_mlp_solve

kernels = pytest.mark.kernels
RELU = ACTIVATIONS["relu"]


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (19, 37)], ids=str)
def test_whole_solves_match_the_general_loop(shape, dtype, device):
    assert_within_bounds(check_mlp_solve(Case(getattr(torch, dtype), shape, torch.device(device), seed=2)))


@kernels
def test_same_bits_every_time(device):
    z, u = torch.randn(2, 40, 12, device=device)
    weight = torch.randn(12, 12, device=device)
    rule = op.Rule(3, 1.0, 1e-6, True, 1e-6, 6, True)
    cell = op.Layer(weight / 8, u, ACTIVATIONS["tanh"], None, None)
    first, second = (op.mlp_solve(z, cell, rule) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].data, second[1].data)


@kernels
def test_a_useless_gram_matrix_restarts_the_history(device):
    """A constant map: the second residual is zero, and without a ridge its Gram matrix is singular.

    Of numbers that no arithmetic rounds.
    """
    u = torch.tensor([[-1.5, 0.25, 2.0, -0.5], [3.0, -2.25, 1.0, 0.75]], dtype=torch.float64, device=device)
    cell = op.Layer(torch.zeros(4, 4, dtype=torch.float64, device=device), u, RELU, None, None)
    counts = []
    for ridge in (1e-6, 0.0):
        rule = op.Rule(3, 1.0, ridge, True, 0.0, 2, True)
        value, record, _ = op.mlp_solve(torch.ones_like(u), cell, rule)
        counts.append(record.count.tolist())
        torch.testing.assert_close(value, torch.relu(u))
    assert counts == [[2, 2], [1, 1]]


@pytest.mark.parametrize(
    ("shape", "history", "fits"),
    [((2, 256), 6, True), ((2, 257), 6, False), ((2, 16), 9, False), ((2, 3, 16), 6, False)],
    ids=str,
)
def test_what_fits_one_launch(shape, history, fits):
    z = torch.empty(shape)
    rule = op.Rule(history, 1.0, 1e-6, True, 1e-6, 6, True)
    cell = op.Layer(torch.empty(shape[-1], shape[-1]), z, RELU, None, None)
    assert op.mlp_solve_fits(z, cell, rule) is fits
