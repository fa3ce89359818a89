"""The DEQ-Transformer: its attention, and whole steps beside the stacked model of the paper's table."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from triton_deq.backend import ambient
from triton_deq.models import CONFIGURATIONS, DEQTransformerLM, LanguageModelConfiguration, TransformerXL
from triton_deq.models.transformer import LanguageModel
from triton_deq.ops.attention import Context, attention, spare_columns
from triton_deq.timing import Call

from ..cases import Case, Setting, Solved, Variant, kernels_alone, ours

GROUP = "language"
NFE = 14
"""Evaluations of f in each solve: the paper's pre-LN model with the penalty."""


@dataclass(frozen=True)
class Size:
    """Sequences, tokens of a segment, of the memory before it, heads, and entries a head; H·d is the width.

    inner, layers, stacked: the feed-forward of the DEQ; the stack's layers, and the feed-forward of each.
    """

    batch: int
    length: int
    memory: int
    heads: int
    head: int
    inner: int
    layers: int
    stacked: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.length, self.heads * self.head


PAPER = Size(14, 150, 150, 10, 70, 48000, 18, 1550)
"""A quarter of the batch of 56, as on each of the authors' four GPUs."""
SIZES = {
    "tiny": Size(1, 3, 2, 2, 4, 8, 2, 4),
    "quick": Size(2, 32, 32, 4, 16, 4388, 18, 142),
    "full": Size(4, 64, 64, 4, 16, 4388, 18, 142),
}
"""The paper's proportions at a smaller width, beyond what only shows that it runs."""
GPU_SIZES = {"tiny": SIZES["tiny"], "quick": PAPER, "full": PAPER}


def cases(setting: Setting) -> Iterator[Case]:
    size = (GPU_SIZES if setting.gpu else SIZES)[setting.scale]
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    for mode in ("forward", "full"):
        yield Case(
            GROUP, "attention", mode, dtype, size.shape, tuple(_attentions(setting, size, dtype, mode))
        )
    for mode in ("inference", "training"):
        yield Case(GROUP, "deq-transformer", mode, dtype, size.shape, tuple(_models(setting, size, mode)))


# ------------------------------------------------------------------------------------------- attention


def _attentions(setting: Setting, size: Size, dtype: torch.dtype, mode: str) -> Iterator[Variant]:
    """full: with the gradients of q, k and v, as a step of the backward solve needs them."""
    for name, backend in ours(setting, "reference"):
        yield Variant(name, partial(_attention, setting, size, dtype, mode, backend), backend)
    eager = partial(_attention, setting, size, dtype, mode, "reference")
    yield Variant("eager formula", eager)
    if setting.compiled != "no":
        yield Variant("formula compiled", partial(eager, True), "inductor", compiles=True)


def _attention(
    setting: Setting, size: Size, dtype: torch.dtype, mode: str, backend: str, compiled: bool = False
) -> Call:
    generator = torch.Generator(setting.device).manual_seed(setting.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=setting.device)

    # As the cell has them: zeros behind each head change no product, but these are as fast as zeros.
    heads = size.heads, size.head + spare_columns(randn(1), size.head, backend)
    q, k, v = (randn(size.batch, size.length, *heads).requires_grad_(mode == "full") for _ in range(3))
    keys, values = (randn(size.batch, size.memory, *heads) for _ in range(2))
    context = Context(randn(size.length + size.memory, *heads), randn(*heads), randn(*heads), keys, values)
    vector = randn(size.batch, size.length, *heads)
    call = torch.compile(attention) if compiled else attention
    if mode == "forward":
        return torch.no_grad()(lambda: call(q, k, v, context, backend))
    return lambda: torch.autograd.grad(call(q, k, v, context, backend), (q, k, v), vector)


# ---------------------------------------------------------------------------------------- whole models


def _models(setting: Setting, size: Size, mode: str) -> Iterator[Variant]:
    base = configuration_of(size, setting)
    stacked = replace(base, layers=size.layers, inner=size.stacked, weight_norm=False)
    for name, backend in kernels_alone(setting):
        yield Variant(name, partial(step, setting, base, size, mode, backend), backend)
        if setting.gpu and backend == "triton":
            graphed = partial(step, setting, base, size, mode, backend, graph=True)
            yield Variant(f"{name} graph", graphed, "cuda graph")
            narrow = partial(graphed, state_dtype=torch.bfloat16)
            yield Variant(f"{name} graph, bfloat16 state", narrow, "cuda graph")
        if mode == "training":  # the penalty falls in a third of the steps: here in all, and in none
            penalised = replace(base, penalty=1.0, penalty_probability=1.0)
            prepare = partial(step, setting, penalised, size, mode, backend)
            yield Variant(f"{name} penalised", prepare, backend)
    xl = partial(step, setting, stacked, size, mode, "auto")
    yield Variant("transformer-xl", xl)
    if setting.compiled != "no" and setting.gpu:
        yield Variant("transformer-xl compiled", partial(xl, True), "inductor", compiles=True)


def configuration_of(size: Size, setting: Setting) -> LanguageModelConfiguration:
    published = CONFIGURATIONS["wikitext103-pre-ln-jr"]
    if not setting.gpu or setting.scale == "tiny":  # a vocabulary that leaves the cells something to take
        published = replace(published, vocabulary=300, cutoffs=(100, 200), div_value=1)
    return replace(
        published,
        width=size.heads * size.head,
        heads=size.heads,
        head_width=size.head,
        inner=size.inner,
        segment=size.length,
        memory=size.memory,
        penalty=0.0,
        max_steps=NFE,
        backward_max_steps=NFE,
        tol=0.0,
        backward_tol=0.0,
    )


def step(
    setting: Setting,
    configuration: LanguageModelConfiguration,
    size: Size,
    mode: str,
    backend: str,
    compiled: bool = False,
    graph: bool = False,
    state_dtype: torch.dtype | None = None,
    make: type[DEQTransformerLM] = DEQTransformerLM,
) -> Call:
    """One segment with memory, through embedding and softmax; in training with all gradients.

    On a GPU under bfloat16 autocast. graph: a DEQ's solves in CUDA graphs.
    """
    torch.manual_seed(setting.seed)
    with setting.device:
        if configuration.layers:
            model: LanguageModel = TransformerXL(configuration)
        else:
            model = make(configuration, graph=graph, state_dtype=state_dtype)
        model.train(mode == "training")
        tokens = torch.randint(configuration.vocabulary, (size.batch, 2 * size.length + 1))
    first, second = tokens[:, : size.length], tokens[:, size.length :]
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, enabled=setting.gpu)
    with torch.no_grad(), autocast(), ambient(backend):
        memory = model(first).memory
    run = torch.compile(model) if compiled else model

    def call() -> Solved:
        with torch.set_grad_enabled(mode == "training"), ambient(backend):
            with autocast():
                out = run(second[:, :-1], second[:, 1:], memory)
                loss = out.nll.mean() + out.penalty
            if mode == "training":
                model.zero_grad()
                loss.backward()
        return Solved(out.hidden.detach(), NFE)

    return call
