"""Tables, plots and the README's section, from rows that are written here."""

import pytest

from bench import profiles
from bench import report as reports
from bench.report import BEGIN, END, NO_ROWS, report, section, with_section
from bench.rows import write
from bench.tables import compare
from tests.bench.test_rows import row


def step_rows(run: str = "2026-01-01T00:00:00Z-abcd", **changes):
    """20 steps: f takes 10 ms of them, we 30 beyond, the textbook 60, TorchDEQ 90."""
    times = {"bare f": 10.0, "triton-deq": 40.0, "textbook": 70.0, "torchdeq": 100.0}
    return [row(run=run, variant=name, p50_ms=time, **changes) for name, time in times.items()]


def solve_row(variant: str, p50_ms: float, residual: float, **changes):
    return row(
        group="solve", op="dense to 0.001", variant=variant, p50_ms=p50_ms, residual=residual, **changes
    )


def test_a_step_counts_without_f_and_against_the_best_peer():
    (comparison,) = compare(step_rows())
    assert comparison.cost(comparison.find("triton-deq")) == 1.5
    assert [peer.variant for peer in comparison.peers] == ["textbook", "torchdeq"]
    assert comparison.speedup == 2.0


def test_a_peer_that_stopped_too_early_is_no_peer():
    (comparison,) = compare(
        [
            solve_row("triton-deq", 10, 9e-4),
            solve_row("hasty", 1, 2e-3),
            solve_row("fair", 20, 1e-3),
            solve_row("failed", 1, 0, error="no"),
        ][:3]
    )
    assert [peer.variant for peer in comparison.peers] == ["fair"]


def test_a_failed_variant_is_no_peer():
    (comparison,) = compare(
        [row(group="training"), row(group="training", variant="x", p50_ms=None, error="no")]
    )
    assert comparison.peers == []
    assert comparison.speedup is None


def test_rows_are_set_against_rows_of_their_own_run():
    """A slow run of the compiled peers beside ours does not make the eager ones of another run look bad."""
    eager = [row(group="training", p50_ms=10.0), row(group="training", variant="eager", p50_ms=12.0)]
    slow = [
        row(group="training", p50_ms=20.0, run="2026-01-02"),
        row(group="training", variant="compiled", p50_ms=22.0, run="2026-01-02"),
    ]
    (comparison,) = compare(eager + slow)
    assert [peer.variant for peer in comparison.peers] == ["compiled", "eager"]
    assert comparison.speedup == pytest.approx(1.1)


def test_only_the_latest_code_counts():
    old = step_rows(source="old")
    new = [row(variant="triton-deq", run="2026-02-01", source="new")]
    (comparison,) = compare(old + new)
    assert comparison.rows == tuple(new)


def test_a_graph_is_held_against_a_graph():
    times = {"bare f": 10.0, "bare f graph": 1.0, "triton-deq": 30.0, "triton-deq graph": 3.0}
    times["textbook graph"] = 5.0
    (comparison,) = compare([row(variant=name, p50_ms=time) for name, time in times.items()])
    assert comparison.speedup == 2.0


def test_the_section_names_what_ran_where_and_hides_no_loss():
    facts = {"group": "training", "op": "dense", "versions": {"torch": "2.13.0"}, "commit": "c" * 40}
    text = section([row(p50_ms=20.0, **facts), row(variant="torchdeq", p50_ms=10.0, **facts)])
    for said in ("A processor, 2 threads", "torch 2.13.0", "commit cccccccccc", "0.50×", "32×1024"):
        assert said in text


def test_readme_and_rows_are_held_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reports, "whole", lambda rows, beside: "tables")
    readme, results, output = tmp_path / "README.md", tmp_path / "results", tmp_path / "out"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert report(results, output, readme, check=True) == 1
    assert "run python -m bench report" in capsys.readouterr().err
    assert report(results, output, readme, check=False) == 0
    assert readme.read_text() == f"before\n{BEGIN}\n{NO_ROWS}\n{END}\nafter\n"
    assert report(results, output, readme, check=True) == 0

    for each in step_rows():
        write(results / "a.jsonl", each)
    assert report(results, output, readme, check=True) == 1
    assert report(results, output, readme, check=False) == 0
    assert "2.00×" in readme.read_text()
    assert report(results, output, readme, check=True) == 0


def test_a_readme_without_markers_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert report(tmp_path, tmp_path, readme, check=False) == 1
    assert readme.read_text() == "nothing"
    assert with_section(f"{END} {BEGIN}", "x") is None


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plots import draw

    rows = [*step_rows(), *step_rows(shape=(32, 4096))]
    rows.append(row(group="ceilings", op="copy", variant="copy", gigabytes_per_s=20.0))
    for size in (1024, 4096):
        rows.append(row(group="kernels", op="probe", shape=(32, size), gigabytes_per_s=size / 1000))
    paths = draw(rows, tmp_path)
    assert [path.name for path in paths] == [
        "a-processor-2-threads-step-float32.png",
        "a-processor-2-threads-probe-float32.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_models_beside_their_peers():
    shared = {
        "run": "1", "device": "A processor", "threads": 2, "mode": "inference", "execution": "eager",
        "dtype": "fp32", "batch": 4, "backward_nfe": None,
    }  # fmt: skip
    model = {"role": "model", "name": "deq", "p50_ms": 30.0, "peak_bytes": 10, "nfe": 6}
    peer = {"role": "against", "name": "resnet101", "p50_ms": 20.0, "peak_bytes": 20}
    rows = [{**shared, **model, "ratio_p50": 1.5, "f_ratio": 1.25}, {**shared, **peer}]
    *_, line = profiles.table(rows).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["deq, inference", "A processor, 2 threads", "fp32, eager", "4", "6"]
    assert cells[5:] == ["30", "resnet101", "20", "1.50×", "1.25×", "0.50×"]
    assert profiles.table([{**row, "run": row["role"]} for row in rows]) == ""
    assert "resnet101" in section([row(p50_ms=1.0)], profiles.table(rows))
