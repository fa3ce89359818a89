"""One evaluation of f after another with our solvers, as TorchDEQ, locuslab/deq and the tutorial do a solve.

They judge every evaluation by norms over the batch, and let no sample stop by itself. So the modules decide
on the host, once an evaluation, and an iteration only stops samples that are not finite.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import backend as backends
from ..checks import check_state
from ..ops.anderson import anderson_advance, anderson_residual, anderson_squares, anderson_start
from ..ops.broyden import broyden_advance, broyden_residual, broyden_squares, broyden_start
from ..ops.places import best_so_far
from ..reference.anderson import anderson_mix
from ..reference.broyden import broyden_mix
from ..reference.rows import SAFE, keep_best
from ..solvers.layout import Layout
from .line_search import armijo
from .low_rank import LowRank

Function = Callable[[Tensor], Tensor]
Squares = tuple[NDArray[np.float64], NDArray[np.float64]]


INITIAL = 1e8
"""What both libraries take for the lowest residual before the first step."""

STALLED = (30, 3.0, 1.3)
"""Broyden ends when, after so many steps and below so many tolerances, the last residuals differ by less."""


def check_packed(x0: Any) -> None:
    """x0 must be one tensor."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}: pack several into one [B, ...]")


class Iteration:
    """What the methods share: f on rows, and the best iterate so far.

    f: from a state like x0 to its next value; it is cast to x0's dtype, as an assignment would.
    x0: `[B, ...]`, real floating; a scalar is a batch of one.
    unjudged: how many evaluations come before the first that counts.

    `evaluate` leaves x and f(x) in `x` and `value`, rows `[B, N]`, and gives `‖f(x) − x‖²` and `‖f(x)‖²` of
    each sample, float64 `[B]`, NaN from where a sample is not finite on. `value` stays as it is. `move` then
    goes to the next x, unless that was the last; `best` keeps the x of the lowest residual, if `improved`
    tells where that is. `going` tells which samples have been finite so far.
    """

    unjudged = 0
    x: Tensor
    value: Tensor
    best: Tensor

    def __init__(self, f: Function, x0: Tensor, backend: str):
        check_state("x0", x0 if x0.dim() else x0[None])
        self._f, self._shape = f, x0.shape
        self._layout = Layout(x0) if x0.dim() > 2 else None
        self.backend, _ = backends.choose(x0, backend)
        self.evaluations = 0
        self.going = np.ones(x0.shape[0] if x0.dim() else 1, dtype=bool)
        self._first: Tensor | None = None
        self._returned: tuple[Tensor, int] | None = None
        self._copies = self.backend == "triton"  # a graph's output is overwritten by the next replay

    def rows(self, x: Tensor) -> Tensor:
        """`[B, N]`, as a view where that can be."""
        if self._layout is not None:
            return self._layout.rows(x)
        return x if x.dim() == 2 else x.reshape(-1, 1)

    def unrows(self, rows: Tensor) -> Tensor:
        """The state again."""
        return self._layout.unrows(rows) if self._layout is not None else rows.view(self._shape)

    def value_at(self, x: Tensor) -> Tensor:
        """f of rows, as rows."""
        value = self._f(self.unrows(x))
        if value.shape != self._shape:
            raise ValueError(
                f"func(x) has shape {tuple(value.shape)}, x0 has {tuple(self._shape)}: a fixed point needs "
                "them equal; check func, or the shape of x0"
            )
        return self.rows(value).to(x.dtype)

    def lasting_value_at(self, x: Tensor) -> Tensor:
        """The same in memory that f does not write to again: copied where f returns one memory each time."""
        value = self.value_at(x)
        if self._returned is not None and self._returned[0]._version != self._returned[1]:
            raise RuntimeError("func wrote to a tensor that it had returned before: let it return a clone")
        if self._first is None:
            self._first = value
            return value.clone()
        self._copies |= value.data_ptr() == self._first.data_ptr()
        if self._copies or value.data_ptr() == x.data_ptr():
            return value.clone()
        self._returned = None if value.is_inference() else (value, value._version)
        return value

    def evaluate(self) -> Squares:
        squares = self._evaluate()
        self.evaluations += 1
        residual_sq, value_sq = squares
        if not np.isfinite(residual_sq.sum() + value_sq.sum()) or not self.going.all():
            self.going &= np.isfinite(residual_sq) & np.isfinite(value_sq)
            return np.where(self.going, residual_sq, np.nan), np.where(self.going, value_sq, np.nan)
        return squares

    def _evaluate(self) -> Squares:
        raise NotImplementedError

    def move(self, improved: NDArray[np.bool_] | None, last: bool) -> None:
        raise NotImplementedError


class EngineIteration(Iteration):
    """On an engine's state: Anderson's, and Broyden's while it keeps every pair.

    The reference moves as it is told. The kernels, and compiled steps, judge by themselves in the same pass.
    """

    def __init__(self, f: Function, x0: Tensor, backend: str, relative: bool, over_batch: bool):
        super().__init__(f, x0, backend)
        self.backend = backends.choose_step(x0, backend)
        self._judging = {"relative": relative, "over_batch": over_batch}
        self._state: Any = None

    def move(self, improved: NDArray[np.bool_] | None, last: bool) -> None:
        state, step = self._state, self.evaluations - 1
        if self.backend == "reference":
            if improved is not None:
                keep_best(state, improved, self.going)
            if not last:
                self._mix(step)
            return
        if step == self.unjudged:
            state.record.best.fill_(torch.inf)  # what came before does not count
        self._advance(step, last)
        if step == 0:
            state.record.limit.fill_(torch.inf)  # the originals do not call it divergence

    def _mix(self, step: int) -> None:
        raise NotImplementedError

    def _advance(self, step: int, last: bool) -> None:
        raise NotImplementedError

    @property
    def x(self) -> Tensor:  # type: ignore[override]
        return self._state.x

    @property
    def best(self) -> Tensor:  # type: ignore[override]
        return best_so_far(self._state)


class AndersonIteration(EngineIteration):
    """Anderson's, with the originals' bare second step: `x₁ = f(x₀)` whatever the mixing."""

    def __init__(
        self,
        f: Function,
        x0: Tensor,
        *,
        evaluations: int,
        history: int,
        mixing: float,
        ridge: float,
        relative: bool,
        over_batch: bool,
        unjudged: int,
        backend: str,
    ):
        super().__init__(f, x0, backend, relative, over_batch)
        self.unjudged, self._mixing, self._ridge = unjudged, float(mixing), float(ridge)
        self._state = anderson_start(self.rows(x0.detach()), history, 0.0, evaluations, self.backend)

    def _evaluate(self) -> Squares:
        self.value = self.lasting_value_at(self._state.x)
        anderson_residual(self._state, self.value, self.evaluations, self._mixing, self.backend)
        return anderson_squares(self._state, self.evaluations, self.backend)

    def move(self, improved: NDArray[np.bool_] | None, last: bool) -> None:
        super().move(improved, last)
        if self.evaluations == 1 and self._mixing != 1:
            self._state.x.copy_(self.value)

    def _mix(self, step: int) -> None:
        anderson_mix(self._state, step, self.going, self._ridge, relative_ridge=False)

    def _advance(self, step: int, last: bool) -> None:
        anderson_advance(
            self._state,
            step,
            ridge=self._ridge,
            relative_ridge=False,
            last=last,
            backend=self.backend,
            **self._judging,
        )


class BroydenIteration(EngineIteration):
    """Broyden's with every pair of the solve, and a line search on request."""

    unjudged = 1

    def __init__(
        self,
        f: Function,
        x0: Tensor,
        *,
        evaluations: int,
        line_search: bool,
        relative: bool,
        over_batch: bool,
        backend: str,
    ):
        super().__init__(f, x0, backend, relative, over_batch)
        self._searches = line_search
        self._state = broyden_start(self.rows(x0.detach()), evaluations, 0.0, evaluations, self.backend)
        self._last: tuple[Tensor, Tensor] | None = None

    def _evaluate(self) -> Squares:
        state = self._state
        if self._last is None:
            self.value = self.lasting_value_at(state.x)
        else:
            x, g = self._last
            accepted, self.value = searched(self.value_at, x, state.x - x, g)
            state.x.copy_(accepted)
        broyden_residual(state, self.value, self.evaluations, self.backend)
        return broyden_squares(state, self.evaluations, self.backend)

    def move(self, improved: NDArray[np.bool_] | None, last: bool) -> None:
        if self._searches:
            self._last = self.x.clone(), self.value - self.x
        super().move(improved, last)

    def _mix(self, step: int) -> None:
        broyden_mix(self._state, step, self.going, self.going)

    def _advance(self, step: int, last: bool) -> None:
        broyden_advance(self._state, step, last=last, backend=self.backend, **self._judging)


class PicardIteration(Iteration):
    """Plain iteration where no kernel does it: `x⁺ = f(x)` without a copy."""

    def __init__(self, f: Function, x0: Tensor, backend: str):
        super().__init__(f, x0, backend)
        self.x = self.rows(x0.detach())
        self._residual = torch.empty_like(self.x)

    def _evaluate(self) -> Squares:
        self.value = self.lasting_value_at(self.x)
        return squares_of(torch.sub(self.value, self.x, out=self._residual), self.value)

    def move(self, improved: NDArray[np.bool_] | None, last: bool) -> None:
        self.x = self.value


class BoundedBroydenIteration(Iteration):
    """Broyden's with a ring of rank-one terms; see `LowRank`."""

    unjudged = 1

    def __init__(self, f: Function, x0: Tensor, *, terms: int, line_search: bool, backend: str):
        super().__init__(f, x0, backend)
        self._searches = line_search
        self.x = self.best = self.rows(x0.detach()).clone()
        self._inverse = LowRank(terms, self.x)
        self._last: tuple[Tensor, Tensor] | None = None

    def _evaluate(self) -> Squares:
        if self._last is not None and self._searches:
            x, g = self._last
            self.x, self.value = searched(self.value_at, x, self.x - x, g)
        else:
            self.value = self.lasting_value_at(self.x)
        self._residual = self.value - self.x
        return squares_of(self._residual, self.value)

    def move(self, improved: NDArray[np.bool_] | None, last: bool) -> None:
        if improved is not None:
            self.best = torch.where(_column(improved, self.x), self.x, self.best)
        if last:
            return
        if self._last is None:
            direction = self._residual
        else:
            x, g = self._last
            direction = self._inverse.direction(self.x - x, self._residual - g, self._residual)
        self._last = self.x, self._residual
        self.x = torch.where(_column(self.going, self.x), (self.x + direction).to(self.x.dtype), self.x)


def squares_of(residual: Tensor, value: Tensor) -> Squares:
    """`‖residual‖²` and `‖value‖²` of rows; summed again in float64 where float32 is near a limit."""
    norms = [torch.linalg.vector_norm(rows, dim=1).double() for rows in (residual, value)]
    squares = [norm.square_().cpu().numpy() for norm in norms]
    if residual.dtype != torch.float64 and not all(
        square.min() > SAFE[0] and square.max() < SAFE[1] for square in squares
    ):
        norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in (residual, value)]
        squares = [norm.square_().cpu().numpy() for norm in norms]
    return squares[0], squares[1]


def _column(mask: NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(mask).to(like.device)[:, None]


def searched(f: Function, x: Tensor, update: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The iterate and f there that `armijo` accepts along `update`; the whole step where it accepts none."""
    last: list[tuple[Tensor, Tensor]] = []

    def phi(scale: float) -> float:
        at = x + scale * update
        last[:] = [(at, f(at))]
        square = torch.linalg.vector_norm(last[0][1] - at).item() ** 2
        return square if np.isfinite(square) else np.inf

    if armijo(phi, torch.linalg.vector_norm(g).item() ** 2) is None:
        phi(1.0)  # f may have written over what it gave before
    return last[0]
