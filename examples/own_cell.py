"""Your own cell: a DEQ that reads handwritten digits. Half a minute on a CPU."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import triton_deq as td


class Cell(nn.Module):
    """f(z; u) = relu(W z + u): `inject` runs once a solve, `forward` once a step."""

    def __init__(self, pixels: int, width: int):
        super().__init__()
        self.inject = nn.Linear(pixels, width)
        self.state = nn.Linear(width, width, bias=False)

    def forward(self, z, u):
        return torch.relu(0.5 * self.state(z) + u)


def main(epochs: int = 12) -> float:
    torch.manual_seed(0)
    pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    mixed = torch.randperm(len(pixels))  # the digits come sorted by who wrote them
    images, labels = pixels.float()[mixed] / 16, digits.long()[mixed]
    deq = td.DEQ(Cell(64, 100), td.Anderson(), max_steps=20, penalty=td.JacobianPenalty(0.5))
    head = nn.Linear(100, 10)
    optimizer = torch.optim.Adam([*deq.parameters(), *head.parameters()], 3e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(1400).split(64):
            out = deq(images[batch])
            loss = nn.functional.cross_entropy(head(out.value), labels[batch]) + out.penalty
            optimizer.zero_grad()
            loss.backward()  # implicit gradients: nothing of the solve was kept
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {out.solution.describe()}")
    accuracy = (head(deq.eval()(images[1400:]).value).argmax(1) == labels[1400:]).float().mean().item()
    print(f"accuracy on digits never seen: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
