"""The image classifier's task and command: with a stand-in for the model, and with the model itself."""

import json
import math
import os
import signal
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import triton_deq as td
from tests.training.toy import options
from triton_deq import cli
from triton_deq.data import Augmentation, Split, TensorImages, digits
from triton_deq.models import IMAGE_CONFIGURATIONS
from triton_deq.training import ImageClassifierTask, Interrupted, evaluate_by_nfe, plot, train
from triton_deq.training import checkpoint as checkpoints
from triton_deq.training.recipes import IMAGE_RECIPES


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    """What kernels compute is others' to test; here they would take minutes."""
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)


@dataclass(frozen=True)
class Configuration:
    classes: int = 4


class StandIn(nn.Module):
    """A convolution, the equilibrium of an MLP cell, and a linear head."""

    def __init__(self, classes=4):
        super().__init__()
        self.configuration = Configuration(classes)
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 8))
        self.deq = td.DEQ(td.MLPCell(8, 8), penalty=td.JacobianPenalty(0.1, probability=0.5))
        self.penalty = self.deq.penalty
        self.head = nn.Linear(8, classes)
        self.pretraining = False

    def forward(self, images):
        out = self.deq(self.stem(images))
        logits = self.head(out.value)
        solution = None if self.pretraining else out.solution
        initial = 1e-3 * logits.square().mean() if self.training else logits.new_zeros(())
        return SimpleNamespace(logits=logits, solution=solution, penalty=out.penalty, initial=initial)

    def spectral_radius(self, images, steps):
        return torch.full((len(images),), 0.25)


@pytest.fixture
def data():
    """A bright quarter of an image says its class; 30 images validate, in batches of 16."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (94,), generator=generator)
    images = 0.1 * torch.randn(94, 1, 4, 4, generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    split = Split(images[:64], labels[:64], images[64:], labels[64:])
    return TensorImages("quarters", split, Augmentation((0.25,), (0.5,), pad=1), 4)


def make(data, seed=0):
    torch.manual_seed(seed)
    return ImageClassifierTask(StandIn(), data, batch=16)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_reports_on_the_solves(data, tmp_path):
    valid = train(make(data), options(steps=60, pretrain_steps=20, lr=0.03, validate_every=20), tmp_path)
    assert valid["accuracy"] > 0.9
    assert valid["radius"] == 0.25
    assert "top5_accuracy" not in valid
    lines = metrics(tmp_path)
    assert "train/nfe" not in lines[0]
    keys = (
        "accuracy",
        "nfe",
        "residual",
        "unconverged",
        "backward_nfe",
        "backward_residual",
        "penalty",
        "initial",
    )
    assert {f"train/{key}" for key in keys} <= set(lines[-1])
    assert {"valid/nfe", "valid/residual", "valid/unconverged"} <= set(lines[-1])
    assert not {"valid/penalty", "valid/initial"} & set(lines[-1])


def test_validation_takes_every_image_once(data):
    task = make(data)
    task.model.eval()
    with torch.no_grad():
        valid = task.validate()
        logits = task.model(data.augmentation.normalise(data.split.valid_x)).logits
    labels = data.split.valid_y
    assert math.isclose(valid["loss"], nn.functional.cross_entropy(logits, labels).item(), rel_tol=1e-5)
    assert math.isclose(valid["accuracy"], (logits.argmax(1) == labels).double().mean().item(), rel_tol=1e-6)


def test_the_five_best_of_many_classes(data):
    many = replace(data, classes=101)
    task = ImageClassifierTask(StandIn(101), many, batch=16)
    task.model.head.weight.data.zero_()
    task.model.head.bias.data = torch.arange(101.0).remainder(100)  # 99, 98, … 95 are the five best
    many.split.valid_y[:15] = 95
    many.split.valid_y[15:20] = 99
    task.model.eval()
    with torch.no_grad():
        valid = task.validate()
    assert math.isclose(valid["accuracy"], 5 / 30, rel_tol=1e-6)
    assert math.isclose(valid["top5_accuracy"], 20 / 30, rel_tol=1e-6)


def test_it_resumes_to_the_bit(data, tmp_path):
    """Within an epoch of 4 batches, which are shifted at random."""
    train(make(data), options(), tmp_path / "straight")
    task = make(data)
    loss, calls = task.loss, []

    def interrupted(module):
        calls.append(module)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(module)

    task.loss = interrupted
    with pytest.raises(Interrupted):
        train(task, options(), tmp_path / "resumed")
    train(make(data, seed=1), options(), tmp_path / "resumed", resume=True)
    one, two = (checkpoints.load(tmp_path / run / "last.pt") for run in ("straight", "resumed"))
    for name, value in one["model"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two["model"][name]), name
    assert one["tasks"] == two["tasks"] == [{"train": {"position": 2, "epoch": 1}}]


def test_accuracy_by_evaluations(data):
    task = make(data)
    model, stopping = task.model, task.model.deq.stopping
    images = data.augmentation.normalise(data.split.valid_x)
    wanted = {}
    for number in (1, 3):
        z = td.solve(
            lambda z: model.deq.cell(z, model.deq.cell.inject(model.stem(images))),
            torch.zeros(30, 8),
            tol=0.0,
            max_steps=number,
        ).value
        wanted[number] = (model.head(z).argmax(1) == data.split.valid_y).double().mean().item()
    assert evaluate_by_nfe(model, task.valid, (1, 3)) == wanted
    assert model.deq.stopping is stopping
    assert model.training
    with pytest.raises(ValueError, match="evaluations=0 is too small"):
        evaluate_by_nfe(model, task.valid, (0, 1))
    with pytest.raises(ValueError, match="batches has no images"):
        evaluate_by_nfe(model, [])
    model.pretraining = True
    with pytest.raises(ValueError, match="model.pretraining=True, so that it does not solve"):
        evaluate_by_nfe(model, task.valid)


def test_pretraining_reaches_model_and_penalty(data):
    task = make(data)
    task.set_pretraining(True)
    assert task.model.pretraining
    assert task.model.penalty.pretraining


def test_tasks_that_cannot_be(data):
    with pytest.raises(ValueError, match="the model has classes=5, and quarters has 4"):
        ImageClassifierTask(StandIn(5), data, batch=16)
    with pytest.raises(ValueError, match="batch=65 is more than the 64 images"):
        ImageClassifierTask(StandIn(), data, batch=65)


def test_every_classifier_has_a_recipe():
    named = {name for name, configuration in IMAGE_CONFIGURATIONS.items() if configuration.head}
    assert set(IMAGE_RECIPES) == named


RUN = ["train", "image-classifier", "--device", "cpu", "--batch", "8"]
SHORT = ["--steps", "3", "--pretrain-steps", "1", "--log-every", "1", "--validate-every", "3"]


def test_the_command_line(tmp_path, capsys, monkeypatch):
    """Trains, writes and prints accuracy by evaluations, refuses another penalty, resumes, and plots."""
    pytest.importorskip("sklearn")
    small = digits(validation=1700)
    monkeypatch.setattr(
        "triton_deq.data.digits",
        lambda: small._replace(valid_x=small.valid_x[:20], valid_y=small.valid_y[:20]),
    )
    folder = tmp_path / "run"
    run = [*RUN, *SHORT, "--output", str(folder)]
    assert cli.main([*run, "--penalty", "0.25"]) == 0
    told = capsys.readouterr().out
    assert "digits: 97 images of 8×8, 10 classes" in told
    assert "valid: loss" in told
    held = json.loads((folder / "nfe.json").read_text())
    assert held["step"] == 3
    assert list(held["accuracy"]) == [str(number) for number in range(1, 9)]
    assert f"evaluations of f  accuracy\n               1  {held['accuracy']['1']:.4f}\n" in told
    assert json.loads((folder / "config.json").read_text())["task"]["penalty"] == 0.25
    assert metrics(folder)[-1]["valid/radius"] > 0
    assert cli.main([*run, "--no-penalty", "--resume"]) == 2
    assert "task.penalty=0.25, and now it is 0.0" in capsys.readouterr().err

    (folder / "nfe.json").unlink()
    assert cli.main([*run, "--penalty", "0.25", "--resume"]) == 0
    assert json.loads((folder / "nfe.json").read_text()) == held
    pytest.importorskip("matplotlib")
    plot([folder], tmp_path / "with.svg")
    (folder / "nfe.json").unlink()
    plot([folder], tmp_path / "without.svg")
    widths = [(tmp_path / name).read_text().split('width="')[1] for name in ("with.svg", "without.svg")]
    assert float(widths[0].split("pt")[0]) > float(widths[1].split("pt")[0])
    (folder / "nfe.json").write_text("[]")
    assert cli.main(["train", "plot", str(folder), "--output", str(tmp_path / "x.png")]) == 2
    assert "nfe.json holds no accuracy by evaluations of f" in capsys.readouterr().err


def test_folders_of_images_and_a_broken_one(tmp_path, capsys, monkeypatch):
    """With a small model in the place of ImageNet's, for as many classes as there are folders."""
    image_of = pytest.importorskip("PIL.Image").fromarray
    small = replace(IMAGE_CONFIGURATIONS["digits"], image_channels=3, image_size=(16, 16), classes=1000)
    monkeypatch.setitem(IMAGE_CONFIGURATIONS, "imagenet-small", small)
    for part in ("train", "val"):
        for name in "abc":
            (tmp_path / part / name).mkdir(parents=True)
            image_of(np.zeros((20, 20, 3), dtype=np.uint8)).save(tmp_path / part / name / "1.png")
    (tmp_path / "train/c/1.png").write_bytes(b"")
    run = [*RUN, "--config", "imagenet-small", "--data", str(tmp_path), "--workers", "0", "--batch", "3"]
    run += ["--steps", "1", "--pretrain-steps", "1"]
    assert cli.main([*run, "--output", str(tmp_path / "strict")]) == 1
    assert "train/c/1.png cannot be decoded" in (told := capsys.readouterr().err)
    assert "--on-error skip" in told
    with pytest.warns(UserWarning, match="train/c/1.png cannot be decoded"):
        assert cli.main([*run, "--on-error", "skip", "--output", str(tmp_path / "lenient")]) == 0
    described = json.loads((tmp_path / "lenient/config.json").read_text())["task"]
    assert described["classes"] == 3


def test_a_run_of_pretraining_alone_has_no_table(tmp_path, capsys):
    pytest.importorskip("sklearn")
    run = [*RUN, "--steps", "1", "--pretrain-steps", "1", "--batch", "4", "--output", str(tmp_path)]
    assert cli.main(run) == 0
    assert "evaluations of f" not in capsys.readouterr().out
    assert not (tmp_path / "nfe.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "huge"], "config='huge' is unknown: choose one of digits, "),
        (["--config", "cityscapes-small"], "config='cityscapes-small' is unknown"),
        (["--data", "somewhere"], "--data somewhere: the digits ship with scikit-learn"),
        (["--config", "cifar10-tiny"], "needs --data FOLDER with CIFAR-10's Python batches"),
        (["--config", "cifar10-tiny", "--data", "nowhere"], "there is no file nowhere/data_batch_1"),
        (["--config", "imagenet-small", "--data", "nowhere"], "there is no folder nowhere/train"),
        (["--batch", "5000"], "batch=5000 is more than the 1437 images"),
        (["--penalty", "-1"], "penalty=-1.0 is outside"),
        (["--optimizer", "nesterov", "--momentum", "0"], "momentum=0.0 is outside"),
    ],
)
def test_commands_that_cannot_begin(arguments, message, capsys, tmp_path):
    pytest.importorskip("sklearn")
    assert cli.main([*RUN, "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
