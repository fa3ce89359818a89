"""`python -m bench report`: tables and plots from the rows, and the README's performance section."""

import sys
from collections.abc import Sequence
from pathlib import Path

from . import profiles
from .rows import Row, read
from .tables import TITLES, Comparison, compare, copy_bandwidth, devices, every_row, provenance, table

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
NO_ROWS = "No measurement is committed yet."
PREFACE = (
    "Generated from the rows under `bench/results/` by `python -m bench report`. Times are medians of calls "
    "that took turns; a speed-up below 1 is a loss. The best peer is the fastest of TorchDEQ 0.1.0 and a "
    "textbook Anderson, both also under `torch.compile`, for whole solves their Broyden too, and of jaxopt "
    "where it was installed; a whole solve is timed up to the same residual for all."
)


def report(results: Path, output: Path, readme: Path, check: bool) -> int:
    """Write everything, or with `check` only compare; 1 if the README does not say what the rows say.

    Raises:
        RowsError: a rows file that cannot be read.
    """
    rows = read(sorted(results.glob("*.jsonl")))
    text = readme.read_text(encoding="utf-8")
    beside = profiles.table(profiles.read(results / "profile"))
    wanted = with_section(text, section(rows, beside))
    if wanted is None:
        print(f"{readme.name} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    if check:
        if wanted != text:
            print(
                f"{readme.name} and the rows under bench/results/ disagree: run python -m bench report",
                file=sys.stderr,
            )
        return int(wanted != text)

    if wanted != text:
        readme.write_text(wanted, encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(whole(rows, beside), encoding="utf-8")
    print(f"{len(rows)} rows; {readme.name} updated; tables in {output / 'report.md'}")
    try:
        from .plots import draw
    except ImportError as error:
        print(f"no plots: {error}")
        return 0
    for path in draw(rows, output):
        print(path)
    return 0


def with_section(text: str, body: str) -> str | None:
    """The README's text with this section between the markers; None without the markers."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        return None
    return text[: begin + len(BEGIN)] + "\n" + body + "\n" + text[end:]


def section(rows: Sequence[Row], beside: str = "") -> str:
    """What stands between the markers; beside: the table of whole models beside others."""
    if not rows:
        return NO_ROWS
    parts = [PREFACE]
    if beside:
        parts += [f"**{profiles.TITLE}**", beside]
    for name, own in devices(rows).items():
        comparisons = compare(own)
        parts += [f"### {name}", _ceilings(comparisons), provenance(_shown(comparisons))]
        for group, title in TITLES.items():
            chosen = [each for each in comparisons if each.head.group == group]
            if chosen:
                parts += [f"**{title}**", table(group, chosen)]
    return "\n\n".join(part for part in parts if part)


def whole(rows: Sequence[Row], beside: str = "") -> str:
    """The report: the section, then every row of the latest runs."""
    latest = _shown([each for own in devices(rows).values() for each in compare(own)])
    return f"# Benchmarks\n\n{section(rows, beside)}\n\n## Every row\n\n{every_row(latest)}\n"


def _shown(comparisons: Sequence[Comparison]) -> list[Row]:
    return [row for comparison in comparisons for row in comparison.rows]


def _ceilings(comparisons: Sequence[Comparison]) -> str:
    """A sentence on what the device can do at all."""
    copy = copy_bandwidth(comparisons)
    if copy is None:
        return ""
    products = [
        f"{row.teraflops:.3g} TFLOP/s in {row.dtype}"
        for each in comparisons
        for row in each.rows
        if row.op == "matmul" and row.teraflops is not None
    ]
    return f"It copies {copy:.3g} GB/s (read plus written) and multiplies matrices at {', '.join(products)}."
