"""Rows of `triton-deq profile` as a table of the README."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLE = (
    "Whole models beside ResNet-101, in turns, untrained: the ratio of their times is of the machine named"
)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows under a folder, in the order in which they were written."""
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines if line.strip()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each model with its peer of the same run and setting; "" without rows."""
    lines = []
    for row in rows:
        if row["role"] != "model" or row["p50_ms"] is None:
            continue
        setting = ("run", "mode", "execution", "dtype", "batch")
        peer = next(
            (
                each
                for each in rows
                if each["role"] != "model" and all(each[name] == row[name] for name in setting)
            ),
            None,
        )
        if peer is None or peer["p50_ms"] is None:
            continue
        evaluations = f"{row['nfe']} + {row['backward_nfe']}" if row["backward_nfe"] else str(row["nfe"])
        memory = row["peak_bytes"] / peer["peak_bytes"] if row["peak_bytes"] and peer["peak_bytes"] else None
        lines.append(
            [
                f"{row['name']}, {row['mode']}",
                f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] != 1)}",
                f"{row['dtype']}, {row['execution']}",
                str(row["batch"]),
                evaluations,
                f"{row['p50_ms']:.3g}",
                peer["name"],
                f"{peer['p50_ms']:.3g}",
                f"{row['ratio_p50']:.2f}×",
                f"{row['f_ratio']:.2f}×" if row["mode"] == "inference" and row["f_ratio"] else "–",
                "–" if memory is None else f"{memory:.2f}×",
            ]
        )
    if not lines:
        return ""
    titles = [
        "",
        "on",
        "as",
        "batch",
        "evaluations",
        "its ms",
        "beside",
        "its ms",
        "time",
        "f alone",
        "memory",
    ]
    cells = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(each) + " |" for each in cells)
