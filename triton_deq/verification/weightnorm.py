"""Weight normalisation's kernels."""

from collections.abc import Iterator

import torch

from ..reference import weightnorm as reference
from .case import LEAST_WIDTH, Case, Row, relative_error, row


def check_weightnorm(case: Case) -> Iterator[Row]:
    """Values and gradients of a weight with zeros behind it, beside one that is only copied."""
    from ..ops import weightnorm as op

    rows, columns = case.shape[0], max(case.shape[1], LEAST_WIDTH)
    wider = rows + 1, columns + 3
    v, g = case.randn(rows, columns), case.randn(rows, stream=1).abs() + 0.5
    vector = case.randn(*wider, stream=2)
    other, its_vector = (case.randn(columns, rows + 2, stream=stream) for stream in (3, 4))
    weights = [op.Weight(v, g, *wider), op.Weight(other)]
    value, copied = op.weightnorm_fwd(weights)
    (of_v, of_g), (of_other, _) = op.weightnorm_vjp_fwd(weights, [vector, its_vector])
    assert of_v is not None
    assert of_g is not None
    assert of_other is not None

    wide_v, wide_g = v.double().requires_grad_(), g.double().requires_grad_()
    wanted = reference.weightnorm(wide_v, wide_g, torch.float64, *wider)
    gradients = torch.autograd.grad(wanted, (wide_v, wide_g), vector.double())
    found = (
        ("weightnorm", "value", value, wanted.detach()),
        ("weightnorm", "beside", copied, other.double()),
        ("weightnorm_vjp", "of v", of_v, gradients[0]),
        ("weightnorm_vjp", "of g", of_g, gradients[1]),
        ("weightnorm_vjp", "beside", of_other, its_vector.double()),
    )
    for kernel, quantity, each, exact in found:
        yield row(case, "weightnorm", kernel, quantity, relative_error(each, exact))
