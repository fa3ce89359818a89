"""Choices of launch parameters: each must still compute the same."""

from unittest.mock import patch

import pytest
import torch

from bench.groups import tuning
from triton_deq.ops import feedforward


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
