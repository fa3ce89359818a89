"""The plot of runs, and the command line around it."""

import json

import pytest

from triton_deq import cli
from triton_deq.training import plot


def write(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"valid/perplexity": 50.0, "valid/nfe": 9.0, "valid/radius": 0.8}
    first = write(tmp_path / "with", [{"step": 5, **line}, {"step": 10, **line, "valid/perplexity": None}])
    second = write(tmp_path / "without", [{"step": 5, "train/loss": 1.0}, {"step": 10, **line}])
    output = tmp_path / "runs.png"
    assert cli.main(["train", "plot", str(first), str(second), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_plotted(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["train", "plot", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no validation in .* yet"):
        plot([write(tmp_path / "run", [{"step": 1, "train/loss": 1.0}])], tmp_path / "x.png")
