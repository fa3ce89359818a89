"""Data-parallel training of a DEQ with the Jacobian penalty, and resuming it. Ten seconds on a CPU.

    python examples/data_parallel.py                          # starts two processes of itself
    torchrun --nproc-per-node 4 examples/data_parallel.py     # or as many as you have GPUs

DistributedDataParallel needs nothing special. Each rank solves for its own samples, with as many steps as
these take; only gradients are exchanged. The penalty is computed in some steps only, and its draws come
from a seeded generator, so all ranks draw alike and none waits for a gradient that another never computes.
"""

import copy
import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import triton_deq as td

PROCESSES, BATCH, STEPS = 2, 32, 20


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        penalty = td.JacobianPenalty(0.5, probability=0.4, seed=0)
        gradient = td.ImplicitGradient(tol=1e-6, max_steps=60)
        self.deq = td.DEQ(td.MLPCell(32, 8), tol=1e-6, max_steps=60, gradient=gradient, penalty=penalty)
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        out = self.deq(x)
        return self.head(out.value)[:, 0], out.penalty


def batch_of(step: int, device):
    """The whole batch of a step, the same on every rank; each takes its share."""
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step)).to(device)
    return x, x.square().sum(1).sin()


def loss_of(model, x, y):
    value, penalty = model(x)
    return (value - y).square().mean() + penalty


def train(rank: int, model, optimizer, steps: range, device) -> list[bool]:
    """Train, and tell in which steps the penalty fired."""
    network, fired = model.module, []
    for step in steps:
        x, y = (tensor.chunk(dist.get_world_size())[rank] for tensor in batch_of(step, device))
        before = network.deq.penalty.fired
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fired.append(network.deq.penalty.fired > before)
    return fired


def check_gradients(rank: int, model, device) -> float:
    """How far the averaged gradients are from those of one process with the whole batch."""
    alone, parallel = copy.deepcopy(model), DistributedDataParallel(copy.deepcopy(model))
    for network in (alone, parallel.module):
        network.deq.penalty = None  # its probes differ between a whole batch and its parts
    x, y = batch_of(0, device)
    loss_of(alone, x, y).backward()
    loss_of(parallel, *(tensor.chunk(dist.get_world_size())[rank] for tensor in (x, y))).backward()
    return max(
        ((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item()
        for mine, theirs in zip(parallel.module.parameters(), alone.parameters(), strict=True)
    )


def work(rank: int, folder: str) -> None:
    """One rank."""
    torch.manual_seed(0)  # the same start on every rank
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    network = Model().to(device)
    error = check_gradients(rank, network, device)
    assert error < 1e-3, error

    model = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    fired = train(rank, model, optimizer, range(STEPS // 2), device)
    path = os.path.join(folder, "checkpoint.pt")
    if rank == 0:
        torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, path)
    dist.barrier()
    fired += train(rank, model, optimizer, range(STEPS // 2, STEPS), device)

    # Where a run is resumed, the penalty goes on with the draws it would have made.
    state = torch.load(path, map_location=device, weights_only=True)
    resumed = Model().to(device)
    resumed.load_state_dict(state["model"])
    again = DistributedDataParallel(resumed)
    optimizer = torch.optim.Adam(again.parameters(), 1e-2)
    optimizer.load_state_dict(state["optimizer"])
    assert train(rank, again, optimizer, range(STEPS // 2, STEPS), device) == fired[STEPS // 2 :]

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fired)
    assert all(other == fired for other in everyone), "the ranks drew differently"
    if rank == 0:
        print(f"gradients of {len(everyone)} processes and of one differ by {error:.1e}")
        print(f"the penalty fired in {sum(fired)} of {STEPS} steps, in the same ones on every rank")
        print("a resumed run draws as the first one did")


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        rank = dist.get_rank()
        with tempfile.TemporaryDirectory() as folder:
            shared = [folder]  # rank 0's, for all
            dist.broadcast_object_list(shared)
            work(rank, shared[0])
            dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        main()
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        sys.exit(subprocess.run([sys.executable, *launcher, __file__]).returncode)
