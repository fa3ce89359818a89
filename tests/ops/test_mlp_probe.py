"""The closed-form estimate of the perceptron's Jacobian norm: against its reference, and its derivatives."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.bounds import assert_within_bounds
from triton_deq.ops import mlp_probe as op
from triton_deq.ops.mlp_probe import MLPJacobianFunction
from triton_deq.reference.activations import ACTIVATIONS
from triton_deq.verification import BOUNDS, Case, check_mlp_probe

kernels = pytest.mark.kernels


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (20, 70)], ids=str)
def test_the_fused_estimate_matches_the_reference(shape, dtype, device):
    assert_within_bounds(check_mlp_probe(Case(getattr(torch, dtype), shape, torch.device(device), seed=3)))


@kernels
def test_large_tiles_match_the_reference(device, large_tiles):
    assert_within_bounds(check_mlp_probe(Case(torch.float16, (70, 140), torch.device(device), seed=7)))
    assert (64, 128) in large_tiles


@pytest.mark.parametrize(("hip", "warps"), [(None, 16), ("6.4", 8)])
def test_warps_of_a_large_tile(hip, warps, monkeypatch):
    """Those of AMD have twice as many threads."""
    monkeypatch.setattr(torch.version, "hip", hip)
    _, constants = op._tiles(4096, 2048, 2048, torch.empty(0, dtype=torch.bfloat16))
    assert (constants["BLOCK_B"], constants["BLOCK_N"], constants["num_warps"]) == (64, 128, warps)


@kernels
def test_derivatives_of_the_fused_estimate(device):
    tensors = z, weight, u = [
        torch.randn(shape, dtype=torch.float64, device=device).requires_grad_()
        for shape in ((2, 2), (3, 2), (2, 3))
    ]
    seed = torch.tensor([11], device=device)

    def norms(*tensors):
        return MLPJacobianFunction.apply(*tensors, seed, 2, "rademacher", ACTIVATIONS["silu"])

    assert gradcheck(norms, tensors)
    assert gradgradcheck(norms, tensors)
    for tensors in ((z, weight.detach(), u), (z.detach(), weight, u.detach())):
        assert gradcheck(norms, tensors)
