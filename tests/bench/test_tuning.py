"""Choices of launch parameters: each must still compute the same."""

from unittest.mock import patch

import pytest
import torch

from bench.groups import tuning
from triton_deq.ops import feedforward, groupnorm, mlp_probe
from triton_deq.reference.activations import ACTIVATIONS


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_product_may_be_cut_as_its_choices_say(dtype, device):
    s, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((1, 130, 20), (140, 20)))
    arguments = s, weight, torch.zeros_like(weight[:, 0]), None
    expected = feedforward.feedforward_fwd(*arguments)
    for choice in tuning._product_choices(dtype):
        if choice.values:
            with patch.object(feedforward, "tiles", choice.values["tiles"]):
                found = feedforward.feedforward_fwd(*arguments)
            torch.testing.assert_close(found, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_estimate_may_be_cut_as_its_choices_say(dtype, device):
    z, weight, u = (torch.randn(size, 24, dtype=dtype, device=device) for size in (70, 24, 70))
    arguments = (
        z,
        weight,
        u,
        torch.ones(1, dtype=torch.int64, device=device),
        1,
        "gaussian",
        ACTIVATIONS["tanh"],
    )
    expected = mlp_probe.mlp_probe_fwd(*arguments)
    for choice in tuning._probe_choices(dtype):
        with tuning._chosen("mlp_probe", choice):
            found = mlp_probe.mlp_probe_fwd(*arguments)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.kernels
def test_a_map_may_be_cut_as_its_choices_say(device):
    x = torch.randn(2, 32, 24, 24, device=device).contiguous(memory_format=torch.channels_last)
    gain, offset = torch.rand(2, 32, device=device)

    def both():
        ((value, held),) = groupnorm.groupnorm_each([groupnorm.Map(x, 8, gain, offset)], "triton")
        return value, groupnorm.groupnorm_vjp(x, held, "triton")[0]

    expected = both()
    for choice in tuning._part_choices(32):
        with tuning._chosen("groupnorm", choice):
            torch.testing.assert_close(both(), expected)


def test_each_tuned_op_has_a_module_that_launches_it():
    for op, dtype, _, choices in tuning._plan():
        module = tuning.module_of(op)
        assert hasattr(module, "launch")
        for choice in choices:
            assert all(hasattr(module, name) for name in choice.values), (op, dtype, choice.name)
    assert tuning.module_of("mlp_probe_vjp") is mlp_probe
    assert tuning.module_of("mlp_vjp") is not mlp_probe
