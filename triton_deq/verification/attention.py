"""The relative attention's kernels: the value and the gradient of everything that it reads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import attention as reference
from .case import Case, Row, relative_error, row

HEADS = 2
_STATES = ("of q", "of k", "of v")
_NAMES = (*_STATES, "of r", "of b_c", "of b_p", "of memory k", "of memory v")
_KERNELS = (
    "attention_query_vjp",
    *("attention_key_vjp",) * 2,
    "attention_position_vjp",
    *("attention_query_vjp",) * 2,
    *("attention_key_vjp",) * 2,
)


def check_attention(case: Case) -> Iterator[Row]:
    """The value, all gradients and theirs, with memory and with a window and dropout.

    8 to 300 queries; in the interpreter at most 20 of one sample, because each tile takes it long. With fewer
    than 8 a gradient is a small difference of large numbers, and its relative error means little.
    """
    from ..ops import attention as op

    samples, most = (case.shape[0], 300) if case.device.type == "cuda" else (1, 20)
    batch, queries = samples, max(8, min(case.shape[1], most))
    seed = torch.tensor([(case.seed + 1) * 0x5DEECE66D], device=case.device)
    variants: tuple[tuple[str, int, int, dict], ...] = (
        ("", 5, queries // 2 + 1, {}),
        ("masked ", 16, 0, {"window": queries // 2 + 2, "dropout": 0.2, "seed": seed}),
    )
    for label, depth, memory, options in variants:
        tensors, (vector, *directions) = _draws(case, batch, queries, memory, depth)
        q, k, v, *others = tensors
        context = op.Context(*others, **options)
        evaluated = op.attention_fwd(q, k, v, context)
        needed = tuple(each is not None for each in tensors)
        first = op.attention_gradients(vector, q, k, v, context, evaluated, needed)
        given = op.Given(q, k, v, context, vector)
        derivative, tangents = op.derivative(given, evaluated, *directions)
        second = op.attention_gradients(vector, q, k, v, context, evaluated, needed, tangents)

        tensors = [None if each is None else each.double().requires_grad_() for each in tensors]
        wide, *wide_directions = (each.double().requires_grad_() for each in (vector, *directions))
        q, k, v, *others = tensors
        context = op.Context(*others, **options)
        leaves = [each for each in tensors if each is not None]
        value = reference.attention(q, k, v, context)
        firsts = torch.autograd.grad(value, leaves, wide)
        products = reference.attention_vjp(wide, q, k, v, context)
        changed, *seconds = torch.autograd.grad(products.unbind(2), [wide, *leaves], wide_directions)

        error = relative_error(evaluated.value, value.detach())
        yield row(case, "attention", "attention", f"{label}value", error)
        error = relative_error(derivative, changed)
        yield row(case, "attention", "attention_jvp", f"{label}along a, b, c", error)
        for order, found, wanted in (("", first, firsts), (", second", second, seconds)):
            remaining = iter(wanted)
            for name, kernel, gradient in zip(_NAMES, _KERNELS, found, strict=True):
                if gradient is not None:
                    error = relative_error(gradient, next(remaining))
                    yield row(case, "attention", kernel, f"{label}{name}{order}", error)


def _draws(
    case: Case, batch: int, queries: int, memory: int, depth: int
) -> tuple[list[Any], tuple[Tensor, ...]]:
    """q, k, v, positions, both biases, memory's keys and values; a vector and three directions."""

    def rows(stream: int, count: int) -> Tensor:
        return case.randn(batch * count, HEADS * depth, stream=stream).view(batch, count, HEADS, depth)

    kept = [rows(stream, memory) if memory else None for stream in (6, 7)]
    positions = case.randn(memory + queries + 1, HEADS * depth, stream=3).unflatten(1, (HEADS, depth))
    biases = [case.randn(HEADS, depth, stream=stream) for stream in (4, 5)]
    states = [rows(stream, queries) for stream in range(3)]
    return [*states, positions, *biases, *kept], tuple(rows(stream, queries) for stream in range(8, 12))
