"""A looped reasoning model: one block, run until nothing changes, trained by its last step alone.

The task is a maze: which cells can be reached from the start? A convolution sees only neighbours, so it has
to be looped, the longer the longer the way. Such models (and hierarchical or recursive reasoners) run their
block under `no_grad` and backpropagate through one last step: the one-step gradient, with a loss after each
segment of the loop and the state carried on. That is a fixed point with td.PhantomGradient(steps=1), and
this example shows the textbook loop, the same by triton-deq, and what stopping by itself saves.

A minute on a CPU; --quick for a few seconds.
"""

import argparse

import torch
from torch import nn

import triton_deq as td

SIZE, CHANNELS, LOOP = 8, 24, 16


def mazes(count: int, device: str):
    """Images `[count, 2, SIZE, SIZE]` of walls and start, and which cells can be reached."""
    walls = (torch.rand(count, 1, SIZE, SIZE, device=device) < 0.35).float()
    start = torch.zeros_like(walls).flatten(1)
    start[torch.arange(count), torch.randint(SIZE * SIZE, (count,), device=device)] = 1
    start = start.view_as(walls)
    walls = walls * (1 - start)
    reached = start
    for _ in range(SIZE * SIZE):
        across = nn.functional.max_pool2d(reached, (1, 3), 1, (0, 1))
        down = nn.functional.max_pool2d(reached, (3, 1), 1, (1, 0))
        reached = torch.maximum(across, down) * (1 - walls)
    return torch.cat((walls, start), dim=1), reached[:, 0]


class Reasoner(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Conv2d(2, CHANNELS, 1)
        self.look = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.think = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.answer = nn.Conv2d(CHANNELS, 1, 1)

    def block(self, z, u):
        return torch.tanh(self.think(torch.relu(self.look(z) + u)))

    def loss(self, z, reached):
        return nn.functional.binary_cross_entropy_with_logits(self.answer(z)[:, 0], reached)


def textbook(model, z, u):
    """What looped models do: many steps without gradients, one with."""
    with torch.no_grad():
        for _ in range(LOOP):
            z = model.block(z, u)
    return model.block(z, u)


def ours(model, z, u, solver=None, tol=0.0, max_steps=LOOP):
    """The same. With `tol=0` all steps are taken; else each maze stops where nothing changes any more."""
    return td.fixed_point(
        lambda z: model.block(z, u),
        z,
        solver or td.Picard(),
        tol=tol,
        max_steps=max_steps,
        gradient=td.PhantomGradient(steps=1),
        return_solution=True,
    )


def gradients(model, z, reached):
    return torch.autograd.grad(model.loss(z, reached), list(model.parameters())[2:-2])


def compare(model, device: str) -> float:
    """The largest difference between the two gradients, relative to the largest gradient."""
    images, reached = mazes(16, device)
    u = model.read(images)
    start = torch.zeros_like(u)
    # What comes back is the iterate with the lowest residual, in a loop that settles the last one.
    theirs = gradients(model, textbook(model, start, u), reached)
    z, _ = ours(model, start, u, max_steps=LOOP + 1)
    mine = gradients(model, z, reached)
    return max(
        ((one - other).abs().max() / other.abs().max()).item()
        for one, other in zip(mine, theirs, strict=True)
    )


def train(model, steps: int, device: str) -> None:
    """Two segments a maze: the state is carried from one to the next, and each has its loss."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        images, reached = mazes(64, device)
        z = torch.zeros(64, CHANNELS, SIZE, SIZE, device=device)
        for _ in range(2):
            z, _ = ours(model, z, model.read(images), tol=1e-3)
            loss = model.loss(z, reached)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            z = z.detach()
        if (step + 1) % max(steps // 5, 1) == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")


@torch.no_grad()
def examine(model, device: str) -> dict[str, tuple[float, float]]:
    """Cells that are right, and the evaluations of the block that a maze needs, by solver.

    Anderson extrapolates, and what moves through a maze cell by cell is not to be extrapolated: where f is
    nearly a lookup, plain iteration is the better solver.
    """
    images, reached = mazes(256, device)
    u = model.read(images)
    found = {}
    for name, solver, tol in (
        ("all steps", td.Picard(), 0.0),
        ("until it settles", td.Picard(), 1e-2),
        ("by Anderson", td.Anderson(), 1e-2),
    ):
        z, solution = ours(model, torch.zeros_like(u), u, solver, tol, max_steps=2 * LOOP)
        right = ((model.answer(z)[:, 0] > 0) == (reached > 0)).float().mean().item()
        steps = solution.steps.float()
        found[name] = right, steps.mean().item()
        print(
            f"{name:17} {right:.1%} of the cells are right, {steps.mean().item():.1f} evaluations a maze "
            f"({int(steps.min())} to {int(steps.max())})"
        )
    return found


def main(steps: int = 600) -> tuple[float, dict[str, tuple[float, float]]]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Reasoner().to(device)
    difference = compare(model, device)
    print(f"the gradients of the textbook loop and of ours differ by {difference:.1e}")
    train(model, steps, device)
    return difference, examine(model, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    main(steps=100 if parser.parse_args().quick else 600)
