"""`python -m bench run` on sizes that prove only that it runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import environment
from bench.__main__ import main
from bench.cases import Case, Setting, Variant
from bench.groups import GROUPS
from bench.rows import read
from bench.runner import Deadline, run, run_case
from triton_deq.timing import Stopwatch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = environment.choose_device()
SETTING = Setting(DEVICE, "tiny", 0, Stopwatch(DEVICE), "no")


def case_of(*variants: Variant) -> Case:
    return Case("step", "anderson", "forward", torch.float32, (2, 3), variants)


def test_an_unknown_group_lists_the_groups(capsys):
    assert main(["run", "--group", "speed"]) == 2
    assert (
        "choose from ceilings, step, solve, kernels, penalty, training, language" in capsys.readouterr().err
    )


def test_every_group_gives_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)  # test_gpu has the kernels
    path = tmp_path / "rows.jsonl"
    threads = torch.get_num_threads()
    try:  # one thread: two wait for each other where other processes run
        assert main(["run", "--tiny", "--no-compile", "--threads", "1", "--output", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read([path])
    assert {row.group for row in rows} == set(GROUPS) - {"tuning"}  # which the reference has none of
    assert len({row.run for row in rows}) == 1
    missing = {row.variant for row in rows if row.error is not None}
    assert missing <= {"jaxopt", "torchdeq", "torchdeq broyden", "locuslab"}, rows
    for row in rows:
        if row.error is None:
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            assert row.roofline is None or row.kind == "gpu"
        if row.group == "solve" and row.error is None:
            assert row.residual <= 1.05e-3
            assert row.steps >= 3


def test_a_variant_that_fails_is_a_row_that_says_so():
    def broken():
        raise ValueError("no luck\nin /home/someone/place.py")

    def later():
        raise RuntimeError("cannot read /home/someone/place.py")

    case = case_of(
        Variant("triton-deq", lambda: lambda: None), Variant("x", broken), Variant("y", lambda: later)
    )
    rows = {row.variant: row for row in run_case(case, SETTING, environment.look(DEVICE))}
    assert rows["triton-deq"].p50_ms is not None
    assert rows["x"].error == "ValueError: no luck"
    assert rows["y"].error == "RuntimeError: cannot read (path)"
    assert rows["y"].p50_ms is None


def test_no_case_begins_after_the_deadline():
    started = []

    def cases(setting):
        for number in range(3):
            started.append(number)
            yield case_of(Variant("triton-deq", lambda: lambda: None))

    taken = []
    run([cases], SETTING, environment.look(DEVICE), taken.append, Deadline(0))
    assert started == [0]
    assert taken == []


def test_an_interruption_keeps_the_rows_of_the_cases_before(tmp_path, monkeypatch):
    def cases(setting):
        yield case_of(Variant("triton-deq", lambda: lambda: None))
        raise KeyboardInterrupt

    monkeypatch.setitem(GROUPS, "step", cases)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        main(["run", "--tiny", "--group", "step", "--output", str(path)])
    assert len(read([path])) == 1


def test_rows_name_neither_the_host_nor_a_path(tmp_path):
    import platform

    found = environment.look(DEVICE)
    for text in map(str, vars(found).values()):
        assert str(ROOT) not in text
        assert platform.node() not in text or len(platform.node()) < 3


def test_it_runs_from_a_checkout_that_is_not_installed():
    """Without the finder of an editable installation, `kernels/` still has its name."""
    code = """
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
        import importlib.util, triton_deq
        assert importlib.util.find_spec("triton_deq.kernels") is None
        import bench
        import triton_deq.kernels.anderson as module
        print(module.__file__)
    """
    import textwrap

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "anderson.py"
