"""The trainer on a toy: it learns, resumes bit for bit, stops cleanly, and never loses a checkpoint."""

import errno
import json
import os
import random
import signal
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import triton_deq as td
from tests.training.toy import Toy, options
from triton_deq.training import (
    CheckpointError,
    Interrupted,
    NonFinite,
    TrainingOptions,
    checkpoint,
    loop,
    report,
    train,
)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(a, b):
    """Equal to the bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def numpy_draw():
    return np.random.rand()  # noqa: NPY002


def stop_after(step, number=signal.SIGTERM):
    return step, lambda: os.kill(os.getpid(), number)


def test_it_learns(tmp_path):
    many = options(steps=150, pretrain_steps=0, lr=0.03, log_every=50, validate_every=50)
    valid = train(Toy(), many, tmp_path)
    lines = metrics(tmp_path)
    assert valid["loss"] < 0.1 < lines[0]["valid/loss"]
    assert [line["step"] for line in lines] == [50, 100, 150]
    assert json.loads((tmp_path / "config.json").read_text())["options"]["steps"] == 150


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_resumed_run_is_the_same_to_the_bit(stop, tmp_path):
    """Also where it stopped between two lines of metrics, and at the end of pretraining."""
    straight = train(Toy(), options(), tmp_path / "straight")
    drawn = [random.random(), numpy_draw(), torch.rand(()).item()]
    with pytest.raises(Interrupted, match=f"after step {stop} of 6; the checkpoint is .*last.pt.*--resume"):
        train(Toy(signal_at=stop_after(stop)), options(), tmp_path / "resumed")
    torch.manual_seed(1)
    task = Toy(seed=5)
    assert train(task, options(), tmp_path / "resumed", resume=True) == straight
    assert [random.random(), numpy_draw(), torch.rand(()).item()] == drawn
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    for name in ("last.pt", "best.pt"):
        one, two = (checkpoint.load(tmp_path / run / name) for run in ("straight", "resumed"))
        del one["seconds"], two["seconds"]
        assert same(one, two), name
    assert task.model.penalty.calls == 6 + 2


def test_lines_after_the_checkpoint_are_cut_away(tmp_path):
    """As when a run dies long after its last checkpoint: no step is there twice."""
    train(Toy(), options(), tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(Toy(signal_at=stop_after(3)), options(), tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": 7}\n{"step": 5, "tra')
    train(Toy(), options(), tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_phases(tmp_path):
    task = Toy()
    train(task, options(), tmp_path)
    assert task.phases == [True, False]
    assert [line["phase"] for line in metrics(tmp_path)] == ["pretraining", *["equilibrium"] * 3]


def test_the_best_of_pretraining_is_not_the_best(tmp_path):
    task = Toy()
    losses = iter([1.0, 5.0, 4.0, 4.5])
    task.validate = lambda: {"loss": next(losses)}
    train(task, options(steps=8, pretrain_steps=2, validate_every=2), tmp_path)
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 6
    assert checkpoint.load(tmp_path / "last.pt")["best"] == 4


def test_validating_more_often_changes_nothing(tmp_path):
    train(Toy(), options(validate_every=1), tmp_path / "often")
    train(Toy(), options(validate_every=6), tmp_path / "once")
    often, once = (checkpoint.load(tmp_path / run / "last.pt")["model"] for run in ("often", "once"))
    # The calls of the penalty are counted at validation, too.
    assert all(same(often[name], once[name]) for name in often if name.startswith("layers"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("short")])
def test_a_failing_write_keeps_the_checkpoint_of_before(error, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(Toy(signal_at=stop_after(2)), options(), tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(CheckpointError, match=r"step 3 could not be written .* of before is intact"):
            train(Toy(), options(), tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    train(Toy(), options(), tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    with pytest.raises(NonFinite, match=r"step 5 has loss nan .* is of step 3\. Lower lr"):
        train(Toy(poison=5), options(), tmp_path)
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["step"] == 3
    assert all(torch.isfinite(value).all() for name, value in state["model"].items() if "layers" in name)
    with pytest.raises(NonFinite, match="there is no checkpoint yet"):
        train(Toy(poison=1), options(), tmp_path / "other")


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a script's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        train(Toy(signal_at=(4, twice)), options(), tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("task", "chosen", "field"),
    [
        ({"width": 9}, {}, "task.width=8, and now it is 9"),
        ({}, {"lr": 0.1}, "options.lr=0.01, and now it is 0.1"),
        ({}, {"steps": 7}, "options.steps=6, and now it is 7"),
    ],
)
def test_another_configuration_is_refused(task, chosen, field, tmp_path):
    train(Toy(), options(), tmp_path)
    with pytest.raises(CheckpointError, match=field):
        train(Toy(**task), options(**chosen), tmp_path, resume=True)


def test_how_often_something_is_written_may_change(tmp_path):
    with pytest.raises(Interrupted):
        train(Toy(signal_at=stop_after(4)), options(), tmp_path)
    train(Toy(), options(log_every=1, checkpoint_every=50), tmp_path, resume=True)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4, 5, 6]


def test_runs_that_cannot_begin(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint .*last.pt to resume from"):
        train(Toy(), options(), tmp_path, resume=True)
    train(Toy(), options(), tmp_path)
    with pytest.raises(CheckpointError, match="has a run already: resume it, or train into another folder"):
        train(Toy(), options(), tmp_path)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is not a checkpoint that can be read"):
        train(Toy(), options(), tmp_path, resume=True)
    torch.save({"version": 0}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="has version 0"):
        train(Toy(), options(), tmp_path, resume=True)


def test_a_checkpoint_runs_no_code(tmp_path):
    train(Toy(), options(), tmp_path)
    torch.save({"version": 1, "model": types.SimpleNamespace()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="cannot be read|can be read"):
        train(Toy(), options(), tmp_path, resume=True)


def test_a_finished_run_is_validated_once_more(tmp_path):
    valid = train(Toy(), options(), tmp_path)
    assert train(Toy(), options(), tmp_path, resume=True) == valid


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    chosen = options(steps=12, warmup_steps=4, lr=0.1, final_lr=0.01)
    rates = [0.1 * loop.lr_factor(step, chosen) for step in range(13)]
    np.testing.assert_allclose(rates[:5], [0.025, 0.05, 0.075, 0.1, 0.1])
    np.testing.assert_allclose(rates[8], (0.1 + 0.01) / 2)
    np.testing.assert_allclose(rates[12], 0.01)
    assert all(np.diff(rates[4:]) < 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_resumes(optimizer, tmp_path):
    chosen = options(optimizer=optimizer, weight_decay=0.1)
    train(Toy(), chosen, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(Toy(signal_at=stop_after(3)), chosen, tmp_path / "resumed")
    train(Toy(), chosen, tmp_path / "resumed", resume=True)
    one, two = (checkpoint.load(tmp_path / run / "last.pt") for run in ("straight", "resumed"))
    assert same(one["optimizer"], two["optimizer"])


def test_gradients_are_clipped(tmp_path):
    task = Toy()
    train(task, options(clip=1e-3), tmp_path)
    norm = torch.stack([p.grad.norm() for p in task.model.parameters()]).norm()
    assert norm <= 1.001e-3
    assert metrics(tmp_path)[-1]["train/gradient_norm"] > 1e-2


@pytest.mark.parametrize(("autocast", "state_dtype"), [("bf16", None), ("bf16-state", torch.bfloat16)])
def test_autocast(tmp_path, autocast, state_dtype):
    seen = []
    task = Toy()
    task.model.deq = td.DEQ(td.MLPCell(2, 2))
    task.model.float()
    task.data, task.carried = task.data.float(), task.carried.float()
    task.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    train(task, options(autocast=autocast), tmp_path)
    assert set(seen) == {torch.bfloat16}
    assert task.model.deq.state_dtype == state_dtype


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps=0 is too small"),
        ({"pretrain_steps": 7}, "pretrain_steps=7 is more than steps=6"),
        ({"warmup_steps": 7}, "warmup_steps=7 is more than steps=6"),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown: choose one of 'adam'"),
        ({"autocast": "fp8"}, "autocast='fp8' is unknown"),
        ({"lr": 0.0}, "lr=0.0 is outside"),
        ({"final_lr": 1.0}, "final_lr=1.0 is outside"),
        ({"clip": -1.0}, "clip=-1.0 is outside"),
        ({"seed": -1}, "seed=-1 is too small"),
    ],
)
def test_options_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(options(), **changed)
    with pytest.raises(TypeError, match="steps=1.5 must be an int"):
        TrainingOptions(steps=1.5)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    task = Toy()
    task.validate = lambda: {"loss": float("inf")}
    train(task, options(), tmp_path)
    assert metrics(tmp_path)[-1]["valid/loss"] is None


def test_tensorboard_gets_the_scalars(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append(("purge", purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append(("closed", None))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(Toy(), options(), tmp_path)
    assert written[0] == ("purge", 1)
    assert written[-1] == ("closed", None)
    assert {("train/loss", 2), ("train/lr", 6), ("valid/loss", 3)} <= set(written)


def test_without_tensorboard_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(Toy(), options(), tmp_path)
    told = capsys.readouterr().err
    assert told.count("No TensorBoard events") == 1
    assert "step 6/6  equilibrium\n  train: loss" in told


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(report.sys.stderr, "isatty", lambda: True, raising=False)
    train(Toy(), options(), tmp_path)
    told = capsys.readouterr().err
    assert "6/6" in told
    assert "valid: loss" in told
