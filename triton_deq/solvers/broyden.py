"""Good Broyden with a bounded memory."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_count
from ..ops.broyden import (
    BroydenState,
    broyden_adjoint,
    broyden_advance,
    broyden_landing,
    broyden_residual,
    broyden_restart,
    broyden_select,
    broyden_start,
)
from .stopping import Stopping


@dataclass(frozen=True)
class Broyden:
    """Good Broyden from `J⁻¹ = −I`: `x⁺ = x − B⁻¹ (f(x) − x)`, where B follows the last `memory` pairs.

    Broyden, Math. Comp. 19 (1965); compact form of Byrd, Nocedal & Schnabel, Math. Programming 63 (1994).
    There is no line search: each step is one evaluation of f. A sample whose coefficients are not finite or
    are huge takes a plain step `x⁺ = f(x)` and forgets its pairs.

    Attributes:
        memory: the most pairs (x, f(x)) of differences that take part; it costs 2·memory states. Beyond it
            the oldest pair is dropped.

    Raises:
        TypeError, ValueError: memory below 1 or not an integer.
    """

    compiled: ClassVar[bool] = True

    memory: int = 10

    def __post_init__(self):
        check_count("memory", self.memory)

    def start(self, x: Tensor, stopping: Stopping, backend: str) -> BroydenState:
        return broyden_start(x, self.memory, stopping.tol, stopping.max_steps, backend)

    def step(
        self, state: BroydenState, fx: Tensor, step: int, stopping: Stopping, backend: str
    ) -> int | Tensor:
        """Take in f(x), decide who stops, write the next x. Returns how many samples go on."""
        broyden_residual(state, fx, step, backend)
        return broyden_advance(
            state,
            step,
            relative=stopping.residual == "relative",
            over_batch=stopping.norm_over == "batch",
            last=step + 1 == stopping.max_steps,
            backend=backend,
        )

    def landing(self, state: BroydenState, step: int) -> Tensor | None:
        """Where f may leave its value in this step, if anywhere."""
        return broyden_landing(state, step)

    def restart(self, state: BroydenState, x: Tensor, stopping: Stopping) -> None:
        """Put the state back to before the first step, from another x."""
        broyden_restart(state, x, stopping.tol)

    def select(self, state: BroydenState, samples: Tensor, backend: str) -> BroydenState:
        """The state of these samples alone."""
        return broyden_select(state, samples, backend)

    def adjoint(self, state: BroydenState, grad: Tensor) -> Tensor:
        """`grad (I − J)⁻¹` by the estimate of the inverse that a solve has left in `state`; rows `[B, N]`."""
        return broyden_adjoint(state, grad)
