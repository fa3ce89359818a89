"""Anderson and Picard. Picard is Anderson without history, and runs on the same kernels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..ops.anderson import (
    AndersonState,
    anderson_landing,
    anderson_restart,
    anderson_select,
    anderson_start,
    anderson_step,
)
from .stopping import Stopping


@dataclass(frozen=True)
class Anderson:
    """Anderson mixing: `x⁺ = Σ α_i (x_i + β G_i)`, the α minimising `‖Σ α_i G_i‖² + ridge`, `Σ α_i = 1`.

    Walker & Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.2. A sample whose α are not finite or are huge takes
    a plain step and starts its history anew.

    Attributes:
        history: m, how many iterates take part; memory is 2m states.
        mixing: β in (0, 1], the weight of f(x) against x in each of them.
        ridge: λ ≥ 0, the damping of α. The default is a little above the rounding of a float32 Gram matrix.
        ridge_scale: "relative": the penalty is `λ Σ ‖G_i‖² α_i²`, which has no units; "absolute": `λ Σ α_i²`.

    Raises:
        TypeError, ValueError: a field outside its range.
    """

    compiled: ClassVar[bool] = True

    history: int = 6
    mixing: float = 1.0
    ridge: float = 1e-6
    ridge_scale: str = "relative"

    def __post_init__(self):
        check_count("history", self.history)
        check_number("mixing", self.mixing, 0, 1, open_low=True)
        check_number("ridge", self.ridge, 0)
        check_choice("ridge_scale", self.ridge_scale, ("relative", "absolute"))

    @property
    def as_anderson(self) -> "Anderson":
        """Itself; what iterates in the same way has one too."""
        return self

    def start(self, x: Tensor, stopping: Stopping, backend: str) -> AndersonState:
        return anderson_start(x, self.history, stopping.tol, stopping.max_steps, backend)

    def step(
        self, state: AndersonState, fx: Tensor, step: int, stopping: Stopping, backend: str
    ) -> int | Tensor:
        """Take in f(x), decide who stops, write the next x. Returns how many samples go on."""
        return anderson_step(
            state,
            fx,
            step,
            mixing=float(self.mixing),
            relative=stopping.residual == "relative",
            over_batch=stopping.norm_over == "batch",
            ridge=float(self.ridge),
            relative_ridge=self.ridge_scale == "relative",
            last=step + 1 == stopping.max_steps,
            backend=backend,
        )

    def landing(self, state: AndersonState, step: int) -> Tensor | None:
        """Where f may leave its value in this step, if anywhere."""
        return anderson_landing(state, step)

    def restart(self, state: AndersonState, x: Tensor, stopping: Stopping) -> None:
        """Put the state back to before the first step, from another x."""
        anderson_restart(state, x, stopping.tol)

    def select(self, state: AndersonState, samples: Tensor, backend: str) -> AndersonState:
        """The state of these samples alone."""
        return anderson_select(state, samples, backend)


@dataclass(frozen=True)
class Picard:
    """Plain iteration `x⁺ = x + β (f(x) − x)`.

    Attributes:
        mixing: β in (0, 1]; 1 is the undamped `x⁺ = f(x)`.

    Raises:
        TypeError, ValueError: mixing outside its range.
    """

    compiled: ClassVar[bool] = True

    mixing: float = 1.0

    def __post_init__(self):
        check_number("mixing", self.mixing, 0, 1, open_low=True)

    @property
    def as_anderson(self) -> Anderson:
        """The same iteration as an Anderson record."""
        return Anderson(history=1, mixing=self.mixing)

    def start(self, x: Tensor, stopping: Stopping, backend: str) -> AndersonState:
        return self.as_anderson.start(x, stopping, backend)

    def step(
        self, state: AndersonState, fx: Tensor, step: int, stopping: Stopping, backend: str
    ) -> int | Tensor:
        return self.as_anderson.step(state, fx, step, stopping, backend)

    def landing(self, state: AndersonState, step: int) -> Tensor | None:
        """Where f may leave its value in this step, if anywhere."""
        return anderson_landing(state, step)

    def restart(self, state: AndersonState, x: Tensor, stopping: Stopping) -> None:
        """Put the state back to before the first step, from another x."""
        anderson_restart(state, x, stopping.tol)

    def select(self, state: AndersonState, samples: Tensor, backend: str) -> AndersonState:
        """The state of these samples alone."""
        return anderson_select(state, samples, backend)
