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
from triton_deq.models import IMAGE_CONFIGURATIONS, MDEQClassifier, MDEQConfiguration
from triton_deq.timing import Call

from .. import layers
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

        beside_plain = partial(layers.variants, setting, partial(_layer, setting, size))
        yield case("layer", "forward", beside_plain(layers.evaluate))
        yield case("layer", "full", beside_plain(layers.differentiate))
        yield case("penalty", "full", _penalties(setting, size))
        for mode in ("inference", "training"):
            yield case("model", mode, _models(setting, size, mode))


# ------------------------------------------------------------------------------------- one evaluation of f


def _layer(setting: Setting, size: Size) -> layers.Layer:
    """The features of random images, and a state."""
    model = _model(setting, size).eval()
    with setting.device, torch.no_grad():
        features = model.stem(_images(size))
        z = torch.randn_like(model.cell.initial_state(model.cell.inject(features)))
    plainly = partial(PlainMDEQ, model.cell, features.contiguous())
    return layers.Layer(model.cell, features, z.requires_grad_(), plainly, partial(_autocast, setting, size))


def _model(setting: Setting, size: Size, **options: Any) -> MDEQClassifier:
    torch.manual_seed(setting.seed)
    with setting.device:
        return MDEQClassifier(size.configuration, **options)


def _images(size: Size) -> Tensor:
    return torch.randn(size.shape).contiguous(memory_format=torch.channels_last)


def _autocast(setting: Setting, size: Size) -> torch.autocast:
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=size.narrow)


def _penalties(setting: Setting, size: Size) -> Iterator[Variant]:
    make = partial(_layer, setting, size)
    yield from layers.variants(setting, make, layers.penalise)
    yield Variant("bare f", partial(layers.prepare, make, layers.differentiate, "auto", False))
    yield Variant("bare f plain", partial(layers.prepare, make, layers.differentiate, "reference", True))


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
        yield Variant(
            "bare f", partial(layers.prepare, partial(_layer, setting, size), _evaluate_often, "auto", False)
        )


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
    model = _model(setting, size, solver=solver, graph=graph, state_dtype=state_dtype)
    return _run(setting, size, mode, model, lambda images: model(images).logits, backend)


def _plain_step(setting: Setting, size: Size, mode: str) -> Call:
    """The same model around the plain layer, solved as the textbook does."""
    from triton_deq.demo.textbook import anderson

    from .training import _textbook

    model = _model(setting, size)
    layer = _textbook(NFE) if mode == "training" else lambda f, z0: anderson(f, z0, tol=0.0, max_steps=NFE)[0]

    def forward(images: Tensor) -> Tensor:
        f = PlainMDEQ(model.cell, model.stem(images).contiguous())
        z = layer(f, images.new_zeros(size.batch, sum(c * h * w for c, h, w in f.sizes)))
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
        images = _images(size)
        labels = torch.randint(size.configuration.classes, (size.batch,))

    def call() -> Solved:
        with torch.set_grad_enabled(training), ambient(backend):
            with _autocast(setting, size):
                logits = forward(images)
                loss = torch.nn.functional.cross_entropy(logits, labels)
            if training:
                model.zero_grad()
                loss.backward()
        return Solved(logits.detach(), NFE)

    return call


def _evaluate_often(layer: layers.Layer, plain: bool) -> Call:
    once = layers.evaluate(layer, plain)

    def call() -> None:
        for _ in range(NFE):
            once()

    return call
