"""What each part found: its rows, its plots, and its section of the page."""

from pathlib import Path
from typing import Any

from ..page import Plot, Section, Table
from . import accelerate, plots, stabilise, synthetic, verified
from .accelerate import OURS, TEXTBOOK, Comparison, Spread
from .rows import Rows

SLICE_X = 1.0
"""Where the zigzag is drawn."""


def accelerated(found: Comparison, rows: Rows, output: Path) -> Section:
    for agreement in found.agreements:
        details = {
            "case": agreement.case,
            "method": agreement.method,
            "dtype": agreement.dtype,
            "bound": agreement.bound,
        }
        rows.add("accelerate", "fixed point, relative difference", agreement.fixed_point, "1", **details)
        rows.add("accelerate", "gradient, relative difference", agreement.gradient, "1", **details)
    for timing in found.timings:
        details = {
            "case": timing.case,
            "method": timing.method,
            "batch": timing.batch,
            "entries": timing.entries,
            "dtype": "float32",
            "steps": timing.steps,
        }
        _spread(rows, f"{timing.quantity}, time", timing.ms, "ms", details)
        _spread(rows, f"{timing.quantity}, textbook's time over it", timing.ratio, "1", details)
        if timing.error is not None:
            kind = "gradient error" if "train" in timing.quantity else "residual"
            rows.add("accelerate", f"{timing.quantity}, {kind}", timing.error, "1", **details)

    _save(plots.solver_cost(found.timings), output / "solver_cost.png")
    _save(plots.speed_ratios(found.timings), output / "speed_ratios.png")
    return Section(
        "1  An existing DEQ, accelerated",
        [
            "A convolutional DEQ on the handwritten digits, written in plain PyTorch: a textbook "
            "Anderson loop, an "
            "implicit gradient by a backward hook. Then the same module, untouched, through "
            "triton_deq.fixed_point with the same history and tolerance.",
            "Ratios are taken within an interleaved turn: above 1 is faster than the textbook, below 1 "
            "slower. "
            f"Everything runs at batch {accelerate.BATCH} in float32, Anderson with history "
            f"{accelerate.HISTORY}, to a "
            "relative residual of the whole batch; on a CPU with one thread. 'solver alone' is one step "
            "with the "
            "values of f made beforehand. "
            "The last column says where each method ended: the residual, or for a training step (forward "
            "and "
            "backward) the relative error of the gradient; its steps are evaluations of f without a "
            "graph plus "
            "vector-Jacobian products.",
            "Every method keeps its own defaults, which differ in two ways. The textbook's and TorchDEQ's "
            "ridge is absolute (1e-4), which weighs the more the smaller residuals or gradients are; that "
            "of triton_deq is relative. So to a tight tolerance, and in the backward solve of a mean "
            "loss, triton_deq takes fewer steps, and most of its gain there is that. At equal steps ('20 "
            "steps', 'solver alone') only the cost of a step counts. And TorchDEQ stops when the worst "
            "sample has converged, so it goes on for longer and ends at a smaller residual, as does the "
            "backward solve of triton_deq.",
            "Where f is expensive or the state small, a solver cannot win much, and on small states the "
            "bookkeeping of triton_deq (a status for each sample, sums in float64) costs more than it "
            "saves.",
        ],
        [*agreement_tables(found), *timing_tables(found)],
        [
            Plot(
                "solver_cost.png",
                "What a step of Anderson costs beside f, which here replays "
                f"{accelerate.FIXED_STEPS} values made beforehand.",
            ),
            Plot(
                "speed_ratios.png",
                "Whole solves and training steps; '20 steps' has the same number of steps for all.",
            ),
        ],
    )


def agreement_tables(found: Comparison) -> list[Table]:
    ours = [agreement for agreement in found.agreements if agreement.method == OURS]
    brief = [
        (
            held.case,
            held.dtype,
            f"{held.fixed_point:.0e}",
            f"{held.gradient:.0e}",
            _verdict(held.passed, "agrees"),
        )
        for held in ours
    ]
    full = [
        (
            held.case,
            held.method,
            held.dtype,
            f"{held.fixed_point:.1e}",
            f"{held.gradient:.1e}",
            f"{held.bound:.0e}",
            _verdict(held.passed, "agrees"),
        )
        for held in found.agreements
    ]
    return [
        Table(
            "Same fixed points, same gradients: relative difference from the textbook's",
            ("model", "dtype", "fixed point", "gradient", ""),
            brief,
            where="terminal",
        ),
        Table(
            "Same fixed points, same gradients: relative difference from the textbook's",
            ("model", "method", "dtype", "fixed point", "gradient", "bound", ""),
            full,
            where="page",
        ),
    ]


def timing_tables(found: Comparison) -> list[Table]:
    """For the terminal one line a comparison, for the page one line a method."""
    groups: dict[tuple[str, str, int], dict[str, accelerate.Timing]] = {}
    for timing in found.timings:
        groups.setdefault((timing.case, timing.quantity, timing.entries), {})[timing.method] = timing
    peers = [method for method in (OURS, accelerate.PEER) if any(method in held for held in groups.values())]
    brief = [
        (
            f"{case}, {quantity}" if held[TEXTBOOK].steps else f"{case}, {entries} entries",
            f"{held[TEXTBOOK].ms.median:.3g} ms",
            *(f"{held[method].ratio.median:.2f}×" for method in peers),
            " / ".join(timing.steps or str(accelerate.FIXED_STEPS) for timing in held.values()).replace(
                " + ", "+"
            ),
        )
        for (case, quantity, entries), held in groups.items()
    ]
    full = [
        (
            f"{timing.case}: {timing.quantity}",
            timing.method,
            f"{timing.batch} × {timing.entries}",
            f"{timing.ratio.median:.2f}",
            "" if timing.method == TEXTBOOK else f"{timing.ratio.low:.2f} to {timing.ratio.high:.2f}",
            f"{timing.ms.median:.3g}",
            timing.steps or str(accelerate.FIXED_STEPS),
            "" if timing.error is None else f"{timing.error:.1e}",
        )
        for timing in found.timings
    ]
    return [
        Table(
            "Time of the textbook over time of the method (above 1: faster)",
            ("what", TEXTBOOK, *peers, "steps"),
            brief,
            where="terminal",
        ),
        Table(
            "Time of the textbook over time of the method (above 1: faster)",
            ("what", "method", "batch × entries", "ratio", "p20 to p80", "ms", "steps", "residual or error"),
            full,
            where="page",
        ),
    ]


def stabilised_digits(histories: dict[float, list[stabilise.Epoch]], rows: Rows, output: Path) -> Section:
    quantities = {
        "accuracy": f"accuracy at {stabilise.CAP} steps",
        "accuracy_at_rest": f"accuracy at up to {stabilise.PATIENCE} steps",
        "steps": f"steps to {stabilise.TOL:g}, median",
        "converged": "share converged",
        "residual": f"relative residual at {stabilise.CAP} steps, median",
        "radius": "spectral radius, mean",
    }
    for weight, epochs in histories.items():
        for epoch in epochs:
            for field, quantity in quantities.items():
                unit = "steps" if field == "steps" else "1"
                details = {"weight": weight, "epoch": epoch.epoch, "path": epoch.path}
                rows.add("digits", quantity, getattr(epoch, field), unit, **details)

    _save(plots.training(histories), output / "digits.png")
    last = {weight: epochs[-1] for weight, epochs in histories.items()}
    return Section(
        "2a  Stabilised: digits",
        [
            f"A DEQ of width {stabilise.WIDTH} (one ReLU layer) classifies the digits' pixels. In "
            "training the "
            f"solver may take {stabilise.CAP} evaluations of f forward and {stabilise.CAP} backward, "
            "converged or "
            "not. Seed, start and order of the data are the same with and without the penalty.",
            "Without it the model learns to be right at the sixth step and gives up having a fixed "
            "point: its "
            "spectral radius passes 1, and letting the solver run on makes it worse. With it the fixed "
            "point "
            "stays within reach, so the answer does not depend on where the solver stops.",
            "γ is larger here than in the paper's table because the penalty is divided by the width of "
            "the state, "
            "and because no weight normalisation helps.",
            f"How a batch was solved: {next(iter(last.values())).path}.",
        ],
        [
            Table(
                f"After {len(next(iter(histories.values()))) - 1} epochs, on 360 held-out digits",
                (
                    "γ",
                    f"accuracy at {stabilise.CAP}",
                    f"at {stabilise.PATIENCE}",
                    f"steps to {stabilise.TOL:g}",
                    "converged",
                    f"residual at {stabilise.CAP}",
                    "radius",
                ),
                [
                    (
                        f"{weight:g}",
                        f"{epoch.accuracy:.1%}",
                        f"{epoch.accuracy_at_rest:.1%}",
                        _steps(epoch.steps, stabilise.PATIENCE),
                        f"{epoch.converged:.0%}",
                        f"{epoch.residual:.1e}",
                        f"{epoch.radius:.2f}",
                    )
                    for weight, epoch in last.items()
                ],
            )
        ],
        [Plot("digits.png", "Over training, with and without the Jacobian penalty.")],
    )


def stabilised_synthetic(
    outcomes: list[synthetic.Outcome], epochs: int, seed: int, rows: Rows, output: Path
) -> Section:
    for outcome in outcomes:
        steps = outcome.steps.float()
        for quantity, value, unit in (
            (f"root mean square error at {synthetic.CAP} steps", outcome.capped_error, "1"),
            (f"root mean square error at up to {synthetic.PATIENCE} steps", outcome.equilibrium_error, "1"),
            ("|∂f/∂z|, mean", outcome.slope, "1"),
            (f"steps to {synthetic.TOL:g}, mean", steps.mean().item(), "steps"),
            (f"steps to {synthetic.TOL:g}, median", steps.median().item(), "steps"),
            (f"steps of Anderson to {synthetic.TOL:g}, mean", outcome.anderson_steps, "steps"),
            ("share converged", outcome.converged, "1"),
        ):
            rows.add("synthetic", quantity, value, unit, weight=outcome.weight, epochs=epochs)

    _save(plots.surfaces(outcomes), output / "synthetic_surfaces.png")
    _save(plots.learned_curves(outcomes, seed), output / "synthetic_curves.png")
    _save(plots.zigzags(outcomes, SLICE_X), output / "synthetic_zigzag.png")
    _save(plots.steps_needed(outcomes), output / "synthetic_steps.png")
    return Section(
        "2b  Stabilised: the paper's one-dimensional experiment",
        [
            "4096 pairs of a scalar curve to train on, 1000 to validate; f(z; x) = V relu(W z + U x + b) "
            "with 50 "
            f"hidden units; {synthetic.CAP} steps forward and backward; γ = 0, 1, 2, 4, drawn in 40% of "
            "the steps "
            "(Bai, Koltun and Kolter, arXiv 2106.14342, figures 4 and 5). The solver is the plain "
            "iteration, "
            "whose path is the zigzag.",
            f"Shortened: {epochs} epochs in place of 50, and for that a learning rate from 1e-2 in place "
            "of 1e-3. "
            "The range of x, [-2, 2], is ours.",
            "Every γ fits the curve at the step it was trained for. The larger γ, the flatter f is in z "
            "and the fewer "
            "steps the solver needs; with γ = 0 there may be no equilibrium to find, and the error there "
            "can be huge.",
        ],
        [
            Table(
                "On the 1000 held-out pairs (error: root mean square; steps: mean and median)",
                (
                    "γ",
                    f"error at {synthetic.CAP}",
                    f"at {synthetic.PATIENCE}",
                    "|∂f/∂z|",
                    f"steps to {synthetic.TOL:g}",
                    "median",
                    "converged",
                    "by Anderson",
                ),
                [
                    (
                        f"{outcome.weight:g}",
                        f"{outcome.capped_error:.2f}",
                        f"{outcome.equilibrium_error:.3g}",
                        f"{outcome.slope:.2f}",
                        f"{outcome.steps.float().mean().item():.1f}",
                        _steps(outcome.steps.float().median().item(), synthetic.PATIENCE),
                        f"{outcome.converged:.0%}",
                        f"{outcome.anderson_steps:.1f}",
                    )
                    for outcome in outcomes
                ],
            )
        ],
        [
            Plot(
                "synthetic_surfaces.png",
                "f(z; x) as a colour. Its change along the vertical is what the solver has to work against; "
                "the thick line is where f(z; x) = z.",
            ),
            Plot(
                "synthetic_curves.png",
                "The learned curve at the cap of training, and if the iteration goes on.",
            ),
            Plot(
                "synthetic_zigzag.png",
                f"The iteration on the slice x = {SLICE_X:g}. The steeper f, the longer the way; beyond a "
                "slope of 1 it leads away.",
            ),
            Plot(
                "synthetic_steps.png",
                "The residual over steps (a sample that has converged or diverged keeps its last), and the "
                "steps needed.",
            ),
        ],
    )


def verification_section(verification: verified.Verification, rows: Rows) -> Section:
    for row in verification.rows:
        details = {name: row[name] for name in ("op", "kernel", "dtype", "shape", "bound", "passed")}
        # The device is verify's own: it may be the interpreter.
        rows.add("verify", row["quantity"], row["error"], "1", **details, verified_on=row["device"])
    passed = sum(row["passed"] for row in verification.rows)
    machine = ", ".join(dict.fromkeys(row["device"] for row in verification.rows)) or "this machine"
    paragraphs = [
        f"triton-deq verify, quick form: every kernel against its float64 reference, on {machine}. "
        f"{passed} of {len(verification.rows)} rows are within their bounds."
    ]
    if verification.trouble:
        paragraphs.append(f"It did not finish: {verification.trouble[-2000:]}")

    def table(title: str, held: list[dict[str, Any]], where: str) -> Table:
        return Table(
            title,
            ("kernel", "quantity", "dtype", "batch × entries", "error", "bound", ""),
            [
                (
                    row["kernel"],
                    row["quantity"],
                    row["dtype"],
                    " × ".join(map(str, row["shape"])),
                    f"{row['error']:.1e}",
                    f"{row['bound']:.0e}",
                    _verdict(row["passed"], "passed"),
                )
                for row in held
            ],
            where,
        )

    worst = verified.worst_by_kernel(verification.rows)
    return Section(
        "3  Verified",
        paragraphs,
        [
            table("The row nearest to its bound, for each kernel and dtype", worst, "terminal"),
            table("All rows", verification.rows, "page"),
        ],
    )


def _spread(rows: Rows, quantity: str, spread: Spread, unit: str, details: dict[str, Any]) -> None:
    for name, value in (("p20", spread.low), ("p50", spread.median), ("p80", spread.high)):
        rows.add("accelerate", quantity, value, unit, statistic=name, **details)


def _verdict(passed: bool, word: str) -> str:
    return word if passed else "FAILED"


def _steps(steps: float, most: int) -> str:
    return f"over {most}" if steps >= most else f"{steps:g}"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
