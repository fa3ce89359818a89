"""What TorchDEQ asks of a solve: its traces, its lowest residuals, when it ends, and its statistics."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import check_choice, check_count, check_number
from ..iteration import INITIAL, STALLED, Iteration

LEAST = 1e-9
"""What TorchDEQ adds to ‖f(x)‖ in a relative residual."""

Answer = tuple[Tensor, list[Tensor], Any]


class Watch:
    """Judges a solve as TorchDEQ does, and makes its answer.

    uncounted: evaluations that TorchDEQ's step numbers leave out.
    """

    def __init__(
        self,
        x0: Any,
        max_iter: Any,
        tol: Any,
        stop_mode: Any,
        indexing: list[int] | None,
        return_final: bool,
        uncounted: int = 0,
    ):
        if not isinstance(x0, Tensor):
            raise TypeError(
                f"x0 must be a tensor, got {type(x0).__name__}: TorchDEQ packs several tensors into one, "
                "unless no_stat=True was given; leave that out"
            )
        check_count("max_iter", max_iter)
        check_number("tol", tol, 0)
        check_choice("stop_mode", stop_mode, ("abs", "rel"))
        self.x0, self.tol, self.stop_mode = x0, tol, stop_mode
        self.indexing = sorted(indexing or [])
        self.return_final, self.uncounted, self.unjudged = return_final, uncounted, 0
        self.batch = x0.shape[0] if x0.dim() else 1
        self.lowest = np.full(self.batch, INITIAL)
        self.trace = {mode: [self.lowest.copy()] for mode in ("abs", "rel")}

    def run(
        self, iteration: Iteration, evaluations: int, *, gives_value: bool, stalls: bool = False
    ) -> Answer:
        """Evaluate until every sample is below the tolerance, or `evaluations` times.

        gives_value: the answer is f(x) at the lowest residual, not x.
        stalls: whether a lack of progress ends it.
        """
        # Where no evaluation would be judged, the last one is.
        self.unjudged = iteration.unjudged = min(iteration.unjudged, evaluations - 1)
        gathers = gives_value or self.return_final  # else the iteration itself keeps the best x
        kept = iteration.rows(self.x0)
        states: list[Tensor] = []
        for evaluation in range(1, evaluations + 1):
            residual = self._residual(*iteration.evaluate(), judged=evaluation > self.unjudged)
            ended = evaluation == evaluations or self._ended(evaluation, residual, stalls)
            improved = self._improved(residual)
            if gathers:
                kept = _kept(kept, iteration.value if gives_value else iteration.x.clone(), improved)
            if not gathers or not ended:
                iteration.move(None if gathers else improved, last=ended)
            if not gathers:
                kept = iteration.best
            if evaluation == self.unjudged:
                self.lowest[:] = INITIAL
            asked = self.indexing.count(evaluation) if self.indexing else 0
            if asked:
                states += [iteration.unrows(kept.clone())] * asked
            if ended:
                break
        result = iteration.unrows(kept.clone())
        states += [result] * (len(self.indexing) - len(states))
        return result, states, self._stat(evaluations)

    def _residual(
        self, residual_sq: NDArray[np.float64], value_sq: NDArray[np.float64], judged: bool
    ) -> NDArray[np.float64]:
        """Each sample's residual, which goes into the trace where it is judged."""
        residual = np.sqrt(residual_sq)
        relative = residual / (np.sqrt(value_sq) + LEAST)
        if judged:
            self.trace["abs"].append(residual)
            self.trace["rel"].append(relative)
        return residual if self.stop_mode == "abs" else relative

    def _improved(self, residual: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The samples whose present state is to be kept."""
        if self.return_final:
            return np.ones(self.batch, dtype=bool)
        improved = residual < self.lowest
        np.copyto(self.lowest, residual, where=improved)
        return improved

    def _ended(self, evaluation: int, residual: NDArray[np.float64], stalls: bool) -> bool:
        if self.return_final or evaluation <= self.unjudged:
            return False
        highest = residual.max()
        if np.isnan(highest):  # what is not finite holds nobody up
            highest = np.nanmax(residual, initial=-1.0)
        return bool(highest < self.tol) or (stalls and self._stalled(highest))

    def _stalled(self, highest: float) -> bool:
        """TorchDEQ's rule, which in each of the last steps compares the samples of the batch."""
        steps, tolerances, ratio = STALLED
        trace = self.trace[self.stop_mode]
        if len(trace) - 1 <= steps or not highest < tolerances * self.tol:
            return False
        last = np.stack(trace[-steps:])
        return bool((last.max(axis=1) < ratio * last.min(axis=1)).all())

    def _stat(self, evaluations: int) -> Any:
        from torchdeq.solver.stat import SolverStat

        columns = evaluations - self.unjudged + 1
        traces = {mode: np.stack(trace, axis=1) for mode, trace in self.trace.items()}
        step = np.nanargmin(traces[self.stop_mode], axis=1)
        lowest = {mode: np.fmin.reduce(trace, axis=1) for mode, trace in traces.items()}
        if self.return_final:
            step[:] = columns - 1
            lowest = {mode: trace[:, -1] for mode, trace in traces.items()}
        number = np.where(step > 0, step + self.unjudged - self.uncounted, 0)
        padded = {
            mode: np.concatenate(
                [trace, np.repeat(lowest[mode][:, None], columns - trace.shape[1], 1)], axis=1
            )
            for mode, trace in traces.items()
        }
        return SolverStat(
            abs_lowest=self._tensor(lowest["abs"]),
            rel_lowest=self._tensor(lowest["rel"]),
            abs_trace=self._tensor(padded["abs"]),
            rel_trace=self._tensor(padded["rel"]),
            nstep=torch.from_numpy(number).to(self.x0.device, torch.float32),
        )

    def _tensor(self, numbers: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(numbers).to(self.x0.device, torch.promote_types(self.x0.dtype, torch.float32))

    def nothing(self, evaluations: int) -> Answer:
        """The answer for a state without entries: f is not called."""
        for trace in self.trace.values():
            trace.append(np.zeros(self.batch))
        result = self.x0.detach().clone()
        return result, [result] * len(self.indexing), self._stat(evaluations)


def _kept(before: Tensor, newest: Tensor, improved: NDArray[np.bool_]) -> Tensor:
    """The newest rows where they are improved, else those before."""
    count = np.count_nonzero(improved)  # a third of the cost of improved.all()
    if count == len(improved):
        return newest
    return torch.where(torch.from_numpy(improved).to(newest.device)[:, None], newest, before)
