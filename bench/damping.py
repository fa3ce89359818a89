"""How well a DEQ trains that has no penalty, by its backward solve: `python -m bench damping`.

The model is that of `examples/from_textbook_before.py`, whose layer stops contracting within some steps of
training: then forward solves end at their cap, short of a fixed point, and backward solves have a Jacobian
there that may be close to I. Beside them the textbook's own solves, phantom gradients, and what SHINE makes
of the inverse Jacobian that a forward solve by Broyden's method has estimated.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import triton_deq as td
from triton_deq.environment import environment
from triton_deq.solvers import Solver

from . import ROOT

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


class Equilibrium(nn.Module):
    """The textbook's model by this library, with the gradient to look at."""

    def __init__(
        self, f: nn.Module, gradient: td.ImplicitGradient | td.PhantomGradient, solver: Solver | None = None
    ):
        super().__init__()
        self.f = f
        self.gradient = gradient
        self.solver = solver
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        z, solution = td.fixed_point(
            lambda z: self.f(z, x),
            torch.zeros_like(x),
            self.solver,
            tol=1e-3,
            max_steps=50,
            gradient=self.gradient,
            return_solution=True,
        )
        self.evaluations = solution.nfe
        return z


def damping(seeds: int, steps: int, output: Path) -> int:
    """Train each way from each seed; write a line a run, and print the means over the seeds."""
    example = _example()
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        **{f"ridge={ridge:g}": _implicit(td.Anderson(ridge=ridge)) for ridge in RIDGES},
        "Broyden": _implicit(td.Broyden(memory=30)),
        "5 phantom steps": lambda f: Equilibrium(f, td.PhantomGradient(steps=5)),
        **{
            f"{name}, forward by Broyden": _after_broyden(gradient)
            for name, gradient in (
                ("ridge=0.01", td.ImplicitGradient()),
                ("SHINE as a start", td.ImplicitGradient(shine="start")),
                ("SHINE alone", td.ImplicitGradient(shine="alone")),
                ("1 phantom step", td.PhantomGradient()),
            )
        },
        "the textbook's solves": example.DEQ,
    }
    about = environment("cpu")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for way, make in ways.items():
            runs = [_trained(example, make, seed, steps) for seed in range(seeds)]
            for seed, run in enumerate(runs):
                file.write(json.dumps({"backward": way, "seed": seed, "steps": steps, **run, **about}) + "\n")
            file.flush()
            midway, end, evaluations = (
                sum(run[name] for run in runs) / seeds for name in ("loss_midway", "loss", "evaluations")
            )
            print(f"{way:<34} loss midway {midway:.3f}, at the end {end:.3f}, {evaluations:.1f} evaluations")
    return 0


def _implicit(solver: Solver) -> Callable[[nn.Module], nn.Module]:
    return lambda f: Equilibrium(f, td.ImplicitGradient(solver))


def _after_broyden(gradient: td.ImplicitGradient | td.PhantomGradient) -> Callable[[nn.Module], nn.Module]:
    return lambda f: Equilibrium(f, gradient, td.Broyden(memory=50))


def _example() -> ModuleType:
    """It is a script in no package."""
    path = ROOT / "examples" / "from_textbook_before.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _trained(example: Any, make: Callable[[nn.Module], nn.Module], seed: int, steps: int) -> dict[str, float]:
    """Losses, each the mean of a sixth of the steps, and the last step's evaluations of f."""
    torch.manual_seed(seed)
    deq, losses = example.train(make, steps)
    share = max(steps // 6, 1)
    middle = losses[(steps - share) // 2 :][:share]
    return {
        "loss_midway": round(sum(middle) / share, 5),
        "loss": round(sum(losses[-share:]) / share, 5),
        "evaluations": deq.evaluations,
    }
