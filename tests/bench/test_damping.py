"""`python -m bench damping`: a row for each way and seed."""

import json

from bench.__main__ import main
from triton_deq import backend


def test_a_row_for_each_way_and_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    output = tmp_path / "damping.jsonl"
    assert main(["damping", "--seeds", "2", "--steps", "2", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    ways = list(dict.fromkeys(row["backward"] for row in rows))
    assert [(row["backward"], row["seed"]) for row in rows] == [
        (way, seed) for way in ways for seed in (0, 1)
    ]
    assert "ridge=0.01" in ways
    first = {row["backward"]: row["loss"] for row in rows if row["seed"] == 0}
    assert len(set(first.values())) > 1, "a second step's loss has seen one gradient, and these are different"
    assert all(abs(loss - first["ridge=0.01"]) < 0.1 for loss in first.values())
    assert all(row["steps"] == 2 and row["evaluations"] > 2 and row["versions"] for row in rows)
    assert "ridge=0.01" in capsys.readouterr().out
