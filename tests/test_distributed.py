"""Data-parallel training: two processes and gloo on the CPU, against one process on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


def two_ranks(folder: Path, norm_over: str, how: str) -> list[dict]:
    """What each of them saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/distributed_worker.py"), norm_over, how, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("norm_over", ["sample", "batch"])
def test_two_ranks_train_as_one_process_does(norm_over, tmp_path):
    """Gradients agree, and beside DDP's own reduction nobody asks for a collective.

    With `norm_over="batch"` the norm is over the samples of the rank, so it too needs no communication.
    """
    first, second = two_ranks(tmp_path, norm_over, "ddp")
    for seen in (first, second):
        assert seen["error"] < 1e-9
        assert seen["collectives_in_forward"] == seen["collectives_in_backward"] == 0
    assert second["nfe"] < first["nfe"]


def test_a_sharded_model_trains_as_a_whole_one_does(tmp_path):
    """FSDP around the DEQ; around its cell alone it is refused, since a solve is many calls of the cell."""
    for seen in two_ranks(tmp_path, "sample", "fsdp"):
        assert seen["error"] < 1e-9
        assert "cell=FSDPMLPCell is sharded by itself" in seen["refusal"]
