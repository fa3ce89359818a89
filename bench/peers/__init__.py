"""The solvers that triton-deq is measured against, all called as `solve(f, z0, steps)`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Solve = Callable[[Function, Tensor, int], Tensor]


@dataclass(frozen=True)
class Peer:
    """A solver that takes `steps` evaluations of f and returns its value.

    Attributes:
        load: imports and returns the solver, eager.
        load_compiled: the same under torch.compile, as well as its code allows; None for a peer of the record
            only.
    """

    name: str
    load: Callable[[], Solve]
    load_compiled: Callable[[], Solve] | None = None


def _textbook() -> Solve:
    from triton_deq.demo.textbook import anderson

    return lambda f, z0, steps: anderson(f, z0, tol=0.0, max_steps=steps)[0]


def _textbook_compiled() -> Solve:
    from .textbook import compiled_anderson

    return compiled_anderson()


def _textbook_broyden() -> Solve:
    from .textbook import broyden

    return broyden


def _torchdeq() -> Solve:
    from torchdeq.solver.anderson import anderson_solver

    return lambda f, z0, steps: anderson_solver(f, z0, max_iter=steps, tol=0.0, stop_mode="rel")[0]


def _torchdeq_compiled() -> Solve:
    return _compile(_torchdeq())


def _torchdeq_broyden() -> Solve:
    from torchdeq.solver.broyden import broyden_solver

    # Its loop evaluates f once before its first step.
    return lambda f, z0, steps: broyden_solver(f, z0, max_iter=steps - 1, tol=0.0, stop_mode="rel")[0]


def _compile(function: Any) -> Any:
    """Whole, graph breaks allowed: the peers look at their residuals."""
    return torch.compile(function)


PEERS = (
    Peer("textbook", _textbook, _textbook_compiled),
    Peer("torchdeq", _torchdeq, _torchdeq_compiled),
    Peer("textbook broyden", _textbook_broyden),
    Peer("torchdeq broyden", _torchdeq_broyden),
)


ANDERSON, BROYDEN = PEERS[:2], PEERS[2:]


def steps_to(solve: Solve, f: Function, z0: Tensor, tol: float, most: int = 60) -> int:
    """After how many evaluations of f a solver has first seen a residual of at most `tol` in every sample.

    So a peer is stopped as early as its own evaluations allow, whatever its stopping rule would have said.

    Raises:
        RuntimeError: not within `most`.
    """
    worst: list[float] = []

    def watched(z: Tensor) -> Tensor:
        value = f(z)
        rows, image = z.reshape(z0.shape).flatten(1).double(), value.reshape(z0.shape).flatten(1).double()
        worst.append(((image - rows).norm(dim=1) / image.norm(dim=1)).max().item())
        return value

    solve(watched, z0, most)
    reached = [step for step, residual in enumerate(worst, 1) if residual <= tol]
    if not reached:
        raise RuntimeError(
            f"does not reach a residual of {tol:g} in {most} evaluations of f; best {min(worst):.1e}"
        )
    return max(reached[0], 3)  # the peers need three evaluations to take one step of their own
