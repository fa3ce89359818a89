"""The demo's plots. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import triton_deq as td

from .. import data
from . import stabilise, synthetic
from .accelerate import OURS, PEER, TEXTBOOK, Timing
from .stabilise import Epoch
from .synthetic import Outcome

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
METHODS = {TEXTBOOK: (ORANGE, "s"), OURS: (BLUE, "o"), PEER: (PURPLE, "^")}
WEIGHT_STYLES = ((VERMILION, "o", "-"), (ORANGE, "s", "--"), (SKY, "^", "-."), (BLUE, "D", ":"))


def _axis(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)


def _plain_ticks(axis: Axes, ticks: list[int]) -> None:
    """A logarithmic axis with just these numbers on it."""
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def solver_cost(timings: list[Timing]) -> Figure:
    """Time of a solver step beside f, over the entries of a sample."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for method, (colour, marker) in METHODS.items():
        held = [timing for timing in timings if timing.method == method and timing.case == "solver alone"]
        if not held:
            continue
        middle = [timing.ms.median for timing in held]
        spread = [
            [timing.ms.median - timing.ms.low for timing in held],
            [timing.ms.high - timing.ms.median for timing in held],
        ]
        axis.errorbar(
            [timing.entries for timing in held],
            middle,
            spread,
            color=colour,
            marker=marker,
            capsize=3,
            label=method,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _axis(axis, "Anderson(6) beside f, batch 32", "entries of a sample", "time of one step (ms)")
    axis.legend(title="median, bars p20 to p80", fontsize=9, title_fontsize=8)
    return figure


def speed_ratios(timings: list[Timing]) -> Figure:
    """The textbook's time divided by each method's, for whole solves and training steps."""
    held = [timing for timing in timings if timing.case != "solver alone" and timing.method != TEXTBOOK]
    groups = list(dict.fromkeys((timing.case, timing.quantity) for timing in held))
    figure = Figure(figsize=(9.2, 0.42 * len(groups) + 1.4), layout="constrained")
    axis = figure.subplots()
    for method, shift in ((OURS, -0.13), (PEER, 0.13)):
        mine = [timing for timing in held if timing.method == method]
        if not mine:
            continue
        colour, marker = METHODS[method]
        places = [groups.index((timing.case, timing.quantity)) + shift for timing in mine]
        spread = [
            [timing.ratio.median - timing.ratio.low for timing in mine],
            [timing.ratio.high - timing.ratio.median for timing in mine],
        ]
        axis.errorbar(
            [timing.ratio.median for timing in mine],
            places,
            xerr=spread,
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=3,
            label=method,
        )
    axis.axvline(1, color=ORANGE, linewidth=1.5, label="textbook")
    axis.set_yticks(range(len(groups)), [f"{case}: {quantity}" for case, quantity in groups], fontsize=9)
    axis.invert_yaxis()
    axis.set_xscale("log", base=2)
    ticks = [0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4]
    low, high = axis.get_xlim()
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.set_xlim(low, high)
    axis.minorticks_off()
    _axis(
        axis,
        "Speed against the textbook (right of the line is faster)",
        "time ratio, median and p20 to p80",
        "",
    )
    axis.legend(fontsize=9)
    return figure


def training(histories: dict[float, list[Epoch]]) -> Figure:
    """What the penalty does to the digits classifier over training."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    grid = figure.subplots(2, 2)
    styles = dict(zip(histories, ((VERMILION, "o"), (BLUE, "D")), strict=True))
    for weight, epochs in histories.items():
        colour, marker = styles[weight]
        label = f"γ = {weight:g}" if weight else "γ = 0 (no penalty)"
        at = [epoch.epoch for epoch in epochs]

        def draw(axis: Axes, quantity: str, scale: float, line: str, name: str) -> None:
            values = [scale * getattr(epoch, quantity) for epoch in epochs]  # noqa: B023
            axis.plot(at, values, line, color=colour, marker=marker, markersize=4, label=name)  # noqa: B023

        draw(grid[0, 0], "accuracy", 100, "-", f"{label}, {stabilise.CAP} steps")
        draw(grid[0, 0], "accuracy_at_rest", 100, ":", f"{label}, up to {stabilise.PATIENCE} steps")
        draw(grid[0, 1], "steps", 1, "-", label)
        draw(grid[1, 0], "residual", 1, "-", label)
        draw(grid[1, 1], "radius", 1, "-", label)
    _axis(grid[0, 0], "Accuracy on held-out digits", "epoch", "accuracy (%)")
    _axis(
        grid[0, 1],
        f"Steps to a relative residual of {stabilise.TOL:g}",
        "epoch",
        "steps (median over samples)",
    )
    _axis(grid[1, 0], f"Residual after {stabilise.CAP} steps", "epoch", "relative residual (median)")
    _axis(grid[1, 1], "Spectral radius of ∂f/∂z", "epoch", "spectral radius (mean)")
    grid[0, 1].axhline(stabilise.CAP, color=BLACK, linewidth=1, linestyle="--", label="cap in training")
    grid[0, 1].axhline(stabilise.PATIENCE, color=BLACK, linewidth=1, linestyle=":", label="gave up")
    grid[0, 1].set_yscale("log")
    _plain_ticks(grid[0, 1], [5, 10, 20, 60])
    grid[1, 0].set_yscale("log")
    grid[1, 0].axhline(stabilise.TOL, color=BLACK, linewidth=1, linestyle="--", label="tolerance")
    grid[1, 1].axhline(1, color=BLACK, linewidth=1, linestyle="--", label="contraction below")
    for axis in grid.flat:
        axis.legend(fontsize=8)
    return figure


def surfaces(outcomes: list[Outcome]) -> Figure:
    """`f(z; x)` as a colour over the plane: where the colour does not change upwards, f is flat in z."""
    figure = Figure(figsize=(3.1 * len(outcomes), 3.6), layout="constrained")
    grid = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    x, z = torch.linspace(-2, 2, 121), torch.linspace(-8, 8, 121)
    for axis, outcome in zip(grid, outcomes, strict=True):
        device = next(outcome.model.parameters()).device
        values = synthetic.surface(outcome.model, x.to(device), z.to(device)).cpu()
        drawn = axis.contourf(x, z, values, levels=torch.linspace(-9, 9, 37), cmap="viridis", extend="both")
        axis.contour(x, z, values, levels=torch.linspace(-9, 9, 13), colors="white", linewidths=0.4)
        axis.contour(x, z, values - z[:, None], levels=[0.0], colors=VERMILION, linewidths=2)
        _axis(axis, f"γ = {outcome.weight:g},  mean |∂f/∂z| = {outcome.slope:.2f}", "input x", "")
    grid[0].set_ylabel("state z")
    figure.colorbar(drawn, ax=list(grid), label="f(z; x)", ticks=[-9, -6, -3, 0, 3, 6, 9])
    return figure


def learned_curves(outcomes: list[Outcome], seed: int) -> Figure:
    """The curve at the cap and at rest, against the data."""
    figure = Figure(figsize=(3.1 * len(outcomes), 3.4), layout="constrained")
    grid = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    held = data.synthetic(seed=seed)
    x = torch.linspace(-2, 2, 201)[:, None]
    for axis, outcome in zip(grid, outcomes, strict=True):
        device = next(outcome.model.parameters()).device
        with torch.no_grad():
            capped = outcome.model(x.to(device)).value.cpu()
            f, z0 = synthetic.slice_of(outcome.model, x.to(device))
            rest = synthetic.solve(f, z0, td.Picard(), device.type).value.cpu()
        axis.scatter(held.valid_x[:250], held.valid_y[:250], s=7, color="#999999", label="held-out data")
        axis.plot(
            x, rest, color=VERMILION, linestyle="--", linewidth=1.6, label=f"{synthetic.PATIENCE} steps"
        )
        axis.plot(x, capped, color=BLUE, linewidth=1.6, label=f"{synthetic.CAP} steps")
        _axis(axis, f"γ = {outcome.weight:g},  error {outcome.capped_error:.2f}", "input x", "")
        axis.set_ylim(-9, 9)
    grid[0].set_ylabel("output y")
    grid[0].legend(fontsize=8)
    return figure


def zigzags(outcomes: list[Outcome], x: float) -> Figure:
    """The plain iteration on one slice: up to f, across to the diagonal, up to f again."""
    figure = Figure(figsize=(3.1 * len(outcomes), 3.6), layout="constrained")
    grid = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    z = torch.linspace(-10, 10, 401)
    for axis, outcome in zip(grid, outcomes, strict=True):
        device = next(outcome.model.parameters()).device
        line = synthetic.surface(outcome.model, torch.tensor([x], device=device), z.to(device)).cpu()[:, 0]
        corners = synthetic.zigzag(outcome.model, x)
        path_z, path_f = [corners[0][0]], [0.0]
        for state, value in corners:
            path_z += [state, value]
            path_f += [value, value]
        axis.plot(z, z, color=BLACK, linewidth=1, label="z = f(z; x)")
        axis.plot(z, line, color=BLUE, linewidth=2, label="f(z; x)")
        axis.plot(path_z, path_f, color=VERMILION, linewidth=1.1, label=f"{len(corners)} steps")
        axis.plot(*corners[0], color=VERMILION, marker="o", linestyle="none", label="first step")
        axis.set_xlim(-10, 10)
        axis.set_ylim(-10, 10)
        axis.set_aspect("equal")
        _axis(axis, f"γ = {outcome.weight:g},  x = {x:g}", "state z", "")
    grid[0].set_ylabel("f(z; x)")
    grid[0].legend(fontsize=8, loc="upper left")
    return figure


def steps_needed(outcomes: list[Outcome]) -> Figure:
    """The residual over steps, and the steps needed, for each weight."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for outcome, (colour, marker, line) in zip(outcomes, WEIGHT_STYLES, strict=False):
        shown = outcome.trace[:40]
        steps = torch.arange(1, len(shown) + 1)
        # A diverged sample keeps its last residual.
        middle = shown.median(dim=1).values
        left.plot(
            steps, middle, line, color=colour, marker=marker, markersize=3, label=f"γ = {outcome.weight:g}"
        )
    left.axhline(synthetic.TOL, color=BLACK, linewidth=1, linestyle="--", label="tolerance")
    left.axvline(synthetic.CAP, color=BLACK, linewidth=1, linestyle=":", label="cap in training")
    left.set_yscale("log")
    left.set_ylim(bottom=1e-4)
    _axis(left, "Residual of the plain iteration", "step", "relative residual (median)")
    left.legend(fontsize=8)

    names = [f"{outcome.weight:g}" for outcome in outcomes]
    drawn = right.boxplot(
        [outcome.steps.tolist() for outcome in outcomes],
        tick_labels=names,
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        medianprops={"color": BLACK},
        meanprops={"marker": "D", "markerfacecolor": BLACK, "markeredgecolor": BLACK, "markersize": 5},
    )
    for box, (colour, _, _) in zip(drawn["boxes"], WEIGHT_STYLES, strict=False):
        box.set(facecolor=colour, alpha=0.7)
    right.axhline(synthetic.CAP, color=BLACK, linewidth=1, linestyle=":")
    right.set_yscale("log")
    _plain_ticks(right, [2, 5, 10, 20, 50, 100])
    _axis(
        right,
        "Steps needed: quartiles, whiskers p5 to p95, ◆ mean",
        "penalty weight γ",
        f"steps to {synthetic.TOL:g} (at most {synthetic.PATIENCE})",
    )
    return figure
