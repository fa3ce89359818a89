"""A complex state: images of magnetic resonance from half of their spectrum. A quarter of a minute on a CPU.

An equilibrium model for inverse problems, after Gilton, Ongie and Willett (arXiv 2102.07944).
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn

import triton_deq as td


class Reconstruction(nn.Module):
    """A step down the misfit to what was measured, and what a network makes better of that."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.register_buffer("lines", torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 1])[:, None])
        self.network = nn.Sequential(
            *(nn.Conv2d(2, channels, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
            nn.Conv2d(channels, 2, 3, padding=1),
        )

    def measure(self, image):
        return torch.fft.fft2(image, norm="ortho") * self.lines

    def inject(self, spectrum):
        return torch.fft.ifft2(spectrum * self.lines, norm="ortho")

    def forward(self, z, u):
        z = torch.view_as_real(z - self.inject(self.measure(z)) + u).movedim(3, 1)
        z = 0.5 * (z + self.network(z))
        return torch.view_as_complex(z.movedim(1, 3).contiguous())


def phantoms():
    """Handwritten digits, each with a phase that rises along some direction."""
    magnitudes = torch.from_numpy(load_digits().images).float() / 16
    slopes = 0.3 * torch.randn(2, len(magnitudes), 1)
    across = torch.arange(8.0) - 3.5
    return torch.polar(magnitudes, (slopes[0] * across)[:, :, None] + (slopes[1] * across)[:, None, :])


def decibels(found, images):
    """Signal to noise, against the largest magnitude."""
    return -10 * math.log10((found - images).abs().square().mean())


def main(epochs: int = 6) -> tuple[float, float]:
    torch.manual_seed(0)
    images = phantoms()
    images = images[torch.randperm(len(images))]
    cell = Reconstruction()
    deq = td.DEQ(cell, max_steps=30, tol=1e-3, penalty=td.JacobianPenalty(0.1))
    optimizer = torch.optim.Adam(deq.parameters(), 2e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(1400).split(64):
            out = deq(cell.measure(images[batch]))
            loss = (out.value - images[batch]).abs().square().mean()
            optimizer.zero_grad()
            (loss + 0.01 * out.penalty).backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}, {out.solution.describe()}")
    with torch.no_grad():
        spectrum = cell.measure(images[1400:])
        filled, found = cell.inject(spectrum), deq.eval()(spectrum).value
    before, after = decibels(filled, images[1400:]), decibels(found, images[1400:])
    print(f"images never seen: {before:.1f} dB with zeros for what is missing, {after:.1f} dB reconstructed")
    return before, after


if __name__ == "__main__":
    main()
