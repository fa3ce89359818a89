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


def probe(shape: torch.Size, seed: Tensor, index: int, distribution: str, dtype: torch.dtype) -> Tensor:
    """A random probe of `shape` on the seed's device, the same entries for the same seed and index.

    seed: int64 `[1]`. Samples are rows of `words` of stream `index`, and a sample's entries columns.
    distribution: "gaussian", N(0, 1) by Box-Muller from two columns side by side; "rademacher", ±1.
    """
    total = math.prod(shape)
    if total == 0:
        return torch.empty(shape, dtype=dtype, device=seed.device)
    rows = shape[0] if len(shape) else 1
    stream = torch.full((1,), index, device=seed.device)
    (found,) = words(seed, stream, rows, total // rows + total // rows % 2)
    if distribution == "rademacher":
        entries = (1.0 - 2.0 * (found & 1)).to(dtype)
    else:
        pair = _box_muller(found[:, 0::2], found[:, 1::2], accumulate_dtype(dtype))
        entries = torch.stack(pair, -1).to(dtype).flatten(1)
    return entries[:, : total // rows].reshape(shape)


def drawn_probe(like: Tensor, distribution: str, generator: torch.Generator | None) -> Tensor:
    """A random probe of `like`'s shape, dtype and device as PyTorch draws it, which no kernel can repeat."""
    at = generator.device if generator is not None else like.device
    if distribution == "rademacher":
        entries = torch.randint(2, like.shape, generator=generator, dtype=like.dtype, device=at)
        return entries.mul_(2).sub_(1).to(like.device)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=at).to(like.device)


def squared_norm(rows: Tensor) -> Tensor:
    """`Σ_n v[b, n]²` as `[B]` in the accumulation dtype, for v `[B, N]`."""
    return rows.to(accumulate_dtype(rows.dtype)).square().sum(dim=1)


def words(seed: Tensor, streams: Tensor, rows: int, columns: int, first: int = 0) -> Tensor:
    """Random words of 32 bits, `[S, rows, columns]` in int64, on the seed's device.

    A counter of Philox gives four, for two rows r and r + 8 of each 16 and for two columns side by side. A
    thread holds these places of a tensor core's product, so kernels make a tile's words where they need them.

    Args:
        seed: int64 `[1]`.
        streams: int64 `[S]`, the numbers of the tables of words wanted, of those that a seed has.
        columns: how many, an even number; first: the number of the first one, even too, perhaps negative.
    """
    row = torch.arange(rows, device=seed.device)
    pair = row // 16 * 8 + row % 8
    pairs = torch.arange(rows // 16 * 8 + min(rows % 16, 8), device=seed.device)
    column = torch.arange(first // 2, (first + columns) // 2, device=seed.device)
    counters = (pairs[:, None] << 32 | column & _WORD).expand(len(streams), -1, -1)
    even, odd = _philox(seed, counters.flatten(), streams[:, None, None].expand_as(counters).flatten())
    found = torch.stack([even, odd], -1).view(2, len(streams), len(pairs), columns).transpose(0, 1)
    return found[:, row // 8 % 2, pair]


def _philox(seed: Tensor, counters: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and words 1 and 3, `[2, n]` each, of counters `[n]` of 64 bits, each in its stream.

    They have 32 bits and are held in int64, as seed, counters and streams are. On the host by NumPy, which
    takes half of PyTorch's time.
    """
    if _on_host(seed):
        return _philox_on_host(int(seed.item()), counters.numpy(), streams.numpy())
    keys = torch.stack([(seed >> 32) & _WORD, seed & _WORD])
    even = torch.stack([counters & _WORD, streams])
    odd = torch.stack([torch.zeros_like(counters), counters >> 32 & _WORD])
    constants = [torch.stack([torch.full_like(seed, each) for each in pair]) for pair in _CONSTANTS]
    return _rounds(even, odd, [keys, *constants], lambda pair: pair.flip(0))


def _philox_on_host(seed: int, counters: np.ndarray, streams: np.ndarray) -> tuple[Tensor, Tensor]:
    counters, streams = counters.view(np.uint64), streams.view(np.uint64)
    even = np.stack([counters & _WORD, streams])
    odd = np.stack([np.zeros_like(counters), counters >> 32])
    pairs = (seed >> 32 & _WORD, seed & _WORD), *_CONSTANTS
    numbers = [np.array(pair, np.uint64)[:, None] for pair in pairs]
    found = _rounds(even, odd, numbers, lambda pair: pair[::-1])
    first, second = (torch.from_numpy(np.ascontiguousarray(pair).view(np.int64)) for pair in found)
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
