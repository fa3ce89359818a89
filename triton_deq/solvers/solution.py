"""What a solve gives back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..status import Status
from ..trees import register


@dataclass(frozen=True)
class Solution:
    """The result of `solve` for B samples.

    Attributes:
        value: shaped like z0; each sample's best finite iterate, the one with the lowest residual.
        residual: `[B]` float64, the residual of `value` itself, as `solve` was asked to measure it
            (relative or absolute, of the sample or of the batch). Infinite where f never gave a finite value.
        steps: `[B]` int32, evaluations of f until the sample stopped.
        status: `[B]` int8 holding `Status`.
        nfe: evaluations of f in all; each one serves the whole batch. Of a compiled loop, a tensor `[]`.
        path: how it was solved: "steps", f and the solver in turns; "compiled steps", the same on a CPU, the
            solver compiled by Numba; "graph", the same in a CUDA graph; "one launch", by a kernel of f's own;
            "compiled loop", by torch.compile with `graph=True`.
        trace: `[nfe, B]` float64, the residual after each evaluation (a stopped sample keeps its last),
            or None if it was not asked for. Of a compiled loop, `[max_steps, B]`.
        backward: the `Solution` of the implicit gradient's linear system; None until a backward pass has
            solved it. Each pass replaces it.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    status: Tensor
    nfe: int
    path: str = "steps"
    trace: Tensor | None = None
    backward: "Solution | None" = field(default=None, init=False, repr=False, compare=False)

    @property
    def converged(self) -> Tensor:
        """`[B]` bool: which samples reached the tolerance."""
        return self.status == Status.CONVERGED

    def counts(self) -> dict[Status, int]:
        """How many samples ended in which status; reads the device."""
        held = torch.bincount(self.status.long(), minlength=len(Status)).tolist()
        return {status: held[status] for status in Status if held[status]}

    def describe(self) -> str:
        """One line per status that occurred: how many samples, and what to do about them."""
        return "\n".join(
            f"{count} of {self.status.numel()} {status.name}: {status.remedy}"
            for status, count in self.counts().items()
        )


register(Solution, constants=("nfe", "path"))


def empty_solution(z0: Tensor, trace: bool) -> Solution:
    """No entries, nothing to solve: f is not called."""
    batch = z0.shape[0]
    return Solution(
        value=z0.detach().clone(),
        residual=torch.zeros(batch, dtype=torch.float64, device=z0.device),
        steps=torch.zeros(batch, dtype=torch.int32, device=z0.device),
        status=torch.full((batch,), Status.CONVERGED, dtype=torch.int8, device=z0.device),
        nfe=0,
        trace=torch.empty(0, batch, dtype=torch.float64, device=z0.device) if trace else None,
    )


class NotConverged(RuntimeError):
    """Raised by `solve(..., throw=True)` where a sample did not reach the tolerance.

    `solution` holds what there is.
    """

    def __init__(self, solution: Solution):
        self.solution = solution
        worst = solution.residual.max().item()
        super().__init__(
            f"the solve did not converge: largest residual {worst:.3g} after {solution.nfe} "
            f"evaluations of f\n{solution.describe()}"
        )

    def __reduce__(self):
        return NotConverged, (self.solution,)
