"""`triton-deq verify`: every kernel against its float64 reference, on this machine.

On a GPU the compiled kernels run; elsewhere Triton's interpreter runs them. Inputs are fresh random
numbers, outputs are filled with NaN before each launch, and the reference computes from the same inputs
in float64.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import parse_count
from .reference import anderson as reference_anderson
from .reference import broyden as reference_broyden
from .reference import jacobian as reference_jacobian
from .reference.record import Record
from .status import Status

BOUNDS = {"float64": 1e-12, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
"""Largest relative error, ‖out − reference‖ / ‖reference‖, for each dtype."""
SHAPES = ((1, 1), (3, 37), (2, 4100))
"""(batch, entries): the smallest, an odd one, and one that is cut into several unequal parts."""
LAYOUTS = ("contiguous", "transposed", "strided")
"""Of the inputs: "strided" takes every other entry of a tensor whose other entries are NaN."""


@dataclass(frozen=True)
class Row:
    """One quantity that a kernel wrote, held against the reference.

    `error` is relative, except for a status: there it is the number of samples that differ, and the
    bound is 0.
    """

    op: str
    kernel: str
    dtype: str
    shape: tuple[int, int]
    layout: str
    quantity: str
    error: float
    bound: float
    device: str
    seed: int

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class Case:
    """What a check runs on. layout: how the inputs `[B, N]` lie in memory, one of `LAYOUTS`."""

    dtype: torch.dtype
    shape: tuple[int, int]
    device: torch.device
    seed: int
    layout: str = "contiguous"

    def randn(self, *shape: int, stream: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        value = torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        if self.layout == "transposed":
            return value.t().contiguous().t()
        if self.layout == "strided":
            return torch.stack((value, torch.full_like(value, math.nan)), dim=-1)[..., 0]
        return value


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖ in float64; equal entries, NaN and infinity included, count as exact."""
    out, expected = out.cpu().double(), expected.cpu().double()
    same = (out == expected) | (out.isnan() & expected.isnan())
    difference = torch.where(same, 0, out - expected).norm().item()
    if difference == 0:
        return 0.0
    scale = expected[expected.isfinite()].norm().item()
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf


# ---------------------------------------------------------------------------------------------- the checks


def check_anderson(
    case: Case, history: int = 3, mixing: float = 0.8, steps: int = 5, **options: bool
) -> Iterator[Row]:
    """The Anderson kernels over a few steps, each step from the kernels' own state in float64.

    f's values are random, so every step has a well-conditioned Gram matrix; the ring wraps around; one
    sample converges on the way and one meets a NaN.
    """
    from .ops import anderson as op
    from .ops.launch import MAX_BLOCK

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

    held = _Held("anderson")
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
            ("best", state.best, expected.best),
            ("gram", state.gram.cpu()[running], expected.gram.cpu()[running]),
        ):
            held.add("anderson_advance", quantity, relative_error(out, wanted))
        held.add_record("anderson_advance", state.record, expected.record)

        if case.shape[1] <= MAX_BLOCK and not rule["over_batch"]:  # else it is the two kernels again
            op.anderson_step(fused, fx, step, mixing=mixing, **rule, last=False, backend="triton")
            for quantity, out, wanted in (
                ("residual", fused.residuals[slot], state.residuals[slot]),
                ("iterate", fused.iterates[slot], state.iterates[slot]),
                ("x", fused.x, expected.x),
                ("best", fused.best, expected.best),
                ("gram", fused.gram, expected.gram),
            ):
                held.add("anderson_step", quantity, relative_error(out.cpu()[running], wanted.cpu()[running]))
            held.add_record("anderson_step", fused.record, expected.record)
    yield from held.rows(case)


def check_broyden(
    case: Case, memory: int = 3, steps: int = 6, *, relative: bool = True, over_batch: bool = False
) -> Iterator[Row]:
    """Both Broyden kernels over a few steps, as `check_anderson` does it.

    With random values of f no pair is close to another, so M is well conditioned.
    """
    from .ops import broyden as op

    rule: dict[str, Any] = {"relative": relative, "over_batch": over_batch, "last": False}
    state = op.broyden_start(case.randn(*case.shape), memory, 1e-3, steps + 1, "triton")
    for buffer in (state.moves, state.changes, state.dots):
        buffer.fill_(math.nan)

    held, slots = _Held("broyden"), state.slots
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
            ("best", state.best, expected.best),
            ("matrix", state.matrix[:, closed][:, :, closed], expected.matrix[:, closed][:, :, closed]),
            ("squares", state.squares, expected.squares),
        ):
            held.add("broyden_advance", quantity, relative_error(out.cpu()[running], wanted.cpu()[running]))
        held.add_record("broyden_advance", state.record, expected.record)
    yield from held.rows(case)


def check_probe(case: Case) -> Iterator[Row]:
    """The probes of both distributions, entry by entry, and that each entry was written."""
    from .ops.jacobian import probe

    seed = torch.tensor([(case.seed + 1) * 0x5DEECE66D], device=case.device)
    like = torch.empty(case.shape, dtype=case.dtype, device=case.device)
    for index, distribution in enumerate(("gaussian", "rademacher")):
        out = probe(like, seed, index, distribution, "triton")
        wanted = reference_jacobian.probe(like.shape, seed, index, distribution, torch.float64)
        yield _row(case, "jacobian", "probe", distribution, relative_error(out, wanted))


def check_squared_norm(case: Case) -> Iterator[Row]:
    """The squared norms and their gradient."""
    from .ops.jacobian import squared_norm

    value = case.randn(*case.shape).requires_grad_()
    weight = case.randn(case.shape[0], stream=1)
    out = squared_norm(value, "triton")
    (grad,) = torch.autograd.grad((out * weight).sum(), value)

    wide = value.detach().double().requires_grad_()
    wanted = reference_jacobian.squared_norm(wide)
    (wanted_grad,) = torch.autograd.grad((wanted * weight.double()).sum(), wide)
    yield _row(case, "jacobian", "squared_norm", "value", relative_error(out, wanted))
    yield _row(case, "jacobian", "squared_norm", "gradient", relative_error(grad, wanted_grad))


def _products(state: reference_broyden.BroydenState, fx: Tensor, step: int) -> Tensor:
    """`dots` `[B, 3, slots]` from the pairs as they are stored, rounding included: differences cancel."""
    moves, changes = state.moves.double().transpose(0, 1), state.changes.double().transpose(0, 1)
    newest = (step - 1) % state.slots
    move = moves[:, newest]
    right = ((moves, fx.double() - state.x.double()), (moves, move - changes[:, newest]), (changes, move))
    return torch.stack([torch.einsum("bin,bn->bi", ring, vector) for ring, vector in right], dim=1)


class _Held:
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

    def rows(self, case: Case) -> Iterator[Row]:
        for (kernel, quantity), error in self._errors.items():
            bound = 0.0 if quantity == "status" else _bound(case, quantity)
            yield _row(case, self._op, kernel, quantity, error, bound)


def _values(case: Case, record: Record, steps: int) -> Iterator[Tensor]:
    """Random values of f. One sample is made to stop on the way, and one meets a NaN."""
    batch, entries = case.shape
    for step in range(steps):
        fx = case.randn(batch, entries, stream=step + 1)
        if batch > 1 and step == 1:
            record.status[0] = Status.CONVERGED
        if batch > 2 and step == 2:
            fx[1] = math.nan
        yield fx


CHECKS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "anderson": check_anderson,
    "broyden": check_broyden,
    "probe": check_probe,
    "squared_norm": check_squared_norm,
}


def _cloned(state: reference_anderson.AndersonState) -> reference_anderson.AndersonState:
    tensors = {name: value.clone() for name, value in vars(state).items() if isinstance(value, Tensor)}
    record = Record(state.x.shape[0], 1.0, state.x.device)
    record.data.copy_(state.record.data)
    return replace(state, **tensors, record=record)


def _in_float64(state: reference_anderson.AndersonState) -> reference_anderson.AndersonState:
    """A copy of a kernel's state that the reference can go on from."""
    history = state.history
    return reference_anderson.AndersonState(
        x=state.x.to(torch.float64, copy=True),
        best=state.best.to(torch.float64, copy=True),
        residuals=state.residuals.to(torch.float64, copy=True),
        iterates=state.iterates.to(torch.float64, copy=True),
        gram=state.gram.cpu().clone(),
        dots=state.dots.double().sum(1, keepdim=True)[..., : history + 1].contiguous(),
        record=_copied(state.record),
        before=state.before,
        active=state.active,
        spare=torch.empty_like(state.x, dtype=torch.float64),
    )


def _broyden_in_float64(state: reference_broyden.BroydenState) -> reference_broyden.BroydenState:
    batch, entries = state.x.shape
    return reference_broyden.BroydenState(
        x=state.x.to(torch.float64, copy=True),
        best=state.best.to(torch.float64, copy=True),
        moves=state.moves.to(torch.float64, copy=True),
        changes=state.changes.to(torch.float64, copy=True),
        matrix=state.matrix.cpu().clone(),
        squares=state.squares.cpu().clone(),
        dots=state.dots.sum(1, keepdim=True)[..., : state.slots + 1].contiguous(),
        record=_copied(state.record),
        before=state.before,
        active=state.active,
        spare=state.x.new_empty((batch, 2, entries), dtype=torch.float64),
    )


def _copied(record: Record) -> Record:
    """A copy on the host."""
    copy = Record(record.data.shape[1], 1.0, torch.device("cpu"))
    copy.data.copy_(record.data)
    return copy


def _bound(case: Case, quantity: str) -> float:
    """The decision runs in float64 whatever the state's dtype, so its quantities are held to that."""
    decided = quantity in ("gram", "matrix", "squares", "residuals", "best of", "limit", "steps", "count")
    return BOUNDS["float64" if decided else _name(case.dtype)]


def _row(case: Case, op: str, kernel: str, quantity: str, error: float, bound: float | None = None) -> Row:
    device = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else "CPU (interpreter)"
    bound = BOUNDS[_name(case.dtype)] if bound is None else bound
    return Row(
        op, kernel, _name(case.dtype), case.shape, case.layout, quantity, error, bound, device, case.seed
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------- the command


def cases(seed: int, quick: bool, dtypes: list[str]) -> Iterator[Case]:
    """The fixed shapes; `quick` takes one of them."""
    for dtype in dtypes:
        for shape in SHAPES[1:2] if quick else SHAPES:
            yield Case(getattr(torch, dtype), shape, _device(), seed)


def random_cases(seeds: int, first: int, dtypes: list[str]) -> Iterator[Case]:
    """One random shape, dtype and layout a seed; small in the interpreter, which is slow."""
    most = 1 << 20 if _device().type == "cuda" else 5000
    for seed in range(first, first + seeds):
        draw = random.Random(seed)
        entries = round(math.exp(draw.uniform(0, math.log(most))))
        shape = (draw.randint(1, max(1, min(64, most // entries // 4))), entries)
        if _device().type == "cpu":
            shape = (min(shape[0], 5), entries)
        yield Case(getattr(torch, draw.choice(dtypes)), shape, _device(), seed, draw.choice(LAYOUTS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one shape, float32 and bfloat16 only")
    parser.add_argument("--kernel", choices=sorted(CHECKS), help="only this check")
    parser.add_argument("--dtype", choices=sorted(BOUNDS), help="only this dtype")
    parser.add_argument("--seed", type=parse_count(0), default=0, help="of the random inputs (default 0)")
    parser.add_argument(
        "--seeds", type=parse_count(1), metavar="N", help="instead: N random shapes, dtypes, strides"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too ('-': on standard output)")


def run(arguments: argparse.Namespace) -> int:
    """Run the checks, print a row each, return 1 if one is over its bound."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported, which is below
    dtypes = [arguments.dtype] if arguments.dtype else list(BOUNDS)
    if arguments.quick and not arguments.dtype:
        dtypes = ["float32", "bfloat16"]
    checks = [CHECKS[arguments.kernel]] if arguments.kernel else list(CHECKS.values())
    if arguments.seeds is None:
        chosen = cases(arguments.seed, arguments.quick, dtypes)
    else:
        chosen = random_cases(arguments.seeds, arguments.seed, dtypes)

    began = time.perf_counter()
    rows: list[Row] = []
    show = print if arguments.json != "-" else lambda *_: None
    show(
        f"{'kernel':<18} {'dtype':<9} {'shape':>12} {'layout':<11} {'quantity':<11} {'error':>9} {'bound':>9}"
    )
    for case in chosen:
        for check in checks:
            for row in check(case):
                rows.append(row)
                show(_line(row))
    if arguments.json:
        text = json.dumps([{**asdict(row), "passed": row.passed} for row in rows], indent=1)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n")
    return _conclude(rows, time.perf_counter() - began, arguments)


def _line(row: Row) -> str:
    shape = "x".join(map(str, row.shape))
    verdict = "" if row.passed else "  OVER ITS BOUND"
    return (
        f"{row.kernel:<18} {row.dtype:<9} {shape:>12} {row.layout:<11} {row.quantity:<11} "
        f"{row.error:9.1e} {row.bound:9.1e}"
        f"{verdict}"
    )


def _conclude(rows: list[Row], seconds: float, arguments: argparse.Namespace) -> int:
    """One closing sentence, on standard error where standard output is JSON."""
    out = sys.stderr if arguments.json == "-" else sys.stdout
    failed = [row for row in rows if not row.passed]
    worst = max(rows, key=_excess)
    within = f"{len(rows) - len(failed)} of {len(rows)} rows within their bounds"
    print(f"{within} on {worst.device} in {seconds:.0f} s", file=out)
    if arguments.seeds is not None or failed:
        check = next(name for name in CHECKS if worst.kernel.startswith(name))
        sweep = "--seeds 1 " if arguments.seeds is not None else ""
        print(
            f"worst: {worst.kernel} {worst.quantity}, {worst.error:.1e} of {worst.bound:.1e}; again with: "
            f"triton-deq verify {sweep}--seed {worst.seed} --kernel {check}",
            file=out,
        )
    return 1 if failed else 0


def _excess(row: Row) -> float:
    """How far a row is towards its bound, or beyond it."""
    if row.bound == 0:
        return math.inf if row.error else 0.0
    return math.inf if math.isnan(row.error) else row.error / row.bound


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
