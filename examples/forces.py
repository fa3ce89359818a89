"""An energy that is learned from forces alone: a loss on the gradient of a DEQ. Ten seconds on a CPU."""

import torch
from torch import nn

import triton_deq as td


class Energy(nn.Module):
    """E(x) = ⟨c, z*(x)⟩. Its force −∂E/∂x conserves energy, whatever the weights are."""

    def __init__(self, width: int = 64):
        super().__init__()
        # The loss differentiates through the force, so the implicit gradient has to be differentiable itself.
        gradient = td.ImplicitGradient(tol=1e-5, double_backward=True)
        self.deq = td.DEQ(td.MLPCell(width, 2, "tanh"), tol=1e-5, max_steps=30, gradient=gradient)
        self.readout = nn.Linear(width, 1)

    def forward(self, x):
        return self.readout(self.deq(x).value)[:, 0]


def valleys(x):
    """Two valleys, at (±1, 1/2), and a bent pass between them of height 1."""
    return (x[:, 0] ** 2 - 1) ** 2 + 2 * (x[:, 1] - x[:, 0] ** 2 / 2) ** 2


def force(energy, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    return -slope


def main(steps: int = 400) -> tuple[float, float]:
    torch.manual_seed(0)
    x = torch.rand(1000, 2) * torch.tensor([3.0, 2.0]) - torch.tensor([1.5, 0.5])
    wanted = force(valleys, x).detach()
    energy = Energy()
    optimizer = torch.optim.Adam(energy.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = torch.randint(800, (128,))
        loss = (force(energy, x[batch]) - wanted[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: mean squared error of the force {loss.item():.4f}")
    error = (force(energy, x[800:]) - wanted[800:]).norm() / wanted[800:].norm()
    top, bottom = energy(torch.tensor([[0.0, 0.0], [1.0, 0.5]])).tolist()
    print(f"forces at points never seen: relative error {error:.3f}")
    print(f"height of the pass, from forces alone: {top - bottom:.3f} (it is 1)")
    return error.item(), top - bottom


if __name__ == "__main__":
    main()
