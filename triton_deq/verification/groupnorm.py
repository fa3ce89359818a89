"""GroupNorm's kernels and those of the multiscale sum."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import fusion as fusion_reference
from ..reference import groupnorm as reference
from ..reference.groupnorm import Normalised
from .case import Case, Row, relative_error, row

GROUPS = 2
LEAST = 8
"""Pixels: of few entries what is left after the mean is cancellation, and a relative error means nothing."""


def check_groupnorm(case: Case) -> Iterator[Row]:
    """Value, gradients and their derivatives, with all that surrounds the norm; maps lie apart.

    The first two with another map, of another size, in the same launches.
    """
    from ..ops import groupnorm as op

    batch, pixels, channels = _sizes(case)
    x, shift, residual, vector, along, beside = (
        _maps(case, batch, pixels, channels, stream) for stream in range(6)
    )
    gain, offset = (case.randn(channels, stream=stream) for stream in (6, 7))
    mask = case.randn(batch, channels, stream=8).abs()
    out = torch.full_like(x, torch.nan)
    given = op.Map(x, GROUPS, gain, offset, mask, shift, residual, True, 1e-5, out)
    beside_x, beside_vector = (_maps(case, batch, 2 * LEAST, 3 * GROUPS, stream) for stream in (9, 10))
    some = _maps(case, batch, 2 * LEAST, 5 * GROUPS, 11)[:, GROUPS : 3 * GROUPS]
    (value, mean, inverse), second_map, (of_some, *_) = op.groupnorm_fwd(
        [given, op.Map(beside_x, GROUPS), op.Map(some, GROUPS)]
    )
    held = Normalised(x, gain, mask, shift, mean, inverse, value)
    beside_held = Normalised(beside_x, None, None, None, *second_map[1:], None)
    place = torch.full_like(torch.cat([beside_x] * 2, 1), torch.nan)[:, GROUPS : 4 * GROUPS]
    product, beside_product = op.groupnorm_vjp_fwd(
        [vector, beside_vector], [held, beside_held], True, [None, place]
    )
    second = op.groupnorm_second_fwd(along, beside, vector, held)

    # The relu lets through what it did: near zero rounding decides.
    leaves = [each.double().requires_grad_() for each in (x, shift, residual, gain, offset)]
    wide_x, wide_shift, wide_residual, wide_gain, wide_offset = leaves
    passed = (value > 0).double()
    wanted, wide_mean, wide_inverse = reference.groupnorm(
        wide_x, GROUPS, wide_gain, wide_offset, mask.double(), wide_shift, wide_residual
    )
    numbers: tuple[tuple[str, Tensor, Tensor], ...] = (
        ("value", value, wanted.relu()),
        ("mean", mean, wide_mean),
        ("inverse", inverse, wide_inverse),
    )
    for quantity, found, expected in numbers:
        yield row(case, "groupnorm", "groupnorm", quantity, relative_error(found, expected.detach()))

    wide_vector = vector.double().requires_grad_()
    gradients = torch.autograd.grad(wanted, leaves, wide_vector * passed, create_graph=True)
    names = ("of x", "of shift", "of residual", "of gain", "of offset")
    for quantity, out_of, gradient in zip(names, product, gradients, strict=True):
        assert out_of is not None
        yield row(case, "groupnorm", "groupnorm_vjp", quantity, relative_error(out_of, gradient.detach()))

    wide = beside_x.double().requires_grad_()
    expected = reference.groupnorm(wide, GROUPS)[0]
    (gradient,) = torch.autograd.grad(expected, wide, beside_vector.double())
    found_value, found_product = second_map[0], beside_product.x
    yield row(case, "groupnorm", "groupnorm", "beside", relative_error(found_value, expected.detach()))
    yield row(case, "groupnorm", "groupnorm_vjp", "beside", relative_error(found_product, gradient))
    expected = reference.groupnorm(some.double(), GROUPS)[0]
    yield row(case, "groupnorm", "groupnorm", "of some channels", relative_error(of_some, expected))

    total = (gradients[0] * along.double()).sum() + (gradients[2] * beside.double()).sum()
    derivatives = torch.autograd.grad(total, (wide_x, wide_shift, wide_vector, wide_gain))
    names = ("of x", "of shift", "of vector", "of gain", "")
    for quantity, out_of, derivative in zip(names[:4], second[:4], derivatives, strict=True):
        assert out_of is not None
        yield row(case, "groupnorm", "groupnorm_second", quantity, relative_error(out_of, derivative))


def check_fusion(case: Case) -> Iterator[Row]:
    """The sum of four terms, and its product, which also makes coarser sums of finer ones."""
    from ..ops import fusion as op

    batch, _, channels = _sizes(case)
    factors = (1, 2, 4, 3)
    side = 12
    base, vector = (_maps(case, batch, side * side, channels, stream) for stream in (0, 1))
    terms = [
        _maps(case, batch, (side // factor) ** 2, channels, stream)
        for stream, factor in enumerate(factors, 2)
    ]
    value, beside = op.fusion_fwd([op.Sum(base, terms), op.Sum(terms[1], terms[2:3], relu=False)])
    wanted = fusion_reference.fusion(base.double(), [term.double() for term in terms])
    yield row(case, "fusion", "fusion", "value", relative_error(value, wanted))
    wanted = fusion_reference.fusion(terms[1].double(), [terms[2].double()], relu=False)
    yield row(case, "fusion", "fusion", "beside", relative_error(beside, wanted))
    found, (_, pooled) = op.fusion_vjp_fwd([vector, terms[1]], [value, None], [factors, [2]])
    expected = fusion_reference.fusion_vjp(vector.double(), value.double(), factors)
    for quantity, out, each in zip(("of base", *(f"by {k}" for k in factors)), found, expected, strict=True):
        yield row(case, "fusion", "fusion_vjp", quantity, relative_error(out, each))
    wanted = fusion_reference.pooled(terms[1].double(), 2)
    yield row(case, "fusion", "fusion_vjp", "beside", relative_error(pooled, wanted))


def _sizes(case: Case) -> tuple[int, int, int]:
    """Batch, pixels and channels of about as many entries as the case has."""
    batch, entries = min(case.shape[0], 4), case.shape[1]
    channels = GROUPS * max(1, min(entries // 200, 20))
    return batch, max(LEAST, entries // channels), channels


def _maps(case: Case, batch: int, pixels: int, channels: int, stream: int) -> Tensor:
    """Channels-last maps, square where pixels are a square, of a buffer with more in it where strided."""
    rows = round(pixels**0.5) if round(pixels**0.5) ** 2 == pixels else 1
    more = 16 if case.layout == "strided" else 0
    packed = case.randn(batch, pixels * channels + more, stream=stream)
    if case.layout == "strided":
        packed = packed.contiguous()
    flat = packed[:, : pixels * channels]
    return flat.unflatten(1, (rows, -1, channels)).permute(0, 3, 1, 2)
