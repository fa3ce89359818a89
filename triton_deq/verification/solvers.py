"""The kernels of the solvers, step by step, each from its own state in float64."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.places import best_so_far
from ..reference import anderson as reference_anderson
from ..reference import broyden as reference_broyden
from ..reference.record import Record
from ..status import Status
from .case import BOUNDS, Case, Row, name_of, relative_error, row


def check_anderson(
    case: Case, history: int = 3, mixing: float = 0.8, steps: int = 5, **options: bool
) -> Iterator[Row]:
    """The Anderson kernels over a few steps, each step from the kernels' own state in float64.

    f's values are random, so every step has a well-conditioned Gram matrix; the ring wraps around; one
    sample converges on the way and one meets a NaN.
    """
    from ..ops import anderson as op

    batch, entries = case.shape
    rule: dict[str, Any] = {
        "relative": options.get("relative", True),
        "over_batch": options.get("over_batch", False),
        "ridge": 1e-6,
        "relative_ridge": options.get("relative_ridge", True),
    }
    state = op.anderson_start(case.randn(batch, entries), history, 1e-3, steps + 1, "triton")
    for buffer in (state.residuals, state.iterates, state.dots):
        buffer.fill_(math.nan)

    held = Held("anderson")
    for step, fx in enumerate(_values(case, state.record, steps)):
        fused = _cloned(state)
        expected = _in_float64(state)
        op.anderson_residual(state, fx, step, mixing, "triton")
        reference_anderson.anderson_residual(expected, fx.double(), step, mixing)
        running = state.record.status.cpu() == Status.MAX_STEPS
        slot, filled = step % history, min(step + 1, history)
        columns = [*range(filled), history]
        for quantity, out, wanted in (
            ("residual", state.residuals[slot], expected.residuals[slot]),
            ("iterate", state.iterates[slot], expected.iterates[slot]),
            ("dots", state.dots.double().sum(1)[:, columns], expected.dots[:, 0, columns]),
        ):
            held.add("anderson_residual", quantity, relative_error(out.cpu()[running], wanted.cpu()[running]))

        expected = _in_float64(state)
        op.anderson_advance(state, step, **rule, last=False, backend="triton")
        reference_anderson.anderson_advance(expected, step, **rule, last=False)
        for quantity, out, wanted in (
            ("x", state.x, expected.x),
            ("best", best_so_far(state), expected.best),
            ("gram", state.gram.cpu()[running], expected.gram.cpu()[running]),
        ):
            held.add("anderson_advance", quantity, relative_error(out, wanted))
        held.add_record("anderson_advance", state.record, expected.record)

        if op.anderson_fits(fused.x, history) and not rule["over_batch"]:  # else it is the two kernels again
            op.anderson_step(fused, fx, step, mixing=mixing, **rule, last=False, backend="triton")
            for quantity, out, wanted in (
                ("residual", fused.residuals[slot], state.residuals[slot]),
                ("iterate", fused.iterates[slot], state.iterates[slot]),
                ("x", fused.x, expected.x),
                ("best", best_so_far(fused), expected.best),
                ("gram", fused.gram, expected.gram),
            ):
                held.add("anderson_step", quantity, relative_error(out.cpu()[running], wanted.cpu()[running]))
            held.add_record("anderson_step", fused.record, expected.record)
    # Of fewer entries than slots the Gram matrix is singular but for the ridge: its solution errs by as much.
    singular = filled > entries
    yield from held.rows(case, 4 * torch.finfo(torch.float64).eps / rule["ridge"] if singular else 0.0)


def check_broyden(
    case: Case, memory: int = 3, steps: int = 6, *, relative: bool = True, over_batch: bool = False
) -> Iterator[Row]:
    """Both Broyden kernels over a few steps, as `check_anderson` does it.

    With random values of f no pair is close to another, so M is well conditioned.
    """
    from ..ops import broyden as op

    rule: dict[str, Any] = {"relative": relative, "over_batch": over_batch, "last": False}
    state = op.broyden_start(case.randn(*case.shape), memory, 1e-3, steps + 1, "triton")
    for buffer in (state.moves, state.changes, state.dots):
        buffer.fill_(math.nan)

    held, slots = Held("broyden"), state.slots
    for step, fx in enumerate(_values(case, state.record, steps)):
        expected = _broyden_in_float64(state)
        op.broyden_residual(state, fx, step, "triton")
        reference_broyden.broyden_residual(expected, fx.double(), step)
        running = state.record.status.cpu() == Status.MAX_STEPS
        written = [(step - 1) % slots, step % slots] if step else [0]
        closed = [slot for slot in range(min(step + 1, slots)) if slot != step % slots]
        for quantity, out, wanted in (
            ("move", state.moves[written].transpose(0, 1), expected.moves[written].transpose(0, 1)),
            ("change", state.changes[written].transpose(0, 1), expected.changes[written].transpose(0, 1)),
            ("products", state.dots.sum(1)[:, :, closed], _products(state, fx, step)[:, :, closed]),
            ("norms", state.dots.sum(1)[:, :2, slots], expected.dots[:, 0, :2, slots]),
        ):
            held.add("broyden_residual", quantity, relative_error(out.cpu()[running], wanted.cpu()[running]))

        expected = _broyden_in_float64(state)
        op.broyden_advance(state, step, **rule, backend="triton")
        reference_broyden.broyden_advance(expected, step, **rule)
        for quantity, out, wanted in (
            ("x", state.x, expected.x),
            ("best", best_so_far(state), expected.best),
            ("matrix", state.matrix[:, closed][:, :, closed], expected.matrix[:, closed][:, :, closed]),
            ("squares", state.squares, expected.squares),
        ):
            held.add("broyden_advance", quantity, relative_error(out.cpu()[running], wanted.cpu()[running]))
        held.add_record("broyden_advance", state.record, expected.record)
    yield from held.rows(case)


def _products(state: reference_broyden.BroydenState, fx: Tensor, step: int) -> Tensor:
    """`dots` `[B, 3, slots]` from the pairs as they are stored, rounding included: differences cancel."""
    moves, changes = state.moves.double().transpose(0, 1), state.changes.double().transpose(0, 1)
    newest = (step - 1) % state.slots
    move = moves[:, newest]
    right = ((moves, fx.double() - state.x.double()), (moves, move - changes[:, newest]), (changes, move))
    return torch.stack([torch.einsum("bin,bn->bi", ring, vector) for ring, vector in right], dim=1)


class Held:
    """The largest error of each quantity over the steps of one check."""

    def __init__(self, op: str):
        self._op = op
        self._errors: dict[tuple[str, str], float] = {}

    def add(self, kernel: str, quantity: str, error: float) -> None:
        self._errors[kernel, quantity] = max(self._errors.get((kernel, quantity), 0.0), error)

    def add_record(self, kernel: str, record: Record, expected: Record) -> None:
        moving = record.status.cpu() == Status.MAX_STEPS
        for quantity, out, wanted in (
            ("residuals", record.residual, expected.residual),
            ("best of", record.best, expected.best),
            ("limit", record.limit, expected.limit),
            ("steps", record.steps, expected.steps),
            ("count", record.count.cpu()[moving], expected.count[moving]),
        ):
            self.add(kernel, quantity, relative_error(out, wanted))
        differing = (record.status.cpu() != expected.status).sum().item()
        self.add(kernel, "status", float(differing))

    def rows(self, case: Case, of_x: float = 0.0) -> Iterator[Row]:
        """of_x: the least bound of the next iterate, where its coefficients are ill-conditioned."""
        for (kernel, quantity), error in self._errors.items():
            bound = 0.0 if quantity == "status" else _bound(case, quantity)
            bound = max(bound, of_x) if quantity == "x" else bound
            yield row(case, self._op, kernel, quantity, error, bound)


def _values(case: Case, record: Record, steps: int) -> Iterator[Tensor]:
    """Random values of f. One sample is made to stop on the way, and one meets a NaN."""
    batch, entries = case.shape
    for step in range(steps):
        fx = case.randn(batch, entries, stream=step + 1)
        if batch > 1 and step == 1:
            record.tolerance[0] = math.inf
        if batch > 2 and step == 2:
            fx[1] = math.nan
        yield fx


def _bound(case: Case, quantity: str) -> float:
    """The decision runs in float64 whatever the state's dtype, so its quantities are held to that."""
    decided = quantity in ("gram", "matrix", "squares", "residuals", "best of", "limit", "steps", "count")
    return BOUNDS["float64" if decided else name_of(case.dtype)]


def _cloned(state: reference_anderson.AndersonState) -> reference_anderson.AndersonState:
    tensors: dict[str, Any] = {
        name: value.clone() for name, value in vars(state).items() if isinstance(value, Tensor)
    }
    record = Record(state.x.shape[0], 1.0, state.x.device)
    record.data.copy_(state.record.data)
    return replace(state, **tensors, record=record)


def _in_float64(state: reference_anderson.AndersonState) -> reference_anderson.AndersonState:
    """A copy of a kernel's state that the reference can go on from."""
    history = state.history
    return reference_anderson.AndersonState(
        x=state.x.to(torch.float64, copy=True),
        best=best_so_far(state).to(torch.float64, copy=True),
        residuals=state.residuals.to(torch.float64, copy=True),
        iterates=state.iterates.to(torch.float64, copy=True),
        gram=state.gram.cpu().clone(),
        dots=state.dots.double().sum(1, keepdim=True)[..., : history + 1].contiguous(),
        record=_copied(state.record),
        before=state.before,
        active=state.active,
        spare=torch.empty_like(state.x, dtype=torch.float64),
        other=state.other[:0],
    )


def _broyden_in_float64(state: reference_broyden.BroydenState) -> reference_broyden.BroydenState:
    batch, entries = state.x.shape
    return reference_broyden.BroydenState(
        x=state.x.to(torch.float64, copy=True),
        best=best_so_far(state).to(torch.float64, copy=True),
        moves=state.moves.to(torch.float64, copy=True),
        changes=state.changes.to(torch.float64, copy=True),
        matrix=state.matrix.cpu().clone(),
        squares=state.squares.cpu().clone(),
        dots=state.dots.sum(1, keepdim=True)[..., : state.slots + 1].contiguous(),
        record=_copied(state.record),
        before=state.before,
        active=state.active,
        spare=state.x.new_empty((batch, 2, entries), dtype=torch.float64),
        other=state.other[:0],
    )


def _copied(record: Record) -> Record:
    """A copy on the host."""
    copy = Record(record.data.shape[1], 1.0, torch.device("cpu"))
    copy.data.copy_(record.data)
    return copy
