"""Runs the parts of the demo with progress bars, prints the tables, writes the page and the rows."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from .. import data, page
from ..page import Section
from . import accelerate, stabilise, synthetic, verified
from .accelerate import OURS
from .rows import Rows, environment
from .sections import accelerated, stabilised_digits, stabilised_synthetic, verification_section


def demo(quick: bool, seed: int, output: Path) -> int:
    """All parts. Returns 0 if the solvers agree and every kernel is within its bounds, else 1."""
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On a shared machine threads that wait for each other make times meaningless: everything runs on one.
    torch.set_num_threads(1)
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    rows = Rows(seed, environment(device))
    digits = data.digits(seed=seed)
    synthetic_epochs, digit_epochs = (3, 3) if quick else (12, 12)

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def stage(name: str, total: int) -> Callable[[], None]:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        ticks = (
            stage("1 accelerate", accelerate.work(quick)),
            stage("2 stabilise: digits", 2 * (digit_epochs + 1)),
            stage("  stabilise: synthetic", len(synthetic.WEIGHTS) * synthetic_epochs),
            stage("3 verify", 1),
        )
        comparison = accelerate.compare(digits.x, digits.y, quick, seed, device, ticks[0])
        histories = train_digits(digits, digit_epochs, seed, device, ticks[1])
        outcomes = train_synthetic(synthetic_epochs, seed, device, ticks[2])
        verification = verified.verify(seed)
        ticks[3]()

    sections = [
        accelerated(comparison, rows, output),
        stabilised_digits(histories, rows, output),
        stabilised_synthetic(outcomes, synthetic_epochs, seed, rows, output),
        verification_section(verification, rows),
    ]
    agreed = all(agreement.passed for agreement in comparison.agreements if agreement.method == OURS)
    verdict = conclude(agreed, verification, time.perf_counter() - began)
    rows.write(output / "rows.json")
    text = page.render(output, "triton-deq demo", verdict, sections, rows.environment, seed)
    (output / "index.html").write_text(text, encoding="utf-8")

    for section in sections:
        show(console, section)
    console.print(verdict, highlight=False)
    console.print(f"Page: {output / 'index.html'}", highlight=False)
    return 0 if agreed and verification.passed else 1


def train_digits(
    digits: data.Split, epochs: int, seed: int, device: str, tick: Callable[[], None]
) -> dict[float, list[stabilise.Epoch]]:
    """The classifier without and with the penalty."""
    histories: dict[float, list[stabilise.Epoch]] = {}
    with synthetic.one_thread():
        for weight in (0.0, stabilise.WEIGHT):
            histories[weight] = []
            for epoch in stabilise.train(weight, epochs, digits, seed, device):
                histories[weight].append(epoch)
                tick()
    return histories


def train_synthetic(epochs: int, seed: int, device: str, tick: Callable[[], None]) -> list[synthetic.Outcome]:
    """The scalar DEQ with each weight."""
    held = data.synthetic(seed=seed)
    return [
        synthetic.examine(weight, synthetic.train(weight, epochs, seed, device, tick), held, device)
        for weight in synthetic.WEIGHTS
    ]


def conclude(agreed: bool, verification: verified.Verification, seconds: float) -> str:
    """One sentence that says whether everything held."""
    solvers = "Fixed points and gradients agree" if agreed else "FIXED POINTS OR GRADIENTS DISAGREE"
    kernels = "every kernel is within its bounds" if verification.passed else "THE KERNELS DID NOT VERIFY"
    return f"{solvers}; {kernels}. {seconds:.0f} s."


def show(console: Console, section: Section) -> None:
    """A section's tables; the page has the explanations."""
    console.rule(section.title, align="left")
    for table in section.tables:
        if table.where == "page":
            continue
        shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    if not any(table.rows for table in section.tables):
        console.print("\n".join(section.paragraphs))
