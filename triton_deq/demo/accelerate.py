"""An existing DEQ, accelerated: the same module under the textbook's solver and under ours.

The rules of the comparison: the same f, start, history and tolerance; the same stopping rule where a method
lets us choose it (the relative residual of the whole batch); runs interleaved, one of each in turn; ratios
taken within a turn, so that a slow second on a shared machine slows both sides.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import triton_deq as td

from . import textbook
from .synthetic import backend_for

try:  # a peer that is measured where it is installed
    import torchdeq
except ImportError:
    torchdeq = None

HISTORY = 6
TOL = 1e-3
TIGHT_TOL = 1e-5
MAX_STEPS = 50
FIXED_STEPS = 20
BATCH = 32
PATIENCE_S = 2.0
RADIUS = 0.8
"""Spectral radius of the cells at their fixed points: a solve takes the 10 to 20 steps of a usual DEQ."""
OURS = "triton-deq"
TEXTBOOK = "textbook"
PEER = "TorchDEQ"

Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """One size of the existing DEQ; the name tells the shape of a sample's state."""

    name: str
    channels: int
    scale: int
    separable: bool
    rounds: int


MODELS = (
    Model("conv 16×8×8", 16, 1, False, 9),
    Model("conv 64×8×8", 64, 1, False, 4),
    Model("separable 32×16×16", 32, 2, True, 4),
)
QUICK_MODELS = (Model("conv 16×8×8", 16, 1, False, 3),)
SIZES = ((32, 64), (32, 256), (32, 1024), (32, 4096), (32, 16384))
QUICK_SIZES = ((32, 256), (32, 4096))


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[-1])


@dataclass(frozen=True)
class Timing:
    """One method in one comparison.

    Attributes:
        method, case, quantity: what ran. batch, entries: the state.
        ms: its time. ratio: the textbook's time divided by it, so above 1 is faster.
        steps: evaluations of f without a graph, "20"; in a training step also the vector-Jacobian products
            of the backward solve, "20 + 20".
        error: the residual where the solve ended, recomputed; in a training step the gradient's relative
            error.
    """

    case: str
    quantity: str
    method: str
    batch: int
    entries: int
    ms: Spread
    ratio: Spread
    steps: str | None = None
    error: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How far a method's fixed point and gradients are from the textbook's, relative; `bound` for both."""

    case: str
    method: str
    dtype: str
    fixed_point: float
    gradient: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.fixed_point <= self.bound and self.gradient <= self.bound


@dataclass
class Comparison:
    """All results of this part."""

    agreements: list[Agreement] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)


def work(quick: bool) -> int:
    """How often `compare` ticks."""
    return len(QUICK_SIZES if quick else SIZES) + 2 * len(QUICK_MODELS if quick else MODELS)


def compare(
    x: Tensor, y: Tensor, quick: bool, seed: int, device: str, tick: Callable[[], None]
) -> Comparison:
    """Run everything; x `[≥ 32, 1, 8, 8]` are digits and y their labels."""
    found = Comparison()
    for batch, entries in QUICK_SIZES if quick else SIZES:
        found.timings += solver_alone(batch, entries, 5 if quick else 15, device)
        tick()
    x, y = x[:BATCH].to(device), y[:BATCH].to(device)
    for model in QUICK_MODELS if quick else MODELS:
        problem = textbook.digits_model(model.channels, model.scale, model.separable, seed)
        for module in problem:
            module.to(device)
        set_radius(problem, x, RADIUS, device)
        found.agreements += agreement(model.name, problem, x[:8], y[:8])
        tick()
        found.timings += whole_solves(model, problem, x, y, device)
        tick()
    return found


@torch.no_grad()
def set_radius(problem: textbook.Problem, x: Tensor, radius: float, device: str) -> None:
    """Scale the cell's last weights until its largest spectral radius over the batch is about `radius`.

    Random weights alone would make one seed's problem trivial and give another's no fixed point.
    """
    injected = problem.embed(x)
    *_, last_weight = (weight for weight in problem.cell.second.parameters() if weight.dim() == 4)
    for _ in range(4):
        f = partial(_evaluate, problem.cell, injected)
        z = td.solve(f, torch.zeros_like(injected), max_steps=MAX_STEPS, backend=backend_for(device)).value
        found = td.spectral_radius(f, z, steps=20).max().item()
        last_weight.mul_(radius / found)


def _evaluate(cell: nn.Module, injected: Tensor, z: Tensor) -> Tensor:
    return cell(z, injected)


# --------------------------------------------------------------------------------------------- the methods


def forward_solvers(tol: float, max_steps: int, device: str) -> dict[str, Solve]:
    """Each method as `(f, z0) -> z`, without gradients."""
    ours = td.Anderson(history=HISTORY)
    solvers: dict[str, Solve] = {
        TEXTBOOK: lambda f, z0: textbook.anderson(f, z0, HISTORY, tol, max_steps)[0],
        OURS: lambda f, z0: (
            td.solve(
                f, z0, ours, tol=tol, max_steps=max_steps, norm_over="batch", backend=backend_for(device)
            ).value
        ),
    }
    if torchdeq is not None:
        solvers[PEER] = lambda f, z0: torchdeq.solver.get_solver("anderson")(
            f, z0, max_iter=max_steps, tol=tol, stop_mode="rel", m=HISTORY
        )[0]
    return solvers


def layers(cell: nn.Module, tol: float, max_steps: int, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each method as a differentiable `x -> z` around the same, untouched cell."""
    ours = td.Anderson(history=HISTORY)

    def accelerated(x: Tensor) -> Tensor:
        return td.fixed_point(
            lambda z: cell(z, x),
            torch.zeros_like(x),
            ours,
            tol=tol,
            max_steps=max_steps,
            norm_over="batch",
            gradient=td.ImplicitGradient(ours, tol=tol, max_steps=max_steps),
            backend=backend_for(device),
        )

    found: dict[str, Callable[[Tensor], Tensor]] = {
        TEXTBOOK: textbook.DEQLayer(cell, history=HISTORY, tol=tol, max_steps=max_steps),
        OURS: accelerated,
    }
    if torchdeq is not None:
        peer = torchdeq.get_deq(
            f_solver="anderson",
            b_solver="anderson",
            f_max_iter=max_steps,
            b_max_iter=max_steps,
            f_tol=tol,
            b_tol=tol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            ift=True,
        )
        found[PEER] = lambda x: peer(lambda z: cell(z, x), torch.zeros_like(x))[0][-1]
    return found


# ----------------------------------------------------------------------------------------- the comparisons


def solver_alone(batch: int, entries: int, rounds: int, device: str) -> Iterator[Timing]:
    """What a step costs beside f: f's values are random and made beforehand, 20 steps are taken by all."""
    values = [torch.randn(batch, entries, device=device) for _ in range(FIXED_STEPS)]
    z0 = torch.zeros(batch, entries, device=device)

    def replay(solve: Solve) -> Callable[[], None]:
        def go() -> None:
            following = iter(values)
            solve(lambda _: next(following), z0)

        return go

    solvers = forward_solvers(0.0, FIXED_STEPS, device)
    times = interleaved({name: replay(solve) for name, solve in solvers.items()}, rounds, device)
    per_step = {name: [ms / FIXED_STEPS for ms in spent] for name, spent in times.items()}
    yield from timings("solver alone", "a step", per_step, batch, entries)


def agreement(case: str, problem: textbook.Problem, x: Tensor, y: Tensor) -> Iterator[Agreement]:
    """Fixed points and gradients of all parameters, in float32 as it is used and in float64 to tell apart
    a difference of the method from one of rounding."""
    for dtype, tol, bound in ((torch.float32, 1e-5, 1e-3), (torch.float64, 1e-8, 1e-6)):
        copied = cast(problem, dtype)
        found = {
            name: solution_and_gradient(copied, layer, x.to(dtype), y)
            for name, layer in layers(copied.cell, tol, 400, x.device.type).items()
        }
        z, gradient = found[TEXTBOOK]
        for name in found.keys() - {TEXTBOOK}:
            yield Agreement(
                case,
                name,
                str(dtype).removeprefix("torch."),
                ((found[name][0] - z).norm() / z.norm()).item(),
                ((found[name][1] - gradient).norm() / gradient.norm()).item(),
                bound,
            )


def cast(problem: textbook.Problem, dtype: torch.dtype) -> textbook.Problem:
    """A copy in another dtype."""
    copied = copy.deepcopy(problem)
    for module in copied:
        module.to(dtype)
    return copied


def solution_and_gradient(
    problem: textbook.Problem, layer: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The equilibrium, and the gradient of all parameters in one vector."""
    z = layer(problem.embed(x))
    loss = nn.functional.cross_entropy(problem.head(z), y)
    for parameter in problem.parameters():
        parameter.grad = None
    loss.backward()
    gradients = [parameter.grad for parameter in problem.parameters()]
    return z.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def whole_solves(
    model: Model, problem: textbook.Problem, x: Tensor, y: Tensor, device: str
) -> Iterator[Timing]:
    """To a tolerance, and with a fixed number of steps; then a training step's forward and backward."""
    with torch.no_grad():
        injected = problem.embed(x)
    z0 = torch.zeros_like(injected)
    batch, entries = z0.shape[0], z0[0].numel()
    counter = Counter(lambda z: problem.cell(z, injected))

    for quantity, tol, max_steps in (
        (f"solve to {short(TOL)}", TOL, MAX_STEPS),
        (f"solve to {short(TIGHT_TOL)}", TIGHT_TOL, 2 * MAX_STEPS),
        (f"{FIXED_STEPS} steps", 0.0, FIXED_STEPS),
    ):
        solvers = forward_solvers(tol, max_steps, device)
        reached = {}
        with torch.no_grad():
            for name, solve in solvers.items():
                counter.calls = 0
                z = solve(counter, z0)
                reached[name] = (str(counter.calls), batch_residual(counter, z))
            runs = {name: partial(solve, counter, z0) for name, solve in solvers.items()}
            times = interleaved(runs, model.rounds, device)
        yield from timings(model.name, quantity, times, batch, entries, reached)

    training = {
        name: partial(solution_and_gradient, problem, layer, x, y)
        for name, layer in layers(problem.cell, TOL, MAX_STEPS, device).items()
    }
    times = interleaved(training, model.rounds, device)
    yield from timings(
        model.name,
        f"train step at {short(TOL)}",
        times,
        batch,
        entries,
        gradient_quality(problem, x, y, device),
    )


def gradient_quality(
    problem: textbook.Problem, x: Tensor, y: Tensor, device: str
) -> dict[str, tuple[str, float]]:
    """For each method at `TOL`: its steps, and how far its gradient is from the exact one."""
    exact = cast(problem, torch.float64)
    reference = layers(exact.cell, 1e-7, 100, device)[OURS]
    _, wanted = solution_and_gradient(exact, reference, x.double(), y)

    found = {}
    counted = CountedCell(problem.cell)
    for name, layer in layers(counted, TOL, MAX_STEPS, device).items():
        counted.forwards = counted.products = 0
        _, gradient = solution_and_gradient(problem, layer, x, y)
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        found[name] = (f"{counted.forwards} + {counted.products}", error)
    return found


class CountedCell(nn.Module):
    """Counts evaluations of a cell without a graph, and vector-Jacobian products with respect to z."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell
        self.forwards = 0
        self.products = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.forwards += not torch.is_grad_enabled()
        if torch.is_grad_enabled() and z.requires_grad:
            z = z.view_as(z)
            z.register_hook(self._count)
        return self.cell(z, x)

    def _count(self, grad: Tensor) -> None:
        self.products += 1


class Counter:
    """Counts the calls of a function."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f = f
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.f(z)


def batch_residual(f: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """`‖f(z) − z‖ / ‖f(z)‖` over the whole batch, recomputed."""
    value = f(z)
    return ((value - z).norm() / value.norm()).item()


def interleaved(
    methods: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each method in each round, after one round that does not count.

    Fewer rounds, but never less than three, where they would take longer than `PATIENCE_S`.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    started = time.perf_counter()
    for index in range(rounds + 1):
        if index > 3 and time.perf_counter() - started > PATIENCE_S:
            break
        for name, method in methods.items():
            _wait(device)
            began = time.perf_counter()
            method()
            _wait(device)
            if index:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def short(tol: float) -> str:
    """1e-3, not 0.001 or 1e-03."""
    return f"{tol:.0e}".replace("e-0", "e-")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timings(
    case: str,
    quantity: str,
    times: dict[str, list[float]],
    batch: int,
    entries: int,
    reached: dict[str, tuple[str, float]] | None = None,
) -> Iterator[Timing]:
    for name, spent in times.items():
        ratios = [theirs / ours for theirs, ours in zip(times[TEXTBOOK], spent, strict=True)]
        steps, error = reached[name] if reached else (None, None)
        yield Timing(case, quantity, name, batch, entries, Spread.of(spent), Spread.of(ratios), steps, error)
