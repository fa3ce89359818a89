"""Restarted Arnoldi iteration: the largest eigenvalues of the Jacobians of a batch, all samples at once.

Saad, "Numerical Methods for Large Eigenvalue Problems", 2011, ch. 6.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .reference.record import accumulate_dtype

Product = Callable[[Tensor], Tensor]

SPACE = 20
"""Vectors of a basis, before the iteration begins again with what it has found."""


def dominant_pair(pullback: Product, value: Tensor, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The largest modulus of an eigenvalue `[B]`, and the sum of the Ritz vectors `[B, N]` that belong to it.

    pullback: the product of Jᵀ with a vector like `value`, like z.    steps: of them at most
    """
    batch, entries = z.shape[0], z[:1].numel()
    wide = accumulate_dtype(z.dtype)

    def transposed(rows: Tensor) -> Tensor:
        return pullback(rows.to(value.dtype).view(z.shape)).reshape(batch, entries).to(wide)

    # A fixed start, so that the same question has the same answer.
    generator = torch.Generator(z.device).manual_seed(0)
    start = torch.randn(batch, entries, generator=generator, dtype=wide, device=z.device)
    tolerance = torch.finfo(wide).eps ** 0.5
    radius = z.new_zeros(batch, dtype=wide)
    taken, size = 0, min(entries, SPACE)
    while taken == 0 or steps - taken >= size / 2:  # of a smaller space: what is known is better
        size = min(size, steps - taken)
        basis, projection, left = arnoldi(transposed, start, size)
        radius, coefficients, beside = largest(projection)
        start = (coefficients[:, None] @ basis)[:, 0]
        if (left * beside <= tolerance * radius).all():
            break
        taken += size
        if entries <= steps - taken:
            size = entries  # a basis of all there is, which leaves nothing over
    return radius, start


def arnoldi(product: Product, start: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal Krylov basis `[B, size, N]` of each row, the projection on it, and what is left over.

    The projection is `[B, size, size]`; what of the last product is outside of the basis has a length, `[B]`.
    Where the space is exhausted the rest of the basis is zero, which adds only zero eigenvalues.
    """
    batch, entries = start.shape
    basis = start.new_zeros(batch, size, entries)
    projection = start.new_zeros(batch, size + 1, size)
    basis[:, 0] = normalise(start)[0]
    for k in range(size):
        vector = product(basis[:, k].contiguous())
        before = torch.linalg.vector_norm(vector, dim=1)
        vector, overlap = orthogonal_part(vector, basis[:, : k + 1])
        # Where little of a vector is left, rounding has its part in that. A GPU does not wait to see.
        if vector.is_cuda or (torch.linalg.vector_norm(vector, dim=1) < 0.7 * before).any():
            vector, more = orthogonal_part(vector, basis[:, : k + 1])
            overlap = overlap + more
        projection[:, : k + 1, k] = overlap
        floor = 10 * torch.finfo(vector.dtype).eps * before
        vector, projection[:, k + 1, k] = normalise(vector, floor)
        if k + 1 < size:
            basis[:, k + 1] = vector
    return basis, projection[:, :-1], projection[:, -1, -1]


def largest(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ρ of matrices H `[B, k, k]`, a unit v `[B, k]` that belongs to it, and `max(|v_k|, |(H v)_k| / ρ)`.

    `ρ = lim ‖Hⁿ‖^(1/n)` (Gelfand), by squaring: at n = 2^24 what stands before ρⁿ is of no account. So all
    matrices are multiplied at once, where a library takes the eigenvalues of one after another; and v, a
    column of the last power, lies in the plane that belongs to a complex pair.
    """
    power = matrices.double()
    logarithm = torch.zeros_like(power[:, :1, :1])
    for doubling in range(24):
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        logarithm = logarithm + norm.log() / 2**doubling
        power = power / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        power = power @ power
    radius = logarithm.exp()[:, 0, 0]
    longest = torch.linalg.vector_norm(power, dim=1).argmax(dim=1)
    vector = normalise(power.gather(2, longest[:, None, None].expand(-1, power.shape[1], 1))[..., 0])[0]
    last = (matrices[:, -1].double() * vector).sum(1) / radius.clamp_min(torch.finfo(radius.dtype).tiny)
    beside = torch.maximum(vector[:, -1].abs(), last.abs())
    dtype = matrices.dtype
    return radius.to(dtype), vector.to(dtype), beside.to(dtype)


def orthogonal_part(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each row `[B, N]` orthogonal to a basis `[B, k, N]`, and the overlaps `[B, k]`."""
    overlap = (vector[:, None] @ basis.mT)[:, 0]
    return torch.baddbmm(vector[:, None], overlap[:, None], basis, alpha=-1)[:, 0], overlap


def normalise(rows: Tensor, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of length 1 and their lengths; a row no longer than `floor` becomes zero."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    kept = norm > floor
    scale = torch.where(kept, 1 / torch.where(kept, norm, 1), 0)
    return rows * scale[:, None], torch.where(kept, norm, 0)
