"""Where the kernels keep iterates: the best is known after each step, though none that improves copies it."""

import math

import pytest
import torch

import triton_deq as td
from triton_deq.ops import anderson, broyden
from triton_deq.ops.places import best_so_far, stays
from triton_deq.status import RUNNING, Status

pytestmark = pytest.mark.kernels
STEPS, BATCH = 13, 7
RULE = {"relative": False, "over_batch": False}
ENDS = [*[RUNNING] * 3, Status.CONVERGED, Status.CONVERGED, Status.NONFINITE, Status.NONFINITE]
RIDGE = {"ridge": 1e-3, "relative_ridge": True}


def in_two_kernels(state, fx, step, last, backend):
    anderson.anderson_residual(state, fx, step, 1.0, backend)
    anderson.anderson_advance(state, step, **RULE, **RIDGE, last=last, backend=backend)


def in_one_kernel(state, fx, step, last, backend):
    anderson.anderson_step(state, fx, step, mixing=1.0, **RULE, **RIDGE, last=last, backend=backend)


def by_broyden(state, fx, step, last, backend):
    broyden.broyden_residual(state, fx, step, backend)
    broyden.broyden_advance(state, step, **RULE, last=last, backend=backend)


def sizes() -> torch.Tensor:
    """`[STEPS, BATCH]`: residuals that fall, rise, go up and down, meet the tolerance or are not finite."""
    torch.manual_seed(2)
    size = 1 + torch.rand(STEPS, BATCH, dtype=torch.float64)
    size[:, 0] = torch.arange(STEPS, 0, -1)
    size[:, 1] = torch.arange(1, STEPS + 1)
    size[0, 3] = size[4, 4] = 1e-9  # the first of them stops at once
    size[0, 5] = size[5, 6] = math.nan
    return size


@pytest.mark.parametrize("width", [37, 700])
@pytest.mark.parametrize(
    ("advance", "slots"),
    [(in_two_kernels, 1), (in_two_kernels, 3), (in_one_kernel, 2), (in_one_kernel, 5), (by_broyden, 4)],
    ids=lambda given: getattr(given, "__name__", given),
)
def test_the_best_iterate_is_known_after_every_step(advance, slots, width, device):
    """Also in cycles of an odd number of steps, which end where they began."""
    module, name = (broyden, "broyden") if advance is by_broyden else (anderson, "anderson")
    start, restart = getattr(module, f"{name}_start"), getattr(module, f"{name}_restart")
    x = torch.randn(BATCH, width, dtype=torch.float64, device=device)
    states = {"triton": start(x + 1, slots, 1e-6, STEPS, "triton"), "reference": None}
    for step in range(3):  # an earlier solve in the same memory, of an odd number of steps
        state = states["triton"]
        advance(state, state.x + 1, step, False, "triton")
    assert state.turned
    restart(state, x, 1e-6)
    states["reference"] = start(x, slots, 1e-6, STEPS, "reference")

    size = sizes().to(device)
    stayed = 0
    for step in range(STEPS):
        direction = torch.nn.functional.normalize(torch.randn_like(x), dim=1)
        for backend, state in states.items():
            fx = state.x + size[step, :, None] * direction
            advance(state, fx, step, step == STEPS - 1, backend)
        found, wanted = states["triton"], states["reference"]
        status = found.record.status.cpu()
        assert torch.equal(status, wanted.record.status)
        torch.testing.assert_close(best_so_far(found), wanted.best, rtol=1e-9, atol=1e-9)
        stopped = (status != float(RUNNING)).to(device)
        assert torch.equal(best_so_far(found)[stopped], found.best[stopped])
        assert torch.equal(found.x[stopped], found.other[stopped])
        torch.testing.assert_close(found.x[~stopped], wanted.x[~stopped], rtol=1e-9, atol=1e-9)
        stayed += stays(found, step)
    assert stayed == (STEPS // 5 if slots == 5 or advance is by_broyden else 0)
    assert status.tolist() == [float(each) for each in ENDS]
    torch.testing.assert_close(found.best, wanted.best, rtol=1e-9, atol=1e-9)


def test_a_sample_that_stops_is_evaluated_where_it_was(device):
    """f sees either place by turns: what couples samples must find the same in both."""
    seen = []

    def f(z):
        seen.append(z.clone())
        return torch.stack([z[0], 0.5 * z[1] + 1])  # the first is at rest where it begins

    z0 = torch.randn(2, 5, dtype=torch.float64, device=device)
    solution = td.solve(f, z0, td.Picard(), tol=1e-6, max_steps=40, backend="triton")
    assert solution.converged.all()
    assert len(seen) > 5
    assert all(torch.equal(z[0], z0[0]) for z in seen)
