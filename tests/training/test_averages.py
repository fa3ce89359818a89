"""Means over steps, and over what not every step has."""

import torch

from triton_deq.training.averages import Averages


def test_means():
    averages = Averages()
    averages.add({"loss": torch.tensor(1.0, requires_grad=True), "nfe": 3})
    averages.add({"loss": torch.tensor(2.0)})
    other = Averages()
    other.load_state_dict(averages.state_dict(), torch.device("cpu"))
    assert averages.take() == other.take() == {"loss": 1.5, "nfe": 3}
    assert averages.take() == {}
