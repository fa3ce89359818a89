"""What a section of `python -m bench gpu` is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Order:
    """Where to write, how many seconds it may take, and on what scale: "full", or "tiny" to rehearse."""

    output: Path
    seconds: float
    scale: str

    @property
    def rows(self) -> Path:
        return self.output / "rows.jsonl"
