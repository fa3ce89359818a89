"""The Transformer cell: one evaluation, the penalty on it, and language models' steps at 14 evaluations.

The peer is the same layer written plainly, with a textbook Anderson.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_deq.models import DEQTransformerLM
from triton_deq.timing import Call

from .. import layers
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

        beside_plain = partial(layers.variants, setting, partial(_layer, setting, size))
        yield case("layer", "forward", beside_plain(layers.evaluate))
        yield case("layer", "product", beside_plain(layers.multiply))
        yield case("layer", "full", beside_plain(layers.differentiate))
        yield case("penalty", "full", beside_plain(layers.penalise))
        for mode in ("inference", "training"):
            yield case("model", mode, _models(setting, size, mode))


# ------------------------------------------------------------------------------------- one evaluation of f


def _layer(setting: Setting, size: Size) -> layers.Layer:
    """Embedded tokens with the memory before them, and a state."""
    torch.manual_seed(setting.seed)
    with setting.device:
        cell = DEQTransformerLM(_configuration(size, setting)).cell.eval()
        before, tokens, state = (
            torch.randn(size.batch, length, cell.width) for length in (size.memory, size.length, size.length)
        )
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, enabled=setting.gpu)
    with torch.no_grad(), autocast():
        memory = cell.memory(before, cell.inject(before), None, size.memory)
    plainly = partial(PlainTransformer, cell, tokens, memory)
    return layers.Layer(cell, (tokens, memory), state.requires_grad_(), plainly, autocast)


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
