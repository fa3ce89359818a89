"""The table of `triton-deq verify`, from a process of its own.

Its own process, because Triton reads TRITON_INTERPRET once, at its first import: on a CPU the kernels of this
process would have to be interpreted from then on.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Verification:
    """The rows of `verify --json`, whether all passed, and what it printed if it could not finish."""

    rows: list[dict[str, Any]]
    passed: bool
    trouble: str


def verify(seed: int, runner: tuple[str, ...] = (sys.executable, "-m", "triton_deq")) -> Verification:
    """Run it; a crash is a failure, not an exception."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        done = subprocess.run(
            [*runner, "verify", "--quick", "--seed", str(seed), "--json", str(file)],
            capture_output=True,
            text=True,
        )
        if not file.exists():
            trouble = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
            return Verification([], False, trouble)
        rows = json.loads(file.read_text())
    return Verification(rows, done.returncode == 0 and bool(rows) and all(row["passed"] for row in rows), "")


def worst_by_kernel(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel and dtype the row that comes closest to its bound, or goes farthest beyond it."""

    def reach(row: dict[str, Any]) -> float:
        if not row["passed"]:
            return float("inf")
        return row["error"] / row["bound"] if row["bound"] else 0.0

    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["kernel"], row["dtype"])
        if key not in worst or reach(row) > reach(worst[key]):
            worst[key] = row
    return list(worst.values())
