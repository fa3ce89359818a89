"""What a step may cost: launches, operators, reads by the host, bytes and allocations, counted."""

import pytest
import torch

import triton_deq as td
from tests.counters import Counter
from triton_deq.backend import interpreting
from triton_deq.ops.anderson import anderson_advance, anderson_residual, anderson_start

BATCH, SIZE, HISTORY = 2, 2304, 6
FULL = {"tol": 0, "max_steps": HISTORY + 3}
"""Every step, until the history has been full for a while."""


SOLVERS = {"anderson": td.Anderson(history=HISTORY), "broyden": td.Broyden(memory=HISTORY)}


def problem(device: str, dtype=torch.float32, gains=(0.5, 0.5), size=SIZE):
    """`z ↦ tanh(w z + b)` with random w up to a gain for each sample, and a start."""
    weight = torch.rand(BATCH, size) * torch.tensor(gains)[:, None]
    weight, bias = weight.to(device, dtype), torch.randn(BATCH, size).to(device, dtype)
    return lambda z: torch.tanh(weight * z + bias), torch.zeros_like(bias)


def steps_of(f, z0, solver=None, **options):
    """`Counts` of each step but the last, whose tail is the making of the solution."""
    with Counter(z0) as counter:
        td.solve(counter.beside(f), z0, solver or td.Anderson(history=HISTORY), **options)
    return counter.steps[1:-1]


@pytest.mark.parametrize("name", SOLVERS)
def test_budgets_of_a_step(name, device, backend):
    """Two launches and next to no operators by the kernels; one look by the host; no new state-sized tensor.

    The operators beside the kernels are the flag that the host looks at: its copy, the reading of that, and
    at first the place for it.
    """
    f, z0 = problem(device)
    for step in steps_of(f, z0, SOLVERS[name], **FULL, backend=backend):
        assert len(step.reads) <= 1, step.reads
        assert step.allocated == []
        if backend == "triton":
            assert step.launches == [f"{name}_residual_kernel", f"{name}_advance_kernel"]
            assert step.operators.total() <= 3
        else:
            assert step.launches == []


@pytest.mark.kernels
def test_a_sample_that_fits_one_program_takes_one_launch(device):
    """Which moves 2m + 4 states, for x and the newest slot stay in registers."""
    f, z0 = problem(device, size=1024)
    for step in steps_of(f, z0, SOLVERS["anderson"], **FULL, backend="triton"):
        assert step.launches == ["anderson_step_kernel"]
        if interpreting():
            assert step.moved <= (2 * HISTORY + 4 + 0.2) * z0.numel() * z0.element_size()
    for step in steps_of(f, z0, SOLVERS["anderson"], **FULL, norm_over="batch", backend="triton"):
        assert step.launches == ["anderson_residual_kernel", "anderson_advance_kernel"]


@pytest.mark.kernels
def test_the_kernels_themselves_never_make_the_host_wait(device):
    f, z0 = problem(device)
    rule = {"relative": True, "over_batch": False, "ridge": 1e-6, "relative_ridge": True, "last": False}
    state = anderson_start(z0, HISTORY, 1e-3, 5, "triton")
    with Counter(z0) as counter:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(4):
                anderson_residual(state, f(state.x), step, 1.0, "triton")
                anderson_advance(state, step, **rule, backend="triton")
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert counter.now.reads == []
    assert len(counter.now.launches) == 8


@pytest.mark.parametrize("mixing", [1.0, 0.7])
def test_a_step_moves_no_more_bytes_than_it_must(device, backend, mixing):
    """Kernels: 2m + 4 states. The residual kernel reads f, x and m − 1 residuals and writes G and x + βG;
    the other reads m iterates and writes x: each step improves, so the best stays where it is. It would be
    2m + 3 if f wrote its value into the ring itself.

    The reference: 2m + 10, since each operator reads its operands anew. A damped step costs it one more.
    """
    if backend == "triton" and not interpreting():
        pytest.skip("a compiled kernel does not tell what it loads")
    f, z0 = problem(device)
    state_bytes = z0.numel() * z0.element_size()
    limit = 2 * HISTORY + (4 if backend == "triton" else 10 + (mixing != 1))
    solver = td.Anderson(history=HISTORY, mixing=mixing)
    for step in steps_of(f, z0, solver, **FULL, backend=backend):
        # A fifth of a state for all that has one entry a sample or a part.
        assert step.moved <= (limit + 0.2) * state_bytes


def test_a_broyden_step_moves_no_more_bytes_than_it_must(device, backend):
    """Kernels: 3m + 8 states. The residual kernel reads f, x, the open slot's two and m − 1 pairs and writes
    the newest pair and the open slot; the other reads f and m changes and writes x. Where the residual
    grows, the best iterate is read and written besides.

    The reference: 3m + 25.
    """
    if backend == "triton" and not interpreting():
        pytest.skip("a compiled kernel does not tell what it loads")
    f, z0 = problem(device)
    limits = [3 * HISTORY + each for each in ((8, 10) if backend == "triton" else (25, 25))]
    steps = steps_of(f, z0, SOLVERS["broyden"], tol=0, max_steps=HISTORY + 4, backend=backend)
    moved = [step.moved / (z0.numel() * z0.element_size()) for step in steps]
    assert min(moved[HISTORY:]) <= limits[0] + 0.5
    assert max(moved) <= limits[1] + 0.5


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_a_full_step_moves_what_the_catalog_says(device, dtype):
    from triton_deq.kernels.catalog import ENTRIES, STEPS

    if not interpreting():
        pytest.skip("a compiled kernel does not tell what it loads")
    names = STEPS[f"Anderson step [{dtype},m={HISTORY}]"]
    traffic = sum(entry.traffic(entry, BATCH, SIZE) for entry in ENTRIES if entry.name in names)
    f, z0 = problem(device, {"bf16": torch.bfloat16, "fp64": torch.float64}[dtype])
    # The catalog counts a full step that improves on the best so far; the last ones are some.
    moved = min(step.moved for step in steps_of(f, z0, **FULL, backend="triton")[HISTORY:])
    assert moved == pytest.approx(traffic, rel=0.03)


@pytest.mark.kernels
def test_a_frozen_sample_moves_nothing(device):
    if not interpreting():
        pytest.skip("a compiled kernel does not tell what it loads")
    f, z0 = problem(device, gains=(0.0, 1.0))  # the first sample stops at its second step
    steps = steps_of(f, z0, tol=1e-5, max_steps=HISTORY + 2, backend="triton")
    assert steps[-1].moved <= (2 * HISTORY + 6 + 0.2) * SIZE * z0.element_size()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_no_allocation_either_while_some_samples_are_frozen(solver, device, backend):
    f, z0 = problem(device, gains=(0.0, 1.0))
    steps = steps_of(f, z0, solver, tol=1e-5, max_steps=HISTORY, backend=backend)
    assert [step.allocated for step in steps] == [[]] * (HISTORY - 1)


def test_fewer_operators_than_torchdeq(device):
    """32 PyTorch operators a step that are no views, on the reference path; TorchDEQ 0.1.0 takes 47."""
    f, z0 = problem(device)
    ours = steps_of(f, z0, **FULL, backend="reference")[-1]
    assert ours.operators.total() <= 34

    solver = pytest.importorskip("torchdeq.solver.anderson")
    with Counter(z0) as counter:
        solver.anderson_solver(counter.beside(f), z0, max_iter=10, tol=0.0)
    theirs = counter.steps[-2]
    assert theirs.operators.total() >= 44
    assert theirs.allocated


def test_peak_memory_is_the_history(device, backend):
    """2m states of history, x, the best and z0; two temporaries of f beside its value of the step before.

    The reference has one more, to mix into while some samples are frozen.
    """
    f, z0 = problem(device)
    with Counter(z0) as counter:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        td.solve(f, z0, td.Anderson(history=HISTORY), **FULL, backend=backend)
    limit = 2 * HISTORY + 6 + (backend == "reference")
    assert counter.peak - before <= (limit + 0.2) * z0.numel() * z0.element_size()


def test_peak_memory_of_broyden_is_its_pairs(device, backend):
    """2m + 2 states of rings, two places for x and one for the best, f's value: 2m + 6. Counted with them:
    z0, f's own temporary. The reference needs no second place.

    The reference has two more to compute in, but only for a block of samples at a time, of which this state
    is one.
    """
    f, z0 = problem(device)
    with Counter(z0) as counter:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        td.solve(f, z0, SOLVERS["broyden"], tol=0, max_steps=HISTORY + 3, backend=backend)
    limit = 2 * HISTORY + 6 + 2 + (1 if backend == "reference" else 0)
    assert counter.peak - before <= (limit + 0.2) * z0.numel() * z0.element_size()


def test_a_training_step_costs_what_its_solves_cost(device, backend):
    """Forward and backward solve each keep their budget: one look by the host and two launches a step, one of
    them the cell's or its product's, which leaves its value in the solver's history; f once more between."""
    cell = td.MLPCell(260, 4).to(device)
    gradient = td.ImplicitGradient(tol=0, max_steps=6)
    deq = td.DEQ(cell, tol=0, max_steps=8, gradient=gradient, backend=backend)
    x = torch.randn(BATCH, 4, device=device)
    with Counter(torch.empty(BATCH, 260, device=device)) as counter:
        deq(x).value.sum().backward()
    assert len(counter.now.reads) <= 8 + 6
    steps = ["mlp_kernel", "anderson_step_kernel"] * 8 + ["mlp_kernel"]
    steps += ["mlp_vjp_kernel", "anderson_step_kernel"] * 6
    assert counter.now.launches == (steps if backend == "triton" else [])


@pytest.mark.kernels
def test_a_training_step_of_a_small_cell_is_three_launches(device):
    cell = td.MLPCell(64, 4).to(device)
    deq = td.DEQ(cell, tol=0, max_steps=8, gradient=td.ImplicitGradient(tol=0, max_steps=6), backend="triton")
    with Counter(torch.empty(BATCH, 64, device=device)) as counter:
        deq(torch.randn(BATCH, 4, device=device)).value.sum().backward()
    assert counter.now.launches == ["mlp_solve_kernel", "mlp_kernel", "mlp_solve_kernel"]
    assert len(counter.now.reads) == 2  # how many evaluations each solve has taken


class TestTheCounterItself:
    def test_reads(self, device):
        x = torch.randn(4, device=device)
        with Counter(x) as counter:
            x.sum().item()
            x[0].cpu()
            bool(x[0] > 0)
            x.tolist()
            x.nonzero()
        assert len(counter.now.reads) == 5

    def test_operators_apart_from_views(self, device):
        x = torch.randn(4, 4, device=device)
        with Counter(x) as counter:
            x[0].add(1).view(2, 2)[1]
        assert counter.now.operators == {"add": 1}
        assert counter.now.views == 3

    def test_allocations_and_bytes(self, device):
        x, out = torch.randn(4, 4, device=device), torch.empty(4, 4, device=device)
        with Counter(x) as counter:
            torch.add(x, x[0], out=out)  # reads x, writes out; the row is smaller than the state
            x.mul_(2)
            x.exp()
            x[0].exp()
        assert counter.now.allocated == ["exp"]
        assert counter.now.moved == 6 * 64

    def test_what_is_beside_is_left_out(self, device):
        x = torch.randn(4, device=device)
        with Counter(x) as counter:
            f = counter.beside(torch.exp)
            x.add(1)
            f(x)
            x.mul(2).mul(2)
        assert [step.operators.total() for step in counter.steps] == [1, 2]

    def test_the_launcher_is_put_back(self, device):
        from triton_deq.ops import anderson, launch

        with Counter(torch.empty(1, device=device)):
            assert anderson.launch is not launch.launch
        assert anderson.launch is launch.launch
