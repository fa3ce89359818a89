"""GroupNorm with what surrounds it in a multiscale DEQ, of channels-last maps, in two passes over each.

The formula stands in triton_deq/reference/groupnorm.py, where it takes up to four operators of PyTorch, each
a pass over the map or two. Here a map is cut into chunks of pixels, which stay in the first cache and are
dealt out to threads. The cut depends on the map's shape alone, so that the bits do not depend on how many
threads there are.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from .. import openmp
from ..reference.record import accumulate_dtype
from .calls import Call, array, compiled, fields, share, vectorised

CHUNK = 1 << 12
"""How many entries are taken at a time."""

ROWS = 16
"""How many pixels are taken at a time at least: sums over them come with some work for each channel."""

GRAIN = 1 << 14
"""How many entries are worth a thread."""

MEASURED, NORMALISED = range(2)
"""Phases: mean and squares of each group in each chunk; the value."""


def groupnorm_float32(call):
    _groupnorm(numba.carray(call, 1)[0], np.float32)


def groupnorm_float64(call):
    _groupnorm(numba.carray(call, 1)[0], np.float64)


class GroupNormCall(Call):
    """Addresses, 0 for what there is none of; how far apart samples lie; which maps are bfloat16; sizes."""

    functions = groupnorm_float32, groupnorm_float64
    _fields_ = fields(
        "x mask shift gain offset residual out mean inverse chunks x_stride shift_stride residual_stride "
        "out_stride x_narrow shift_narrow residual_narrow batch pixels channels groups rows phase relu",
        "epsilon",
    )


def groupnorm_fwd(
    x: Tensor,
    groups: int,
    gain: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    epsilon: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's: the value, into `out`, μ and 1/σ.

    All are of the dtype that x's sums are taken in, float32 or float64; maps may be bfloat16 in place of
    float32, and are channels-last with dense samples. out: of x's dtype; may be x.
    """
    dtype = accumulate_dtype(x.dtype)
    batch, channels, height, width = x.shape
    pixels = height * width
    rows = max(CHUNK // channels, ROWS)
    chunks = x.new_empty((batch, -(-pixels // rows), 2, groups), dtype=torch.float64)
    mean, inverse = x.new_empty(batch, groups, dtype=dtype), x.new_empty(batch, groups, dtype=dtype)
    call = GroupNormCall(
        x=x.data_ptr(),
        mask=_address(mask),
        shift=_address(shift),
        gain=_address(gain),
        offset=_address(offset),
        residual=_address(residual),
        out=out.data_ptr(),
        mean=mean.data_ptr(),
        inverse=inverse.data_ptr(),
        chunks=chunks.data_ptr(),
        x_stride=_stride(x),
        shift_stride=_stride(shift),
        residual_stride=_stride(residual),
        out_stride=_stride(out),
        x_narrow=_narrow(x),
        shift_narrow=_narrow(shift),
        residual_narrow=_narrow(residual),
        batch=batch,
        pixels=pixels,
        channels=channels,
        groups=groups,
        rows=rows,
        relu=relu,
        epsilon=epsilon,
    )
    threads = max(min(openmp.threads_for(chunks.shape[0] * chunks.shape[1]), x.numel() // GRAIN), 1)
    for call.phase in (MEASURED, NORMALISED):
        call.run_on(dtype, threads)
    return out, mean, inverse


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)


def _narrow(values: Tensor | None) -> bool:
    return values is not None and values.dtype == torch.bfloat16


@compiled
def _groupnorm(call, dtype):
    pixels, channels, groups, rows = call.pixels, call.channels, call.groups, call.rows
    count = (pixels + rows - 1) // rows
    chunks = array(call.chunks, (call.batch, count, 2, groups), np.float64)
    means = array(call.mean, (call.batch, groups), dtype)
    inverses = array(call.inverse, (call.batch, groups), dtype)
    summed, normal = np.empty((rows, channels), dtype), np.empty((rows, channels), dtype)
    loaded, wide = np.empty((rows, channels), dtype), np.empty((rows, channels), dtype)
    centres, factors = np.empty(channels, dtype), np.empty(channels, dtype)
    ones, offset = np.ones(channels, dtype), np.zeros(channels, dtype)
    gain = array(call.gain, channels, dtype) if call.gain else ones
    offset = array(call.offset, channels, dtype) if call.offset else offset
    least = dtype(0 if call.relu else -np.inf)
    known = -1  # the sample that centres and factors are of

    _, first, end = share(call.threads, call.batch * count)
    for piece in range(first, end):
        b, part = piece // count, piece % count
        start = part * rows
        height = min(rows, pixels - start)
        s = _chunk(call.x, call.x_stride, call.x_narrow, b, start, wide[:height])
        if call.mask or call.shift:
            mask = array(call.mask, (call.batch, channels), dtype)[b] if call.mask else ones
            if call.shift:
                shift = _chunk(call.shift, call.shift_stride, call.shift_narrow, b, start, loaded[:height])
                _mask_and_shift(s, mask, shift, summed[:height])
            else:
                _mask(s, mask, summed[:height])
            s = summed[:height]
        if call.phase == MEASURED:
            _measure(s, chunks[b, part], centres, factors)
            continue

        if b != known:
            known = b
            _combine(chunks[b], pixels, rows, channels // groups, call.epsilon, means[b], inverses[b])
            _spread(means[b], centres)
            _spread(inverses[b], factors)
            factors *= gain
        # Loops that write to what they read are not vectorised, and the value's place may be x.
        _normalise(s, centres, factors, offset, normal[:height])
        value = normal[:height]
        if call.residual:
            value = wide[:height]  # s is not read again
            _add(
                normal[:height],
                _chunk(call.residual, call.residual_stride, call.residual_narrow, b, start, loaded[:height]),
                value,
            )
        at = b * call.out_stride + start * channels
        if call.x_narrow:
            _clip_narrow(value.view(np.uint32), call.relu, array(call.out + 2 * at, s.shape, np.uint16))
        else:
            _clip(value, least, array(call.out + at * s.itemsize, s.shape, dtype))


@compiled
def _chunk(address, stride, narrow, b, start, place):
    """What sample b has from this pixel on, as much as the place: there if it was bfloat16, else as it lies.

    stride: how many entries samples lie apart.
    """
    first = b * stride + start * place.shape[1]
    if narrow:
        _widen(array(address + 2 * first, place.shape, np.uint16), place.view(np.uint32))
        return place
    return array(address + first * place.itemsize, place.shape, place.dtype)


@compiled
def _measure(s, found, centres, sums):
    """Each group's mean of a chunk, and its squares about that, into found `[2, G]`."""
    groups = found.shape[1]
    size = len(sums) // groups
    _columns(s, sums)
    for g in range(groups):
        found[0, g] = sums[g * size : (g + 1) * size].sum() / (len(s) * size)
    _spread(found[0], centres)
    _squares(s, centres, sums)
    for g in range(groups):
        found[1, g] = sums[g * size : (g + 1) * size].sum()


@compiled
def _combine(chunks, pixels, rows, size, epsilon, means, inverses):
    """μ and 1/σ of a sample's groups from those of its chunks (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    for g in range(len(means)):
        mean, squares = 0.0, 0.0
        for part in range(len(chunks)):
            mean += chunks[part, 0, g] * min(rows, pixels - part * rows) / pixels
        for part in range(len(chunks)):
            apart = chunks[part, 0, g] - mean
            squares += chunks[part, 1, g] + min(rows, pixels - part * rows) * size * apart * apart
        means[g], inverses[g] = mean, 1 / np.sqrt(squares / (pixels * size) + epsilon)


@vectorised
def _spread(groups, channels):
    """Each group's value for all its channels."""
    size = len(channels) // len(groups)
    for g in range(len(groups)):
        channels[g * size : (g + 1) * size] = groups[g]


# Loops over the entries of a chunk [rows, channels].


@vectorised
def _mask(x, mask, out):
    """`out = m ⊙ x`"""
    for p in range(len(x)):
        for c in range(len(mask)):
            out[p, c] = mask[c] * x[p, c]


@vectorised
def _mask_and_shift(x, mask, shift, out):
    """`out = m ⊙ x + u`"""
    for p in range(len(x)):
        for c in range(len(mask)):
            out[p, c] = mask[c] * x[p, c] + shift[p, c]


@vectorised
def _columns(s, sums):
    """Sums over rows, four of which are taken at a time."""
    sums[:] = 0
    fours = len(s) - len(s) % 4
    for p in range(0, fours, 4):
        for c in range(len(sums)):
            sums[c] += (s[p, c] + s[p + 1, c]) + (s[p + 2, c] + s[p + 3, c])
    for p in range(fours, len(s)):
        for c in range(len(sums)):
            sums[c] += s[p, c]


@vectorised
def _squares(s, centres, sums):
    """Sums over rows of `(s − μ)²`, in the same way."""
    sums[:] = 0
    fours = len(s) - len(s) % 4
    for p in range(0, fours, 4):
        for c in range(len(sums)):
            first, second = s[p, c] - centres[c], s[p + 1, c] - centres[c]
            third, fourth = s[p + 2, c] - centres[c], s[p + 3, c] - centres[c]
            sums[c] += (first * first + second * second) + (third * third + fourth * fourth)
    for p in range(fours, len(s)):
        for c in range(len(sums)):
            apart = s[p, c] - centres[c]
            sums[c] += apart * apart


@vectorised
def _normalise(s, centres, factors, offset, out):
    """`out = (s − μ) γ/σ + β`"""
    for p in range(len(s)):
        for c in range(len(centres)):
            out[p, c] = (s[p, c] - centres[c]) * factors[c] + offset[c]


@vectorised
def _add(normal, residual, out):
    """`out = normal + r`"""
    for p in range(len(out)):
        for c in range(out.shape[1]):
            out[p, c] = normal[p, c] + residual[p, c]


@vectorised
def _clip(value, least, out):
    """`out = max(value, least)`, where NaN stays."""
    for p in range(len(out)):
        for c in range(out.shape[1]):
            out[p, c] = least if value[p, c] < least else value[p, c]


# float32 and bfloat16 by their bits: those of a bfloat16 are the upper half of a float32's.


@vectorised
def _widen(narrow, wide):
    for p in range(len(wide)):
        for c in range(narrow.shape[1]):
            wide[p, c] = np.uint32(narrow[p, c]) << np.uint32(16)


@vectorised
def _clip_narrow(value, relu, out):
    """`_clip`, and rounded to the nearest, of two to the even one; NaN stays."""
    negative = np.uint32(1 << 31 if relu else 0)
    for p in range(len(out)):
        for c in range(out.shape[1]):
            bits = value[p, c]
            upper = bits >> np.uint32(16)
            if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                upper |= np.uint32(0x40)
            elif bits & negative:
                upper = np.uint32(0)
            else:
                upper = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
            out[p, c] = upper
