"""Probes and squared norms."""

from collections.abc import Iterator

import torch

from ..reference import jacobian as reference_jacobian
from .case import Case, Row, relative_error, row


def check_probe(case: Case) -> Iterator[Row]:
    """The probes of both distributions, entry by entry, and that each entry was written."""
    from ..ops.jacobian import probe

    seed = torch.tensor([(case.seed + 1) * 0x5DEECE66D], device=case.device)
    like = torch.empty(case.shape, dtype=case.dtype, device=case.device)
    for index, distribution in enumerate(("gaussian", "rademacher")):
        out = probe(like, seed, index, distribution, "triton")
        wanted = reference_jacobian.probe(like.shape, seed, index, distribution, torch.float64)
        yield row(case, "jacobian", "probe", distribution, relative_error(out, wanted))


def check_squared_norm(case: Case) -> Iterator[Row]:
    """The squared norms and their gradient."""
    from ..ops.jacobian import squared_norm

    value = case.randn(*case.shape).requires_grad_()
    weight = case.randn(case.shape[0], stream=1)
    out = squared_norm(value, "triton")
    (grad,) = torch.autograd.grad((out * weight).sum(), value)

    wide = value.detach().double().requires_grad_()
    wanted = reference_jacobian.squared_norm(wide)
    (wanted_grad,) = torch.autograd.grad((wanted * weight.double()).sum(), wide)
    yield row(case, "jacobian", "squared_norm", "value", relative_error(out, wanted))
    yield row(case, "jacobian", "squared_norm", "gradient", relative_error(grad, wanted_grad))
