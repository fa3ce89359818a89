"""Transformer-XL's relative attention in PyTorch, and its vector-Jacobian product.

With i a query of T, j a key of R = M + T (M of them in memory), δ = i + M − j their distance, s the scale:
`S_ij = s ((q_i + b_c)·k_j + (q_i + b_p)·r_δ)` where 0 ≤ δ < window, else −∞, with both learned biases (Dai et
al., arXiv 1901.02860, section 3.3); `P = softmax(S)`; `o_i = Σ_j K_ij P_ij v_j` with the dropout mask K. All
is differentiable by ordinary operators; the scores `[B, H, T, R]` are held in memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .jacobian import uniform


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


def attention(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """o `[B, T, H, d]` from q, k, v `[B, T, H, d]`."""
    keys, values = _with_memory(k, context.memory_keys), _with_memory(v, context.memory_values)
    weights = torch.softmax(_scores(q, keys, context), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", _dropped(weights, context), values)


def attention_vjp(vector: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """The gradients of `⟨vector, attention(q, k, v)⟩` in q, k and v, `[B, T, 3, H, d]`."""
    keys, values = _with_memory(k, context.memory_keys), _with_memory(v, context.memory_values)
    weights = torch.softmax(_scores(q, keys, context), dim=-1)
    of_weights = _dropped(torch.einsum("bihd,bjhd->bhij", vector, values), context)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    of_scores = of_scores * context.factor

    distance, positions = _distances(of_scores, context), context.positions[: keys.shape[1]]
    inside = (distance >= 0) & (distance < keys.shape[1])  # j = i + M − δ: the same map in both directions
    by_distance = of_scores.gather(-1, distance.clamp(0, keys.shape[1] - 1).expand_as(of_scores)) * inside
    of_q = torch.einsum("bhij,bjhd->bihd", of_scores, keys)
    of_q = of_q + torch.einsum("bhin,nhd->bihd", by_distance, positions)
    of_keys = torch.einsum("bhij,bihd->bjhd", of_scores, q + context.content_bias)
    of_values = torch.einsum("bhij,bihd->bjhd", _dropped(weights, context), vector)
    return torch.stack([of_q, of_keys[:, context.memory :], of_values[:, context.memory :]], dim=2)


def _with_memory(current: Tensor, memory: Tensor | None) -> Tensor:
    return current if memory is None else torch.cat([memory, current], dim=1)


def _distances(scores: Tensor, context: Context) -> Tensor:
    """`i + M − j` `[T, R]`."""
    queries, keys = scores.shape[-2:]
    i = torch.arange(queries, device=scores.device)[:, None]
    return i + context.memory - torch.arange(keys, device=scores.device)


def _scores(q: Tensor, keys: Tensor, context: Context) -> Tensor:
    """S `[B, H, T, R]`."""
    positions = context.positions[: keys.shape[1]]
    scores = torch.einsum("bihd,bjhd->bhij", q + context.content_bias, keys)
    by_distance = torch.einsum("bihd,nhd->bhin", q + context.position_bias, positions)
    distance = _distances(scores, context)
    scores = scores + by_distance.gather(-1, distance.clamp(0, keys.shape[1] - 1).expand_as(scores))
    hidden = distance < 0
    if context.window is not None:
        hidden = hidden | (distance >= context.window)
    return (scores * context.factor).masked_fill(hidden, -torch.inf)


def _dropped(weights: Tensor, context: Context) -> Tensor:
    """`K ⊙ weights`"""
    if context.dropout == 0:
        return weights
    mask = dropout_mask(context, weights.shape) if context.mask is None else context.mask
    return weights * mask.to(weights.dtype)


def dropout_mask(context: Context, shape: torch.Size) -> Tensor:
    """K in float32: an entry is kept, and divided by 1 − p, where its uniform number is at least p."""
    assert context.seed is not None
    kept = uniform(shape, context.seed) >= context.dropout
    return kept.to(torch.float32) / (1 - context.dropout)
