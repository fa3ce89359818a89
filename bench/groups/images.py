"""The multiscale DEQ: one evaluation of its layer, the penalty on it, and whole steps at 14 evaluations.

The peer is the same layer written plainly, as the authors' code has it, with a textbook Anderson.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import triton_deq as td
from triton_deq.backend import ambient
from triton_deq.deq import Injected
from triton_deq.models import IMAGE_CONFIGURATIONS, MDEQClassifier, MDEQConfiguration
from triton_deq.timing import Call

from ..cases import Case, Setting, Solved, Variant, kernels_alone
from ..peers.mdeq import PlainMDEQ

GROUP = "images"
NFE = 14


@dataclass(frozen=True)
class Size:
    """A configuration, how many images of how many pixels a side, and whether under bfloat16 autocast."""

    config: str
    batch: int
    pixels: int
    narrow: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.narrow else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.configuration.image_channels, self.pixels, self.pixels

    @property
    def configuration(self) -> MDEQConfiguration:
        return replace(
            IMAGE_CONFIGURATIONS[self.config],
            max_steps=NFE,
            backward_max_steps=NFE,
            tol=0.0,
            backward_tol=0.0,
            dropout=0.0,
            penalty=0.0,
        )


SIZES = {
    "tiny": [Size("digits", 2, 8)],
    "quick": [Size("cifar10-tiny", 8, 32)],
    "full": [
        Size("cifar10-tiny", 16, 32),
        Size("imagenet-small", 4, 224),
        Size("imagenet-small", 4, 224, narrow=True),
    ],
}
GPU_SIZES = {
    "tiny": [Size("digits", 2, 8, narrow=True)],
    "quick": [Size("cifar10-large", 96, 32, narrow=True)],
    "full": [Size("cifar10-large", 96, 32, narrow=True), Size("imagenet-small", 32, 224, narrow=True)],
}


def cases(setting: Setting) -> Iterator[Case]:
    for size in (GPU_SIZES if setting.gpu else SIZES)[setting.scale]:

        def case(op: str, mode: str, variants: Iterator[Variant], size: Size = size) -> Case:
            return Case(GROUP, f"{size.config} {op}", mode, size.dtype, size.shape, tuple(variants))

        yield case("layer", "forward", _layers(setting, size, _evaluate))
        yield case("layer", "full", _layers(setting, size, _differentiate))
        yield case("penalty", "full", _penalties(setting, size))
        for mode in ("inference", "training"):
            yield case("model", mode, _models(setting, size, mode))


# ------------------------------------------------------------------------------------- one evaluation of f


@dataclass(frozen=True)
class Given:
    """A model, the features of random images, a state, and how to run."""

    model: MDEQClassifier
    features: Tensor
    z: Tensor
    autocast: Callable[[], torch.autocast]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.z, *self.model.cell.parameters()]


Evaluation = Callable[[Given, bool], Call]
"""From what is given, and whether the layer is the plain one, to what is timed."""


def _layers(setting: Setting, size: Size, evaluation: Evaluation) -> Iterator[Variant]:
    for name, backend in kernels_alone(setting):
        yield Variant(name, partial(_prepare, setting, size, evaluation, backend, False), backend)
    yield Variant("plain layer", partial(_prepare, setting, size, evaluation, "reference", True))


def _penalties(setting: Setting, size: Size) -> Iterator[Variant]:
    yield from _layers(setting, size, _penalise)
    yield Variant("bare f", partial(_prepare, setting, size, _differentiate, "auto", False))
    yield Variant("bare f plain", partial(_prepare, setting, size, _differentiate, "reference", True))


def _prepare(setting: Setting, size: Size, evaluation: Evaluation, backend: str, plain: bool) -> Call:
    call = evaluation(_given(setting, size), plain)

    def run() -> object:
        with ambient(backend):
            return call()

    return run


def _given(setting: Setting, size: Size) -> Given:
    torch.manual_seed(setting.seed)
    with setting.device:
        model = MDEQClassifier(size.configuration).eval()
        images = torch.randn(size.shape).contiguous(memory_format=torch.channels_last)
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, enabled=size.narrow)
    with torch.no_grad():
        features = model.stem(images)
        z = torch.randn_like(model.cell.initial_state(model.cell.inject(features)))
    return Given(model, features, z.requires_grad_(), autocast)


def _evaluate(given: Given, plain: bool) -> Call:
    """As the loop of a solver does it: what is computed once a solve is there."""
    cell, z = given.model.cell, given.z.detach()
    with torch.no_grad(), given.autocast():
        u = cell.inject(given.features)
        f, out = PlainMDEQ(cell, given.features.contiguous()), torch.empty_like(z)

    def call() -> Tensor:
        with torch.no_grad(), given.autocast():
            if plain:
                return f(z)
            cell.write(z, u, out)
            return out

    return call


def _differentiate(given: Given, plain: bool) -> Call:
    """With the gradients of all parameters and of z."""

    def call() -> tuple[Tensor, ...]:
        with given.autocast():
            f = _function(given, plain)
            value = f(given.z)
        return torch.autograd.grad(value.square().mean(), given.leaves)

    return call


def _penalise(given: Given, plain: bool) -> Call:
    """The same with one probe's Jacobian penalty: from the layer's own product, or by double backward."""

    def call() -> tuple[Tensor, ...]:
        with given.autocast():
            f = _function(given, plain)
            if plain:
                value = f(given.z)
                probe = torch.randn_like(value)
                (product,) = torch.autograd.grad(value, given.z, probe, create_graph=True)
            else:
                value, pullback = f.vjp(given.z)
                product = pullback(torch.randn_like(value))
        loss = value.square().mean() + product.square().sum() / product.numel()
        return torch.autograd.grad(loss, given.leaves)

    return call


def _function(given: Given, plain: bool) -> Any:
    cell = given.model.cell
    return PlainMDEQ(cell, given.features) if plain else Injected(cell, cell.inject(given.features))


# ------------------------------------------------------------------------------------------- whole models


def _models(setting: Setting, size: Size, mode: str) -> Iterator[Variant]:
    for name, backend in kernels_alone(setting):
        yield Variant(name, partial(step, setting, size, mode, backend, None), backend)
        if setting.gpu and backend == "triton":
            graphed = partial(step, setting, size, mode, backend, None, graph=True)
            yield Variant(f"{name} graph", graphed, "cuda graph")
            narrow = partial(graphed, state_dtype=torch.bfloat16)
            yield Variant(f"{name} graph, bfloat16 state", narrow, "cuda graph")
        broyden = td.Broyden(memory=NFE)
        yield Variant(f"{name} broyden", partial(step, setting, size, mode, backend, broyden), backend)
    yield Variant("plain layer, textbook", partial(_plain_step, setting, size, mode))
    if mode == "inference":
        yield Variant("bare f", partial(_prepare, setting, size, _evaluate_often, "auto", False))


def step(
    setting: Setting,
    size: Size,
    mode: str,
    backend: str,
    solver: td.Broyden | None,
    graph: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Call:
    """Inference or a training step of the model; graph: both solves in CUDA graphs."""
    given = _given(setting, size)
    model = MDEQClassifier(size.configuration, solver=solver, graph=graph, state_dtype=state_dtype)
    model.to(setting.device)
    model.load_state_dict(given.model.state_dict())
    return _run(setting, size, mode, model, lambda images: model(images).logits, backend)


def _plain_step(setting: Setting, size: Size, mode: str) -> Call:
    """The same model around the plain layer, solved as the textbook does."""
    from triton_deq.demo.textbook import anderson

    from .training import _textbook

    given = _given(setting, size)
    model = given.model
    layer = _textbook(NFE) if mode == "training" else lambda f, z0: anderson(f, z0, tol=0.0, max_steps=NFE)[0]

    def forward(images: Tensor) -> Tensor:
        features = model.stem(images)
        f = PlainMDEQ(model.cell, features)
        z = layer(f, torch.zeros_like(given.z))
        maps = [
            piece.view(len(z), *sizes)
            for piece, sizes in zip(z.split([c * h * w for c, h, w in f.sizes], 1), f.sizes, strict=True)
        ]
        return model.head(maps)

    return _run(setting, size, mode, model, forward, "reference")


def _run(
    setting: Setting,
    size: Size,
    mode: str,
    model: MDEQClassifier,
    forward: Callable[[Tensor], Tensor],
    backend: str,
) -> Call:
    """Inference, or a training step with all gradients."""
    training = mode == "training"
    model.train(training)
    with setting.device:
        images = torch.randn(size.shape).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(size.configuration.classes, (size.batch,))

    def call() -> Solved:
        with torch.set_grad_enabled(training), ambient(backend):
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=size.narrow):
                logits = forward(images)
                loss = torch.nn.functional.cross_entropy(logits, labels)
            if training:
                model.zero_grad()
                loss.backward()
        return Solved(logits.detach(), NFE)

    return call


def _evaluate_often(given: Given, plain: bool) -> Call:
    once = _evaluate(given, plain)

    def call() -> None:
        for _ in range(NFE):
            once()

    return call
