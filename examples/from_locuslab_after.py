"""The same with the solvers and the Jacobian loss of triton-deq. Seconds on a CPU."""

import argparse
import time

import torch
from torch import autograd, nn

from triton_deq.compat.locuslab import broyden, jac_loss_estimate


class Layer(nn.Module):
    """f(z; u) = tanh(W z + u) on states `[B, d, L]`."""

    def __init__(self, width: int):
        super().__init__()
        self.state = nn.Conv1d(width, width, 1)

    def forward(self, z, u):
        return torch.tanh(0.5 * self.state(z) + u)


class Model(nn.Module):
    """The equilibrium, with implicit gradients in a backward hook."""

    def __init__(self, bits: int = 3, width: int = 64, f_thres: int = 24, b_thres: int = 24):
        super().__init__()
        self.encode, self.layer, self.decode = nn.Linear(bits, width), Layer(width), nn.Linear(width, 2)
        self.f_thres, self.b_thres = f_thres, b_thres

    def forward(self, bits):
        u = self.encode(bits)[:, :, None]
        with torch.no_grad():
            result = broyden(lambda z: self.layer(z, u), torch.zeros_like(u), threshold=self.f_thres)
        z = result["result"].requires_grad_()
        new_z = self.layer(z, u)
        at = z.detach().requires_grad_()
        jac_loss = jac_loss_estimate(self.layer(at, u), at, vecs=1)

        def backward_hook(grad):
            self.hook.remove()
            return broyden(
                lambda y: autograd.grad(new_z, z, y, retain_graph=True)[0] + grad,
                torch.zeros_like(grad),
                threshold=self.b_thres,
            )["result"]

        self.hook = new_z.register_hook(backward_hook)
        return self.decode(new_z[:, :, 0]), result, jac_loss


def main(steps: int = 150) -> list[float]:
    """Train, and return the losses."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    start, losses = time.perf_counter(), []
    for _ in range(steps):
        bits = torch.randint(0, 2, (256, 3)).float()
        logits, result, jac_loss = model(bits)
        loss = nn.functional.cross_entropy(logits, bits.sum(1).long() % 2) + 0.1 * jac_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    accuracy = (logits.argmax(1) == bits.sum(1).long() % 2).float().mean().item()
    print(f"accuracy {accuracy:.3f}, {result['nstep']} steps, {time.perf_counter() - start:.1f} s")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
