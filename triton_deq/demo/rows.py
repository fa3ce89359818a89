"""Every figure of the demo as a JSON row that says what ran where."""

import datetime
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..environment import environment

__all__ = ["Rows", "environment"]


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
