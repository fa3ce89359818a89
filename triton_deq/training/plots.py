"""Plots of runs against each other, from what they leave to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import METRICS, read_metrics, read_nfe

PANELS = {
    "valid/perplexity": "validation perplexity",
    "valid/accuracy": "validation accuracy",
    "valid/nfe": "evaluations of f, validation",
    "valid/residual": "residual, validation (median)",
    "valid/radius": "spectral radius of ∂f/∂z",
}
"""What is plotted of it that some run has, in this order."""

BY_NFE = "accuracy against evaluations of f"
"""The last panel, where some run was evaluated so."""

_LOGARITHMIC = ("valid/perplexity", "valid/residual")

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot(runs: Sequence[str | Path], output: str | Path) -> None:
    """Draw scalars over the steps, and accuracy over evaluations of f, a line for each run, into an image.

    Args:
        runs: folders that `train` wrote to; a line is named after its folder.
        output: the image; its ending says the format.

    Raises:
        FileNotFoundError: a run without metrics.
        ValueError: no run has been validated yet, or matplotlib does not know the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    folders = [Path(run) for run in runs]
    held = [_metrics(run) for run in folders]
    by_nfe = [read_nfe(run) for run in folders]
    panels = [name for name in PANELS if any(_points(lines, name)[0] for lines in held)]
    if not panels:
        raise ValueError(f"no validation in {', '.join(map(str, runs))} yet: wait for the first one")
    count = len(panels) + any(by_nfe)
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, name in zip(axes, panels, strict=False):
        _draw(axis, folders, [_points(lines, name) for lines in held])
        _dress(axis, PANELS[name], "step", name)
    if any(by_nfe):
        _draw(axes[-1], folders, [(list(run), list(run.values())) for run in by_nfe])
        _dress(axes[-1], BY_NFE, "evaluations of f")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=9)
    figure.savefig(output, dpi=130)


def _draw(axis: Any, runs: list[Path], points: list[tuple[list[int], list[float]]]) -> None:
    """A line for each run through its points."""
    for place, run in enumerate(runs):
        colour = _COLOURS[place % len(_COLOURS)]
        axis.plot(*points[place], "o-", color=colour, markersize=3, label=run.resolve().name)


def _dress(axis: Any, title: str, below: str, name: str = "") -> None:
    from matplotlib.ticker import ScalarFormatter

    axis.set_title(title, fontsize=11)
    axis.set_xlabel(below)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    if name in _LOGARITHMIC:
        axis.set_yscale("log")
    if name == "valid/perplexity":  # 90 and 200, where the default says 9 × 10¹
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
    if name == "valid/radius":
        axis.axhline(1, color="black", linewidth=1, linestyle="--")


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no run: there is no {path}")
    return read_metrics(path)


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    held = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in held], [value for _, value in held]
