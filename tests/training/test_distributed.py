"""Two ranks train as one does on the whole batch, stop together, and go on together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.toy import Toy, options
from triton_deq.training import train

ROOT = Path(__file__).resolve().parents[2]


def launch(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/training/distributed_worker.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_ranks_train_as_one(tmp_path):
    train(Toy(dropout=0.0), options(), tmp_path / "one")
    done = launch(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("interrupted after step 4 of 6") == 2

    one, two = (torch.load(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, value in one["model"].items():
        if name.startswith("layers"):
            torch.testing.assert_close(value, two["model"][name], rtol=1e-9, atol=1e-9)
    assert [task["place"] for task in two["tasks"]] == [6, 6]
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["step"] for line in lines[1]] == [2, 3, 4, 6]
    for ours, theirs in zip(*lines, strict=True):
        shared = {key for key in ours if key != "seconds" and "root" not in key and "norm" not in key}
        for key in shared - {"phase"}:
            assert abs(ours[key] - theirs[key]) < 1e-4, key
