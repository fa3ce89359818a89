"""The DEQ of from_textbook_before.py, solved and differentiated by triton-deq. Some seconds on a CPU."""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import triton_deq as td


class Layer(nn.Module):
    """f(z, x) = GN(relu(z + GN(x + conv(GN(relu(conv(z)))))))"""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, width) for width in (inner, channels, channels))
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, 0, 0.01)

    def forward(self, z, x):
        y = self.norm1(torch.relu(self.conv1(z)))
        return self.norm3(torch.relu(z + self.norm2(x + self.conv2(y))))


class DEQ(nn.Module):
    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x):
        z, solution = td.fixed_point(
            lambda z: self.f(z, x), torch.zeros_like(x), tol=1e-3, max_steps=50, return_solution=True
        )
        self.evaluations = solution.nfe
        return z


def train(make_deq, steps: int):
    """The model's DEQ and the losses."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    deq = make_deq(Layer(24, 32))
    stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.GroupNorm(8, 24))
    model = nn.Sequential(stem, deq, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24 * 4, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return deq, losses


def main(steps: int = 60) -> list[float]:
    """Train, and return the losses."""
    torch.manual_seed(0)
    start = time.perf_counter()
    deq, losses = train(DEQ, steps)
    seconds = time.perf_counter() - start
    print(f"loss {losses[-1]:.3f}, {deq.evaluations} evaluations, {seconds:.1f} s")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
