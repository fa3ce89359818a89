"""The Anderson kernels against the reference, and the reference against a bordered system."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton_deq.kernels.mixing import load_gram, load_triangles, mix, weights_of, weights_of_few

from tests.bounds import assert_within_bounds
from tests.memcheck import backwards
from triton_deq.backend import interpreting
from triton_deq.ops import anderson as op
from triton_deq.ops.launch import launch_anew
from triton_deq.ops.places import best_so_far
from triton_deq.reference import anderson as reference
from triton_deq.reference import buffers
from triton_deq.reference.anderson import _host_weights, anderson_weights
from triton_deq.reference.buffers import LARGE, fresh
from triton_deq.reference.record import TOLERANCE, Record
from triton_deq.reference.rows import regular
from triton_deq.status import Status
from triton_deq.verification import BOUNDS, Case, check_anderson

kernels = pytest.mark.kernels
RULE = {"relative": True, "over_batch": False, "ridge": 1e-6, "relative_ridge": True}


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 4100)], ids=str)
def test_both_kernels_match_the_reference(dtype, shape, device):
    case = Case(getattr(torch, dtype), shape, torch.device(device), seed=1)
    assert_within_bounds(check_anderson(case))


@kernels
@pytest.mark.parametrize(
    ("history", "programs", "parts", "processors", "own"),
    [(3, 1, 1, 0, 1), (9, 1, 1, 0, 1), (3, 6, 3, 0, 1), (3, 1, 1, 9, 3)],
)
def test_programs_of_several_blocks(history, programs, parts, processors, own, device, monkeypatch):
    """Of both halves of a step, and of one alone: the second's parts are not those of the first."""
    monkeypatch.setattr(op, "PROGRAMS", programs)
    monkeypatch.setattr("triton_deq.ops.launch.processors", lambda device: processors)
    case = Case(torch.float32, (2, 2500), torch.device(device), seed=3)
    x = case.randn(*case.shape)
    assert op.anderson_start(x, history, 0.0, 20, "triton").dots.shape[1] == parts
    assert op._own_cut(x, history).parts == own
    assert_within_bounds(check_anderson(case, history=history, steps=history + 2))


@kernels
@pytest.mark.skipif(not interpreting(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("over_batch", [False, True], ids=["sample", "batch"])
def test_programs_may_run_in_any_order(over_batch, monkeypatch):
    """What one of a sample's programs writes down, others may have read before or not."""
    monkeypatch.setattr(op, "PROGRAMS", 6)
    monkeypatch.setattr("triton_deq.ops.launch.processors", lambda device: 9)
    x, rule = torch.randn(2, 2500), RULE | {"over_batch": over_batch}

    def steps():
        state = op.anderson_start(x, 3, 0.0, 20, "triton")
        assert state.dots.shape[1] == op._own_cut(x, 3).parts == 3
        for step in range(5):
            op.anderson_residual(state, torch.cos(3 * state.x), step, 1.0, "triton")
            op.anderson_advance(state, step, **rule, last=False, backend="triton")
        return (state.x, best_so_far(state), state.gram, state.record.data)

    found = steps()
    with backwards():
        assert all(map(torch.equal, steps(), found))


@kernels
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout, device):
    assert_within_bounds(check_anderson(Case(torch.float32, (3, 37), torch.device(device), 6, layout)))


@kernels
@pytest.mark.parametrize("history", [1, 2, 7, 8, 9])
def test_any_history(history, device):
    assert_within_bounds(
        check_anderson(
            Case(torch.float32, (3, 19), torch.device(device), 2), history=history, steps=history + 2
        )
    )


@kernels
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("over_batch", [True, False], ids=["batch", "sample"])
@pytest.mark.parametrize("relative_ridge", [True, False], ids=["relative-ridge", "absolute-ridge"])
def test_every_rule(relative, over_batch, relative_ridge, device):
    case = Case(torch.float32, (3, 19), torch.device(device), 3)
    rule = {"relative": relative, "over_batch": over_batch, "relative_ridge": relative_ridge}
    assert_within_bounds(check_anderson(case, mixing=1.0, **rule))


@kernels
def test_batch_norm_over_more_samples_than_one_vector_holds(device):
    case = Case(torch.float32, (131, 3), torch.device(device), 4)
    assert_within_bounds(check_anderson(case, history=1, steps=1, over_batch=True))


@kernels
def test_same_bits_every_time(device):
    """Of an f that has them: the first tanh of a process on a CPU may differ from later ones by 5e-5."""

    def run():
        x = Case(torch.float32, (2, 5000), torch.device(device), 5).randn(2, 5000)
        state = op.anderson_start(x, 3, 1e-6, 4, "triton")
        for step in range(4):
            z = state.x + 0.1 * x
            op.anderson_residual(state, z / (1 + z.abs()), step, 1.0, "triton")
            op.anderson_advance(state, step, **RULE, last=False, backend="triton")
        return state

    first, second = run(), run()
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.record.data, second.record.data)


@kernels
@pytest.mark.parametrize("width", [37, 2100])
@pytest.mark.parametrize(
    "change", [{}, {"mixing": 0.5}, {"relative": False}, {"ridge": 1e-3}, {"relative_ridge": False}], ids=str
)
def test_only_what_has_not_changed_is_launched_again(change, width, device, monkeypatch):
    """One kernel or two; the second solve in the same memory comes to places that the first has left."""
    first, second = torch.randn(2, 1, width, device=device)
    where = torch.empty_like(first)  # f's value always lies here, so that its address does not tell
    rule = RULE | {"mixing": 1.0, "ridge": 1e-2}

    def steps(state, count, rule):
        trail = []
        for step in range(count):
            torch.cos(3 * state.x, out=where)  # which comes to no rest
            op.anderson_step(state, where, step, **rule, last=step == count - 1, backend="triton")
            trail.append(
                [each.clone() for each in (state.x, best_so_far(state), state.gram, state.record.data)]
            )
        return trail

    used, new = (op.anderson_start(x, 3, 0.0, 20, "triton") for x in (first, second))
    steps(used, 9, rule)
    op.anderson_restart(used, second, 0.0)
    trail = steps(used, 9, rule | change)
    monkeypatch.setattr(op, "launch_at", launch_anew)  # else both could be wrong alike
    for found, wanted in zip(trail, steps(new, 9, rule | change), strict=True):
        assert all(map(torch.equal, found, wanted))


def test_stopped_samples_are_left_alone(backend, device):
    x = torch.randn(3, 40, device=device)
    state = op.anderson_start(x, 2, 1e-6, 4, backend)
    state.record.tolerance[1] = math.inf
    for step in range(3):
        fx = torch.randn_like(x)
        if step > 0:
            fx[1] = math.nan
        op.anderson_residual(state, fx, step, 1.0, backend)
        op.anderson_advance(state, step, **RULE, last=False, backend=backend)
    assert torch.equal(state.x[1], x[1])
    assert not torch.equal(state.x[0], x[0])
    assert state.record.steps.tolist() == [3, 1, 3]


def test_useless_gram_matrix_gives_a_plain_step_and_a_new_history(backend, device):
    """The same residual twice is a singular matrix without a ridge."""
    x = torch.ones(1, 4, device=device)
    state = op.anderson_start(x, 3, 0.0, 5, backend)
    rule = {**RULE, "ridge": 0.0}
    for step in range(2):
        fx = state.x + torch.tensor([[1.0, 0, 0, 0]], device=device)
        op.anderson_residual(state, fx, step, 1.0, backend)
        op.anderson_advance(state, step, **rule, last=False, backend=backend)
    assert state.record.count.tolist() == [1]
    assert torch.equal(state.x, fx)


@pytest.mark.parametrize("relative_ridge", [True, False], ids=["relative", "absolute"])
def test_weights_solve_the_bordered_system(relative_ridge):
    """α from the Lagrange conditions, as one linear system with the constraint in it."""
    residuals = torch.randn(5, 4, 30, dtype=torch.float64) * torch.tensor([1, 1e-3, 10, 1e-6])[:, None]
    gram = residuals @ residuals.mT
    ridge = 1e-3
    weights, mixed = anderson_weights(gram, torch.ones(5, 4, dtype=torch.bool), 2, ridge, relative_ridge)

    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    damping = torch.diag_embed(ridge * (diagonal if relative_ridge else torch.ones_like(diagonal)))
    bordered = torch.zeros(5, 5, 5, dtype=torch.float64)
    bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1
    bordered[:, 1:, 1:] = gram + damping
    right = torch.zeros(5, 5, 1, dtype=torch.float64)
    right[:, 0] = 1
    expected = torch.linalg.solve(bordered, right)[:, 1:, 0]
    assert mixed.all()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-9)


def test_weights_do_not_see_units():
    residuals = torch.randn(2, 4, 9, dtype=torch.float64)
    gram = residuals @ residuals.mT
    valid = torch.ones(2, 4, dtype=torch.bool)
    weights, _ = anderson_weights(gram, valid, 0, 1e-6, True)
    scaled, _ = anderson_weights(gram * 2.0**-80, valid, 0, 1e-6, True)
    torch.testing.assert_close(scaled, weights, rtol=1e-12, atol=0)


def test_only_valid_slots_get_weight():
    residuals = torch.randn(2, 4, 9, dtype=torch.float64)
    gram = residuals @ residuals.mT
    gram[:, 3, :] = gram[:, :, 3] = math.nan
    valid = torch.tensor([[True, True, False, False], [True, False, False, False]])
    weights, mixed = anderson_weights(gram, valid, 0, 1e-6, True)
    assert mixed.all()
    assert torch.equal(weights[:, 2:], torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
    assert weights[1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("bad", ["nothing", "huge weights", "not a Gram matrix", "NaN", "singular"])
def test_the_hosts_weights_are_those_of_the_operators(bad):
    residuals = torch.randn(3, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    residuals[1, 2] = residuals[1, 0] + {"huge weights": 1e-6, "singular": 0}.get(bad, 1) * residuals[1, 2]
    gram = residuals @ residuals.mT
    if bad == "NaN":
        gram[1, 2, :] = gram[1, :, 2] = math.nan
    elif bad == "not a Gram matrix":
        gram[1] = 3 * torch.eye(4) - 2
    weights, mixed = _host_weights(gram.numpy(), None, 1, 0.0, True)
    expected, useful = anderson_weights(gram, None, 1, 0.0, True)
    assert useful.tolist() == [True, bad == "nothing", True]
    assert useful.tolist() == ([True] * 3 if mixed is None else mixed.tolist())
    np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-6, atol=1e-9)


@triton.jit
def mix_kernel(slots_ptr, weights_ptr, out_ptr, COUNT: tl.constexpr, N: tl.constexpr):
    columns = tl.arange(0, N)
    slots = ()
    weights = ()
    for j in tl.static_range(COUNT):
        slots += (tl.load(slots_ptr + j * N + columns),)
        weights += (tl.load(weights_ptr + j),)
    tl.store(out_ptr + columns, mix(slots, weights, COUNT, tl.float32))


@kernels
def test_a_slot_without_weight_is_not_mixed_whatever_it_holds(device):
    slots = torch.randn(3, 16, device=device)
    weights = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64, device=device)
    expected = 0.25 * slots[0] + 0.75 * slots[2]
    slots[1, ::2], slots[1, 1::2] = math.nan, math.inf
    out = torch.empty(16, device=device)
    mix_kernel[(1,)](slots, weights, out, 3, 16)
    torch.testing.assert_close(out, expected)


@triton.jit
def weights_kernel(
    gram_ptr,
    sums_ptr,
    weights_ptr,
    mixed_ptr,
    slot,
    count,
    HISTORY: tl.constexpr,
    LANES: tl.constexpr,
    RIDGE: tl.constexpr,
    RELATIVE_RIDGE: tl.constexpr,
):
    lanes = tl.arange(0, LANES)
    gram = load_gram(gram_ptr, slot, count, lanes, HISTORY)
    sums = tl.load(sums_ptr + lanes, mask=lanes < HISTORY, other=0)
    weights, mixed = weights_of(gram, sums, slot, count, lanes, HISTORY, RIDGE, RELATIVE_RIDGE)
    for j in tl.static_range(HISTORY):
        tl.store(weights_ptr + j, weights[j])
    tl.store(mixed_ptr, mixed)


@kernels
@pytest.mark.parametrize("ridge", [(1e-3, True), (1e-3, False), (0.0, True)], ids=str)
@pytest.mark.parametrize(
    ("bad", "useful"),
    [
        ("nothing", True),
        ("zero", True),
        ("huge weights", False),
        ("not a Gram matrix", False),
        ("NaN", False),
    ],
)
@pytest.mark.parametrize(
    ("history", "count", "slot"), [(4, 4, 1), (4, 3, 1), (4, 1, 3), (9, 9, 4), (9, 5, 0), (32, 20, 7)]
)
def test_the_kernels_weights_in_scalars_and_columns_and_matrices(
    history, count, slot, bad, useful, ridge, device
):
    """What slots hold that take no part counts for nothing, NaN or not, nor does what the newest row was."""
    if bad == "zero" and not ridge[0]:
        useful = False  # singular without a ridge
    valid = torch.tensor([(slot - j) % history < count for j in range(history)])
    others = [j for j in range(history) if valid[j] and j != slot]
    residuals = torch.randn(history, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if bad == "zero":
        residuals[slot] = 0
    elif bad == "huge weights" and others:
        residuals[slot] = residuals[others[0]] + 1e-6 * residuals[slot]
        ridge = 0.0, True
    gram = residuals @ residuals.mT
    if bad == "not a Gram matrix":
        gram[slot, slot] = -1.0
    elif bad == "NaN":
        gram[slot, slot] = math.nan
    if bad == "huge weights" and not others:
        useful = True  # one slot's weight is 1
    expected, _ = anderson_weights(gram[None], valid[None], slot, *ridge)

    stored = torch.where(valid[:, None] & valid[None, :], gram, math.nan)
    stored[slot] = stored[:, slot] = 5.0
    sums = torch.where(valid, gram[slot], math.nan)
    weights = torch.empty(history, dtype=torch.float64, device=device)
    mixed = torch.empty((), dtype=torch.int32, device=device)
    lanes = 1 << history.bit_length()
    weights_kernel[(1,)](
        stored.to(device), sums.to(device), weights, mixed, slot, count, history, lanes, *ridge
    )
    assert bool(mixed) == useful
    torch.testing.assert_close(weights.cpu(), expected[0], rtol=1e-8, atol=1e-12)


@triton.jit
def many_weights_kernel(
    gram_ptr, sums_ptr, count_ptr, weights_ptr, B, slot, HISTORY: tl.constexpr, SAMPLES: tl.constexpr
):
    local = tl.arange(0, SAMPLES)
    present = local < B
    count = tl.load(count_ptr + local, mask=present, other=0)
    triangles = load_triangles(gram_ptr + local * HISTORY * HISTORY, present, slot, count, HISTORY)
    sums = ()
    for j in tl.static_range(HISTORY):
        sums += (tl.load(sums_ptr + local * HISTORY + j, mask=present, other=0),)
    weights, _ = weights_of_few(triangles, sums, slot, count, HISTORY, 1e-3, True)
    for j in tl.static_range(HISTORY):
        tl.store(weights_ptr + local * HISTORY + j, weights[j], mask=present)


@kernels
def test_the_kernels_weights_of_many_samples_know_of_each_how_many_slots_it_has(device):
    """What stands in the Gram matrix of slots that take no part counts for nothing, NaN or not."""
    history, slot, counts = 4, 1, torch.tensor([4, 1, 3, 2, 4])
    residuals = torch.randn(5, history, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = residuals @ residuals.mT
    valid = (slot - torch.arange(history)) % history < counts[:, None]
    expected, _ = anderson_weights(gram, valid, slot, 1e-3, True)
    stored = torch.where(valid[:, :, None] & valid[:, None, :], gram, math.nan)
    stored[2] = torch.where(stored[2].isnan(), 7.0, stored[2])
    weights = torch.empty(5, history, dtype=torch.float64, device=device)
    sums = gram[:, slot].contiguous()
    many_weights_kernel[(1,)](
        stored.to(device), sums.to(device), counts.to(device), weights, 5, slot, history, 8
    )
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-8, atol=1e-12)


def test_a_history_that_began_anew_is_not_taken_for_a_whole_one():
    """A state that knows that all slots are valid takes the steps of one that asks each time."""
    x, values = torch.randn(3, 8, dtype=torch.float64), torch.randn(9, 3, 8, dtype=torch.float64)
    knowing, asking = (reference.anderson_start(x.clone(), 4, 0.0, 10) for _ in range(2))
    assert knowing.whole
    counts = []
    for step, fx in enumerate(values):
        asking.whole = False
        if step == 5:  # the residual of the step before once more: without a ridge, huge weights
            fx[1] = knowing.x[1] + knowing.residuals[(step - 1) % 4, 1]
        for state in (knowing, asking):
            reference.anderson_residual(state, fx, step, 1.0)
            reference.anderson_advance(state, step, **RULE | {"ridge": 0.0, "last": False})
        assert torch.equal(knowing.x, asking.x)
        counts.append(knowing.record.count.tolist())
        assert counts[-1] == asking.record.count.tolist()
    assert counts[5] == [4, 1, 4]
    assert counts[8] == [4, 4, 4]
    assert knowing.whole


@pytest.mark.parametrize("relative", [True, False])
def test_a_record_judges_regular_squares_like_any(relative):
    """Also from the step on at which the first sample converges, and another diverges."""
    shortly, at_length = (Record(4, 1e-3, torch.device("cpu")) for _ in range(2))
    residual_sq = np.array([1.0, 1.0, 4.0, 2.0])
    for _ in range(6):
        residual_sq = residual_sq * np.array([0.5, 0.02, 1e3, 1.5])
        squares = residual_sq, np.array([1.0, 3.0, 9.0, 1.0])
        assert regular(np.stack(squares))
        found = shortly.judge(*squares, relative=relative, over_batch=False, regular=True)
        wanted = at_length.judge(*squares, relative=relative, over_batch=False)
        assert [mask.tolist() for mask in found] == [mask.tolist() for mask in wanted]
        assert torch.equal(shortly.data, at_length.data)
    assert set(shortly.status.tolist()) == {Status.MAX_STEPS, Status.CONVERGED, Status.DIVERGED}


@pytest.mark.parametrize("square", [0.0, 1e-31, 1e31, math.inf, math.nan])
def test_squares_near_a_limit_are_not_regular(square):
    squares = np.ones((3, 2))
    assert regular(squares)
    squares[1, 1] = square
    assert not regular(squares)


def test_a_record_is_put_back_to_before_its_first_step(device):
    record = Record(3, 1e-3, torch.device(device))
    first = record.data.clone()
    for tol in (1e-3, 1e-3, 0.5, 0.5, 1e-3):
        record.data.normal_()
        record.reset(tol)
        first[TOLERANCE] = tol
        assert torch.equal(record.data, first)


def test_a_large_buffer_serves_again_when_nobody_looks_at_it(monkeypatch):
    def place(entries):
        return fresh((2, entries), torch.float32, torch.device("cpu"))

    entries = LARGE // 4  # twice what is large
    first = place(entries)
    assert first.data_ptr() % 64 == 0
    second, part = place(entries), first[1, 5:]
    assert second.data_ptr() != first.data_ptr()
    at, part[:] = first.data_ptr(), 3
    del first  # a part of it is still looked at
    third = place(entries)
    third.zero_()
    assert third.data_ptr() not in (at, second.data_ptr())
    assert (part == 3).all()
    del part
    assert place(entries // 2).data_ptr() == at
    larger = place(entries + 16)  # for which that is too small
    assert larger.data_ptr() != at
    other = larger.data_ptr()
    del larger
    for _ in range(2):  # solves of two sizes in turns
        assert place(entries // 2).data_ptr() == at
        assert place(entries + 16).data_ptr() == other


def test_of_what_is_given_up_the_last_is_kept(monkeypatch):
    monkeypatch.setattr(buffers, "KEPT", 5 * LARGE)
    monkeypatch.setattr(buffers, "_given_up", {})

    def kept():
        return [memory.size // LARGE for memory in buffers._given_up.values()]

    def place(times):
        return fresh((times * LARGE,), torch.uint8, torch.device("cpu"))

    first, second, third = place(2), place(2), place(2)
    del first
    del third
    assert kept() == [2, 2]
    del second
    assert kept() == [2, 2]
    place(6)  # too much to keep
    assert kept() == [2, 2]
