"""The trainer."""

import json
import math
import random
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..deq import DEQ
from . import checkpoint
from .averages import Averages
from .errors import CheckpointError, Interrupted, NonFinite
from .interrupts import Interrupts
from .options import TrainingOptions
from .ranks import Ranks
from .report import Report
from .task import Task

LAST, BEST = "last.pt", "best.pt"

# A run may be resumed with other values of these: they do not change what is learned.
_FREE = ("validate_every", "checkpoint_every", "log_every")


def train(
    task: Task, options: TrainingOptions, folder: str | Path, *, resume: bool = False
) -> dict[str, float]:
    """Train a model; returns the scalars of the last validation.

    `folder` gets config.json, metrics.jsonl (see `Report`), last.pt, the newest checkpoint, and best.pt, that
    of the least validation loss of the present phase. A resumed run goes on as if it had not stopped: on a
    CPU bit for bit. Under torchrun each rank calls this with its own task; rank 0 writes.

    Args:
        task: model and data; the model is on its device.
        options: of the optimiser and of what is written when.
        folder: of the run; made if need be.
        resume: go on from the folder's last.pt.

    Raises:
        CheckpointError: none to resume from, one of another configuration, or one that cannot be written;
            without `resume`, a folder that has a run.
        NonFinite: the loss or its gradient is; last.pt is of before.
        Interrupted: SIGINT or SIGTERM; last.pt is of the last whole step.
    """
    trainer = _Trainer(task, options, Path(folder))
    if resume:
        trainer.resume()
    else:
        trainer.begin()
    return trainer.run()


def optimizer_for(parameters: Iterable[nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """The optimiser that the options name."""
    lr, decay = options.lr, options.weight_decay
    if options.optimizer in ("sgd", "nesterov"):
        nesterov = options.optimizer == "nesterov"
        return torch.optim.SGD(
            parameters, lr, momentum=options.momentum, weight_decay=decay, nesterov=nesterov
        )
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr, weight_decay=decay)


def lr_factor(step: int, options: TrainingOptions) -> float:
    """The learning rate of a step, counted from 0, as a multiple of `lr`."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    final = options.final_lr / options.lr
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class _Trainer:
    def __init__(self, task: Task, options: TrainingOptions, folder: Path):
        self.task, self.options, self.folder = task, options, folder
        self.ranks = Ranks()
        self.device = next(task.model.parameters()).device
        if options.autocast == "bf16-state":
            for part in task.model.modules():
                if isinstance(part, DEQ):
                    part.state_dtype = torch.bfloat16
        self.module = self.ranks.wrap(task.model)
        self.optimizer = optimizer_for((p for p in task.model.parameters() if p.requires_grad), options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, options)
        )
        self.averages = Averages()
        self.step = 0
        self.best = math.inf
        self.seconds = 0.0  # of training, before this process
        self.began = time.perf_counter()
        self.saved: int | None = None  # step of last.pt
        self.pretraining = False
        described = {"task": task.configuration, "options": asdict(options), "world": self.ranks.world}
        self.configuration = json.loads(json.dumps(described))  # as it will be read

    @property
    def last(self) -> Path:
        return self.folder / LAST

    @property
    def phase(self) -> str:
        return "pretraining" if self.pretraining else "equilibrium"

    def begin(self) -> None:
        """From the first step on."""
        occupied = self.last.exists()
        self.ranks.any(occupied)  # all have looked before anyone writes
        if occupied:
            raise CheckpointError(f"{self.folder} has a run already: resume it, or train into another folder")
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / BEST).unlink(missing_ok=True)
            text = json.dumps(self.configuration, indent=1)
            (self.folder / "config.json").write_text(text + "\n", encoding="utf-8")
        seed = self.options.seed + self.ranks.rank  # dropout differs between ranks
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        self._set_phase(1)

    def resume(self) -> None:
        """From last.pt on."""
        state = checkpoint.load(self.last)
        checkpoint.check_same(
            _without_free(state["configuration"]), _without_free(self.configuration), self.last
        )
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.task.load_state_dict(state["tasks"][self.ranks.rank])
        self.averages.load_state_dict(state["averages"][self.ranks.rank], self.device)
        self.step = self.saved = state["step"]
        self.best, self.seconds = state["best"], state["seconds"]
        self._set_phase(max(1, self.step))
        checkpoint.set_random_states(state["random"][self.ranks.rank], self.device)

    def run(self) -> dict[str, float]:
        valid: dict[str, float] | None = None
        with ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts())
            report = None
            if self.ranks.rank == 0:
                report = Report(self.folder, self.options.steps, self.step)
                stack.callback(report.close)
            while self.step < self.options.steps:
                lr = self._advance()
                if report is not None:
                    report.tick()
                valid = self._account(lr, report, interrupts)
        return self._validate() if valid is None else valid

    def _advance(self) -> float:
        """One step of the optimiser; returns its learning rate."""
        if (self.step + 1 <= self.options.pretrain_steps) != self.pretraining:
            self._set_phase(self.step + 1)
            self.best = math.inf  # losses of the two phases do not compare
        self.task.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.task.loss(self.module)
        loss.value.backward()
        clip = self.options.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), clip)
        self._check_finite(loss.value, norm)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.averages.add({**loss.scalars(), "gradient_norm": norm})
        return lr

    def _account(self, lr: float, report: Report | None, interrupts: Interrupts) -> dict[str, float] | None:
        """Log, validate and save where it is time; the validation's scalars, if there was one."""
        options, step = self.options, self.step
        end = step == options.steps
        scalars: dict[str, float] = {}
        valid = None
        if end or step % options.log_every == 0:
            means = self.task.summarise(self.ranks.mean(self.averages.take()))
            scalars.update({f"train/{name}": value for name, value in means.items()})
        if end or step % options.validate_every == 0:
            valid = self._validate()
            scalars.update({f"valid/{name}": value for name, value in valid.items()})
        if report is not None and scalars:
            report.write(step, self.phase, lr, self._elapsed(), scalars)

        improved = valid is not None and valid["loss"] < self.best
        if valid is not None and improved:
            self.best = valid["loss"]
        interrupted = self.ranks.any(interrupts.asked)
        if end or interrupted or improved or step % options.checkpoint_every == 0:
            self._save(improved)
        if interrupted and not end:
            raise Interrupted(
                f"interrupted after step {step} of {options.steps}; the checkpoint is {self.last}: go on "
                "with train(..., resume=True), or the same command with --resume"
            )
        return valid

    def _save(self, best: bool) -> None:
        own = {
            "tasks": self.task.state_dict(),
            "averages": self.averages.state_dict(),
            "random": checkpoint.random_states(self.device),
        }
        every = self.ranks.gather(own)
        if self.ranks.rank == 0:
            state = {
                "step": self.step,
                "configuration": self.configuration,
                "model": self.task.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "best": self.best,
                "seconds": self._elapsed(),
                **{name: [rank[name] for rank in every] for name in own},
            }
            checkpoint.save(self.last, state)
            if best:
                checkpoint.save(self.folder / BEST, state)
        self.saved = self.step

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        self.task.model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(self.options.seed)
            return self.task.validate()

    def _check_finite(self, loss: Tensor, norm: Tensor) -> None:
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            return
        kept = "there is no checkpoint yet" if self.saved is None else f"{self.last} is of step {self.saved}"
        raise NonFinite(
            f"step {self.step + 1} has loss {loss.item():.4g} and gradient norm {norm.item():.4g}, and was "
            f"not taken; {kept}. Lower lr or clip, add warm-up or pretraining steps, raise the weight of the "
            "Jacobian penalty, or train without autocast"
        )

    def _set_phase(self, step: int) -> None:
        self.pretraining = step <= self.options.pretrain_steps
        self.task.set_pretraining(self.pretraining)

    def _autocast(self) -> Any:
        enabled = self.options.autocast != "none"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began


def _without_free(configuration: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in configuration["options"].items() if name not in _FREE}
    return {**configuration, "options": kept}
