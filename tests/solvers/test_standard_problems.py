"""Evaluations of f on standard problems, beside SciPy's and TorchDEQ's solvers of the same kind.

What counts is the first evaluation that sees the tolerance met, so that nobody's stopping rule matters.
"""

import numpy as np
import pytest
import torch
from scipy import optimize

import triton_deq as td
from tests.problems import bratu

TOL = 1e-8
MOST = 400
MEMORY = 30


class Met(Exception):
    """Raised at the first evaluation with `‖f(z) − z‖ ≤ TOL ‖f(z)‖`."""


class Counted:
    """f, counting its calls until the tolerance is met."""

    def __init__(self, f, stop: bool):
        self.f, self.stop, self.calls = f, stop, 0

    def __call__(self, z):
        value = self.f(z)
        self.calls += 1
        if (value - z).norm() <= TOL * value.norm() and self.stop:
            raise Met
        if self.calls >= MOST:
            raise Met
        return value


def linear(matrix):
    offset = torch.linspace(1, 2, matrix.shape[0], dtype=torch.float64)
    return lambda z: z @ matrix.T + offset, torch.zeros(1, matrix.shape[0], dtype=torch.float64)


def random_contraction():
    """A dense linear map of spectral radius 0.99."""
    matrix = torch.randn(60, 60, dtype=torch.float64)
    return linear(0.99 * matrix / torch.linalg.eigvals(matrix).abs().max())


def rotation():
    """A rotation by many angles, shrunk by 0.95: every eigenvalue is complex and near the unit circle."""
    skew = torch.randn(12, 12, dtype=torch.float64)
    return linear(0.95 * torch.linalg.matrix_exp(skew - skew.T))


def stiff():
    """A diagonal map with eigenvalues from 0 to 0.999 and to −0.9."""
    return linear(torch.diag(torch.linspace(-0.9, 0.999, 40, dtype=torch.float64)))


def tanh_layer():
    """The layer of a small DEQ."""
    weight = torch.randn(80, 80, dtype=torch.float64)
    weight *= 1.2 / torch.linalg.matrix_norm(weight, 2)
    offset = 0.3 * torch.randn(80, dtype=torch.float64)
    return lambda z: torch.tanh(z @ weight.T + offset), torch.zeros(1, 80, dtype=torch.float64)


def h_equation(strength):
    """Chandrasekhar's `H(μ) = 1 / (1 − c/2 ∫ μ H(ν) / (μ + ν) dν)`, midpoint rule; c = 1 is singular."""
    nodes = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    kernel = strength / 100 * nodes[:, None] / (nodes[:, None] + nodes[None, :])
    return lambda z: 1 / (1 - z @ kernel.T), torch.ones(1, 50, dtype=torch.float64)


def kepler():
    """Kepler's `E = M + e sin E` for many mean anomalies at eccentricity 0.9."""
    anomaly = torch.linspace(0.1, 3.1, 20, dtype=torch.float64)
    return lambda z: anomaly + 0.9 * z.sin(), anomaly[None].clone()


def softmax_game():
    """A logit equilibrium `z = softmax(β A z)` of a random game."""
    payoff = torch.randn(30, 30, dtype=torch.float64)
    return lambda z: torch.softmax(3 * z @ payoff.T, -1), torch.full((1, 30), 1 / 30, dtype=torch.float64)


def page_rank():
    """Damping 0.95 on a random sparse graph."""
    links = (torch.rand(100, 100) < 0.05).double() + torch.eye(100, dtype=torch.float64)
    links /= links.sum(0)
    return lambda z: 0.95 * z @ links.T + 0.05 / 100, torch.full((1, 100), 0.01, dtype=torch.float64)


PROBLEMS = {
    "bratu": lambda: bratu(9),
    "contraction of radius 0.99": random_contraction,
    "rotation": rotation,
    "stiff diagonal": stiff,
    "tanh layer": tanh_layer,
    "H-equation, c = 0.9": lambda: h_equation(0.9),
    "H-equation, c = 0.999": lambda: h_equation(0.999),
    "Kepler": kepler,
    "softmax game": softmax_game,
    "page rank": page_rank,
}


def evaluations(name, solve):
    """How many until the tolerance is met, at most MOST."""
    torch.manual_seed(1)
    f, z0 = PROBLEMS[name]()
    counted = Counted(f, stop=True)
    try:
        solve(counted, z0)
    except (Met, ValueError, optimize.NoConvergence):
        return counted.calls
    return MOST


def ours(solver):
    return lambda f, z0: td.solve(f, z0, solver, tol=0, max_steps=MOST, backend="reference")


def scipys(method, **options):
    def solve(f, z0):
        def defect(z):
            z = torch.from_numpy(z)[None]
            return (f(z) - z)[0].numpy()

        with np.errstate(all="ignore"):
            method(defect, z0[0].numpy(), f_tol=0.0, maxiter=MOST, **options)

    return solve


def torchdeqs(name):
    """With the same history: 6 in its Anderson by default, MEMORY pairs in its Broyden."""
    solver = pytest.importorskip("torchdeq.solver").get_solver(name)
    options = {"LBFGS_thres": MEMORY} if name == "broyden" else {}
    return lambda f, z0: solver(f, z0, max_iter=MOST, tol=0.0, **options)


PAIRS = {
    "anderson": (td.Anderson(), optimize.anderson, {"M": 5}),
    "broyden": (td.Broyden(MEMORY), optimize.broyden1, {"max_rank": MEMORY}),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_at_most_twice_scipys_evaluations(name, kind):
    solver, method, options = PAIRS[kind]
    assert evaluations(name, ours(solver)) <= 2 * evaluations(name, scipys(method, **options))


@pytest.mark.parametrize("kind", PAIRS)
def test_fewer_evaluations_than_torchdeq_on_the_set(kind):
    solver, *_ = PAIRS[kind]
    found = {name: evaluations(name, ours(solver)) for name in PROBLEMS}
    theirs = {name: evaluations(name, torchdeqs(kind)) for name in PROBLEMS}
    assert sum(found.values()) < sum(theirs.values()), (found, theirs)
