"""The Transformer cell: one evaluation, the penalty on it, and language models' steps at 14 evaluations.

The peer is the same layer written plainly, with a textbook Anderson.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_deq.backend import ambient
from triton_deq.cells import TransformerCell
from triton_deq.cells.transformer import Memory
from triton_deq.deq import Injected
from triton_deq.models import DEQTransformerLM
from triton_deq.timing import Call

from ..cases import Case, Setting, Variant, kernels_alone
from ..peers.transformer import PlainTransformer
from .language import NFE, PAPER, SIZES, Size, configuration_of, step

GROUP = "transformer"
WIDE = Size(4, 64, 64, 8, 32, 2048, 0, 0)
CPU_SIZES = {"tiny": [SIZES["tiny"]], "quick": [SIZES["quick"]], "full": [SIZES["full"], WIDE]}
GPU_SIZES = {"tiny": [SIZES["tiny"]], "quick": [PAPER], "full": [PAPER]}


def cases(setting: Setting) -> Iterator[Case]:
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    for size in (GPU_SIZES if setting.gpu else CPU_SIZES)[setting.scale]:

        def case(op: str, mode: str, variants: Iterator[Variant], size: Size = size) -> Case:
            return Case(GROUP, op, mode, dtype, size.shape, tuple(variants))

        yield case("layer", "forward", _layers(setting, size, _evaluate))
        yield case("layer", "product", _layers(setting, size, _multiply))
        yield case("layer", "full", _layers(setting, size, _differentiate))
        yield case("penalty", "full", _layers(setting, size, _penalise))
        for mode in ("inference", "training"):
            yield case("model", mode, _models(setting, size, mode))


# ------------------------------------------------------------------------------------- one evaluation of f


@dataclass(frozen=True)
class Given:
    """A cell, embedded tokens with the memory before them, a state, and how to run."""

    cell: TransformerCell
    tokens: Tensor
    memory: Memory
    z: Tensor
    autocast: Callable[[], torch.autocast]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.z, *self.cell.parameters()]

    def function(self, plain: bool) -> Any:
        """f, with what is computed once a solve."""
        if plain:
            return PlainTransformer(self.cell, self.tokens, self.memory)
        return Injected(self.cell, self.cell.inject((self.tokens, self.memory)))


Evaluation = Callable[[Given, bool], Call]
"""From what is given, and whether the layer is the plain one, to what is timed."""


def _layers(setting: Setting, size: Size, evaluation: Evaluation) -> Iterator[Variant]:
    for name, backend in kernels_alone(setting):
        yield Variant(name, partial(_prepare, setting, size, evaluation, backend, False), backend)
    yield Variant("plain layer", partial(_prepare, setting, size, evaluation, "reference", True))


def _prepare(setting: Setting, size: Size, evaluation: Evaluation, backend: str, plain: bool) -> Call:
    with ambient(backend):
        call = evaluation(_given(setting, size), plain)

    def run() -> object:
        with ambient(backend):
            return call()

    return run


def _given(setting: Setting, size: Size) -> Given:
    torch.manual_seed(setting.seed)
    with setting.device:
        cell = DEQTransformerLM(_configuration(size, setting)).cell.eval()
        before, tokens, state = (
            torch.randn(size.batch, length, cell.width) for length in (size.memory, size.length, size.length)
        )
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, enabled=setting.gpu)
    with torch.no_grad(), autocast():
        memory = cell.memory(before, cell.inject(before), None, size.memory)
    return Given(cell, tokens, memory, state.requires_grad_(), autocast)


def _evaluate(given: Given, plain: bool) -> Call:
    """As the loop of a solver does it: what is computed once a solve is there."""
    z = given.z.detach()
    with torch.no_grad(), given.autocast():
        f, out = given.function(plain), torch.empty_like(z)

    def call() -> Tensor:
        with torch.no_grad(), given.autocast():
            if plain:
                return f(z)
            f.write(z, out)
            return out

    return call


def _multiply(given: Given, plain: bool) -> Call:
    """A vector by the Jacobian, as the loop of a backward solve does it."""
    with given.autocast():
        if plain:
            f, z = given.function(plain), given.z
            value = f(z)
            vector = torch.randn_like(value)
            return lambda: torch.autograd.grad(value, z, vector, retain_graph=True)
        with torch.no_grad():
            value, pullback = given.function(plain).vjp(given.z)
    vector = torch.randn_like(value)
    return torch.no_grad()(lambda: pullback(vector))


def _differentiate(given: Given, plain: bool) -> Call:
    """With the gradients of all parameters and of z."""

    def call() -> tuple[Tensor, ...]:
        with given.autocast():
            value = given.function(plain)(given.z)
        return torch.autograd.grad(value.square().mean(), given.leaves)

    return call


def _penalise(given: Given, plain: bool) -> Call:
    """The same with one probe's Jacobian penalty: from the cell's own product, or by double backward."""

    def call() -> tuple[Tensor, ...]:
        with given.autocast():
            f = given.function(plain)
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


# ------------------------------------------------------------------------------------------- whole models


def _models(setting: Setting, size: Size, mode: str) -> Iterator[Variant]:
    for name, backend in kernels_alone(setting):
        yield Variant(
            name, partial(step, setting, _configuration(size, setting), size, mode, backend), backend
        )
    yield Variant("plain layer, textbook", partial(_plain_step, setting, size, mode))


def _configuration(size: Size, setting: Setting) -> Any:
    return replace(configuration_of(size, setting), dropout=0.0, attention_dropout=0.0)


def _plain_step(setting: Setting, size: Size, mode: str) -> Call:
    return step(setting, _configuration(size, setting), size, mode, "reference", make=PlainLM)


class PlainLM(DEQTransformerLM):
    """The same model around the plain layer, solved as the textbook does, once there is a memory."""

    def _body(self, x: Tensor, memory: Any) -> Any:
        from triton_deq.demo.textbook import anderson

        from .training import _textbook

        if memory is None:
            return super()._body(x, memory)
        f, z0 = PlainTransformer(self.cell, x, memory), torch.zeros_like(x)
        value = _textbook(NFE)(f, z0) if self.training else anderson(f, z0, tol=0.0, max_steps=NFE)[0]
        return value, memory, None, z0.new_zeros(())
