"""What makes an MDEQ cheap at inference, each lever on and off: accuracy against time and evaluations of f.

    python -m bench levers RUN --learned RUN --plain RUN

RUN are folders of `triton-deq train image-classifier --config digits`: with the penalty, with a learned start
as well (--learned), and without either (--plain). Writes levers.jsonl, a line a point, and levers.png.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_deq.data import DIGITS, TensorImages, digits
from triton_deq.environment import environment
from triton_deq.models import MDEQClassifier, MDEQConfiguration
from triton_deq.timing import Stopwatch, interleave, quantiles

from .environment import choose_device

EVALUATIONS = (2, 3, 4, 5, 6, 8)
TOLERANCES = (0.3, 0.1, 0.05, 0.02)
"""Where each image stops by itself."""


@dataclass(frozen=True)
class Point:
    """One way to classify all images that validate.

    Attributes:
        lever: its name; setting: evaluations of f, or the tolerance.
        call: the logits and the evaluations of f that an image took, in the mean.
    """

    lever: str
    setting: float
    call: Callable[[], tuple[Tensor, float]]


def levers(run: Path, learned: Path, plain: Path, output: Path, seconds: float) -> int:
    """Measure, write a line a point, and draw them."""
    data = TensorImages("digits", digits(), DIGITS, 10)
    device = choose_device()
    batch = data.validation
    ((images, labels),) = data.valid(batch, device)
    watch = Stopwatch(device)
    points = list(_points(run, learned, plain, images))
    with torch.no_grad():
        times = interleave({str(i): point.call for i, point in enumerate(points)}, watch, seconds, least=5)
        lines = []
        for i, point in enumerate(points):
            logits, evaluations = point.call()
            lines.append(
                {
                    "lever": point.lever,
                    "setting": point.setting,
                    "evaluations": round(evaluations, 3),
                    "accuracy": round((logits.argmax(1) == labels).double().mean().item(), 5),
                    "images": batch,
                    **{name: round(value, 4) for name, value in quantiles(times[str(i)]).items()},
                }
            )
    about = environment(device.type)
    output.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({**line, **about}) + "\n" for line in lines)
    (output / "levers.jsonl").write_text(text, encoding="utf-8")
    _draw(lines, output / "levers.png")
    for line in lines:
        numbers = (
            f"{line['setting']:>6} {line['evaluations']:>6} {line['accuracy']:.4f} {line['p50_ms']:8.2f} ms"
        )
        print(f"{line['lever']:<42} {numbers}")
    return 0


def _points(run: Path, learned: Path, plain: Path, images: Tensor) -> Iterator[Point]:
    model, started, bare = (_load(folder) for folder in (run, learned, plain))
    for number in EVALUATIONS:
        fixed = {"max_steps": number, "tol": 0.0}
        yield Point("without the penalty", number, _call(bare, images, fixed))
        yield Point("with the penalty", number, _call(model, images, fixed))
        yield Point("with it and a learned start", number, _call(started, images, fixed))
        yield Point("that one, from zero", number, _call(started, images, fixed, zero=True))
        yield Point("with it, bfloat16", number, _call(model, images, fixed, narrow=True))
        yield Point(
            "with it, weights normalised at each step", number, _call(model, images, fixed, anew=True)
        )
    for tolerance in TOLERANCES:
        own = {"max_steps": 12, "tol": tolerance}
        yield Point("with it, each image to a tolerance", tolerance, _call(model, images, own))
        yield Point(
            "the same, the finished leaving the batch", tolerance, _call(model, images, own, compact=0.75)
        )


def _load(folder: Path) -> MDEQClassifier:
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = MDEQConfiguration.__dataclass_fields__
    task = held.get("task", held)
    fields: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in task.items() if name in names}
    model = MDEQClassifier(MDEQConfiguration(**fields))
    state = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    return model.to(choose_device()).eval()


def _call(
    model: MDEQClassifier,
    images: Tensor,
    stop: dict[str, Any],
    *,
    zero: bool = False,
    narrow: bool = False,
    anew: bool = False,
    compact: float | None = None,
) -> Callable[[], tuple[Tensor, float]]:
    """zero: from there although there is a learned start. anew: what is done once a solve, at each step."""
    start = model(images).state.mul(0).detach() if zero else None
    stopping = replace(model.deq.stopping, **stop)

    def call() -> tuple[Tensor, float]:
        model.deq.stopping, model.deq.compact = stopping, compact
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=narrow):
            if anew:
                features = model.stem(images)
                for _ in range(stopping.max_steps - 1):
                    model.cell.inject(features)
            out = model(images, start)
        assert out.solution is not None
        return out.logits, out.solution.steps.double().mean().item()

    return call


def _draw(lines: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, lever in enumerate(dict.fromkeys(line["lever"] for line in lines)):
        held = [line for line in lines if line["lever"] == lever]
        style = {"marker": "o", "markersize": 3, "color": f"C{place}", "label": lever}
        accuracy = [line["accuracy"] for line in held]
        left.plot([line["evaluations"] for line in held], accuracy, **style)
        right.plot([line["p50_ms"] for line in held], accuracy, **style)
    left.set_xlabel("evaluations of f, mean of the images")
    right.set_xlabel("milliseconds for all images")
    for axis in (left, right):
        axis.set_ylabel("accuracy")
        axis.grid(alpha=0.25, linewidth=0.5)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=130)
