"""Transformer-XL's relative attention in PyTorch, and its vector-Jacobian product.

With i a query of T, j a key of R = M + T (M of them in memory), δ = i + M − j their distance, s the scale:
`S_ij = s ((q_i + b_c)·k_j + (q_i + b_p)·r_δ)` where 0 ≤ δ < window, else −∞, with both learned biases (Dai et
al., arXiv 1901.02860, section 3.3); `P = softmax(S)`; `o_i = Σ_j K_ij P_ij v_j` with the dropout mask K. All
is differentiable by ordinary operators; the scores `[B, H, T, R]` are held in memory.

No entry is gathered by its distance: where distances fall along a row, the row of each query lies one place
further to the left than that of the query before it, so the same memory, read with other strides, has the
keys in order.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import tracked
from .jacobian import words


class Context(NamedTuple):
    """What a relative attention reads beside q, k and v: all of it stays the same during a solve.

    Attributes:
        positions: r `[≥ R, H, d]`, the key of each distance, from 0.
        content_bias, position_bias: b_c and b_p, `[H, d]`.
        memory_keys, memory_values: `[B, M, H, d]`, on the left of the others; None for M = 0.
        window: how many keys a query sees, itself included; None for all.
        dropout: the probability that an entry of P is dropped, in [0, 1).
        seed: int64 `[1]`, which stands for the dropout mask; None without dropout.
        mask: K `[B, H, T, R]` itself, for ordinary operators that would make it anew each time; or None.
        scale: s; by default `d^(-1/2)`. Heads that zeros make wider, for loads of 16 bytes, need it said.
    """

    positions: Tensor
    content_bias: Tensor
    position_bias: Tensor
    memory_keys: Tensor | None = None
    memory_values: Tensor | None = None
    window: int | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    mask: Tensor | None = None
    scale: float | None = None

    @property
    def memory(self) -> int:
        """M"""
        return 0 if self.memory_keys is None else self.memory_keys.shape[1]

    @property
    def factor(self) -> float:
        """s"""
        return self.positions.shape[-1] ** -0.5 if self.scale is None else self.scale


class Weighted(NamedTuple):
    """An evaluated attention, with what its products would otherwise compute again; all of it recorded.

    value: o `[B, T, H, d]`. queries: q + b_c, `[B, H, T, d]`. keys, values: of all tokens, `[B, H, R, d]`.
    weights: P `[B, H, T, R]`.
    """

    value: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """o `[B, T, H, d]` from q, k, v `[B, T, H, d]`."""
    return attention_evaluated(q, k, v, context).value


def attention_evaluated(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Weighted:
    """o, and what `attention_vjp` would otherwise compute again."""
    keys, values = _with_memory(k, context.memory_keys), _with_memory(v, context.memory_values)
    q = q.transpose(1, 2).contiguous()
    queries = q + context.content_bias[:, None]
    by_distance = (q + context.position_bias[:, None]) @ _falling(context, keys).mT
    scores = torch.where(_hidden(by_distance, context), -torch.inf, _by_key(by_distance))
    weights = torch.softmax(_plus_content(scores, queries, keys, context.factor), dim=-1)
    value = _dropped(weights, context) @ values
    return Weighted(value.transpose(1, 2), queries, keys, values, weights)


def attention_vjp(
    vector: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context, evaluated: Weighted | None = None
) -> Tensor:
    """The gradients of `⟨vector, attention(q, k, v)⟩` in q, k and v, `[B, T, 3, H, d]`."""
    evaluated = attention_evaluated(q, k, v, context) if evaluated is None else evaluated
    _, queries, keys, values, weights = evaluated
    vector = vector.transpose(1, 2).contiguous()
    of_weights = _dropped(vector @ values.mT, context)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)

    of_q = of_scores @ keys + _by_distance(of_scores) @ _falling(context, keys)
    # Keys and values in memory are not of this solve.
    of_k = of_scores[..., context.memory :].mT @ queries
    of_v = _dropped(weights, context)[..., context.memory :].mT @ vector
    gradients = of_q * context.factor, of_k * context.factor, of_v
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2)


def _with_memory(current: Tensor, memory: Tensor | None) -> Tensor:
    """`[B, H, R, d]`"""
    current = current.transpose(1, 2)
    return current if memory is None else torch.cat([memory.transpose(1, 2), current], dim=2)


def _plus_content(scores: Tensor, queries: Tensor, keys: Tensor, factor: float) -> Tensor:
    """`s (scores + (q_i + b_c)·k_j)`"""
    flat = (each.flatten(0, 1) for each in (scores, queries, keys.mT))
    return torch.baddbmm(*flat, beta=factor, alpha=factor).unflatten(0, scores.shape[:2])


def _falling(context: Context, keys: Tensor) -> Tensor:
    """r `[H, R, d]` for the distances R − 1, …, 0."""
    return context.positions[: keys.shape[2]].flip(0).transpose(0, 1)


def _hidden(scores: Tensor, context: Context) -> Tensor:
    """Which keys no query may see, `[T, R]`."""
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    hidden = ones.triu(context.memory + 1)
    return hidden if context.window is None else hidden | ones.tril(context.memory - context.window)


def _by_key(by_distance: Tensor) -> Tensor:
    """`[..., T, R]`: for each query the keys in order, instead of the distances R − 1, …, 0.

    In the places of keys that come after the query, distances below 0, stands what the next query has.
    """
    queries, keys = by_distance.shape[-2:]
    if tracked(by_distance):  # the gradient of rows that overlap is slow
        by_distance = torch.cat([by_distance.new_zeros(*by_distance.shape[:-1], 1), by_distance], -1)
        return by_distance.flatten(-2)[..., queries:].unflatten(-1, (queries, keys))
    return by_distance.flatten(-2)[..., queries - 1 :].unfold(-1, keys, max(keys - 1, 1))


def _by_distance(by_key: Tensor) -> Tensor:
    """The way back, for what is 0 in the places of keys that come after the query."""
    queries, keys = by_key.shape[-2:]
    zeros = by_key.new_zeros(*by_key.shape[:-2], queries)
    return torch.cat([zeros, by_key.flatten(-2)], -1).unflatten(-1, (queries, keys + 1))[..., 1:]


def _dropped(weights: Tensor, context: Context) -> Tensor:
    """`K ⊙ weights`"""
    if context.dropout == 0:
        return weights
    mask = dropout_mask(context, weights.shape) if context.mask is None else context.mask
    return weights * mask.to(weights.dtype)


def dropout_mask(context: Context, shape: torch.Size) -> Tensor:
    """K in float32, `[B, H, T, M + T]`: 1/(1 − p) where an entry's number is at least p, 0 elsewhere.

    Its number is the upper 24 bits of its word: rows are queries, columns are keys, counted from the first
    one that is not in memory, and each head of each sample has a stream of its own.
    """
    assert context.seed is not None
    batch, heads, queries, keys = shape
    memory = keys - queries
    before = memory + memory % 2
    streams = torch.arange(batch * heads, device=context.seed.device)
    found = words(context.seed, streams, queries, before + queries + queries % 2, -before)
    found = found[:, :, before - memory : before + queries].unflatten(0, (batch, heads))
    kept = found >> 8 >= math.ceil(context.dropout * 2**24)
    return kept.to(torch.float32) / (1 - context.dropout)
