"""The language model's task: with a stand-in for the model, and with the model itself."""

import json
import math
import os
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import triton_deq as td
from tests.training.toy import options
from triton_deq import cli
from triton_deq.data import Corpus, Segments
from triton_deq.training import Interrupted, LanguageModelTask, train
from triton_deq.training import checkpoint as checkpoints


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    """What kernels compute is others' to test; here they would take minutes."""
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)


@dataclass(frozen=True)
class Configuration:
    vocabulary: int = 7
    segment: int = 5


class StandIn(nn.Module):
    """Predicts from the present word and the mean of the last segment, which is its memory."""

    def __init__(self):
        super().__init__()
        self.configuration = Configuration()
        self.words = nn.Embedding(7, 4)
        self.deq = td.DEQ(td.MLPCell(4, 4), penalty=td.JacobianPenalty(0.1, probability=0.5))
        self.penalty = self.deq.penalty
        self.read = nn.Linear(4, 7)
        self.pretraining = False
        self.seen = []

    def forward(self, tokens, targets, memory=None):
        self.seen.append((tokens, memory))
        x = self.words(tokens) + (0 if memory is None else memory[0][:, None])
        out = self.deq(x.flatten(0, 1))
        nll = nn.functional.cross_entropy(self.read(out.value), targets.flatten(), reduction="none")
        remembered = (x.mean(1).detach(), None)
        solution = None if self.pretraining else out.solution
        return SimpleNamespace(
            nll=nll.view(tokens.shape), memory=remembered, solution=solution, penalty=out.penalty
        )

    def spectral_radius(self, tokens, memory, steps):
        return torch.full((len(tokens),), 0.25)


@pytest.fixture
def corpus():
    """Each word is followed by the next one, mostly."""
    ids = (np.arange(400) + (np.arange(400) % 11 == 0)).astype(np.int32) % 7
    return Corpus("counting", tuple("abcdefg"), ids, ids[:90], ids[:90])


def make(corpus, seed=0):
    torch.manual_seed(seed)
    return LanguageModelTask(StandIn(), corpus, batch=4)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_reports_on_the_solves(corpus, tmp_path):
    valid = train(make(corpus), options(steps=60, pretrain_steps=20, lr=0.05, validate_every=20), tmp_path)
    assert valid["perplexity"] < 0.75 * corpus.unigram_perplexity("valid")
    assert valid["radius"] == 0.25
    lines = metrics(tmp_path)
    assert "train/nfe" not in lines[0]
    keys = ("nfe", "residual", "unconverged", "backward_nfe", "backward_residual", "penalty", "perplexity")
    assert {f"train/{key}" for key in keys} <= set(lines[-1])
    assert lines[-1]["valid/nfe"] >= 1
    assert "valid/penalty" not in lines[-1]


def test_validation_reads_the_whole_split(corpus):
    task = make(corpus)
    task.model.eval()
    with torch.no_grad():
        valid = task.validate()
        rows = Segments(corpus.valid, 4, 22).take()  # all 4 rows of 22 in one segment
        parts = [out.nll for out in run(task.model, *rows)]
    assert math.isclose(valid["loss"], torch.cat(parts, 1).double().mean().item(), rel_tol=1e-6)
    assert math.isclose(valid["perplexity"], math.exp(valid["loss"]))


def run(model, tokens, targets):
    memory = None
    for start in range(0, tokens.shape[1], 5):
        out = model(tokens[:, start : start + 5], targets[:, start : start + 5], memory)
        memory = out.memory
        yield out


def test_the_memory_is_carried_and_a_new_epoch_begins_without(corpus):
    task = make(corpus)
    segments = len(Segments(corpus.train, 4, 5))
    for _ in range(segments + 1):
        task.loss(task.model).scalars()
    memories = [memory for _, memory in task.model.seen]
    assert memories[0] is None
    assert memories[segments] is None
    assert all(memory is not None for memory in memories[1:segments])


def test_it_resumes_to_the_bit(corpus, tmp_path):
    """After a segment in the middle of the text, so that the memory counts."""
    train(make(corpus), options(), tmp_path / "straight")
    task = make(corpus)
    loss = task.loss

    def interrupted(module):
        if len(task.model.seen) >= 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(module)

    task.loss = interrupted
    with pytest.raises(Interrupted):
        train(task, options(), tmp_path / "resumed")
    train(make(corpus, seed=1), options(), tmp_path / "resumed", resume=True)
    one, two = (checkpoints.load(tmp_path / run / "last.pt") for run in ("straight", "resumed"))
    for name, value in one["model"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two["model"][name]), name
    held = [state["tasks"][0]["memory"]["parts"] for state in (one, two)]
    assert torch.equal(held[0][0], held[1][0])
    assert held[0][1] is held[1][1] is None


def test_pretraining_reaches_model_and_penalty(corpus):
    task = make(corpus)
    task.set_pretraining(True)
    assert task.model.pretraining
    assert task.model.penalty.pretraining
    task.set_pretraining(False)
    assert not task.model.pretraining
    assert not task.model.penalty.pretraining


def test_tasks_that_cannot_be(corpus):
    small = Corpus("small", tuple("abc"), corpus.train % 3, corpus.valid % 3, corpus.test % 3)
    with pytest.raises(ValueError, match="vocabulary=7, and small has 3 words"):
        LanguageModelTask(StandIn(), small, batch=4)
    with pytest.raises(ValueError, match="length=30 does not fit: 90 tokens"):
        LanguageModelTask(StandIn(), corpus, batch=4, length=30)


SHORT = ["--steps", "6", "--pretrain-steps", "2", "--log-every", "2", "--validate-every", "6"]


@pytest.fixture
def wiki(tmp_path):
    """WikiText's layout around a text of a dozen words."""
    words = ["the", "cat", "saw", "a", "dog", ".", "<unk>", ",", "and", "slept", "on", "it"]
    for split, lines in {"train": 120, "valid": 60, "test": 10}.items():
        text = "".join(" ".join(words[(i * j) % 12] for j in range(1, 12)) + " .\n" for i in range(lines))
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    return tmp_path


def test_the_command_line(wiki, capsys):
    """Trains, refuses to overwrite, refuses another configuration, and resumes what has ended."""
    pytest.importorskip("triton_deq.models")
    run = ["train", "language-model", *SHORT, "--output", str(wiki / "run"), "--device", "cpu"]
    run += ["--data", str(wiki), "--cache", str(wiki / "cache"), "--batch", "4"]
    assert cli.main([*run, "--penalty", "0.5"]) == 0
    assert "valid: loss" in capsys.readouterr().out
    assert json.loads((wiki / "run/config.json").read_text())["task"]["penalty"] == 0.5
    assert metrics(wiki / "run")[-1]["valid/radius"] > 0
    assert cli.main([*run, "--penalty", "0.5"]) == 2
    assert "has a run already" in capsys.readouterr().err
    assert cli.main([*run, "--no-penalty", "--resume"]) == 2
    assert "task.penalty=0.5, and now it is 0.0" in capsys.readouterr().err
    assert cli.main([*run, "--penalty", "0.5", "--resume"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "huge"], "config='huge' is unknown"),
        (["--data", "nowhere"], "there is no file nowhere/wiki.train.tokens"),
        (["--lr", "0"], "lr=0.0 is outside"),
        (["--device", "abacus"], "--device"),
        (["--batch", "500"], "length=32 does not fit"),
        (["--penalty", "-1"], "penalty=-1.0 is outside"),
    ],
)
def test_commands_that_cannot_begin(arguments, message, capsys, tmp_path):
    pytest.importorskip("triton_deq.models")
    assert cli.main(["train", "language-model", "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(wiki, capsys, monkeypatch):
    pytest.importorskip("triton_deq.models")
    run = ["train", "language-model", *SHORT, "--output", str(wiki / "run"), "--device", "cpu"]
    run += ["--data", str(wiki), "--batch", "4"]
    loss = LanguageModelTask.loss

    def interrupted(task, module):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(task, module)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTask, "loss", interrupted)
        assert cli.main(run) == 130
    assert "interrupted after step 1 of 6" in (told := capsys.readouterr().err)
    assert "--resume" in told
    assert cli.main([*run, "--resume"]) == 0
    assert [line["step"] for line in metrics(wiki / "run")] == [2, 4, 6]
