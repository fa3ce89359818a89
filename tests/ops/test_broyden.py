"""The Broyden kernels against the reference, and the reference against Broyden's own rank-one updates."""

import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from triton_deq.kernels.systems import load_matrix, solve

import triton_deq as td
from tests.bounds import assert_within_bounds
from tests.memcheck import backwards
from tests.problems import tanh_map
from triton_deq.backend import interpreting
from triton_deq.ops import broyden as op
from triton_deq.ops.launch import launch_anew, partition
from triton_deq.ops.places import best_so_far
from triton_deq.status import Status
from triton_deq.verification import BOUNDS, Case, check_broyden

kernels = pytest.mark.kernels
RULE = {"relative": True, "over_batch": False, "last": False}


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 4100)], ids=str)
def test_both_kernels_match_the_reference(dtype, shape, device):
    assert_within_bounds(check_broyden(Case(getattr(torch, dtype), shape, torch.device(device), seed=1)))


@kernels
@pytest.mark.parametrize(
    ("memory", "programs", "parts", "processors", "own"),
    [(3, 1, 1, 0, 1), (17, 1, 1, 0, 1), (3, 6, 3, 0, 1), (3, 1, 1, 9, 3)],
)
def test_programs_of_several_blocks(memory, programs, parts, processors, own, device, monkeypatch):
    """Of both halves of a step, and of one alone: the second's parts are not those of the first.

    Few changes are mixed at once, many in turns.
    """
    monkeypatch.setattr(op, "partition", partial(partition, programs=programs))
    monkeypatch.setattr("triton_deq.ops.launch.processors", lambda device: processors)
    case = Case(torch.float32, (2, 2500), torch.device(device), seed=3)
    x = case.randn(*case.shape)
    assert op.broyden_start(x, memory, 0.0, 20, "triton").dots.shape[1] == parts
    assert op._own_cut(x).parts == own
    assert_within_bounds(check_broyden(case, memory=memory, steps=memory + 2))


@kernels
@pytest.mark.skipif(not interpreting(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("over_batch", [False, True], ids=["sample", "batch"])
def test_programs_may_run_in_any_order(over_batch, monkeypatch):
    """What one of a sample's programs writes down, others may have read before or not."""
    monkeypatch.setattr(op, "partition", partial(partition, programs=6))
    monkeypatch.setattr("triton_deq.ops.launch.processors", lambda device: 9)
    x, rule = torch.randn(2, 2500), RULE | {"over_batch": over_batch}

    def steps():
        state = op.broyden_start(x, 3, 0.0, 20, "triton")
        assert state.dots.shape[1] == op._own_cut(x).parts == 3
        for step in range(5):
            op.broyden_residual(state, torch.cos(3 * state.x), step, "triton")
            op.broyden_advance(state, step, **rule, backend="triton")
        return (state.x, best_so_far(state), state.matrix, state.squares, state.record.data)

    found = steps()
    with backwards():
        assert all(map(torch.equal, steps(), found))


@kernels
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout, device):
    assert_within_bounds(check_broyden(Case(torch.float32, (3, 37), torch.device(device), 6, layout)))


@kernels
@pytest.mark.parametrize("memory", [1, 2, 6, 7, 32])
def test_any_memory(memory, device):
    case = Case(torch.float32, (3, 19), torch.device(device), 2)
    assert_within_bounds(check_broyden(case, memory=memory, steps=memory + 3))


@kernels
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("over_batch", [True, False], ids=["batch", "sample"])
def test_every_rule(relative, over_batch, device):
    case = Case(torch.float32, (3, 19), torch.device(device), 3)
    assert_within_bounds(check_broyden(case, relative=relative, over_batch=over_batch))


@kernels
def test_batch_norm_over_more_samples_than_one_vector_holds(device):
    case = Case(torch.float32, (131, 3), torch.device(device), 4)
    assert_within_bounds(check_broyden(case, memory=1, steps=1, over_batch=True))


@kernels
def test_same_bits_every_time(device):
    """Of an f that has them: the first tanh of a process on a CPU may differ from later ones by 5e-5."""

    def run():
        x = Case(torch.float32, (2, 5000), torch.device(device), 5).randn(2, 5000)
        state = op.broyden_start(x, 3, 1e-6, 6, "triton")
        for step in range(5):
            z = state.x + 0.1 * x
            op.broyden_residual(state, z / (1 + z.abs()), step, "triton")
            op.broyden_advance(state, step, **RULE, backend="triton")
        return state

    first, second = run(), run()
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.record.data, second.record.data)


@kernels
@pytest.mark.parametrize("change", [{}, {"relative": False}, {"over_batch": True}], ids=str)
def test_only_what_has_not_changed_is_launched_again(change, device, monkeypatch):
    """The second solve in the same memory comes to places that the first has left."""
    first, second = torch.randn(2, 2, 37, device=device)
    where = torch.empty_like(first)  # f's value always lies here, so that its address does not tell

    def steps(state, count, rule):
        trail = []
        for step in range(count):
            torch.cos(3 * state.x, out=where)  # which comes to no rest
            op.broyden_residual(state, where, step, "triton")
            op.broyden_advance(state, step, **rule | {"last": step == count - 1}, backend="triton")
            trail.append(
                [each.clone() for each in (state.x, best_so_far(state), state.matrix, state.record.data)]
            )
        return trail

    used, new = (op.broyden_start(x, 2, 0.0, 20, "triton") for x in (first, second))
    steps(used, 7, RULE)
    op.broyden_restart(used, second, 0.0)
    trail = steps(used, 7, RULE | change)
    monkeypatch.setattr(op, "launch_at", launch_anew)  # else both could be wrong alike
    for found, wanted in zip(trail, steps(new, 7, RULE | change), strict=True):
        assert all(map(torch.equal, found, wanted))


@triton.jit
def solve_kernel(
    matrix_ptr, right_ptr, out_ptr, least_ptr, SIZE: tl.constexpr, LANES: tl.constexpr, PIVOTED: tl.constexpr
):
    lanes = tl.arange(0, LANES)
    right = tl.load(right_ptr + lanes, mask=lanes < SIZE, other=0)
    solution, least = solve(load_matrix(matrix_ptr, lanes, SIZE), right, lanes, SIZE, PIVOTED)
    tl.store(out_ptr + lanes, solution)
    tl.store(least_ptr, least)


def solved(matrix, right, pivoted, device):
    """What the kernels' elimination gives, and its least pivot."""
    size = len(right)
    lanes = triton.next_power_of_2(size + 2)
    out, least = (
        torch.empty(lanes, dtype=torch.float64, device=device),
        torch.empty_like(right[:1], device=device),
    )
    solve_kernel[(1,)](matrix.to(device), right.to(device), out, least, size, lanes, pivoted)
    assert not out[size:].any()
    return out[:size].cpu(), least.item()


SYSTEMS = pytest.mark.parametrize("size", [1, 5, 10, 20, 40])  # of up to 31 as columns, of more as a matrix


@kernels
@SYSTEMS
def test_the_kernels_elimination_pivots(size, device):
    """Systems that no elimination without row exchanges survives: zeros on the diagonal, and tiny scales."""
    matrix = torch.randn(size, size, dtype=torch.float64).roll(1, 0)
    if size > 1:
        matrix.fill_diagonal_(0)
    right = torch.randn(size, dtype=torch.float64)
    for scale in (1.0, 1e-90, 1e90):
        found, _ = solved(scale * matrix, scale * right, True, device)
        torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-12)


@kernels
@SYSTEMS
def test_the_kernels_elimination_without_pivots_tells_what_is_not_positive_definite(size, device):
    half = torch.randn(size, size + 3, dtype=torch.float64)
    matrix, right = half @ half.T, torch.randn(size, dtype=torch.float64)
    found, least = solved(matrix, right, False, device)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-6, atol=1e-9)
    # D of M = L D Lᵀ has the squares of Cholesky's diagonal.
    wanted = torch.linalg.cholesky(matrix).diagonal().square().min().item()
    assert least == pytest.approx(wanted, rel=1e-6)
    matrix[-1, -1] = -1.0
    assert solved(matrix, right, False, device)[1] < 0


@kernels
@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), None], ids=str)
def test_the_kernels_elimination_hides_nothing(size, entry, device):
    """Neither what is not finite, nor a singular matrix."""
    matrix, right = torch.randn(size, size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    if entry is None:
        matrix[1] = 0
    else:
        matrix[1, 2] = entry
    assert not solved(matrix, right, True, device)[0].isfinite().all()


def rank_one_broyden(f, z0, steps, memory):
    """Broyden's iterates for one sample from dense matrices: `B ← B + (y − B s) sᵀ / sᵀs`, B₀ = −I."""
    points, values = [z0], [f(z0)]
    for _ in range(steps):
        jacobian = -torch.eye(z0.numel(), dtype=z0.dtype)
        for j in range(max(0, len(points) - 1 - memory), len(points) - 1):
            s = points[j + 1] - points[j]
            y = (values[j + 1] - points[j + 1]) - (values[j] - points[j])
            jacobian += torch.outer(y - jacobian @ s, s) / s.dot(s)
        points.append(points[-1] - torch.linalg.solve(jacobian, values[-1] - points[-1]))
        values.append(f(points[-1]))
    return points, jacobian


@pytest.mark.parametrize("memory", [1, 3, 20])
def test_the_compact_form_takes_broydens_steps(memory, backend, device):
    f, *_ = tanh_map(2, 9, gain=1.5, device=device)
    seen = []

    def watched(z):
        seen.append(z[0].clone().cpu())
        return f(z)

    z0 = torch.zeros(2, 9, dtype=torch.float64, device=device)
    td.solve(watched, z0, td.Broyden(memory), tol=0, max_steps=9, backend=backend)
    one = lambda z: f(z.to(device).expand(2, 9))[0].cpu()  # noqa: E731
    expected, _ = rank_one_broyden(one, z0[0].cpu(), 8, memory)
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected).detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("memory", [2, 20])
def test_the_adjoint_is_the_transposed_inverse_of_broydens_matrix(memory, backend, device):
    """u = −g B⁻¹, B from the pairs of the step that each sample stopped at."""
    f, *_ = tanh_map(2, 9, gain=1.5, device=device)
    x = torch.zeros(2, 9, dtype=torch.float64, device=device)
    state = op.broyden_start(x, memory, 0.0, 12, backend)
    for step in range(7):
        if step == 5:
            state.record.status[1] = Status.CONVERGED  # stays as after five steps
        op.broyden_residual(state, f(state.x).detach(), step, backend)
        op.broyden_advance(state, step, **RULE, backend=backend)
    grad = torch.randn(2, 9, dtype=torch.float64, device=device)
    found = op.broyden_adjoint(state, grad).cpu()
    for sample, steps in enumerate((7, 5)):
        one = lambda z, at=sample: f(z.to(device).expand(2, 9))[at].detach().cpu()  # noqa: E731
        _, jacobian = rank_one_broyden(one, x[sample].cpu(), steps, memory)
        expected = -torch.linalg.solve(jacobian.T, grad[sample].cpu())
        torch.testing.assert_close(found[sample], expected, rtol=1e-7, atol=1e-9)


def test_stopped_samples_are_left_alone(backend, device):
    x = torch.randn(3, 40, device=device)
    state = op.broyden_start(x, 2, 1e-6, 8, backend)
    state.record.tolerance[1] = math.inf
    for step in range(4):
        fx = torch.randn_like(x)
        if step > 0:
            fx[1] = math.nan
        op.broyden_residual(state, fx, step, backend)
        op.broyden_advance(state, step, **RULE, backend=backend)
    assert torch.equal(state.x[1], x[1])
    assert state.record.steps.tolist() == [4, 1, 4]
    assert state.x.isfinite().all()


def test_useless_matrix_gives_a_plain_step_and_forgets_the_pairs(backend, device):
    """The same residual twice: y = 0, so no Jacobian fits the pair."""
    state = op.broyden_start(torch.ones(1, 4, device=device), 3, 0.0, 8, backend)
    for step in range(3):
        fx = state.x + torch.tensor([[1.0, 0, 0, 0]], device=device)
        op.broyden_residual(state, fx, step, backend)
        op.broyden_advance(state, step, **RULE, backend=backend)
    assert state.record.count.tolist() == [1]
    assert torch.equal(state.x, fx)


def test_a_step_that_does_not_move_leaves_its_pair_out(backend, device):
    state = op.broyden_start(torch.ones(1, 4, device=device), 3, 0.0, 8, backend)
    for step in range(3):
        op.broyden_residual(state, state.x.clone(), step, backend)
        op.broyden_advance(state, step, **RULE, backend=backend)
    assert torch.equal(state.x, torch.ones_like(state.x))
    assert state.record.residual.tolist() == [0]
