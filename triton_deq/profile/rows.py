"""The rows of a profile: JSON lines, each written whole as soon as it is known."""

import json
import os
from datetime import UTC, datetime
from typing import Any

import torch

from ..environment import environment
from .plan import Plan, Setting
from .sides import Side

ROWS = "rows.jsonl"
SCHEMA = 1
"""Raise it when a field changes its meaning, comes or goes."""

PACKAGES = ("torch", "triton", "triton-deq", "torchvision", "transformers")

MEASURED = (
    "samples", "p20_ms", "p50_ms", "p80_ms", "compile_ms", "per_second", "nfe", "backward_nfe", "residual",
    "backward_residual", "peak_bytes", "flops", "teraflops", "bytes", "gigabytes_per_s", "operators",
    "launches", "syncs", "parts", "f_ms", "ratio_p20", "ratio_p50", "ratio_p80", "f_ratio", "expected_ms",
    "error",
)  # fmt: skip
"""What a row has beside who ran where. None where it is not known.

nfe, backward_nfe: evaluations in the solves; residual: the worst sample's. f_ms: the forward solve's
evaluations of f without a solver. parts: milliseconds by name, adding up to p50_ms. ratio: the model's time
over the peer's, taken within each round; f_ratio: f_ms over the peer's time. expected_ms: of a training step
where the penalty falls as often as the model's configuration says, instead of always.
"""


class Rows:
    """Writes rows to a folder, behind those of earlier runs.

    Attributes:
        written: the rows of this run.
        environment: what it runs on.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self.path = plan.output / ROWS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.environment = environment(str(device), PACKAGES)
        self.written: list[dict[str, Any]] = []
        self._fields = {
            "schema": SCHEMA,
            "run": _now(),
            **self.environment,
            "kind": "gpu" if device.type == "cuda" else device.type,
            "seed": plan.seed,
        }

    def add(self, side: Side, setting: Setting, shape: tuple[int, ...], measured: dict[str, Any]) -> None:
        """One side at one setting."""
        row = {
            **self._fields,
            "timestamp": _now(),
            "role": side.role,
            "name": side.name,
            "note": side.note,
            "parameters": side.parameters,
            "mode": setting.mode,
            "execution": setting.execution,
            "dtype": setting.dtype,
            "batch": setting.batch,
            "shape": shape,
            "unit": side.task.unit,
            "solver": None if side.deq is None else repr(side.deq.solver),
            "penalty": setting.training and side.deq is not None and side.deq.penalty is not None,
            "penalty_probability": side.probability,
            **dict.fromkeys(MEASURED),
            **measured,
        }
        self.written.append(row)
        self._append(json.dumps(_rounded(row), ensure_ascii=False))

    def _append(self, line: str) -> None:
        torn = self.path.exists() and self.path.stat().st_size and self.path.read_bytes()[-1:] != b"\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, ("\n" * bool(torn) + line + "\n").encode())  # one call: nothing comes between
            os.fsync(handle)
        finally:
            os.close(handle)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _rounded(value: Any) -> Any:
    """Six digits are more than any of these measurements has."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None  # JSON has no infinity and no NaN
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
