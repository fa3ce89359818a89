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
    """The value and all gradients, with memory and with a window and dropout; 8 to 300 queries.

    With fewer a gradient is a small difference of large numbers, and its relative error means little.
    """
    from ..ops import attention as op

    batch, queries = case.shape[0], max(8, min(case.shape[1], 300))
    seed = torch.tensor([(case.seed + 1) * 0x5DEECE66D], device=case.device)
    variants: tuple[tuple[str, int, int, dict], ...] = (
        ("", 5, queries // 2 + 1, {}),
        ("masked ", 16, 0, {"window": queries // 2 + 2, "dropout": 0.2, "seed": seed}),
    )
    for label, depth, memory, options in variants:
        given: list[Any] = _draws(case, batch, queries, memory, depth)
        vector = case.randn(batch * queries, HEADS * depth, stream=9).view(batch, queries, HEADS, depth)
        q, k, v, *others = given
        context = op.Context(*others, **options)
        evaluated = op.attention_fwd(q, k, v, context)
        needed = tuple(each is not None for each in given)
        found = op.attention_gradients(vector, q, k, v, context, evaluated, needed)

        wide: list[Any] = [None if each is None else each.double().requires_grad_() for each in given]
        q, k, v, *others = wide
        wanted = reference.attention(q, k, v, op.Context(*others, **options))
        leaves = [each for each in wide if each is not None]
        expected = iter(torch.autograd.grad(wanted, leaves, vector.double()))
        yield row(
            case, "attention", "attention", f"{label}value", relative_error(evaluated.value, wanted.detach())
        )
        for name, kernel, gradient in zip(_NAMES, _KERNELS, found, strict=True):
            if gradient is None:
                continue
            right = next(expected)
            yield row(case, "attention", kernel, f"{label}{name}", relative_error(gradient, right))


def _draws(case: Case, batch: int, queries: int, memory: int, depth: int) -> list[Tensor | None]:
    """q, k, v, positions, both biases, memory's keys and values."""

    def rows(stream: int, count: int) -> Tensor:
        return case.randn(batch * count, HEADS * depth, stream=stream).view(batch, count, HEADS, depth)

    kept = [rows(stream, memory) if memory else None for stream in (6, 7)]
    positions = case.randn(memory + queries + 1, HEADS * depth, stream=3).unflatten(1, (HEADS, depth))
    biases = [case.randn(HEADS, depth, stream=stream) for stream in (4, 5)]
    return [*(rows(stream, queries) for stream in range(3)), positions, *biases, *kept]
