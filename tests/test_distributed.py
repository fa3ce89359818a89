"""Data-parallel training: two processes and gloo on the CPU, against one process on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("norm_over", ["sample", "batch"])
def test_two_ranks_train_as_one_process_does(norm_over, tmp_path):
    """Gradients agree, and beside DDP's own reduction nobody asks for a collective.

    With `norm_over="batch"` the norm is over the samples of the rank, so it too needs no communication.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/distributed_worker.py"), norm_over, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for seen in (first, second):
        assert seen["error"] < 1e-9
        assert seen["collectives_in_forward"] == seen["collectives_in_backward"] == 0
    assert second["nfe"] < first["nfe"]
