"""The Transformer layer of a DEQ in plain PyTorch (arXiv 1901.02860, section 3.3; arXiv 1909.01377).

Scores are shifted by padding and cutting, as Transformer-XL's code does it, and masked; norms and softmax are
PyTorch's, derivatives the autograd engine's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class PlainTransformer:
    """`z ↦ f(z; x)` with the weights of a `TransformerCell`, without dropout.

    Args:
        cell: whose weights are read, once, as the authors' code computes weight normalisation once a solve.
        tokens: what is injected, `[B, T, D]`.
        memory: the cell's `Memory` of M tokens before.
    """

    def __init__(self, cell: Any, tokens: Tensor, memory: Any):
        self.cell = cell
        self.weights = [layer.weight for layer in (cell.qkv, cell.out, cell.up, cell.down)]
        self.injected = cell.injection(tokens)
        value = _norm(memory.value) if cell.pre_norm else memory.value
        before = functional.linear(value, self.weights[0][cell.heads * cell.head_width :]) + memory.injection
        self.keys, self.values = before.unflatten(-1, (2, cell.heads, -1)).unbind(2)
        queries, reach = tokens.shape[1], memory.value.shape[1] + tokens.shape[1]
        self.positions = cell._positions(reach, tokens.device).flip(0)
        self.later = torch.ones(queries, reach, dtype=torch.bool, device=tokens.device).triu(
            reach - queries + 1
        )

    def __call__(self, z: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        cell, (qkv, out, up, down) = self.cell, self.weights
        n = _norm(z) if cell.pre_norm else z
        heads = (functional.linear(n, qkv) + self.injected).unflatten(-1, (3, cell.heads, -1))
        s = _norm(z + functional.linear(self._mixed(*heads.unbind(2)).flatten(2), out, cell.out.bias))
        inner = functional.relu(functional.linear(s, up, cell.up.bias))
        value = s + functional.linear(inner, down, cell.down.bias)
        return value if cell.pre_norm else _norm(value)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = torch.cat([self.keys, k], 1), torch.cat([self.values, v], 1)
        content = torch.einsum("bihd,bjhd->bhij", q + self.cell.content_bias, k)
        position = torch.einsum("bihd,jhd->bhij", q + self.cell.position_bias, self.positions)
        scores = (content + _shifted(position)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(self.later, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v)


def _shifted(x: Tensor) -> Tensor:
    """Each query's row one place further to the left than that of the query before it."""
    *batch, queries, keys = x.shape
    padded = torch.cat([x.new_zeros(*batch, queries, 1), x], -1).view(*batch, keys + 1, queries)
    return padded[..., 1:, :].reshape(x.shape)


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])
