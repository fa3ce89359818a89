"""`python -m bench gpu`, rehearsed with Triton's interpreter standing in for the GPU."""

import json
import signal
import subprocess
from functools import partial
from itertools import chain

import pytest
import torch

from bench import gpu, proofs, sections
from bench.groups import GROUPS
from bench.order import Order
from bench.proofs import find_sanitizer, together
from bench.rows import read, write
from bench.sections import MEASUREMENTS, PROOFS, SECTIONS
from tests.bench.test_report import step_rows

rehearsal = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to do it for real")


def test_an_unknown_section_lists_the_sections(tmp_path, capsys):
    assert gpu.main(1, tmp_path, ["speed"]) == 2
    assert f"choose from {', '.join(SECTIONS)}" in capsys.readouterr().err


@rehearsal
@pytest.mark.kernels
def test_sections_leave_their_files(tmp_path, capsys):
    for each in step_rows(group="penalty", op="dense", shape=(2, 64), steps=None):
        write(tmp_path / "rows.jsonl", each)
    assert gpu.main(1.5, tmp_path, ["verify", "memcheck", "profile"]) == 0
    assert all(row["passed"] for row in json.loads((tmp_path / "verify.json").read_text()))
    assert (tmp_path / "sanitizer.txt").read_text().startswith("=== memcheck\nskipped: ")
    assert "Self CPU" in (tmp_path / "profile.txt").read_text()
    assert "verify     done" in (tmp_path / "summary.txt").read_text()
    out = capsys.readouterr().out
    assert "penalty dense forward 2x64 float32" in out
    assert not (tmp_path / "failures.txt").exists()


@rehearsal
@pytest.mark.kernels
def test_rows_are_on_disk_when_a_section_ends(tmp_path):
    outcome = gpu.run_section("solvers", tmp_path, 120, "tiny")
    assert outcome == "done", (tmp_path / "log.txt").read_text()
    assert {row.group for row in read([tmp_path / "rows.jsonl"])} == {"ceilings", "step", "solve"}


@rehearsal
@pytest.mark.kernels
def test_each_section_runs(tmp_path):
    """Those that rows are not of; a rehearsal of them takes seconds."""
    for name in ("tests", "demo", "versus", "tuning"):
        outcome = gpu.run_section(name, tmp_path, 180, "tiny")
        assert outcome == "done", (tmp_path / "log.txt").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert " passed" in log
    assert "train language-model --steps 1" in log
    roles = {json.loads(line)["role"] for line in (tmp_path / "models.jsonl").read_text().splitlines()}
    assert "model" in roles
    assert len(roles) > 1


def test_every_group_is_measured_by_a_section():
    measured = [section.args[0] for _, section in MEASUREMENTS.values() if isinstance(section, partial)]
    assert set(chain.from_iterable(measured)) == set(GROUPS)


def test_tests_that_take_too_long_are_asked_to_tell_what_failed(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, command):
            assert command[1:3] == ["-m", "pytest"]

        def wait(self, seconds=None):
            if not seen:
                raise subprocess.TimeoutExpired("pytest", seconds)
            return 2

        def send_signal(self, number):
            seen.append(number)

    seen = []
    monkeypatch.setattr(proofs.subprocess, "Popen", Slow)
    assert proofs.tests(Order(tmp_path, 6, "full")) == 2
    assert seen == [signal.SIGINT]


def test_a_process_that_fails_fails_them_all(capsys):
    ended = []
    commands = {"good": ["-c", "print('fine')"], "bad": ["-c", "raise SystemExit(3)"]}
    assert together(commands, ended.append) == 1
    assert sorted(ended) == ["bad", "good"]
    out = capsys.readouterr().out
    assert "--- good: 0\nfine" in out
    assert "--- bad: 3" in out
    assert together({"good": commands["good"]}) == 0


def test_whole_training_steps_are_profiled_first(tmp_path):
    order = Order(tmp_path, 10, "full")
    assert [group for group, _ in sections._whole_steps(order)] == ["language", "images"]
    assert sections._worst(order) == []


@pytest.mark.parametrize(("plan", "names"), [("prove", PROOFS), ("measure", MEASUREMENTS), (None, SECTIONS)])
def test_a_plan_is_half_of_the_sections(plan, names, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "run_section", lambda name, *rest: ran.append(name) or "done")
    assert gpu.main(9, tmp_path, None, plan) == 0
    assert ran == list(names)


def test_a_section_that_fails_leaves_its_traceback(tmp_path):
    assert gpu.run_section("fail", tmp_path, 30, "tiny", "tests.bench.broken") == "failed (1)"
    said = (tmp_path / "failures.txt").read_text()
    assert "Traceback" in said
    assert "RuntimeError: the section broke" in said


def test_the_rest_still_runs(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(
        gpu, "run_section", lambda name, *rest: (ran.append(name), "failed (1)" if not ran[1:] else "done")[1]
    )
    assert gpu.main(9, tmp_path, None) == 1
    assert ran == list(SECTIONS)
    assert "verify     failed (1)" in (tmp_path / "summary.txt").read_text()


def test_time_is_shared_out(tmp_path, monkeypatch):
    """Sections that take no time leave theirs to the others, and none gets more than there is."""
    given = []
    monkeypatch.setattr(
        gpu, "run_section", lambda name, output, seconds, scale: given.append(seconds) or "done"
    )
    gpu.main(9, tmp_path, None)
    assert len(given) == len(SECTIONS)
    shares = sum(share for share, _ in SECTIONS.values())
    assert given[0] == pytest.approx((60 * 9 - gpu.RESERVE) * SECTIONS["verify"][0] / shares, rel=0.01)
    assert given[-1] == pytest.approx(60 * 9 - gpu.RESERVE, rel=0.1)


def test_without_time_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_section", lambda *rest: pytest.fail("a section began"))
    gpu.main(0.05, tmp_path, ["verify"])
    assert "no time left" in (tmp_path / "summary.txt").read_text()


def test_a_section_that_hangs_is_ended(tmp_path):
    assert gpu.run_section("hang", tmp_path, 0.5, "tiny", "tests.bench.broken") == "out of time"


def test_the_sanitizer_is_found_on_the_path(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_sanitizer() == str(program)
