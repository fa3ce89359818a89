"""The same with the solvers of triton-deq in place of TorchDEQ's. Seconds on a CPU."""

import argparse
import time

import torch
import torchdeq
from torch import nn
from torchdeq.loss import jac_reg
from torchdeq.norm import apply_norm

import triton_deq.compat.torchdeq as compat

compat.install(replace=True)


class Layer(nn.Module):
    """f(z; u) = tanh(W z + u)"""

    def __init__(self, width: int):
        super().__init__()
        self.state = nn.Linear(width, width)

    def forward(self, z, u):
        return torch.tanh(self.state(z) + u)


class Model(nn.Module):
    def __init__(self, bits: int = 3, width: int = 64):
        super().__init__()
        self.encode, self.layer, self.decode = nn.Linear(bits, width), Layer(width), nn.Linear(width, 2)
        apply_norm(self.layer, "weight_norm")
        self.deq = torchdeq.get_deq(f_solver="anderson", b_solver="anderson", f_max_iter=24, ift=True)

    def forward(self, bits):
        torchdeq.reset_deq(self)
        u = self.encode(bits)
        (z,), info = self.deq(lambda z: self.layer(z, u), torch.zeros_like(u))
        return self.decode(z), info, (z, u)


def main(steps: int = 150) -> list[float]:
    """Train, and return the losses."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    start, losses = time.perf_counter(), []
    for _ in range(steps):
        bits = torch.randint(0, 2, (256, 3)).float()
        logits, info, (z, u) = model(bits)
        at = z.detach().requires_grad_()
        penalty = jac_reg(model.layer(at, u), at)
        loss = nn.functional.cross_entropy(logits, bits.sum(1).long() % 2) + 0.1 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    accuracy = (logits.argmax(1) == bits.sum(1).long() % 2).float().mean().item()
    seconds = time.perf_counter() - start
    print(f"accuracy {accuracy:.3f}, {info['nstep'].mean():.1f} evaluations, {seconds:.1f} s")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
