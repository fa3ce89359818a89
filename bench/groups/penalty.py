"""The Jacobian penalty: what its estimate costs, and its gradient, beside one forward and backward of f.

And the spectral radius, by as many products at most as TorchDEQ's power iteration takes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import triton_deq as td
from triton_deq.backend import ambient
from triton_deq.timing import Call

from ..cases import Case, Setting, Variant, ours
from ..problems import Problem, make

GROUP = "penalty"
PRODUCTS = 100
"""Of a spectral radius: TorchDEQ's default."""
Estimate = Callable[[], Tensor]
SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": [("dense", (2, 64))],
    "quick": [("dense", (128, 512)), ("mlp cell", (128, 512))],
    "full": [("dense", (128, 1024)), ("mlp cell", (128, 1024)), ("convolution", (4, 32, 32, 32))],
}
GPU_SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "tiny": SIZES["tiny"],
    "quick": [("dense", (128, 1024)), ("mlp cell", (128, 1024)), ("convolution", (32, 64, 32, 32))],
    "full": [
        ("dense", (128, 1024)),
        ("mlp cell", (128, 1024)),
        ("mlp cell", (1024, 2048)),
        ("convolution", (32, 128, 56, 56)),
    ],
}


def cases(setting: Setting) -> Iterator[Case]:
    for kind, shape in (GPU_SIZES if setting.gpu else SIZES)[setting.scale]:
        for mode in ("forward", "full"):
            problem = make(kind, shape, setting.device, seed=setting.seed, grad=mode == "full")
            variants = tuple(_variants(setting, problem, mode))
            yield Case(GROUP, kind, mode, torch.float32, shape, variants)
        problem = make(kind, shape, setting.device, seed=setting.seed)
        yield Case(GROUP, kind, "radius", torch.float32, shape, tuple(_radii(setting, problem)))


def _variants(setting: Setting, problem: Problem, mode: str) -> Iterator[Variant]:
    at = problem.z0 + 0.1
    yield Variant("bare f", partial(_call, problem, lambda: partial(_bare, problem, at), mode))
    for name, backend in ours(setting):
        yield Variant(name, partial(_call, problem, partial(_ours, problem, at, backend), mode), backend)
    peer = partial(_torchdeq, problem, at)
    yield Variant("torchdeq", partial(_call, problem, peer, mode))
    if setting.compiled != "no":  # where the peer's double backward is refused
        own = partial(_ours, problem, at, "reference")
        for name, load in (("triton-deq compiled", own), ("torchdeq compiled", peer)):
            yield Variant(name, partial(_call, problem, load, mode, True), "inductor", compiles=True)


def _call(problem: Problem, load: Callable[[], Estimate], mode: str, compiled: bool = False) -> Call:
    """The estimate alone, without gradients to come; or with its gradient in f's parameters."""
    estimate = torch.compile(load()) if compiled else load()
    if mode == "forward":
        return lambda: estimate().detach()
    return lambda: torch.autograd.grad(estimate(), problem.parameters)


def _bare(problem: Problem, at: Tensor) -> Tensor:
    return problem.f(at).square().mean()


def _ours(problem: Problem, at: Tensor, backend: str) -> Estimate:
    """Without gradients to come, it is asked for under no_grad."""

    def estimate() -> Tensor:
        with torch.set_grad_enabled(problem.weight.requires_grad):
            return td.jacobian_norm(problem.f, at, backend=backend)

    return estimate


def _torchdeq(problem: Problem, at: Tensor) -> Estimate:
    """locuslab's estimator as TorchDEQ ships it; a graph of it is kept only where one is needed."""
    from torchdeq.loss import jac_reg

    keep = problem.weight.requires_grad

    def estimate() -> Tensor:
        z = at.detach().requires_grad_()
        return jac_reg(problem.f(z), z, create_graph=keep)

    return estimate


def _radii(setting: Setting, problem: Problem) -> Iterator[Variant]:
    at = problem.z0 + 0.1

    def ours_on(backend: str) -> Call:
        def call() -> Tensor:
            with ambient(backend):
                return td.spectral_radius(problem.f, at, PRODUCTS)

        return call

    def torchdeq() -> Call:
        from torchdeq.loss import power_method

        def call() -> Tensor:
            z = at.detach().requires_grad_()
            return power_method(problem.f(z), z, n_iters=PRODUCTS)[1]

        return call

    yield Variant("bare f", lambda: torch.no_grad()(partial(_bare, problem, at)))
    for name, backend in ours(setting):
        yield Variant(name, partial(ours_on, backend), backend)
    yield Variant("torchdeq", torchdeq)
