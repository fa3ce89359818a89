"""One rank of test_distributed.py: trains the toy on its rows, stops and goes on. Run by torchrun."""

import os
import sys

import torch

from tests.training.toy import Toy, options
from triton_deq.training import Interrupted, train
from triton_deq.training.ranks import Ranks, process_group


def main(folder: str) -> None:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        ranks = Ranks()
        mine = {"rank": ranks.rank, "world": ranks.world, "dropout": 0.0}
        # The signal comes to one rank, and stops both after the same step. Rank 0's weights are taken.
        stopping = (4, lambda: os.kill(os.getpid(), 15) if ranks.rank else None)
        try:
            train(Toy(seed=ranks.rank, signal_at=stopping, **mine), options(), folder)
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            train(Toy(seed=9, **mine), options(), folder, resume=True)
        ranks.any(False)
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way on a busy machine


if __name__ == "__main__":
    main(sys.argv[1])
