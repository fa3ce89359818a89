"""From rows to comparisons, and from those to Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import Row

OURS = "triton-deq"
TITLES = {
    "step": "Solver alone: 20 steps of Anderson(6) or of Broyden(10), milliseconds a step beyond f",
    "solve": "Whole solve to the same residual, milliseconds",
    "kernels": "Single ops (on a CPU the reference, and what Numba has compiled), milliseconds",
    "penalty": "Jacobian penalty, and spectral radius by at most 100 products, milliseconds",
    "training": "Training step of a DEQ, 10 steps forward and 10 backward, milliseconds",
    "language": "DEQ-Transformer at 14 evaluations a solve beside a stacked Transformer-XL, milliseconds",
    "transformer": "DEQ-Transformer: its layer, the penalty on it, the model at 14 evaluations, milliseconds",
    "compat": "TorchDEQ, locuslab/deq and the tutorial, on our solvers and as they are, milliseconds",
    "images": "Multiscale DEQ: its layer, the penalty on it, the model at 14 evaluations, milliseconds",
}
"""The groups that are comparisons, in the order of the report."""


@dataclass(frozen=True)
class Comparison:
    """The variants of one case: of each the latest row that the same code has.

    Only rows of one run are set against each other, because there they took turns.
    """

    rows: tuple[Row, ...]

    @property
    def head(self) -> Row:
        return self.rows[0]

    def find(self, variant: str, run: str | None = None) -> Row | None:
        """The latest row of a variant, or the one of a run."""
        found = [row for row in self.rows if row.variant == variant and run in (None, row.run)]
        return max(found, key=lambda row: row.run, default=None)

    @property
    def peers(self) -> list[Row]:
        """What is neither ours nor a baseline, has a time and did the same, the best against ours first.

        A whole solve that missed the residual asked for did less.
        """
        able = [
            row
            for row in self.rows
            if self.against_ours(row) is not None
            and not row.variant.startswith((OURS, "bare f"))
            and not (row.group == "solve" and (row.residual is None or row.residual > 1.05 * _tolerance(row)))
        ]
        return sorted(able, key=lambda row: self.against_ours(row) or 0.0)

    def cost(self, row: Row | None) -> float | None:
        """Milliseconds: of the whole call, or for a solver step of what one costs beyond f."""
        if row is None or row.p50_ms is None:
            return None
        if row.group != "step":
            return row.p50_ms
        in_graph = row.variant.endswith(("graph", "graph mode"))
        bare = self.find("bare f graph" if in_graph else "bare f", row.run)
        if bare is None or bare.p50_ms is None or not row.steps:
            return None
        return max(row.p50_ms - bare.p50_ms, 0.0) / row.steps

    @property
    def beyond_f(self) -> float | None:
        """How many times as long the best peer takes apart from evaluating f, which both do alike."""
        if not self.peers:
            return None
        rows = self.find(OURS, self.peers[0].run), self.peers[0], self.find("bare f", self.peers[0].run)
        ours, theirs, common = (None if row is None else row.p50_ms for row in rows)
        if ours is None or theirs is None or common is None or ours <= common:
            return None
        return (theirs - common) / (ours - common)

    @property
    def in_graphs(self) -> float | None:
        """What ours costs as a user has it in CUDA graphs: as `graph=True`, where the case knows that."""
        rows = (self.find(f"{OURS} {name}") for name in ("graph mode", "graph"))
        return next((self.cost(row) for row in rows if row is not None), None)

    def against_ours(self, row: Row) -> float | None:
        """Its cost over ours in the same run; a replayed CUDA graph is held against ours in one."""
        ours = self.find(f"{OURS} graph" if row.variant.endswith("graph") else OURS, row.run)
        own, theirs = self.cost(ours), self.cost(row)
        return theirs / own if own and theirs is not None else None

    @property
    def speedup(self) -> float | None:
        """How many times as long the best peer takes; below 1, it is the faster."""
        return self.against_ours(self.peers[0]) if self.peers else None


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """One comparison for each device, group, op, mode, dtype and shape, of the code of its latest run."""
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        threads = row.threads if row.kind == "cpu" else 0
        key = (row.device, threads, row.group, row.op, row.mode, row.dtype, row.shape)
        cases.setdefault(key, []).append(row)
    return [Comparison(_latest(found)) for found in cases.values()]


def _latest(rows: list[Row]) -> tuple[Row, ...]:
    """Of the code that ran last: of each variant its last row, and in its run what it is held against."""
    source = max(rows, key=lambda row: row.run).source
    same = [row for row in rows if row.source == source]
    last: dict[str, str] = {}
    for row in same:
        last[row.variant] = max(row.run, last.get(row.variant, ""))
    baselines = (OURS, "bare f")
    return tuple(row for row in same if row.variant.startswith(baselines) or row.run == last[row.variant])


def devices(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each device, GPUs first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.kind != "gpu", row.device)):
        name = (
            row.device
            if row.kind == "gpu"
            else f"{row.device}, {row.threads} thread{'s' * (row.threads != 1)}"
        )
        found.setdefault(name, []).append(row)
    return found


def provenance(rows: Sequence[Row]) -> str:
    """What the rows were measured with: a line for each run."""
    lines = {}
    for row in rows:
        packages = ", ".join(
            f"{name} {version}" for name, version in row.versions.items() if version is not None
        )
        commit = "no commit" if row.commit is None else f"commit {row.commit[:10]}"
        changed = " with changes" if row.dirty and row.commit is not None else ""
        lines[row.run] = f"Measured {row.run[:10]} on {packages}; {commit}{changed}, source {row.source}."
    return "\n".join(dict.fromkeys(lines[run] for run in sorted(lines)))


def table(group: str, comparisons: Sequence[Comparison]) -> str:
    """Ours against the best peer, a line for each case; losses are there like gains."""
    more = {
        "solve": ["steps", "peer's steps"],
        "kernels": ["GB/s"],
        "penalty": ["f itself"],
        "compat": ["beyond f"],
    }.get(group, [])
    graphs = any(each.in_graphs is not None for each in comparisons)
    titles = ["", "state", "dtype", OURS, "best peer", "its time", "speed-up", *more]
    titles += ["ours in CUDA graphs"] * graphs
    lines = [titles, ["---"] * len(titles)]
    for comparison in comparisons:
        ours, head = comparison.find(OURS), comparison.head
        best = comparison.peers[0] if comparison.peers else None
        lines.append(
            [
                f"{head.op}, {head.mode}"
                if group in ("penalty", "language", "transformer", "images", "compat")
                else head.op,
                "×".join(map(str, head.shape)),
                head.dtype,
                _number(comparison.cost(ours)),
                "–" if best is None else best.variant,
                _number(comparison.cost(best)),
                "–" if comparison.speedup is None else f"{comparison.speedup:.2f}×",
            ]
        )
        if group == "solve":
            lines[-1] += ["–" if row is None else str(row.steps) for row in (ours, best)]
        elif group == "kernels":
            lines[-1].append(_number(None if ours is None else ours.gigabytes_per_s))
        elif group == "compat":
            beyond = comparison.beyond_f
            lines[-1].append("–" if beyond is None else f"{beyond:.2f}×")
        elif group == "penalty":
            lines[-1].append(_number(comparison.cost(comparison.find("bare f"))))
        lines[-1] += [_number(comparison.in_graphs)] * graphs
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def every_row(rows: Sequence[Row]) -> str:
    """All variants of all cases, errors included."""
    titles = ["group", "op", "mode", "state", "dtype", "variant", "p20", "p50", "p80", "compile"]
    titles += ["peak MB", "steps", "residual", "GB/s", "TFLOP/s", "of roofline", "error"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = [row.group, row.op, row.mode, "×".join(map(str, row.shape)), row.dtype, row.variant]
        cells += [_number(time) for time in (row.p20_ms, row.p50_ms, row.p80_ms, row.compile_ms)]
        megabytes = None if row.peak_bytes is None else row.peak_bytes / 1e6
        rates = (row.residual, row.gigabytes_per_s, row.teraflops, row.roofline)
        cells += [_number(number) for number in (megabytes, row.steps, *rates)]
        lines.append([*cells, (row.error or "").replace("|", "\\|")])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def copy_bandwidth(comparisons: Sequence[Comparison]) -> float | None:
    """GB/s of the device's own copy, bytes read plus bytes written."""
    found = [row.gigabytes_per_s for each in comparisons for row in each.rows if row.variant == "copy"]
    return max((speed for speed in found if speed is not None), default=None)


def _tolerance(row: Row) -> float:
    """`dense to 0.001`: 0.001"""
    return float(row.op.rsplit(" ", 1)[-1])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
