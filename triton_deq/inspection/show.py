"""Rows as text."""

from collections.abc import Iterable, Iterator

from .compiling import Row
from .roofline import DEVICES, Bound
from .waits import BARRIER, LATENCIES, OTHERS

HEADER = (
    f"{'kernel':<48} {'target':<6} {'regs':>4} {'spill':>5} {'shared':>6} {'occupancy':>15} "
    f"{'load':>5} {'store':>5} {'mma':>4} {'code':>6} {'time':>6}"
)


def table(rows: Iterable[Row], quiet: bool) -> Iterator[Row]:
    """Print each row as it comes, unless `quiet`, and pass it on."""
    if not quiet:
        print(HEADER)
    for row in rows:
        if not quiet:
            print(line(row), flush=True)
        yield row


def line(row: Row) -> str:
    """One row; loads and stores are the bytes of the contiguous path, narrowest-widest."""
    start = f"{row.kernel:<48} {row.target:<6}"
    if row.error is not None:
        return f"{start} DOES NOT COMPILE: {_last_line(row.error)}"
    occupancy = f"{row.occupancy:.0%} {row.limited_by}"
    numbers = (
        f" {row.registers:4} {row.spilled:5} {row.shared:6} {occupancy:>15} "
        f"{_range(row.contiguous_loads):>5} {_range(row.contiguous_stores):>5} "
        f"{row.matrix_instructions:4} {row.code:6} {row.seconds:5.1f}s"
    )
    return start + numbers + (f"  BROKEN: {'; '.join(row.broken)}" if row.broken else "")


def waits(rows: Iterable[Row]) -> str:
    """A table of what a warp waits for in each kernel."""
    latencies = ", ".join(f"{name} {clocks}" for name, clocks in {**LATENCIES, "BAR": BARRIER}.items())
    lines = [
        f"one warp alone, no branch taken; clocks assumed: {latencies}, others {OTHERS}",
        f"{'kernel':<48} {'target':<6} {'instructions':>12} {'clocks':>7} {'memory':>6} {'barriers':>8} "
        f"{'shuffles':>8}  a turn of each loop: clocks (memory, barriers)",
    ]
    for row in rows:
        if row.path is None:
            continue
        whole = row.path.whole
        turns = ", ".join(f"{turn.clocks} ({turn.memory}, {turn.barriers})" for turn in row.path.loops)
        lines.append(
            f"{row.kernel:<48} {row.target:<6} {whole.instructions:12} {whole.clocks:7} {whole.memory:6} "
            f"{whole.barriers:8} {whole.shuffles:8}  {turns or '-'}"
        )
    return "\n".join(lines)


def conclusion(rows: list[Row], version: str, seconds: float) -> str:
    """The compilers' messages in full, and one closing sentence."""
    errors = [f"{row.kernel} for {row.target}:\n{row.error}\n" for row in rows if row.error is not None]
    broken = sum(bool(row.broken) for row in rows)
    closing = f"{sum(row.passed for row in rows)} of {len(rows)} within their budgets"
    closing += f" with Triton {version} in {seconds:.0f} s"
    closing += f"; {broken} break one" if broken else ""
    closing += f"; {len(errors)} do not compile" if errors else ""
    return "\n".join([*errors, closing])


def bounds(found: list[Bound], device: str, launch: float) -> str:
    """A table of least times in µs."""
    rates = ", ".join(f"{unit} {rate / 1e12:g}" for unit, rate in DEVICES[device].rates.items())
    lines = [
        f"{device}: {DEVICES[device].bandwidth / 1e9:g} GB/s; 10^12 operations/s: {rates}",
        f"steps: {launch:g} µs a launch; f is not counted",
        f"{'kernel':<48} {'batch x entries':>15} {'MB':>9} {'memory µs':>10} {'arithm. µs':>10} "
        f"{'launch µs':>9} {'least µs':>9}  binds",
    ]
    for bound in found:
        lines.append(
            f"{bound.kernel:<48} {f'{bound.batch}x{bound.entries}':>15} {bound.traffic / 1e6:9.2f} "
            f"{bound.bandwidth * 1e6:10.2f} {bound.arithmetic * 1e6:10.2f} {bound.launches * 1e6:9.0f} "
            f"{bound.least * 1e6:9.2f}  {bound.binds}"
        )
    return "\n".join(lines)


def _range(widths: dict[int, int]) -> str:
    if not widths:
        return "-"
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}-{high}"


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "").strip()[:160]
