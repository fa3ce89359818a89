"""A task that trains in milliseconds: regression by a small network with dropout, carrying a state along."""

import math
from functools import partial

import torch
from torch import nn

import triton_deq as td
from triton_deq.training import Loss, TrainingOptions


class Network(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.penalty = td.JacobianPenalty(0.0, probability=0.5)

    def forward(self, x):
        self.penalty.draw()
        return self.layers(x)


class Toy:
    """Learn `sum(x)` of batches in a fixed order; the loss has an offset, carried from step to step."""

    def __init__(self, seed=0, rows=8, rank=0, world=1, poison=None, signal_at=None, **network):
        torch.manual_seed(seed)
        self.model = Network(**network).double()
        self.configuration = {"width": self.model.layers[0].out_features, "rows": rows}
        self.data = torch.randn(40, rows, 3, generator=torch.Generator().manual_seed(1)).double()
        self.share = slice(rank * rows // world, (rank + 1) * rows // world)
        self.place = 0
        self.carried = torch.zeros(()).double()
        self.phases = []
        self.poison, self.signal_at = poison, signal_at

    def loss(self, module):
        x = self.data[self.place % len(self.data), self.share]
        self.place += 1
        if self.signal_at is not None and self.place == self.signal_at[0]:
            self.signal_at[1]()
        error = (module(x)[:, 0] - x.sum(1)).square().mean() + 1e-3 * self.carried
        self.carried = (self.carried + error).detach() / 2
        if self.place == self.poison:
            error = error * math.nan
        return Loss(error, partial(dict, loss=error.detach(), place=float(self.place)))

    def validate(self):
        torch.rand(3)  # must not disturb training
        assert not self.model.training
        assert not torch.is_grad_enabled()
        x = self.data.flatten(0, 1)
        return {"loss": (self.model(x)[:, 0] - x.sum(1)).square().mean().item(), "radius": 0.5}

    def summarise(self, means):
        return {**means, "root": math.sqrt(means["loss"])}

    def set_pretraining(self, on):
        self.phases.append(on)

    def state_dict(self):
        return {"place": self.place, "carried": self.carried}

    def load_state_dict(self, state):
        self.place, self.carried = state["place"], state["carried"]


def options(**changed) -> TrainingOptions:
    return TrainingOptions(
        **{
            "steps": 6,
            "pretrain_steps": 2,
            "warmup_steps": 2,
            "lr": 1e-2,
            "log_every": 2,
            "validate_every": 3,
            "checkpoint_every": 3,
            **changed,
        }
    )
