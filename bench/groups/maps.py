"""What runs between a multiscale DEQ's convolutions, kernel by kernel, and PyTorch's operators for it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from triton_deq.ops import fusion as fusions
from triton_deq.ops import groupnorm as norms
from triton_deq.timing import Call

from ..roofline import Work

GROUPS = 8
FACTORS = (1, 2, 4)
"""How many times smaller the terms of a sum are."""
SMALLER = sum(1 / factor**2 for factor in FACTORS)
RESOLUTIONS = 4
"""Maps of a multiscale state that are normalised together: each half as high, with twice as many channels."""
MAPS = {
    "groupnorm": 2.0,
    "groupnorm_each": 2 * sum(1 / 2**place for place in range(RESOLUTIONS)),
    "groupnorm_vjp": 4.0,
    "fusion": 2 + SMALLER,
    "fusion_vjp": 2 + SMALLER,
}
"""The least that each moves, in maps of the size of its value, or of the largest."""

SIZES: dict[str, list[tuple[int, int, int]]] = {
    "tiny": [(1, 4, 8)],
    "quick": [(4, 16, 64)],
    "full": [(4, 56, 160)],
}
GPU_SIZES: dict[str, list[tuple[int, int, int]]] = {
    "tiny": SIZES["tiny"],
    "quick": [(32, 56, 160)],
    "full": [(32, 56, 160), (96, 32, 32), (32, 7, 256)],
}
"""(batch, height and width, channels): maps of the ImageNet models."""

Draw = Callable[..., Tensor]


def _maps(randn: Draw, batch: int, side: int, channels: int) -> Tensor:
    return randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)


def work(kernel: str, size: tuple[int, int, int], dtype: torch.dtype) -> Work | None:
    batch, side, channels = size
    entries = batch * side * side * channels
    return Work(round(MAPS[kernel] * entries * dtype.itemsize), {}) if kernel in MAPS else None


def groupnorm(randn: Draw, batch: int, side: int, channels: int, backend: str) -> Call:
    """With its relu, as behind a block's first convolution."""
    x, gain = _maps(randn, batch, side, channels), randn(channels)
    return lambda: norms.groupnorm(x, GROUPS, gain, gain, relu=True, backend=backend)


def groupnorm_torch(randn: Draw, batch: int, side: int, channels: int) -> Call:
    x, gain = _maps(randn, batch, side, channels), randn(channels)
    return lambda: functional.relu(functional.group_norm(x, GROUPS, gain, gain))


def groupnorm_each(randn: Draw, batch: int, side: int, channels: int, backend: str) -> Call:
    """The same for all resolutions."""
    given = [
        norms.Map(x, GROUPS, gain, gain, relu=True) for x, gain in _pyramid(randn, batch, side, channels)
    ]
    return lambda: norms.groupnorm_each(given, backend, statistics=False)


def groupnorm_each_torch(randn: Draw, batch: int, side: int, channels: int) -> Call:
    pairs = _pyramid(randn, batch, side, channels)
    return lambda: [functional.relu(functional.group_norm(x, GROUPS, gain, gain)) for x, gain in pairs]


def _pyramid(randn: Draw, batch: int, side: int, channels: int) -> list[tuple[Tensor, Tensor]]:
    """Maps of all resolutions, and a gain for each; none is smaller than a pixel."""
    sizes = [(max(side >> place, 1), channels << place) for place in range(RESOLUTIONS)]
    return [(_maps(randn, batch, *size), randn(size[1])) for size in sizes]


def groupnorm_vjp(randn: Draw, batch: int, side: int, channels: int, backend: str) -> Call:
    x, vector, gain = (
        _maps(randn, batch, side, channels),
        _maps(randn, batch, side, channels),
        randn(channels),
    )
    _, held = norms.groupnorm_each([norms.Map(x, GROUPS, gain, gain, relu=True)], backend)[0]
    return lambda: norms.groupnorm_vjp(vector, held, backend)


def groupnorm_vjp_torch(randn: Draw, batch: int, side: int, channels: int) -> Call:
    x, vector, gain = (
        _maps(randn, batch, side, channels),
        _maps(randn, batch, side, channels),
        randn(channels),
    )
    x.requires_grad_()
    value = functional.relu(functional.group_norm(x, GROUPS, gain, gain))
    return lambda: torch.autograd.grad(value, x, vector, retain_graph=True)


def groupnorm_second(randn: Draw, batch: int, side: int, channels: int, backend: str) -> Call:
    """The gradients of `⟨w, product⟩`, as the penalty's backward pass needs them."""
    x, vector, along = (_maps(randn, batch, side, channels) for _ in range(3))
    gain = randn(channels).requires_grad_()
    leaves = [x.requires_grad_(), vector.requires_grad_(), gain]
    given = norms.Map(x.detach(), GROUPS, gain.detach(), gain.detach(), relu=True)
    _, held = norms.groupnorm_each([given], backend)[0]
    product, _ = norms.groupnorm_vjp(vector, held._replace(x=x, gain=gain), backend)
    return lambda: torch.autograd.grad(product, leaves, along, retain_graph=True)


def groupnorm_second_torch(randn: Draw, batch: int, side: int, channels: int) -> Call:
    x, vector, along = (_maps(randn, batch, side, channels) for _ in range(3))
    gain = randn(channels).requires_grad_()
    leaves = [x.requires_grad_(), vector.requires_grad_(), gain]
    value = functional.relu(functional.group_norm(x, GROUPS, gain, gain))
    (product,) = torch.autograd.grad(value, x, vector, create_graph=True)
    return lambda: torch.autograd.grad(product, leaves, along, retain_graph=True)


def _terms(randn: Draw, batch: int, side: int, channels: int) -> list[Tensor]:
    return [_maps(randn, batch, side // factor, channels) for factor in FACTORS]


def fusion(randn: Draw, batch: int, side: int, channels: int, backend: str) -> Call:
    base, terms = _maps(randn, batch, side, channels), _terms(randn, batch, side, channels)
    return lambda: fusions.fusion(base, terms, backend=backend)


def fusion_torch(randn: Draw, batch: int, side: int, channels: int) -> Call:
    base, terms = _maps(randn, batch, side, channels), _terms(randn, batch, side, channels)

    def call() -> Tensor:
        total = base
        for term, factor in zip(terms, FACTORS, strict=True):
            total = total + (functional.interpolate(term, scale_factor=factor) if factor > 1 else term)
        return functional.relu(total)

    return call


def fusion_vjp(randn: Draw, batch: int, side: int, channels: int, backend: str) -> Call:
    vector, value = _maps(randn, batch, side, channels), _maps(randn, batch, side, channels)
    return lambda: fusions.fusion_vjp(vector, value, FACTORS, backend)


def fusion_vjp_torch(randn: Draw, batch: int, side: int, channels: int) -> Call:
    vector, value = _maps(randn, batch, side, channels), _maps(randn, batch, side, channels)

    def call() -> list[Tensor]:
        masked = torch.where(value > 0, vector, 0)
        return [masked, *(functional.avg_pool2d(masked, k, divisor_override=1) for k in FACTORS if k > 1)]

    return call
