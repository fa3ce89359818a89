"""A fixed number of steps of a solver on an f that costs next to nothing: what the solver itself costs.

Time beyond "bare f", which evaluates f as often, divided by the steps, is the solver's own time a step.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import triton_deq as td
from triton_deq.solvers import Solver
from triton_deq.timing import Call, graphed

from ..cases import Case, Setting, Solved, Variant, ours
from ..peers import ANDERSON, BROYDEN, Peer, Solve
from ..problems import Problem, in_graphs, make

GROUP = "step"
STEPS = 20
HISTORY = 6
SHAPES = {
    "tiny": [(2, 256)],
    "quick": [(32, 1024), (32, 16384)],
    "full": [(32, 1024), (32, 16384), (8, 262144)],
}
SOLVERS: dict[str, tuple[td.Anderson | td.Broyden, tuple[Peer, ...]]] = {
    "anderson": (td.Anderson(history=HISTORY), ANDERSON),
    "broyden": (td.Broyden(), BROYDEN),
}
GPU_SHAPES = {
    "tiny": SHAPES["tiny"],
    "quick": [(32, 1024), (32, 16384), (8, 262144)],
    "full": [(32, 16384), (32, 1024), (32, 1048576), (8, 262144)],
}


def cases(setting: Setting) -> Iterator[Case]:
    dtypes = [torch.float32, torch.bfloat16] if setting.gpu else [torch.float32]
    for shape in (GPU_SHAPES if setting.gpu else SHAPES)[setting.scale]:
        for dtype in dtypes:
            for op in SOLVERS:
                yield _case(setting, op, shape, dtype)


def _case(setting: Setting, op: str, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    solver, peers = SOLVERS[op]
    problem = make("pointwise", shape, setting.device, dtype, setting.seed)
    steps = 8 if setting.scale == "tiny" else STEPS
    variants = [Variant("bare f", lambda: partial(_bare, problem, steps))]
    for name, backend in ours(setting):
        variants.append(Variant(name, partial(_ours, problem, solver, steps, backend), backend))
    call = partial(peer_call, problem, steps)
    for peer in peers:
        variants += [Variant(peer.name, partial(loaded, call, peer.load)), *compiled(setting, peer, call)]
    if setting.gpu:
        variants += _graphs(setting, problem, op, steps)
    return Case(GROUP, op, "forward", dtype, shape, tuple(variants), problem)


def loaded(call: Callable[[Solve], Call], load: Callable[[], Solve]) -> Call:
    """The call of a solver that is imported only now, so that its absence is this variant's own error."""
    return call(load())


def compiled(setting: Setting, peer: Peer, call: Callable[[Solve], Call]) -> list[Variant]:
    """The peer's compiled variant, where there is one and it is asked for."""
    if peer.load_compiled is None or setting.compiled == "no":
        return []
    prepare = partial(loaded, call, peer.load_compiled)
    return [Variant(f"{peer.name} compiled", prepare, "inductor", compiles=True)]


def _bare(problem: Problem, steps: int) -> Solved:
    z = problem.z0
    with torch.no_grad():
        for _ in range(steps):
            z = problem.f(z)
    return Solved(z, steps)


def _ours(problem: Problem, solver: Solver, steps: int, backend: str) -> Call:
    def call() -> Solved:
        solution = td.solve(problem.f, problem.z0, solver, tol=0, max_steps=steps, backend=backend)
        return Solved(solution.value, solution.nfe)

    return call


def peer_call(problem: Problem, steps: int, solve: Solve) -> Call:
    @torch.no_grad()
    def call() -> Solved:
        return Solved(solve(problem.f, problem.z0, steps), steps)

    return call


def _graphs(setting: Setting, problem: Problem, op: str, steps: int) -> Iterator[Variant]:
    """What `graph=True` does; and all steps in one CUDA graph: no Python, and nobody looks at a residual."""
    from ..peers.textbook import graphable_anderson

    graph_mode = partial(_in_graph_mode, problem, SOLVERS[op][0], steps)
    yield Variant("triton-deq graph mode", graph_mode, "cuda graph")
    calls: dict[str, Call] = {
        "bare f graph": partial(_bare, problem, steps),
        "triton-deq graph": partial(_steps_of_ops, problem, SOLVERS[op][0], steps),
    }
    if op == "anderson":
        calls["textbook graph"] = peer_call(problem, steps, graphable_anderson)
    for name, call in calls.items():
        yield Variant(name, partial(graphed, call, setting.watch), "cuda graph")


def _in_graph_mode(problem: Problem, solver: td.Anderson | td.Broyden, steps: int) -> Call:
    run = in_graphs(problem, solver, 0.0, steps)
    return lambda: Solved(*run())


@torch.no_grad()
def _steps_of_ops(problem: Problem, solver: Solver, steps: int) -> Solved:
    """The steps of a solve without the loop's look at the flag, which a graph cannot hold."""
    from triton_deq.solvers.stopping import Stopping

    stopping = Stopping(tol=0, max_steps=steps)
    state = solver.start(problem.z0, stopping, "triton")
    for step in range(steps):
        solver.step(state, problem.f(state.x), step, stopping, "triton")
    return Solved(state.best, steps)
