"""Thousands of random problems: nothing raises, everything returned is finite, and every status is true.

A seed draws a batch of unlike problems, a solver, a dtype and all options. What f was called with is kept,
so that what the solution says can be recomputed from it.
"""

import math
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

import triton_deq as td
from triton_deq.reference.record import DIVERGENCE
from triton_deq.status import Status

SEEDS = 430
PROBLEMS_AT_LEAST = 10_000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def matrix_of(kind: str, size: int, draw: Random) -> torch.Tensor:
    """`[size, size]` float64."""
    dense = torch.randn(size, size, dtype=torch.float64)
    if kind == "contraction":
        radius = torch.linalg.eigvals(dense).abs().max().clamp(min=1e-3)
        return dense * (draw.choice((0.1, 0.5, 0.9, 0.99, 0.999)) / radius)
    if kind == "rotation":
        return draw.choice((0.5, 0.99, 1.0)) * torch.linalg.qr(dense)[0]
    if kind == "expansion":
        return draw.uniform(1.5, 30) * torch.linalg.qr(dense)[0]
    if kind == "stiff":
        return torch.diag(torch.logspace(-6, math.log10(0.999), size, dtype=torch.float64))
    if kind == "rank one":  # residuals in one direction: the Gram matrix has rank one
        return 0.9 * dense[:, :1] @ dense[:1] / dense[:, 0].norm() / dense[0].norm()
    if kind == "constant":
        return torch.zeros(size, size, dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64)  # "identity": no fixed point, or every point is one


KINDS = ("contraction", "rotation", "expansion", "stiff", "rank one", "constant", "identity")


@dataclass
class Problem:
    """`f(z) = A z + b` for each sample, with a value that is not finite put in from some call on."""

    seed: int
    small: bool = False
    device: str = "cpu"
    calls: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        draw = self.draw = Random(self.seed)
        torch.manual_seed(self.seed)
        self.batch = draw.choice((1, 2, 4) if self.small else (0, 1, 2, 30, 60, 60))
        self.entries = draw.choice((1, 2, 5, 13, 32))
        self.dtype = draw.choice(DTYPES)
        self.kinds = [draw.choice(KINDS) for _ in range(self.batch)]
        matrices = [matrix_of(kind, self.entries, draw) for kind in self.kinds]
        self.matrix = torch.stack(matrices) if matrices else torch.empty(0, self.entries, self.entries)
        scale = 1.0 if self.dtype == torch.float16 else 10.0 ** draw.choice((-25, -6, 0, 0, 0, 6, 25))
        self.offset = scale * torch.randn(self.batch, self.entries, dtype=torch.float64)
        for sample in range(1, self.batch, 5):  # duplicates of a neighbour
            self.matrix[sample], self.offset[sample] = self.matrix[sample - 1], self.offset[sample - 1]
        self.poisoned = draw.randrange(self.batch) if self.batch and draw.random() < 0.4 else None
        self.poison, self.poison_from = draw.choice((math.nan, math.inf, -math.inf)), draw.randrange(12)
        z0 = scale * draw.choice((0.0, 1.0)) * torch.randn(self.entries, self.batch, dtype=torch.float64)
        self.matrix, self.offset = self.matrix.to(self.device), self.offset.to(self.device)
        self.z0 = z0.to(self.device, self.dtype).T  # not contiguous
        if draw.random() < 0.3:
            self.z0.requires_grad_()

    def clean(self, z: torch.Tensor) -> torch.Tensor:
        moved = torch.einsum("bij,bj->bi", self.matrix, z.double())
        return (moved + self.offset).to(self.dtype)

    def f(self, z: torch.Tensor) -> torch.Tensor:
        value = self.clean(z)
        if self.poisoned is not None and len(self.calls) >= self.poison_from:
            value[self.poisoned, -1] = self.poison
        self.calls.append(z.clone())
        return value

    def solver(self):
        draw = self.draw
        return draw.choice(
            (
                td.Picard(draw.choice((1.0, 0.5))),
                td.Anderson(
                    draw.randint(1, 8),
                    mixing=draw.choice((1.0, 0.7)),
                    ridge=draw.choice((0.0, 1e-10, 1e-6, 1e-4)),
                    ridge_scale=draw.choice(("relative", "absolute")),
                ),
                td.Broyden(draw.randint(1, 12)),
            )
        )

    def options(self):
        draw = self.draw
        return {
            "tol": draw.choice((0.0, 1e-2, 1e-4, 1e-8, 1e-12)),
            "max_steps": draw.choice((2, 7, 12) if self.small else (1, 2, 7, 25, 40)),
            "residual": draw.choice(("relative", "absolute")),
            "norm_over": draw.choice(("sample", "sample", "batch")),
            "trace": draw.random() < 0.5,
            "check_every": draw.choice((1, 4)),
        }


def recomputed(problem: Problem, z: torch.Tensor, residual: str) -> torch.Tensor:
    """`[B]` float64; the difference is taken as the solver takes it, in the accumulation dtype."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    value = problem.clean(z)
    difference = (value.to(wide) - z.to(wide)).double().norm(dim=1)
    if residual == "absolute":
        return difference
    return torch.where(difference == 0, 0, difference / value.double().norm(dim=1))


def check(seed: int, backend: str, device: str = "cpu") -> int:
    """Solve one batch of problems and hold the solution to its word; returns how many problems it was."""
    problem = Problem(seed, small=backend == "triton", device=device)
    solver, options = problem.solver(), problem.options()
    before = problem.z0.detach().clone()
    solution = td.solve(problem.f, problem.z0, solver, backend=backend, **options)
    assert torch.equal(problem.z0, before)
    assert not solution.value.requires_grad
    assert solution.value.isfinite().all()
    assert solution.nfe == len(problem.calls) <= options["max_steps"]
    assert solution.steps.shape == (problem.batch,)

    status, steps = solution.status, solution.steps.long()
    tol, residual = options["tol"], solution.residual
    converged, out_of_steps = status == Status.CONVERGED, status == Status.MAX_STEPS
    assert not residual.isnan().any()
    assert (residual[converged] <= tol).all()
    assert (tol > 0) or not converged.any() or problem.batch == 0
    assert (steps[out_of_steps] == options["max_steps"]).all()
    assert (residual[out_of_steps] > tol).all() or tol == 0
    assert (steps <= solution.nfe).all()
    if problem.poisoned is not None and problem.poison_from < steps[problem.poisoned]:
        assert status[problem.poisoned] == Status.NONFINITE
    # What was never finite is where it started, at an infinite residual; all else is its value's own.
    known = residual < math.inf
    assert torch.equal(solution.value[~known], before[~known])
    if options["norm_over"] == "sample" and problem.batch:
        wanted = recomputed(problem, solution.value, options["residual"])
        # The kernels keep f(z) − z in the state's dtype, and its norm with it.
        rounding = torch.finfo(problem.dtype).eps if backend == "triton" else 0
        torch.testing.assert_close(residual[known], wanted[known], rtol=1e-4 + rounding, atol=0)
        for sample in (status == Status.DIVERGED).nonzero()[:, 0].tolist():
            first, last = (
                recomputed(problem, problem.calls[at], "absolute")[sample] for at in (0, steps[sample] - 1)
            )
            scale = problem.clean(problem.calls[0])[sample].double().norm()
            assert last > DIVERGENCE * (first + scale) * (1 - 1e-4)
    # From the step at which it stopped, a sample never moves again.
    for sample in (steps < solution.nfe).nonzero()[:, 0].tolist():
        stopped = problem.calls[int(steps[sample]) - 1][sample]
        assert all(torch.equal(z[sample], stopped) for z in problem.calls[int(steps[sample]) :])
        if converged[sample]:
            assert torch.equal(solution.value[sample], stopped)
    return problem.batch


def test_ten_thousand_random_problems():
    problems = sum(check(seed, "reference") for seed in range(SEEDS))
    assert problems >= PROBLEMS_AT_LEAST


def test_thousands_of_them_on_compiled_steps():
    pytest.importorskip("numba")
    seeds = [seed for seed in range(0, SEEDS, 2) if Problem(seed).dtype in (torch.float32, torch.float64)]
    assert sum(check(seed, "numba") for seed in seeds) >= PROBLEMS_AT_LEAST // 6


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(8))
def test_a_few_of_them_on_the_kernels(seed, device):
    check(seed, "triton", device)


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(100, 160))
def test_more_of_them_on_the_kernels(seed, device):
    check(seed, "triton", device)


@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden(), td.Picard()], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_values_far_from_one_converge_in_float32(scale, solver, backend, device):
    """Their squares over- and underflow float32."""
    rates = torch.linspace(-0.5, 0.8, 12, device=device)
    f = lambda z: rates * z + scale  # noqa: E731
    z0 = torch.zeros(2, 12, device=device)
    solution = td.solve(f, z0, solver, tol=1e-5, max_steps=80, backend=backend)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value / scale, (1 / (1 - rates)).expand(2, 12), rtol=1e-3, atol=0)
