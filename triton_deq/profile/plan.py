"""What is asked for, free of PyTorch, so that the command line loads quickly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = ("inference", "training")
DTYPES = ("fp32", "bf16", "bf16-state", "pure-bf16")
"""bf16: float32 parameters under autocast; bf16-state: the same with a DEQ's state and history in bfloat16;
pure-bf16: parameters, buffers and inputs, too."""
EXECUTIONS = ("eager", "graph", "compile")
SOLVERS = ("anderson", "broyden")


class Refusal(Exception):
    """A sentence for the user: the command cannot do what was asked, and what can be done about it."""


def sentence(error: BaseException) -> str:
    """The kind of an error and the first lines of it that say something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:2]])[:300]


@dataclass(frozen=True)
class Plan:
    """The options of the command, by their names there.

    Attributes:
        against, device, batch, image_size, nfe, solver: None for what the model or the machine suggests.
        penalty: whether a Jacobian penalty that a model has is taken in every training step, or in none.
    """

    model: str
    against: str | None = None
    mode: tuple[str, ...] = MODES
    batch: tuple[int, ...] | None = None
    image_size: tuple[int, ...] | None = None
    dtype: tuple[str, ...] = ("fp32",)
    execution: tuple[str, ...] = ("eager",)
    nfe: int | None = None
    solver: str | None = None
    penalty: bool = True
    device: str | None = None
    seconds: float = 1.0
    output: Path = Path("build/profile")
    seed: int = 0

    @classmethod
    def of(cls, arguments: Any) -> "Plan":
        """From the parsed command line."""
        given = {name: getattr(arguments, name) for name in cls.__dataclass_fields__}
        return cls(**{**given, "penalty": given["penalty"] == "on"})


@dataclass(frozen=True)
class Setting:
    """One place of the sweep."""

    mode: str
    dtype: str
    execution: str
    batch: int

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}, {self.execution}, batch {self.batch}"


def settings(plan: Plan, batches: tuple[int, ...]) -> list[Setting]:
    """The sweep in its order: batches innermost, so that a row beside its neighbour differs in the batch."""
    return [
        Setting(mode, dtype, execution, batch)
        for execution in plan.execution
        for dtype in plan.dtype
        for mode in plan.mode
        for batch in batches
    ]
