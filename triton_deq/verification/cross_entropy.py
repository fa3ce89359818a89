"""The kernels of the negative log-likelihood."""

from collections.abc import Iterator

import torch

from ..reference import cross_entropy as reference
from .case import Case, Row, relative_error, row


def check_cross_entropy(case: Case) -> Iterator[Row]:
    """The value and the gradient, with columns that are no classes."""
    from ..ops import cross_entropy as op

    rows, classes = case.shape
    logits = (3 * case.randn(rows, classes + 3)).to(case.dtype)
    targets = (case.randn(rows, stream=1).double().abs() * classes).long() % classes
    value, levels = op.cross_entropy_fwd(logits, targets, classes)
    vector = case.randn(rows, stream=2).to(value.dtype)
    slopes = op.cross_entropy_vjp_fwd(logits, targets, levels, vector, classes)

    wide = logits.double().requires_grad_()
    wanted = reference.cross_entropy(wide, targets, classes)
    (gradient,) = torch.autograd.grad(wanted, wide, vector.double())
    yield row(case, "cross_entropy", "cross_entropy", "value", relative_error(value, wanted.detach()))
    yield row(case, "cross_entropy", "cross_entropy_vjp", "of logits", relative_error(slopes, gradient))
