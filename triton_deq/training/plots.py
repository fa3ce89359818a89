"""Plots of runs against each other, from their metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import METRICS, read_metrics

PANELS = {
    "valid/perplexity": "validation perplexity",
    "valid/accuracy": "validation accuracy",
    "valid/nfe": "evaluations of f, validation",
    "valid/residual": "residual, validation (median)",
    "valid/radius": "spectral radius of ∂f/∂z",
}
"""What is plotted of it that some run has, in this order."""

_LOGARITHMIC = ("valid/perplexity", "valid/residual")

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot(runs: Sequence[str | Path], output: str | Path) -> None:
    """Draw each scalar over the steps, a line for each run, into an image file.

    Args:
        runs: folders that `train` wrote to; a line is named after its folder.
        output: the image; its ending says the format.

    Raises:
        FileNotFoundError: a run without metrics.
        ValueError: no run has been validated yet, or matplotlib does not know the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    held = [_metrics(Path(run)) for run in runs]
    panels = [name for name in PANELS if any(_points(lines, name)[0] for lines in held)]
    if not panels:
        raise ValueError(f"no validation in {', '.join(map(str, runs))} yet: wait for the first one")
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, name in zip(axes, panels, strict=True):
        for place, (run, lines) in enumerate(zip(runs, held, strict=True)):
            colour = _COLOURS[place % len(_COLOURS)]
            axis.plot(*_points(lines, name), "o-", color=colour, markersize=3, label=Path(run).resolve().name)
        axis.set_title(PANELS[name], fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        if name in _LOGARITHMIC:
            axis.set_yscale("log")
        if name == "valid/perplexity":  # 90 and 200, where the default says 9 × 10¹
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
        if name == "valid/radius":
            axis.axhline(1, color="black", linewidth=1, linestyle="--")
    axes[0].legend(fontsize=9)
    figure.savefig(output, dpi=130)


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no run: there is no {path}")
    return read_metrics(path)


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    held = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in held], [value for _, value in held]
