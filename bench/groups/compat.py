"""TorchDEQ's, the authors' and the tutorial's code, as it is and on our solvers by one line.

Same f, same input, and the tolerance 0, so that both take the same steps to the same iterates: what differs
is the solver's own time. "bare f" evaluates f, and for a training step its products, as often.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_deq.timing import Call

from ..cases import Case, Setting, Solved, Variant
from ..problems import Function, Problem, make

GROUP = "compat"
STEPS = 20
SOLVERS = {
    "torchdeq": ("anderson", "broyden", "fixed_point_iter"),
    "locuslab": ("anderson", "broyden"),
    "tutorial": ("anderson",),
}
FORWARD = {
    "tiny": [("pointwise", (2, 256))],
    "quick": [("pointwise", (32, 1024)), ("pointwise", (32, 16384))],
    "full": [("pointwise", (32, 1024)), ("pointwise", (32, 16384)), ("pointwise", (8, 262144))],
}
TRAINING: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": [("dense", (2, 64))],
    "quick": [("dense", (128, 512))],
    "full": [("dense", (128, 512)), ("convolution", (4, 32, 32, 32))],
}

Layer = Callable[[Function, Tensor], Tensor]
"""From f and z0 to the fixed point, with its gradient where it is to be trained."""


def cases(setting: Setting) -> Iterator[Case]:
    for training, sizes in ((False, FORWARD), (True, TRAINING)):
        for kind, shape in sizes[setting.scale]:
            for library, solvers in SOLVERS.items():
                for solver in solvers:
                    yield _case(setting, library, solver, kind, shape, training)


def _case(
    setting: Setting, library: str, solver: str, kind: str, shape: tuple[int, ...], training: bool
) -> Case:
    problem = make(kind, shape, setting.device, seed=setting.seed, grad=training)
    steps = 4 if setting.scale == "tiny" else STEPS // 2 if training else STEPS
    layer = {"torchdeq": _torchdeq, "locuslab": _locuslab, "tutorial": _tutorial}[library]
    # Broyden evaluates f once more than it takes steps.
    evaluations = steps + (solver == "broyden")
    calls: dict[str, Callable[[], Layer]] = {
        "bare f": partial(_bare, evaluations, training),
        "triton-deq": partial(layer, solver, steps, training, ours=True),
        library: partial(layer, solver, steps, training, ours=False),
    }
    variants = tuple(
        Variant(name, partial(_call, problem, load, evaluations, training)) for name, load in calls.items()
    )
    mode = "training" if training else "forward"
    return Case(GROUP, f"{library} {solver}", f"{mode}, {kind}", torch.float32, shape, variants, problem)


def _call(problem: Problem, load: Callable[[], Layer], evaluations: int, training: bool) -> Call:
    layer = load()

    def call() -> Solved:
        if not training:
            with torch.no_grad():
                return Solved(layer(problem.f, problem.z0), evaluations)
        z = layer(problem.f, problem.z0)
        torch.autograd.grad(z.square().mean(), problem.parameters)
        return Solved(z.detach(), evaluations)

    return call


def _bare(evaluations: int, training: bool) -> Layer:
    def layer(f: Function, z: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(evaluations):
                z = f(z)
        return _hooked(f, z, lambda product, grad: _repeated(product, grad, evaluations)) if training else z

    return layer


def _repeated(product: Function, grad: Tensor, times: int) -> Tensor:
    for _ in range(times):
        grad = product(grad)
    return grad


def _hooked(f: Function, z: Tensor, solve: Callable[[Function, Tensor], Tensor]) -> Tensor:
    """f once more with its graph, and the gradient's linear system in a hook, as the authors write it."""
    z = z.detach().requires_grad_()
    value = f(z)
    handle: list[Any] = []

    def hook(grad: Tensor) -> Tensor:
        handle.pop().remove()
        return solve(lambda u: torch.autograd.grad(value, z, u, retain_graph=True)[0] + grad, grad)

    handle.append(value.register_hook(hook))
    return value


def _torchdeq(solver: str, steps: int, training: bool, ours: bool) -> Layer:
    import torchdeq

    import triton_deq.compat.torchdeq as compat

    if ours:
        compat.install(replace=True)
    try:
        deq = torchdeq.get_deq(
            f_solver=solver,
            b_solver=solver,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=steps,
            b_max_iter=steps,
            f_tol=0.0,
            b_tol=0.0,
            ift=True,
        )
    finally:
        compat.uninstall()
    deq.train(training)
    return lambda f, z0: deq(f, z0)[0][-1]


def _locuslab(solver: str, steps: int, training: bool, ours: bool) -> Layer:
    """Their solvers want a state of three dimensions."""
    from triton_deq.compat import locuslab

    from ..peers.locuslab import load

    solve = getattr(locuslab if ours else load(), solver)

    def result(f: Function, z0: Tensor) -> Tensor:
        packed = solve(
            lambda z: f(z.view_as(z0)).view_as(z), z0.flatten(1)[..., None], threshold=steps, eps=0.0
        )
        return packed["result"].view_as(z0)

    def layer(f: Function, z0: Tensor) -> Tensor:
        with torch.no_grad():
            z = result(f, z0)
        if not training:
            return z
        return _hooked(f, z, lambda adjoint, grad: result(adjoint, torch.zeros_like(grad)))

    return layer


def _tutorial(solver: str, steps: int, training: bool, ours: bool) -> Layer:
    from triton_deq.compat import tutorial
    from triton_deq.demo import textbook

    options: dict[str, Any] = {"max_iter": steps} if ours else {"max_steps": steps, "history": 5}
    solve = partial(getattr(tutorial if ours else textbook, solver), tol=0.0, **options)

    def result(f: Function, z0: Tensor) -> Tensor:
        return solve(f, z0)[0]

    def layer(f: Function, z0: Tensor) -> Tensor:
        with torch.no_grad():
            z = result(f, z0)
        return _hooked(f, z, result) if training else z

    return layer
