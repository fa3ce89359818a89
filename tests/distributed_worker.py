"""One rank of tests/test_distributed.py: a training step of a DEQ on half of the batch. Run by torchrun.

Its arguments are `norm_over`, "ddp" or "fsdp", and a folder. Writes RANK.json there: what the rank saw, and
how far its gradients are from those of the whole batch.
"""

import copy
import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import triton_deq as td

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "all_to_all")


def main(norm_over: str, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    gradient = td.ImplicitGradient(tol=1e-12, max_steps=200)
    options = {"tol": 1e-11, "max_steps": 200, "norm_over": norm_over, "backend": "reference"}
    deq = td.DEQ(td.MLPCell(12, 5), gradient=gradient, **options).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    x[3:] *= 30  # saturates tanh, so the second rank needs fewer steps than the first
    alone = copy.deepcopy(deq)
    alone(x).value.square().mean().backward()

    refusal = refused(copy.deepcopy(deq), x) if how == "fsdp" else ""
    parallel = DistributedDataParallel(deq) if how == "ddp" else fully_shard(deq)
    calls = count_collectives()
    out = parallel(x[3 * rank : 3 * rank + 3])
    in_forward = len(calls)
    out.value.square().mean().backward()
    errors = [
        ((whole(mine.grad) - theirs.grad).norm() / theirs.grad.norm()).item()
        for mine, theirs in zip(deq.parameters(), alone.parameters(), strict=True)
    ]
    seen = {
        "rank": rank,
        "nfe": out.solution.nfe,
        "backward_nfe": out.solution.backward.nfe,
        "collectives_in_forward": in_forward,
        "collectives_in_backward": len(calls) - in_forward,
        "error": max(errors),
        "refusal": refusal,
    }
    with open(os.path.join(folder, f"{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(seen, file)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way on a busy machine


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def refused(deq: td.DEQ, x: torch.Tensor) -> str:
    """What a DEQ says whose cell is sharded by itself."""
    fully_shard(deq.cell)
    try:
        deq(x)
    except TypeError as error:
        return str(error)
    return "nothing"


def count_collectives() -> list[str]:
    """The names of collectives that Python code asks for from now on."""
    calls: list[str] = []
    for name in COLLECTIVES:
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, _n=name, _f=original, **k: (calls.append(_n), _f(*a, **k))[1])
    return calls


if __name__ == "__main__":
    main(*sys.argv[1:])
