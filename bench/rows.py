"""The one row schema of all measurements, kept as JSON lines."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Raise it when a field changes its meaning, comes or goes: rows of another schema are refused."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one operation, timed in one run.

    Attributes:
        run: names the run; variants are comparable within one run only, where they took turns.
        timestamp: when the row was written, UTC.
        group, op: what was done; variant: by whom ("triton-deq" is this library), backend: on what.
        mode: "forward", "backward" or "full".
        device, kind: the device's name, and "cpu" or "gpu"; threads: of PyTorch on the CPU.
        dtype, shape: of the state, `[B, ...]`.
        commit, dirty, source: the checkout's commit, whether it differed from it, and a digest of the
            library's Python files, which names the code also where there is no commit.
        versions: of Python and of the packages; None where one is not installed.
        seed: of the inputs.
        p20_ms, p50_ms, p80_ms: quantiles of one call's time over `samples` calls.
        compile_ms: what the first call took beyond `p50_ms`, for a variant that compiles something.
        peak_bytes: most memory held at once beyond what was held before the call.
        steps: evaluations of f in a call; residual: the worst sample's relative residual of its result.
        gigabytes_per_s, teraflops: the least bytes and operations of the call, over `p50_ms`.
        roofline: the least time on this device over `p50_ms`; None on a CPU and on an unknown device.
        error: why there is no time; None where there is.
    """

    schema: int = SCHEMA
    run: str
    timestamp: str
    group: str
    op: str
    variant: str
    backend: str
    mode: str
    device: str
    kind: str
    threads: int
    dtype: str
    shape: tuple[int, ...]
    commit: str | None
    dirty: bool
    source: str
    versions: dict[str, str | None] = field(default_factory=dict)
    seed: int = 0
    samples: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    compile_ms: float | None = None
    peak_bytes: int | None = None
    steps: int | None = None
    residual: float | None = None
    gigabytes_per_s: float | None = None
    teraflops: float | None = None
    roofline: float | None = None
    error: str | None = None


class RowsError(Exception):
    """A rows file that cannot be read; says which and what to do."""


def write(path: Path, row: Row) -> None:
    """Append one row; it is in the file whole, or not at all.

    Raises:
        RowsError: the file holds rows of another schema.
    """
    line = json.dumps(_rounded(asdict(row)), ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())  # one call, so that nothing can come between
        os.fsync(handle)
    finally:
        os.close(handle)


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of these files.

    Raises:
        RowsError: a row of another schema, or a line that is no row.
    """
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(_parse(line, f"{path}, line {number}"))
    return found


def _parse(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowsError(f"{where}: not JSON ({error.msg}): remove the line or measure again") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise RowsError(
            f"{where}: rows of schema {schema}, and this bench reads schema {SCHEMA}: measure again with "
            "python -m bench run, or read them with the commit that wrote them"
        )
    names = {entry.name for entry in fields(Row)}
    if set(values) != names:
        differing = ", ".join(sorted(set(values) ^ names))
        raise RowsError(f"{where}: its fields are not those of schema {SCHEMA}: {differing}")
    return Row(**{**values, "shape": tuple(values["shape"])})


def _mend(path: Path) -> None:
    """Cut off the rest of a line that a crash left behind, and refuse to add to another schema's rows."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        first = file.readline()
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    if first.endswith(b"\n"):
        _parse(first.decode(), f"{path}, line 1")


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Six digits are more than any of these measurements has."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()
    }
