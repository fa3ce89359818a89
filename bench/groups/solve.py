"""Whole solves to the same residual: each variant evaluates f as often as it needs, and no more."""

from collections.abc import Iterator
from functools import partial

import torch

import triton_deq as td
from triton_deq.timing import Call

from ..cases import Case, Setting, Solved, Variant, ours
from ..peers import PEERS, Peer, Solve, steps_to
from ..peers.jaxopt import jaxopt_variant
from ..problems import Problem, in_graphs, make
from .step import HISTORY, compiled, loaded, peer_call

GROUP = "solve"
TOLERANCES = (1e-3, 1e-5)
SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": [("dense", (2, 64))],
    "quick": [("dense", (32, 512))],
    "full": [("dense", (32, 256)), ("dense", (128, 1024)), ("convolution", (4, 32, 32, 32))],
}
GPU_SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": SIZES["tiny"],
    "quick": [("dense", (128, 1024)), ("convolution", (32, 64, 32, 32))],
    "full": [
        ("mlp cell", (1024, 128)),
        ("dense", (128, 1024)),
        ("dense", (1024, 2048)),
        ("convolution", (32, 64, 32, 32)),
        ("convolution", (32, 128, 56, 56)),
    ],
}


def cases(setting: Setting) -> Iterator[Case]:
    for kind, shape in (GPU_SIZES if setting.gpu else SIZES)[setting.scale]:
        for tol in TOLERANCES[:1] if setting.scale == "tiny" else TOLERANCES:
            yield _case(setting, kind, shape, tol)


def _case(setting: Setting, kind: str, shape: tuple[int, ...], tol: float) -> Case:
    problem = make(kind, shape, setting.device, seed=setting.seed)
    variants = [
        Variant(name + of, partial(_ours, problem, solver, tol, backend), backend)
        for name, backend in ours(setting)
        for of, solver in (("", td.Anderson(history=HISTORY)), (" broyden", td.Broyden()))
    ]
    if setting.gpu and problem.cell is None:  # whose solve is one launch
        variants.append(Variant("triton-deq graph mode", partial(_in_graphs, problem, tol), "cuda graph"))
    for peer in PEERS:
        call = partial(_peer, peer, problem, tol)
        variants.append(Variant(peer.name, partial(loaded, call, peer.load)))
        if setting.gpu or tol == TOLERANCES[-1]:  # compiling takes minutes of a CPU
            variants += compiled(setting, peer, call)
    variants.append(jaxopt_variant(problem, tol, HISTORY))
    return Case(GROUP, f"{kind} to {tol:g}", "forward", torch.float32, shape, tuple(variants), problem)


@torch.no_grad()
def _peer(peer: Peer, problem: Problem, tol: float, solve: Solve) -> Call:
    """`solve` is the peer's, eager or compiled; how many steps it needs, the eager one tells."""
    return peer_call(problem, steps_to(peer.load(), problem.f, problem.z0, tol), solve)


def _in_graphs(problem: Problem, tol: float) -> Call:
    """As a model in service would call it."""
    run = in_graphs(problem, td.Anderson(history=HISTORY), tol, 60)
    return lambda: Solved(*run())


def _ours(problem: Problem, solver: td.Anderson | td.Broyden, tol: float, backend: str) -> Call:
    def call() -> Solved:
        solution = td.solve(problem.f, problem.z0, solver, tol=tol, max_steps=60, backend=backend)
        return Solved(solution.value, solution.nfe)

    return call
