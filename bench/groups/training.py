"""A training step of a DEQ: a forward and a backward solve of a fixed number of steps, and the gradient."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import triton_deq as td
from triton_deq.timing import Call

from ..cases import Case, Setting, Solved, Variant, ours
from ..problems import Function, Problem, make

GROUP = "training"
STEPS = 10
SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": [("dense", (2, 64)), ("mlp cell penalised", (2, 16))],
    "quick": [("dense", (128, 512)), ("mlp cell", (128, 512)), ("mlp cell penalised", (64, 200))],
    "full": [
        ("dense", (128, 512)),
        ("mlp cell", (128, 512)),
        ("mlp cell penalised", (64, 200)),
        ("dense", (32, 2048)),
        ("convolution", (4, 32, 32, 32)),
    ],
}
GPU_SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": SIZES["tiny"],
    "quick": [
        ("dense", (128, 1024)),
        ("mlp cell penalised", (1024, 128)),
        ("convolution", (32, 64, 32, 32)),
    ],
    "full": [
        ("dense", (128, 1024)),
        ("mlp cell", (128, 1024)),
        ("mlp cell", (1024, 128)),
        ("mlp cell penalised", (1024, 128)),
        ("dense", (1024, 2048)),
        ("convolution", (32, 128, 56, 56)),
    ],
}

Layer = Callable[[Function, Tensor], Tensor]
"""From f and z0 to the fixed point with its implicit gradient."""
Estimate = Callable[[Function, Tensor], Tensor]
"""From f and a state to the Jacobian norm there, differentiable."""


def cases(setting: Setting) -> Iterator[Case]:
    for kind, shape in (GPU_SIZES if setting.gpu else SIZES)[setting.scale]:
        problem = make(kind.removesuffix(" penalised"), shape, setting.device, seed=setting.seed, grad=True)
        steps = 4 if setting.scale == "tiny" else STEPS
        variants = tuple(_variants(setting, problem, steps, penalised=kind.endswith("penalised")))
        yield Case(GROUP, kind, "full", torch.float32, shape, variants, problem)


def _variants(setting: Setting, problem: Problem, steps: int, penalised: bool) -> Iterator[Variant]:
    """Each layer with f as it is, and with f compiled: a solver's user can always compile f.

    penalised: with the Jacobian penalty in every step, each peer's own estimate or the authors'.
    """
    layers: list[tuple[str, str, Callable[[], Layer], Estimate]] = [
        *(
            (name, backend, partial(_ours, steps, backend), partial(_estimate, backend))
            for name, backend in ours(setting)
        ),
        ("textbook", "pytorch", partial(_textbook, steps), _authors_estimate),
        ("torchdeq", "pytorch", partial(_torchdeq, steps), _torchdeq_estimate),
    ]
    for name, backend, load, estimate in layers:
        if penalised:
            yield Variant(name, partial(_call, problem, load, steps, estimate=estimate), backend)
            continue
        yield Variant(name, partial(_call, problem, load, steps), backend)
        # Compiling takes long on a CPU, and loses there: one size shows it.
        if setting.compiled != "no" and (setting.gpu or problem.kind == "convolution"):
            prepare = partial(_call, problem, load, steps, True)
            yield Variant(f"{name} f compiled", prepare, backend, compiles=True)


def _call(
    problem: Problem,
    load: Callable[[], Layer],
    steps: int,
    compiled: bool = False,
    estimate: Estimate | None = None,
) -> Call:
    layer, f = load(), torch.compile(problem.f) if compiled else problem.f

    def call() -> Solved:
        z = layer(f, problem.z0)
        loss = z.square().mean()
        if estimate is not None:
            loss = loss + 0.5 * estimate(f, z.detach())
        torch.autograd.grad(loss, problem.parameters)
        return Solved(z.detach(), steps)

    return call


def _ours(steps: int, backend: str) -> Layer:
    gradient = td.ImplicitGradient(tol=0, max_steps=steps)
    return lambda f, z0: td.fixed_point(f, z0, tol=0, max_steps=steps, gradient=gradient, backend=backend)


def _textbook(steps: int) -> Layer:
    """The hook of triton_deq.demo.textbook.DEQLayer, for any f."""
    from triton_deq.demo.textbook import anderson

    def layer(f: Function, z0: Tensor) -> Tensor:
        with torch.no_grad():
            z, _ = anderson(f, z0, tol=0.0, max_steps=steps)
        z = f(z)
        at = z.detach().requires_grad_()
        value = f(at)

        def hook(grad: Tensor) -> Tensor:
            def adjoint(u: Tensor) -> Tensor:
                return torch.autograd.grad(value, at, u, retain_graph=True)[0] + grad

            return anderson(adjoint, grad, tol=0.0, max_steps=steps)[0]

        z.register_hook(hook)
        return z

    return layer


def _torchdeq(steps: int) -> Layer:
    from torchdeq import get_deq

    solver = {"f_solver": "anderson", "b_solver": "anderson", "f_stop_mode": "rel", "b_stop_mode": "rel"}
    deq = get_deq(**solver, f_max_iter=steps, b_max_iter=steps, f_tol=0.0, b_tol=0.0, ift=True)
    deq.train()
    return lambda f, z0: deq(f, z0)[0][-1]


def _estimate(backend: str, f: Function, z: Tensor) -> Tensor:
    return td.jacobian_norm(f, z, backend=backend)


def _authors_estimate(f: Function, z: Tensor) -> Tensor:
    """One probe through double backward, as the paper's authors write it (arXiv 2106.14342, eq. 6)."""
    at = z.requires_grad_()
    value = f(at)
    (product,) = torch.autograd.grad(value, at, torch.randn_like(at), create_graph=True)
    return product.norm().square() / z.numel()


def _torchdeq_estimate(f: Function, z: Tensor) -> Tensor:
    from torchdeq.loss import jac_reg

    at = z.requires_grad_()
    return jac_reg(f(at), at, vecs=1)
