"""LayerNorm of a residual sum as an op, and its vector-Jacobian product.

Inside torch.compile and in the transforms of torch.func the ordinary operators run: those know what to make
of them. Autocast changes nothing: statistics are wide anyway, and the value has x's dtype.
"""

import functools
import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import recorded
from ..checks import check_number
from ..reference import norm as reference
from ..reference.record import accumulate_dtype
from .launch import kernels_serve, launch, next_power_of_2, wide_dtype

MOST_BLOCK = 8192
"""The widest row that a program holds; of a wider one it reads BLOCK entries at a time, more than once."""
BLOCK = 4096
TILE = 1024
"""Entries of a program with several short rows: of each row a thread has 16 bytes at once."""


def norm(
    x: Tensor,
    branch: Tensor | None = None,
    mask: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    epsilon: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm `γ ⊙ n + β` of `s = x + m ⊙ y` with `n = (s − mean(s)) / σ`, `σ² = var(s) + ε`.

    Args:
        x: `[..., D]`, floating; rows may lie any distance apart.
        branch: y, of x's shape, or None.
        mask: m, broadcasts to x, e.g. `[B, 1, D]` to `[B, T, D]`; only with branch.
        gain, offset: γ and β `[D]`, both or neither.
        epsilon: ε above 0.
        backend: "auto", "triton" or "reference".

    Statistics are taken in float32, or in float64 for float64. The kernels serve where x's dtype holds the
    others', or statistics' the mask's: under autocast the state may be float32 and the branch bfloat16.

    Returns:
        The value and n, both `[..., D]` in x's dtype, and 1/σ `[..., 1]` in the accumulation dtype; without
        gain value and n are one tensor. All are differentiable to any order.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
    """
    _check(x, branch, mask, gain, offset, epsilon)
    served = _served(x, backend, mask, branch, gain, offset)
    if not served or recorded(x, branch, mask, gain, offset):
        branch, mask, gain, offset = (_widened(each, x.dtype) for each in (branch, mask, gain, offset))
        if not served:
            return reference.norm(x, branch, mask, gain, offset, epsilon)
        value, normal, inverse = NormFunction.apply(x, branch, mask, gain, offset, epsilon)
        return value, value if normal is None else normal, inverse
    normal, inverse = _fresh(x) if gain is not None else None, _fresh_inverse(x)
    value = norm_fwd(x, branch, mask, gain, offset, epsilon, None, normal, inverse)
    return value, value if normal is None else normal, inverse


def norm_value(
    x: Tensor,
    branch: Tensor | None = None,
    mask: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    epsilon: float = 1e-5,
    backend: str = "auto",
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    also: Tensor | None = None,
) -> Tensor:
    """The value of `norm` alone: where no gradient is recorded, nothing else is written.

    out: where it is left, of x's shape and any dtype; only without gradients. dtype: of the value instead of
    x's, for a product that takes fewer bits; then without out. also: another place for it, likewise; only
    without gain.
    """
    _check(x, branch, mask, gain, offset, epsilon)
    if out is not None and dtype is not None:
        raise ValueError(f"dtype={dtype} with out, whose dtype is {out.dtype}: give one of the two")
    if also is not None and gain is not None:
        raise ValueError("also with a gain: the kernel would leave the value before it there; copy the value")
    served = _served(x, backend, mask, branch, gain, offset)
    fit = all(place is None or _apart(place) for place in (out, also))
    if served and fit and not recorded(x, branch, mask, gain, offset):
        out = x.new_empty(x.shape, dtype=dtype or x.dtype) if out is None else out
        return norm_fwd(x, branch, mask, gain, offset, epsilon, out, also)
    branch, mask, gain, offset = (_widened(each, x.dtype) for each in (branch, mask, gain, offset))
    if served:
        value = NormFunction.apply(x, branch, mask, gain, offset, epsilon)[0]
    else:
        value = reference.norm_value(x, branch, mask, gain, offset, epsilon)
    if also is not None:
        also.copy_(value)
    return value.to(dtype or x.dtype) if out is None else out.copy_(value)


def norm_vjp(
    vector: Tensor, normal: Tensor, inverse: Tensor, gain: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`(g − mean(g) − n mean(g n)) / σ` with `g = γ ⊙ v`: the gradient of `⟨v, value⟩` in s.

    Args:
        vector: v `[..., *normal.shape]`, of any number of probes; rows may lie any distance apart.
        normal, inverse: n `[..., D]` and 1/σ `[..., 1]`, as `norm` gives them.
        gain: γ `[D]`, or None.
        backend: "auto", "triton" or "reference".

    Returns:
        A tensor like vector, differentiable to any order.

    Raises:
        ValueError: shapes that do not go together.
    """
    _check_vjp(vector, normal, inverse, gain)
    wide = inverse.dtype == accumulate_dtype(vector.dtype) and inverse.device == vector.device
    if not (wide and kernels_serve(vector, backend, normal, gain, autocast=True)):
        return reference.norm_vjp(vector, normal, inverse, gain)
    if recorded(vector, normal, inverse, gain):
        return NormVJPFunction.apply(vector, normal, inverse, gain)
    return norm_vjp_fwd(vector, normal, inverse, gain)[0]


def norm_vjps(
    vector: Tensor,
    normal: Tensor,
    inverse: Tensor,
    more: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    branch_out: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `⟨v + w, n⟩` in both terms of a residual sum: `g` in x, and `m ⊙ g` in y.

    `g = (u − mean(u) − n mean(u n)) / σ` with `u = v + w`, as in `norm_vjp`.

    Args:
        vector: v, of n's shape and of its dtype or one of fewer bits.
        normal, inverse: n `[..., D]` and 1/σ `[..., 1]`, as `norm` gives them.
        more: w, likewise, or None.
        mask: m as in `norm`, or None.
        dtype: of the second result, for the product that it goes into; n's by default.
        backend: "auto", "triton" or "reference".
        branch_out: where the second result is left, of its shape and dtype; only without gradients.
        addend: a, like vector: added to the first result alone.

    Returns:
        `g + a` in n's dtype and `m ⊙ g` in the other, in one launch where the kernels serve and no gradient
        is recorded; differentiable to any order.

    Raises:
        ValueError: shapes that do not go together.
    """
    _check_terms(normal, vector=vector, more=more, addend=addend)
    _check_vjp(vector, normal, inverse, None)
    _check_mask(mask, normal)
    dtype = dtype or normal.dtype
    served = _vjp_served(normal, inverse, backend, mask, vector, more, addend)
    if not served or recorded(vector, normal, inverse, more, mask, addend):
        total = vector if more is None else vector + more
        value = norm_vjp(total.to(normal.dtype), normal, inverse, None, backend)
        branch_value = (value if mask is None else value * mask).to(dtype)
        value = value if addend is None else (value + addend).to(normal.dtype)
        return value, branch_value if branch_out is None else branch_out.copy_(branch_value)
    place = branch_out if branch_out is not None and _apart(branch_out) else None
    if place is None and not (mask is None and addend is None):
        place = normal.new_empty(normal.shape, dtype=dtype)
    value, branch_value = norm_vjp_fwd(
        vector, normal, inverse, None, more, None, mask, _fresh(normal), place, addend
    )
    if branch_out is None or branch_value is branch_out:
        return value, branch_value.to(dtype)
    return value, branch_out.copy_(branch_value)


def norm_vjp_plus(
    vector: Tensor,
    normal: Tensor,
    inverse: Tensor,
    addend: Tensor,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`norm_vjp(v) + a` in n's dtype, or left in `out`, of any dtype, where no gradient is recorded.

    Args:
        vector, addend: v and a, of n's shape and of its dtype or one of fewer bits.
        normal, inverse: n `[..., D]` and 1/σ `[..., 1]`, as `norm` gives them.
        backend: "auto", "triton" or "reference".

    One launch where the kernels serve and no gradient is recorded; differentiable to any order.

    Raises:
        ValueError: shapes that do not go together.
    """
    _check_terms(normal, vector=vector, addend=addend)
    _check_vjp(vector, normal, inverse, None)
    served = _vjp_served(normal, inverse, backend, None, vector, addend)
    if not served or recorded(vector, normal, inverse, addend):
        value = norm_vjp(vector.to(normal.dtype), normal, inverse, None, backend)
        return (value + addend).to(normal.dtype) if out is None else torch.add(value, addend, out=out)
    place = _fresh(normal) if out is None or not out.is_contiguous() else out
    norm_vjp_fwd(vector, normal, inverse, None, out=place, addend=addend)
    return place if out is None or place is out else out.copy_(place)


# ------------------------------------------------------------------------------------------- the launches


def norm_fwd(
    x: Tensor,
    branch: Tensor | None,
    mask: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    out: Tensor | None = None,
    normal: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """The value by the kernel, into `out` if given; n and 1/σ into the others.

    Rows of value and n are `_apart`, and 1/σ is contiguous.
    """
    value = _fresh(x) if out is None else out
    rows, stride = _rows(x)
    branch_rows, branch_stride = (rows, stride) if branch is None else _rows(branch)
    mask_rows, per = (rows, 1) if mask is None else _mask_rows(mask, x.shape)
    grid, constants = _tiles(len(rows), x.shape[-1])
    launch(
        _kernels().norm_kernel,
        grid,
        rows,
        branch_rows,
        mask_rows,
        rows if gain is None else gain.contiguous(),
        rows if offset is None else offset.contiguous(),
        value,
        value if normal is None else normal,
        value if inverse is None else inverse,
        len(rows),
        per,
        D=x.shape[-1],
        X_STRIDE=stride,
        BRANCH_STRIDE=branch_stride,
        VALUE_STRIDE=_apart(value),
        NORMAL_STRIDE=_apart(value if normal is None else normal),
        BRANCH=branch is not None,
        MASK=mask is not None,
        GAIN=gain is not None,
        NORMAL=normal is not None,
        INVERSE=inverse is not None,
        EPSILON=float(epsilon),
        WIDE=wide_dtype(x.dtype),
        **constants,
    )
    return value


def norm_vjp_fwd(
    vector: Tensor,
    normal: Tensor,
    inverse: Tensor,
    gain: Tensor | None,
    shift: Tensor | None = None,
    bend: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    branch_out: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients in x and in the branch by the kernel: one tensor without mask and place for the other.

    Args:
        vector, normal, inverse, gain: as in `norm_vjp`.
        shift: the gradient in n, like vector, or None.
        bend: the gradient in 1/σ, `[..., 1]`, in its dtype, or None.
        mask: m, which broadcasts to n, or None.
        out, branch_out: where the gradients in x and in the branch are left; out is contiguous, and the rows
            of the other are `_apart`.
        addend: added to the gradient in x, like vector, or None.
    """
    value = _fresh(vector) if out is None else out
    if branch_out is None:
        branch_out = value if mask is None else _fresh(vector)
    rows, stride = _rows(vector)
    normal_rows = normal.reshape(-1, normal.shape[-1]).contiguous()
    mask_rows, per = (rows, 1) if mask is None else _mask_rows(mask, normal.shape)
    grid, constants = _tiles(len(rows), vector.shape[-1])
    launch(
        _kernels().norm_vjp_kernel,
        grid,
        rows,
        rows if shift is None else shift.contiguous(),
        inverse if bend is None else bend.contiguous(),
        normal_rows,
        inverse.contiguous(),
        rows if gain is None else gain.contiguous(),
        mask_rows,
        rows if addend is None else addend.contiguous(),
        value,
        branch_out,
        len(rows),
        len(normal_rows),
        per,
        D=vector.shape[-1],
        VECTOR_STRIDE=stride,
        BRANCH_OUT_STRIDE=_apart(branch_out),
        GAIN=gain is not None,
        SHIFT=shift is not None,
        BEND=bend is not None,
        MASK=mask is not None,
        ADDEND=addend is not None,
        BRANCH=branch_out is not value,
        WIDE=wide_dtype(normal.dtype),
        **constants,
    )
    return value, branch_out


class NormFunction(torch.autograd.Function):
    """`(x, y, m, γ, β) ↦ (value, n, 1/σ)`; without γ the value is n, and None stands in n's place.

    The gradient in s is `norm_vjp` of the value's, the like of n's, and `−b n / (σ² D)` of the gradient b in
    1/σ. It is made of outputs, which have a gradient themselves: so there are derivatives of any order.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        branch: Tensor | None,
        mask: Tensor | None,
        gain: Tensor | None,
        offset: Tensor | None,
        epsilon: float,
    ):
        normal, inverse = None if gain is None else _fresh(x), _fresh_inverse(x)
        value = norm_fwd(x, branch, mask, gain, offset, epsilon, None, normal, inverse)
        of_mask = ctx.needs_input_grad[2]
        ctx.save_for_backward(
            value if normal is None else normal, inverse, gain, mask, branch if of_mask else None
        )
        ctx.set_materialize_grads(False)
        return value, normal, inverse

    @staticmethod
    def backward(ctx, grad: Tensor | None, shift: Tensor | None, bend: Tensor | None):
        normal, inverse, gain, mask, branch = ctx.saved_tensors
        if grad is None and shift is None and bend is None:
            return (None,) * 6
        of_x, of_branch, of_mask, of_gain, of_offset, _ = ctx.needs_input_grad
        of_sum = of_x or of_branch or of_mask
        total = branch_grad = None
        if torch.is_grad_enabled() and of_sum:  # the gradient is to be differentiated again
            total = _by_operators(grad, shift, bend, normal, inverse, gain)
            branch_grad = total if mask is None else total * mask
        elif of_sum:
            vector, scale = (shift, None) if grad is None else (grad, gain)
            vector = torch.zeros_like(normal) if vector is None else vector
            shift = None if grad is None else shift
            masked = mask if of_branch else None
            total, branch_grad = norm_vjp_fwd(vector, normal, inverse, scale, shift, bend, masked)
        mask_grad = (total * branch).sum_to_size(mask.shape) if of_mask else None
        gain_grad = offset_grad = None
        if grad is not None and (of_gain or of_offset):
            gain_grad = (grad * normal).sum_to_size(gain.shape) if of_gain else None
            offset_grad = grad.sum_to_size(gain.shape) if of_offset else None
        return (
            total if of_x else None,
            branch_grad if of_branch else None,
            mask_grad,
            gain_grad,
            offset_grad,
            None,
        )


def _by_operators(
    grad: Tensor | None,
    shift: Tensor | None,
    bend: Tensor | None,
    normal: Tensor,
    inverse: Tensor,
    gain: Tensor | None,
) -> Tensor:
    """The gradient in s, differentiable in all of these."""
    parts = [
        norm_vjp(vector, normal, inverse, scale, "triton")
        for vector, scale in ((grad, gain), (shift, None))
        if vector is not None
    ]
    if bend is not None:
        bent = bend * inverse.square() * normal.to(inverse.dtype) / -normal.shape[-1]
        parts.append(bent.to(normal.dtype))
    return functools.reduce(torch.add, parts)


class NormVJPFunction(torch.autograd.Function):
    """`(v, n, 1/σ, γ) ↦ (g − mean(g) − n mean(g n)) / σ` with `g = γ ⊙ v`.

    As a map of g it is symmetric. So for the gradient w of the result, `ḡ = (w − mean(w) − n mean(w n)) / σ`,
    `v̄ = γ ⊙ ḡ`, `γ̄ = Σ v ⊙ ḡ`, `n̄ = −(w mean(g n) + g mean(w n)) / σ`, and that in 1/σ is
    `Σ w (g − mean(g) − n mean(g n))` of each row. These are ordinary operators beside the op itself.
    """

    @staticmethod
    def forward(ctx, vector: Tensor, normal: Tensor, inverse: Tensor, gain: Tensor | None):
        ctx.save_for_backward(vector, normal, inverse, gain)
        return norm_vjp_fwd(vector, normal, inverse, gain)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        vector, normal, inverse, gain = ctx.saved_tensors
        of_vector, of_normal, of_inverse, of_gain = ctx.needs_input_grad
        vector_grad = normal_grad = inverse_grad = gain_grad = None
        if of_vector or of_gain:
            back = norm_vjp(grad, normal, inverse, None, "triton")
            vector_grad = back if gain is None else back * gain
            gain_grad = (back * vector).sum_to_size(gain.shape) if of_gain else None
        if of_normal or of_inverse:
            wide = inverse.dtype
            w, n, g = grad.to(wide), normal.to(wide), vector.to(wide)
            g = g if gain is None else g * gain.to(wide)
            along = (g * n).mean(-1, keepdim=True)
            if of_normal:
                across = (w * n).mean(-1, keepdim=True)
                normal_grad = -(inverse * (w * along + g * across)).sum_to_size(normal.shape).to(normal.dtype)
            if of_inverse:
                bent = w * (g - g.mean(-1, keepdim=True) - n * along)
                inverse_grad = bent.sum(-1, keepdim=True).sum_to_size(inverse.shape)
        return vector_grad if of_vector else None, normal_grad, inverse_grad, gain_grad


# ------------------------------------------------------------------------------------ shapes and their checks


def _served(x: Tensor, backend: str, mask: Tensor | None, *others: Tensor | None) -> bool:
    """The kernels read in its own dtype what x's dtype holds, and a mask of as many bits as sums have."""
    widest = [(mask, accumulate_dtype(x.dtype)), *((other, x.dtype) for other in others)]
    fit = all(
        other is None or (other.device == x.device and torch.promote_types(other.dtype, wide) == wide)
        for other, wide in widest
    )
    return fit and kernels_serve(x, backend, autocast=True)


def _vjp_served(
    normal: Tensor, inverse: Tensor, backend: str, mask: Tensor | None, *terms: Tensor | None
) -> bool:
    fit = (inverse.dtype, inverse.device) == (accumulate_dtype(normal.dtype), normal.device)
    return fit and _served(normal, backend, mask, *terms)


def _widened(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In dtype, if that holds all that the tensor does."""
    if tensor is None or tensor.dtype == dtype or torch.promote_types(tensor.dtype, dtype) != dtype:
        return tensor
    return tensor.to(dtype)


def _fresh(like: Tensor) -> Tensor:
    """Contiguous, of like's shape."""
    return like.new_empty(like.shape)


def _fresh_inverse(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=accumulate_dtype(x.dtype))


def _apart(place: Tensor) -> int:
    """How far apart the rows begin of what is written into, dense themselves; 0 where not evenly."""
    *sizes, width = place.shape
    if place.is_contiguous():
        return width
    apart = expected = place.stride(-2)
    if place.stride(-1) != 1 or apart < width:
        return 0
    for size, stride in zip(sizes[::-1], place.stride()[-2::-1], strict=True):
        if size > 1 and stride != expected:
            return 0
        expected *= size
    return apart


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """`[..., D]` as `[rows, D]`, each row's entries one after another, and how far apart rows begin."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    # Of a single row the stride means nothing, and each one more would be one more compilation.
    return rows, rows.stride(0) if len(rows) > 1 else rows.shape[1]


def _mask_rows(mask: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """The mask as rows `[G, D]`, each of which serves so many rows of `shape`, one after another."""
    aligned = mask.reshape(*(1,) * (len(shape) - mask.dim()), *mask.shape)
    leading = list(zip(aligned.shape[:-1], shape[:-1], strict=True))
    same = next((i for i, (own, wanted) in enumerate(leading) if own != wanted), len(leading))
    if aligned.shape[-1] != shape[-1] or any(own != 1 for own, _ in leading[same:]):
        return mask.expand(shape).reshape(-1, shape[-1]), 1
    return aligned.reshape(-1, shape[-1]).contiguous(), math.prod(shape[same:-1])


def _tiles(rows: int, width: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the launch's constants: rows of a program, and how much of them it holds."""
    block = max(16, next_power_of_2(width))
    block = block if block <= MOST_BLOCK else BLOCK
    each = max(1, TILE // block)
    constants = {"ROWS": each, "BLOCK": block, "num_warps": min(max(2, block // 512), 16)}
    return (-(-rows // each),), constants


def _check(
    x: Tensor,
    branch: Tensor | None,
    mask: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
) -> None:
    check_number("epsilon", epsilon, 0, open_low=True)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: convert it to a floating one, e.g. x.float()")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: give x of shape [..., D] with D ≥ 1")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(
            f"branch has shape {tuple(branch.shape)}, x has {tuple(x.shape)}: give branch the shape of x"
        )
    if mask is not None and branch is None:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} without a branch to multiply: give branch, or leave it out"
        )
    _check_mask(mask, x)
    if (gain is None) != (offset is None):
        given, missing = ("gain", "offset") if offset is None else ("offset", "gain")
        raise ValueError(f"{given} was given and {missing}=None: give both, or neither")
    for name, parameter in (("gain", gain), ("offset", offset)):
        _check_width(name, parameter, x.shape[-1])


def _check_vjp(vector: Tensor, normal: Tensor, inverse: Tensor, gain: Tensor | None) -> None:
    if normal.dim() == 0 or vector.shape[max(vector.dim() - normal.dim(), 0) :] != normal.shape:
        raise ValueError(
            f"vector has shape {tuple(vector.shape)}, normal has {tuple(normal.shape)}: give a vector of "
            "shape [..., *normal.shape]"
        )
    if inverse.shape != (*normal.shape[:-1], 1):
        raise ValueError(
            f"inverse has shape {tuple(inverse.shape)}, normal has {tuple(normal.shape)}: give inverse of "
            f"shape {(*normal.shape[:-1], 1)}, as norm returns it"
        )
    _check_width("gain", gain, normal.shape[-1])


def _check_terms(normal: Tensor, **terms: Tensor | None) -> None:
    for name, term in terms.items():
        if term is not None and term.shape != normal.shape:
            raise ValueError(
                f"{name} has shape {tuple(term.shape)}, normal has {tuple(normal.shape)}: give them one shape"
            )


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is not None and not _broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to x's {tuple(x.shape)}: give it "
            "1 or x's own number in each dimension"
        )


def _check_width(name: str, parameter: Tensor | None, width: int) -> None:
    if parameter is not None and parameter.shape != (width,):
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, and rows have {width} entries: give {name} of shape "
            f"({width},)"
        )


def _broadcasts(shape: torch.Size, wanted: torch.Size) -> bool:
    if len(shape) > len(wanted):
        return False
    return all(own in (1, other) for own, other in zip(reversed(shape), reversed(wanted), strict=False))


@cache
def _kernels() -> ModuleType:
    from ..kernels import norm

    return norm
