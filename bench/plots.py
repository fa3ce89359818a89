"""PNG plots of the rows: time against size, and achieved bandwidth against the device's own copy."""

import re
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from .rows import Row
from .tables import OURS, Comparison, compare, copy_bandwidth, devices


def draw(rows: Sequence[Row], output: Path) -> list[Path]:
    """Write the plots of each device and return their paths."""
    paths: list[Path] = []
    for device, own in devices(rows).items():
        comparisons = compare(own)
        stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        step = [each for each in comparisons if each.head.group == "step"]
        for dtype in sorted({each.head.dtype for each in step}):
            path = output / f"{stem}-step-{dtype}.png"
            chosen = [each for each in step if each.head.dtype == dtype]
            paths += _plot(
                path,
                f"A step beyond f, {dtype}, {device}",
                "ms",
                chosen,
                lambda each, row: each.cost(row),
            )
        kernels = [each for each in comparisons if each.head.group == "kernels"]
        for op, dtype in sorted({(each.head.op, each.head.dtype) for each in kernels}):
            path = output / f"{stem}-{op}-{dtype}.png"
            chosen = [each for each in kernels if (each.head.op, each.head.dtype) == (op, dtype)]
            paths += _plot(
                path,
                f"{op}, {dtype}, {device}",
                "GB/s",
                chosen,
                lambda each, row: row.gigabytes_per_s,
                copy_bandwidth(comparisons),
            )
    return paths


def _plot(
    path: Path,
    title: str,
    unit: str,
    comparisons: Sequence[Comparison],
    value: Callable[[Comparison, Row], float | None],
    ceiling: float | None = None,
) -> Iterator[Path]:
    """A line for each variant over the number of entries of the state; nothing where there is no value."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            number = None if row.variant.startswith("bare f") else value(comparison, row)
            if number:
                lines.setdefault(row.variant, []).append((prod(row.shape), number))
    if not lines:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, linewidth=2.5 if name == OURS else 1)
    if ceiling is not None:
        axes.axhline(ceiling, color="grey", linestyle="--", label="device copy")
    axes.set(xscale="log", yscale="log", xlabel="entries of the state", ylabel=unit, title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    yield path
