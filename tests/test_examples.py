"""The examples do what they say, in processes of their own as a reader starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed(name: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found.group(1))


def test_own_cell():
    out = printed("own_cell.py")
    assert number(r"never seen: ([\d.]+)", out) > 0.94
    assert "CONVERGED" in out.splitlines()[-2]


def test_forces():
    out = printed("forces.py")
    assert number(r"relative error ([\d.]+)", out) < 0.05
    assert number(r"forces alone: ([\d.]+)", out) == pytest.approx(1, abs=0.1)


def test_reconstruct():
    out = printed("reconstruct.py")
    before, after = number(r"never seen: ([\d.]+)", out), number(r"missing, ([\d.]+)", out)
    assert after > before + 3


def test_stabilise():
    without, with_penalty = printed("stabilise.py", "--quick").splitlines()
    assert number(r"([\d.]+)% of the images", without) < 20
    assert number(r"([\d.]+)% of the images", with_penalty) > 80
    assert number(r"radius ([\d.]+)", without) > 1 > number(r"radius ([\d.]+)", with_penalty)
    assert number(r"accuracy ([\d.]+)", with_penalty) > number(r"accuracy ([\d.]+)", without) - 0.02


def test_looped_reasoning():
    out = printed("looped_reasoning.py", "--quick")
    assert number(r"differ by ([\d.e+-]+)", out) < 1e-5
    assert number(r"settles\s+([\d.]+)%", out) == pytest.approx(number(r"all steps\s+([\d.]+)%", out), abs=2)
    assert number(r"settles.*, ([\d.]+) evaluations", out) < 24


@pytest.mark.slow
def test_looped_reasoning_in_full():
    assert number(r"all steps\s+([\d.]+)%", printed("looped_reasoning.py")) > 98


@pytest.mark.slow
def test_stabilise_with_other_seeds():
    for seed in range(1, 5):
        without, with_penalty = printed("stabilise.py", "--quick", "--seed", str(seed)).splitlines()
        assert number(r"([\d.]+)% of the images", without) < 20
        assert number(r"([\d.]+)% of the images", with_penalty) > 80


def test_data_parallel():
    out = printed("data_parallel.py")
    assert number(r"differ by ([\d.e+-]+)", out) < 1e-5
    assert "in the same ones on every rank" in out
    assert "draws as the first one did" in out


def test_every_example_is_listed():
    listed = set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
