"""Every figure of the demo as a JSON row that says what ran where."""

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "triton-deq", "torchdeq")


@dataclass
class Rows:
    """Collects rows; each carries the seed and the environment.

    Attributes:
        seed: of the run.
        environment: device, versions, commit.
    """

    seed: int
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, experiment: str, quantity: str, value: float, unit: str, **details: Any) -> None:
        """One figure. `details` say for which size, method, epoch or weight it holds."""
        value = float(value)
        self.rows.append(
            {
                "experiment": experiment,
                "quantity": quantity,
                "value": value if math.isfinite(value) else None,  # JSON has no NaN
                "unit": unit,
                **details,
                "seed": self.seed,
                **self.environment,
                "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def environment(device: str) -> dict[str, Any]:
    """The device by name, the versions, and the commit if this is a checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _commit(),
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that this package stands in, "-dirty" if changed; an installed package has none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
