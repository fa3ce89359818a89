"""The profile's plots. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..page import Plot

COLOURS = {
    "f": "#0072B2",
    "solver": "#D55E00",
    "f and solver": "#0072B2",
    "backward f": "#56B4E9",
    "backward solver": "#E69F00",
    "penalty": "#CC79A7",
    "injection+head": "#009E73",
    "rest": "#009E73",
    "model": "#999999",
}
MARKERS = {"model": "o", "against": "s"}

Row = dict[str, Any]


def save(folder: Path, rows: list[Row]) -> list[Plot]:
    """Draw what can be drawn into the folder."""
    timed = [row for row in rows if row["parts"] is not None]
    stacked(timed).savefig(folder / "parts.png", dpi=130)
    plots = [Plot("parts.png", "Where the time of a call goes: the parts add up to the median.")]
    if len({row["batch"] for row in timed}) > 1:
        throughput(timed).savefig(folder / "throughput.png", dpi=130)
        plots.append(Plot("throughput.png", "Throughput against the batch: medians, bars from p20 to p80."))
    return plots


def stacked(rows: list[Row]) -> Figure:
    """A bar for each measurement, beside its peer's; a panel for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    most = max(sum(row["mode"] == mode for row in rows) for mode in modes)
    figure = Figure(figsize=(10, len(modes) * (1.3 + 0.34 * most)), layout="constrained")
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    for axis, mode in zip(panels, modes, strict=True):
        shown = [row for row in rows if row["mode"] == mode]
        for place, row in enumerate(shown):
            left = 0.0
            for name, part in row["parts"].items():
                axis.barh(place, part, left=left, color=COLOURS[name], label=name, edgecolor="white")
                left += part
            text = f" {left:.4g} ms"
            if row["ratio_p50"] is not None:
                text += f", {row['ratio_p50']:.2f}× peer"
            axis.text(left, place, text, va="center", fontsize=8)
        labels = [f"{row['name']}  {row['dtype']} {row['execution']} batch {row['batch']}" for row in shown]
        axis.set_yticks(range(len(shown)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlim(left=0)
        axis.set_title(mode, fontsize=11, loc="left")
        axis.set_xlabel("milliseconds")
        axis.grid(alpha=0.25, axis="x", linewidth=0.5)
        once = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(once.values(), once.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def throughput(rows: list[Row]) -> Figure:
    """Samples per second over the batch; a line for each side, dtype and execution."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(5.2 * len(modes), 4), layout="constrained")
    colours = list(dict.fromkeys(COLOURS.values()))
    lines = list(dict.fromkeys((row["role"], row["name"], row["dtype"], row["execution"]) for row in rows))
    for axis, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        for at, line in enumerate(lines):
            shown = [
                row
                for row in rows
                if row["mode"] == mode and (row["role"], row["name"], row["dtype"], row["execution"]) == line
            ]
            if not shown:
                continue
            middle = [row["per_second"] for row in shown]
            spread = [
                [row["per_second"] * (1 - row["p50_ms"] / row["p80_ms"]) for row in shown],
                [row["per_second"] * (row["p50_ms"] / row["p20_ms"] - 1) for row in shown],
            ]
            axis.errorbar(
                [row["batch"] for row in shown],
                middle,
                spread,
                marker=MARKERS[line[0]],
                color=colours[at % len(colours)],
                capsize=3,
                label=" ".join(line[1:]),
            )
        batches = sorted({row["batch"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(mode, fontsize=11)
        axis.set_xlabel("batch")
        axis.set_ylabel(f"{rows[0]['unit']} per second")
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.legend(fontsize=8)
    return figure
