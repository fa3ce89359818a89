"""Runs the sweep, and shows what it found: lines as it goes, tables, rows, and one page."""

import sys
from pathlib import Path
from typing import Any

import torch

from ..page import Plot, Section, Table, render
from ..timing import Stopwatch
from .plan import Plan, Refusal, Setting, settings
from .rows import ROWS, Rows
from .sides import Side, find_sides
from .sweep import Measured, measure
from .tasks import Images, Tokens

PAGE = "index.html"

TIMES = (
    "p20_ms", "p50_ms", "p80_ms", "expected_ms", "per_second", "nfe", "backward_nfe", "ratio_p50", "f_ratio"
)  # fmt: skip
"""The fields of the first table."""

WORK: dict[str, tuple[str, float | None]] = {
    "peak MB": ("peak_bytes", 1e6),
    "GFLOP": ("flops", 1e9),
    "TFLOP/s": ("teraflops", None),
    "MB moved": ("bytes", 1e6),
    "GB/s": ("gigabytes_per_s", None),
    "operators": ("operators", None),
    "launches": ("launches", None),
    "syncs": ("syncs", None),
    "compiled in s": ("compile_ms", 1e3),
}
"""The columns of the second, with the field and its unit."""


def profile(plan: Plan) -> int:
    """All of it. 0; 1 if no call could be timed, 130 if it was interrupted.

    Raises:
        Refusal: what was asked for cannot be done.
    """
    device = _device(plan)
    sides = find_sides(plan, device, plan.batch[0] if plan.batch else None)
    batches = plan.batch or _batches(sides[0], device)
    try:
        rows = Rows(plan, device)
    except OSError as error:
        raise Refusal(f"--output {plan.output}: {error}") from error
    notes = _notes(plan, sides, device, batches, rows)
    for note in notes:
        print(note)
    watch, interrupted = Stopwatch(device), False
    try:
        for setting in settings(plan, batches):
            print(f"{setting} ...", end="", file=sys.stderr, flush=True)
            print(f" {_line(measure(sides, setting, plan, watch, rows))}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        interrupted = True
        notes.append("Interrupted: what was measured before is here.")
        print(f"\n{notes[-1]}", file=sys.stderr)
    section = _section(rows)
    for table in section.tables:
        _print(table)
    _write_page(plan, rows, notes, section)
    print(f"Page: {plan.output / PAGE}, rows: {rows.path}")
    if interrupted:
        return 130
    return 0 if any(row["p50_ms"] is not None for row in rows.written) else 1


def _device(plan: Plan) -> torch.device:
    try:
        device = torch.device(plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise Refusal(f"--device {plan.device}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise Refusal(f"--device {device}: times are taken on cpu and cuda only; give one of them")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refusal(f"--device {device}: this PyTorch sees no GPU; try --device cpu")
    return device


def _batches(side: Side, device: torch.device) -> tuple[int, ...]:
    """Where the user has not said: a GPU's worth, or what a CPU takes seconds for."""
    if device.type == "cuda":
        return (1, 8, 32)
    large = isinstance(side.task, Images) and side.task.height * side.task.width > 64 * 64
    return (1,) if large or isinstance(side.task, Tokens) else (4,)


def _notes(
    plan: Plan, sides: list[Side], device: torch.device, batches: tuple[int, ...], rows: Rows
) -> list[str]:
    """What a reader has to know before the numbers."""
    name = f"{rows.environment['device']}, {rows.environment['threads']} thread(s)"
    if device.type == "cpu":
        first = (
            f"Measured on a CPU ({name}): these are ratios of this machine. The library's plain PyTorch runs "
            "here and none of its kernels, so they say nothing about a GPU."
        )
    else:
        first = f"Measured on {name}."
    notes = [first]
    for side in sides:
        notes.append(f"{side.role}: {side.name}, {side.note}; {side.parameters:,} parameters.")
    if plan.batch is None:
        notes.append(f"Batch {', '.join(map(str, batches))} is the default here: --batch sets others.")
    notes.append(
        "Weights and inputs are random. How many evaluations a solve takes depends on the weights: a trained "
        "model may need more, and --nfe fixes them."
        if plan.nfe is None
        else f"Every solve takes {plan.nfe} evaluations, whatever its residual."
    )
    if "compile" in plan.execution and any(side.deq for side in sides):
        notes.append(
            "torch.compile takes all of a DEQ's model but its solves, in which the host decides, and the "
            "closed forms of a cell; the f of a plain cell is compiled by itself."
        )
    if "training" in plan.mode:
        notes.append("A training step is forward and backward with all gradients, without the optimiser.")
        for side in sides:
            if side.deq is not None and side.deq.penalty is not None:
                notes.append(
                    f"The Jacobian penalty of {side.name} is in every training step here; its configuration "
                    f"has it in {side.probability:.0%} of them, for which 'expected' is the time."
                )
            elif side.probability is not None:
                notes.append(f"The Jacobian penalty of {side.name} is left out (--penalty off).")
    notes.append(
        "Operations, bytes and operator calls are those that PyTorch dispatches: what Triton kernels do is "
        "not among them."
    )
    return notes


def _line(found: list[Measured]) -> str:
    """One setting's outcome, while the sweep goes on."""
    said = []
    for each in found:
        fields = each.fields
        text = f"{fields['p50_ms']:.4g} ms" if fields.get("p50_ms") is not None else fields["error"]
        said.append(f"{each.side.name} {text}")
    return "; ".join(said)


# ---------------------------------------------------------------------------------------------- tables


def _section(rows: Rows) -> Section:
    measured = [row for row in rows.written if row["error"] is None]
    tables = [_times(measured), _failed(rows.written), _work(measured), *_parts(measured)]
    return Section("Model and peer", [], [table for table in tables if table.rows])


def _setting(row: dict[str, Any]) -> str:
    return str(Setting(row["mode"], row["dtype"], row["execution"], row["batch"]))


def _times(rows: list[dict[str, Any]]) -> Table:
    """Ratios stand beside the model."""
    unit = rows[0]["unit"] if rows else "samples"
    columns = (
        "milliseconds a call", "", "p20", "p50", "p80", "expected", f"{unit}/s", "NFE", "backward",
        "× peer", "f alone × peer",
    )  # fmt: skip
    body = [(_setting(row), row["name"], *(_number(row[name]) for name in TIMES)) for row in rows]
    return Table("Time", columns, body)


def _failed(rows: list[dict[str, Any]]) -> Table:
    body = [(_setting(row), row["name"], row["error"]) for row in rows if row["error"] is not None]
    return Table("Not measured, and why", ("", "", ""), body)


def _work(rows: list[dict[str, Any]]) -> Table:
    columns = ("work of a call", "", *WORK)
    body = [
        (_setting(row), row["name"], *(_number(row[name], unit) for name, unit in WORK.values()))
        for row in rows
    ]
    return Table("Memory, operations, bytes, calls", columns, body)


def _parts(rows: list[dict[str, Any]]) -> list[Table]:
    """A table for each set of parts that occurs."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        if row["parts"] is not None and len(row["parts"]) > 1:
            cells = [f"{part:.4g} ({part / row['p50_ms']:.0%})" for part in row["parts"].values()]
            tables.setdefault(tuple(row["parts"]), []).append((_setting(row), row["name"], *cells))
    return [
        Table("Where the time goes, milliseconds", ("", "", *names), body) for names, body in tables.items()
    ]


def _number(value: float | None, unit: float | None = None) -> str:
    """In this unit; four digits of what is measured, all of what is counted."""
    if value is None:
        return "–"
    if unit is not None:
        value = value / unit
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _print(table: Table) -> None:
    """With rich where it is installed and somebody looks on, else plainly."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            pass
        else:
            shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
            for index, column in enumerate(table.columns):
                shown.add_column(column, justify="right" if index > 1 else "left", overflow="fold")
            for row in table.rows:
                shown.add_row(*row)
            Console().print(shown)
            return
    lines = [table.columns, *table.rows]
    # A reason takes the room that it needs, and makes no column wide.
    widths = [max(len(line[at]) for line in lines if len(line[at]) < 40) for at in range(len(table.columns))]
    print(f"\n{table.title}")
    for line in lines:
        cells = [
            cell.rjust(width) if at > 1 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


# ------------------------------------------------------------------------------------------------ page


def _write_page(plan: Plan, rows: Rows, notes: list[str], section: Section) -> None:
    section.paragraphs = notes[1:]
    section.plots = _plots(plan.output, rows.written)
    names = list(dict.fromkeys(row["name"] for row in rows.written)) or [plan.model]
    text = render(
        plan.output, " against ".join(names), notes[0], [section], rows.environment, plan.seed, rows=ROWS
    )
    (plan.output / PAGE).write_text(text, encoding="utf-8")


def _plots(folder: Path, rows: list[dict[str, Any]]) -> list[Plot]:
    if not any(row["parts"] for row in rows):
        return []
    try:
        from . import plots
    except ImportError:
        print("No plots without matplotlib: pip install 'triton-deq[profile]' for them.", file=sys.stderr)
        return []
    return plots.save(folder, rows)
