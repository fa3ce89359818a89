"""The pieces of the stochastic Jacobian-norm estimate in PyTorch: probes and squared norms.

`‖J‖_F² = E ‖εᵀJ‖²` for ε of independent entries with mean 0 and variance 1 (Hutchinson; Bai, Koltun &
Kolter, arXiv 2106.14342, eq. 5).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .record import accumulate_dtype

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_CONSTANTS = (0xD2511F53, 0xCD9E8D57), (0xBB67AE85, 0x9E3779B9)
"""The multipliers, and what is added to the keys after each round."""
_WORD = 0xFFFFFFFF

BLOCK = 1 << 14
"""Counters taken at a time, so that the words stay in a CPU's cache."""


def probe(shape: torch.Size, seed: Tensor, index: int, distribution: str, dtype: torch.dtype) -> Tensor:
    """A random probe of `shape` on the seed's device, the same entries for the same seed and index.

    seed: int64 `[1]`. Counter c of the stream gives the four entries c, c + q, c + 2q, c + 3q of the
    flattened probe, q being a quarter of its length.
    distribution: "gaussian", N(0, 1) by Box-Muller; "rademacher", ±1.
    """
    total = math.prod(shape)
    quarter = -(-total // 4)
    out = torch.empty(2, 2, quarter, dtype=dtype, device=seed.device)
    length = BLOCK if _on_host(seed) else max(quarter, 1)
    for begin in range(0, quarter, length):
        block = out[:, :, begin : begin + length]
        first, second = _philox(seed, begin, block.shape[2], index)
        if distribution == "rademacher":
            entries = 1.0 - 2.0 * (first & 1), 1.0 - 2.0 * (second & 1)
        else:
            entries = _box_muller(first, second, accumulate_dtype(dtype))
        for target, entry in zip(block.unbind(1), entries, strict=True):
            target.copy_(entry)
    return out.view(-1)[:total].view(shape)


def drawn_probe(like: Tensor, distribution: str, generator: torch.Generator | None) -> Tensor:
    """A random probe of `like`'s shape, dtype and device as PyTorch draws it, which no kernel can repeat."""
    at = generator.device if generator is not None else like.device
    if distribution == "rademacher":
        entries = torch.randint(2, like.shape, generator=generator, dtype=like.dtype, device=at)
        return entries.mul_(2).sub_(1).to(like.device)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=at).to(like.device)


def uniform(shape: torch.Size, seed: Tensor) -> Tensor:
    """Numbers of [0, 1) in float32 on the seed's device, from the upper 24 bits of the first word each.

    seed: int64 `[1]`. The entry of flat index c is made from counter c of stream 0.
    """
    words, _ = _philox(seed, 0, math.prod(shape), 0)
    return ((words[0] >> 8).to(torch.float32) * 2.0**-24).view(shape)


def squared_norm(rows: Tensor) -> Tensor:
    """`Σ_n v[b, n]²` as `[B]` in the accumulation dtype, for v `[B, N]`."""
    return rows.to(accumulate_dtype(rows.dtype)).square().sum(dim=1)


def _philox(seed: Tensor, begin: int, count: int, index: int) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and words 1 and 3, `[2, count]` each, of the counters from `begin` on.

    They have 32 bits and are held in int64. On the host by NumPy, which takes half of PyTorch's time.
    """
    if _on_host(seed):
        return _philox_on_host(int(seed.item()), begin, count, index)
    counter = torch.arange(begin, begin + count, device=seed.device)
    keys = torch.stack([(seed >> 32) & _WORD, seed & _WORD])
    even = torch.stack([counter & _WORD, torch.full_like(counter, index)])
    odd = torch.stack([torch.zeros_like(counter), counter >> 32])
    constants = [torch.stack([torch.full_like(seed, each) for each in pair]) for pair in _CONSTANTS]
    return _rounds(even, odd, [keys, *constants], lambda pair: pair.flip(0))


def _philox_on_host(seed: int, begin: int, count: int, index: int) -> tuple[Tensor, Tensor]:
    counter = np.arange(begin, begin + count, dtype=np.uint64)
    even = np.stack([counter & _WORD, np.full_like(counter, index)])
    odd = np.stack([np.zeros_like(counter), counter >> 32])
    pairs = (seed >> 32 & _WORD, seed & _WORD), *_CONSTANTS
    numbers = [np.array(pair, np.uint64)[:, None] for pair in pairs]
    words = _rounds(even, odd, numbers, lambda pair: pair[::-1])
    first, second = (torch.from_numpy(np.ascontiguousarray(pair).view(np.int64)) for pair in words)
    return first, second


def _on_host(seed: Tensor) -> bool:
    """Whether its number can be read here without waiting, and nobody traces what is made of it."""
    if torch.compiler.is_compiling() or seed.device.type != "cpu":
        return False
    return type(seed) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(seed)


def _rounds(even: Any, odd: Any, numbers: list[Any], swapped: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The ten rounds, on arrays of PyTorch or of NumPy: words 0 and 2 in `even`, 3 and 1 in `odd`.

    The product with one word's multiplier makes the other's pair, hence the swaps. In int64 the product wraps
    around and no bit is lost. numbers: the keys, the multipliers and the summands of the keys, `[2, 1]` each.
    """
    keys, multipliers, weyl = numbers
    for _ in range(10):
        product = even * multipliers
        low = product & _WORD
        product >>= 32
        product ^= odd
        product ^= keys
        product &= _WORD
        even, odd, keys = swapped(product), low, (keys + weyl) & _WORD
    return even, swapped(odd)


def _box_muller(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two 32-bit words, of which the upper 24 bits are used.

    The angle runs from minus an eighth of a turn to seven eighths: two bits name the quadrant.
    """
    radius = ((first >> 8) + 1).to(dtype).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (second >> 8).to(dtype).mul_(2.0**-22).sub_(0.5).mul_(math.pi / 2)
    return radius * torch.cos(angle), radius * torch.sin(angle)
