"""What a run leaves to read: metrics.jsonl, TensorBoard's events, and a bar or lines on the terminal."""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
NFE = "nfe.json"
"""The accuracy by evaluations of f, where the run was evaluated so."""


class Report:
    """Writes the metrics of a run and shows how far it is.

    A line of metrics.jsonl is a JSON object with step, phase, lr, seconds, and scalars as "train/loss" or
    "valid/perplexity"; one that is not finite is null.

    Args:
        folder: of the run.
        steps: in all.
        start: steps that are done; the lines of later ones are cut away.
    """

    def __init__(self, folder: Path, steps: int, start: int):
        self._metrics = folder / METRICS
        _keep_until(self._metrics, start)
        self._events = _tensorboard(folder, start)
        self._screen = _screen(steps, start)

    def write(self, step: int, phase: str, lr: float, seconds: float, scalars: dict[str, float]) -> None:
        """The line of a step."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        line = {"step": step, "phase": phase, "lr": lr, "seconds": round(seconds, 3), **finite}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._events is not None:
            for name, value in {"train/lr": lr, **scalars}.items():
                self._events.add_scalar(name, value, step)
        self._screen.line(step, phase, scalars)

    def tick(self) -> None:
        """A step is done."""
        self._screen.tick()

    def close(self) -> None:
        self._screen.close()
        if self._events is not None:
            self._events.close()


class Lines:
    """A plain line on standard error for each line of metrics."""

    def __init__(self, steps: int):
        self._steps = steps

    def line(self, step: int, phase: str, scalars: dict[str, float]) -> None:
        print(_sentence(step, self._steps, phase, scalars), file=sys.stderr, flush=True)

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bar(Lines):
    """A progress bar of rich, which shows the last training loss, and a line above it for validations."""

    def __init__(self, steps: int, start: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("training", total=steps, completed=start)
        self._progress.start()

    def line(self, step: int, phase: str, scalars: dict[str, float]) -> None:
        if "train/loss" in scalars:
            self._progress.update(self._task, description=f"{phase}, loss {scalars['train/loss']:.4g}")
        valid = {name: value for name, value in scalars.items() if name.startswith("valid/")}
        if valid:
            self._progress.console.print(_sentence(step, self._steps, phase, valid), highlight=False)

    def tick(self) -> None:
        self._progress.advance(self._task)

    def close(self) -> None:
        self._progress.stop()


def _sentence(step: int, steps: int, phase: str, scalars: dict[str, float]) -> str:
    parts = [f"step {step}/{steps}  {phase}"]
    for kind in ("train", "valid"):
        numbers = [f"{n.removeprefix(kind + '/')} {v:.4g}" for n, v in scalars.items() if n.startswith(kind)]
        if numbers:
            parts.append(f"{kind}: {', '.join(numbers)}")
    return "\n  ".join(parts) if len(parts) > 2 else "  ".join(parts)


def _screen(steps: int, start: int) -> Lines:
    if sys.stderr.isatty():
        with suppress(ImportError):
            return Bar(steps, start)
    return Lines(steps)


def _tensorboard(folder: Path, start: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("No TensorBoard events: pip install 'triton-deq[train]' for them.", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a crash cut off, and what follows it, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _keep_until(path: Path, step: int) -> None:
    """Cut away the lines of steps after this one, so that no step is there twice."""
    kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def write_nfe(folder: Path, step: int, accuracy: dict[int, float]) -> None:
    """Write the accuracy by evaluations of f, and the step that the weights are of."""
    held = {"step": step, "accuracy": {str(number): value for number, value in accuracy.items()}}
    replace_text(folder / NFE, json.dumps(held, indent=1) + "\n")


def read_nfe(folder: Path) -> dict[int, float]:
    """What `write_nfe` wrote, in rising order; empty where it has not.

    Raises:
        ValueError: the file is another one.
    """
    path = folder / NFE
    if not path.is_file():
        return {}
    try:
        accuracy = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
        return dict(sorted((int(number), float(value)) for number, value in accuracy.items()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no accuracy by evaluations of f ({error}): resume the run, which writes it anew"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
