"""The residual LayerNorm's kernels."""

from collections.abc import Iterator

import torch

from ..reference import norm as reference
from ..reference.record import accumulate_dtype
from .case import LEAST_WIDTH, Case, Row, poisoned, relative_error, row


def check_norm(case: Case) -> Iterator[Row]:
    """All results with a masked branch, and the gradients of all of them in x and in the branch."""
    from ..ops import norm as op

    batch, width = case.shape[0], max(case.shape[1], LEAST_WIDTH)
    x, branch, vector, shift, addend = (case.randn(batch, width, stream=stream) for stream in range(5))
    mask, gain, offset = (case.randn(width, stream=stream) for stream in range(5, 8))
    bend = case.randn(batch, 1, stream=8).to(accumulate_dtype(case.dtype))
    value, normal, inverse = poisoned(x, batch, width), poisoned(x, batch, width), poisoned(bend, batch, 1)
    op.norm_fwd(x, branch, mask, gain, offset, 1e-5, value, normal, inverse)

    leaves = (x.double().requires_grad_(), branch.double().requires_grad_())
    wanted = reference.norm(leaves[0], leaves[1], mask.double(), gain.double(), offset.double())
    for quantity, out, expected in zip(
        ("value", "normal", "inverse"), (value, normal, inverse), wanted, strict=True
    ):
        yield row(case, "norm", "norm", quantity, relative_error(out, expected.detach()))

    places = (poisoned(x, batch, width), poisoned(x, batch, width))
    found = op.norm_vjp_fwd(vector, normal, inverse, gain, shift, bend, mask, *places, addend)
    given = (vector.double(), shift.double(), bend.double())
    of_x, of_branch = torch.autograd.grad(wanted, leaves, given)
    for quantity, out, expected in zip(
        ("of x", "of branch"), found, (of_x + addend.double(), of_branch), strict=True
    ):
        yield row(case, "norm", "norm_vjp", quantity, relative_error(out, expected))
