"""The pieces of the stochastic Jacobian-norm estimate in PyTorch: probes and squared norms.

`‖J‖_F² = E ‖εᵀJ‖²` for ε of independent entries with mean 0 and variance 1 (Hutchinson; Bai, Koltun &
Kolter, arXiv 2106.14342, eq. 5).
"""

import math

import torch
from torch import Tensor

from .record import accumulate_dtype

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

BLOCK = 1 << 15
"""Counters taken at a time, so that the words stay in a CPU's cache."""


def probe(shape: torch.Size, seed: Tensor, index: int, distribution: str, dtype: torch.dtype) -> Tensor:
    """A random probe of `shape` on the seed's device, the same entries for the same seed and index.

    seed: int64 `[1]`. Counter c of the stream gives the four entries c, c + q, c + 2q, c + 3q of the
    flattened probe, q being a quarter of its length.
    distribution: "gaussian", N(0, 1) by Box-Muller; "rademacher", ±1.
    """
    total = math.prod(shape)
    quarter = -(-total // 4)
    wide = accumulate_dtype(dtype)
    out = torch.empty(4, quarter, dtype=dtype, device=seed.device)
    eager_cpu = seed.device.type == "cpu" and not torch.compiler.is_compiling()
    length = BLOCK if eager_cpu else max(quarter, 1)
    for first in range(0, quarter, length):
        block = out[:, first : first + length]
        words = _philox(seed, torch.arange(first, first + block.shape[1], device=seed.device), index)
        if distribution == "rademacher":
            entries = [1.0 - 2.0 * (word & 1) for word in words]
        else:
            entries = [*_box_muller(words[0], words[1], wide), *_box_muller(words[2], words[3], wide)]
        for target, entry in zip(block, entries, strict=True):
            target.copy_(entry)
    return out.view(-1)[:total].view(shape)


def uniform(shape: torch.Size, seed: Tensor) -> Tensor:
    """Numbers of [0, 1) in float32 on the seed's device, from the upper 24 bits of the first word each.

    seed: int64 `[1]`. The entry of flat index c is made from counter c of stream 0.
    """
    word = _philox(seed, torch.arange(math.prod(shape), device=seed.device), 0)[0]
    return ((word >> 8).to(torch.float32) * 2.0**-24).view(shape)


def squared_norm(rows: Tensor) -> Tensor:
    """`Σ_n v[b, n]²` as `[B]` in the accumulation dtype, for v `[B, N]`."""
    return rows.to(accumulate_dtype(rows.dtype)).square().sum(dim=1)


def _philox(seed: Tensor, counter: Tensor, index: int) -> list[Tensor]:
    """Four streams of 32-bit words, held in int64, for each entry of `counter`."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    words = [counter & _WORD, counter >> 32, torch.full_like(counter, index), torch.zeros_like(counter)]
    for _ in range(10):
        high, low = zip(
            *(_multiply(word, constant) for word, constant in zip(words[::2], _MULTIPLIERS, strict=True)),
            strict=True,
        )
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        keys = [(key + weyl) & _WORD for key, weyl in zip(keys, _WEYL, strict=True)]
    return words


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of two 32-bit words; int64 wraps around, and no bit is lost."""
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def _box_muller(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two 32-bit words, of which the upper 24 bits are used.

    The angle runs from minus an eighth of a turn to seven eighths: two bits name the quadrant.
    """
    radius = torch.sqrt(-2 * torch.log(((first >> 8) + 1).to(dtype) * 2.0**-24))
    angle = ((second >> 8).to(dtype) * 2.0**-22 - 0.5) * (math.pi / 2)
    return radius * torch.cos(angle), radius * torch.sin(angle)
