"""The loop as one operator of a graph: f is in it once, and is evaluated until no sample runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config

from ..checks import as_state
from ..status import RUNNING
from .functional import Progress, judge, mixing_of, solution_of, squares
from .graph_cache import GraphCache
from .layout import Layout, evaluate
from .solution import Solution, empty_solution
from .stopping import Stopping

NEEDS_CARE = torch.__version__ < "2.15"
"""Whether Inductor takes a loop's tensors in a backward pass for donated ones, and overwrites them."""


def loops(graph: Any) -> bool:
    """Whether `graph`, as `solve` takes it, asks for a loop where torch.compile or torch.export looks on."""
    asked = isinstance(graph, GraphCache) or bool(graph)  # torch.compile 2.11 knows no truth of an object
    return asked and (torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting())


def check_donation() -> None:
    """A backward pass with a loop in it needs a torch that compiles it right."""
    if NEEDS_CARE and config.donated_buffer:
        raise RuntimeError(
            "graph=True inside torch.compile gives wrong gradients with torch before 2.15, where buffers are "
            "donated to backward passes: set torch._functorch.config.donated_buffer = False, or leave it out"
        )


def looped_solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: Any,
    stopping: Stopping,
    *,
    trace: bool,
    layout: Layout | None = None,
) -> Solution:
    """`functional_solve` as a `torch.while_loop`, without the graph of its steps.

    `Solution.nfe` is a tensor, and a trace has the last residuals in the rows behind it.
    """
    if z0.numel() == 0:
        as_state(f(z0), z0)
        return empty_solution(z0, trace)
    layout = Layout(z0) if layout is None else layout
    start = layout.rows(z0)
    turns = torch.arange(stopping.max_steps if trace else 0, device=z0.device)[:, None]
    known = len(Progress._fields)

    def goes_on(count: Tensor, traced: Tensor, x: Tensor, best: Tensor, *rest: Tensor) -> Tensor:
        status = rest[0]
        return (count < stopping.max_steps) & (status == int(RUNNING)).any()

    def step(count: Tensor, traced: Tensor, x: Tensor, best: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        mixing = mixing_of(solver)
        mixing.take_up(*rest[known:])
        fx = layout.rows(evaluate(f, layout.unrows(x), False))
        improved, moving, progress = judge(Progress(*rest[:known]), squares(fx, x), squares(fx), stopping)
        best = torch.where(improved[:, None], x, best)
        traced = torch.where(turns >= count, progress.residual, traced)
        following = mixing.following(x, fx).to(x.dtype)
        x = torch.where(moving[:, None], following, x).contiguous()  # it may have the strides of f's value
        return count + 1, traced, x, best, *progress, *mixing.carried

    count = start.new_zeros((), dtype=torch.int64)
    traced = start.new_zeros(len(turns), len(start), dtype=torch.float64)
    begun = count, traced, start, start, *Progress.begin(start), *mixing_of(solver).begin(start)
    # A loop refuses two of one memory, z0 itself, and strides that change, if only of one sample.
    apart = tuple(each.clone(memory_format=torch.contiguous_format) for each in begun)
    count, traced, _, best, *rest = torch.while_loop(goes_on, step, apart)
    progress = Progress(*rest[:known])
    return solution_of(layout.unrows(best), progress, count, traced if trace else None, "compiled loop")
