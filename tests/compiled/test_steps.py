"""The solvers' steps compiled by Numba: step by step against the reference, and when they serve."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import triton_deq as td
from triton_deq import backend as backends
from triton_deq import openmp
from triton_deq.ops import anderson, broyden
from triton_deq.reference import anderson as reference_anderson
from triton_deq.reference import record
from triton_deq.status import RUNNING, Status

pytest.importorskip("numba")
from triton_deq.compiled import calls, steps

ANDERSON = {"relative": True, "over_batch": False, "ridge": 1e-6, "relative_ridge": True}
BROYDEN = {"relative": True, "over_batch": False}


@pytest.fixture(autouse=True)
def _kernels_cannot(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)


@pytest.fixture
def deal_out(monkeypatch):
    """Deal samples out to so many threads, however small they are."""
    monkeypatch.setattr(steps, "GRAIN", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 3], ids="threads={}".format)
def threads(request, deal_out):
    deal_out(request.param)


class Problem:
    """f(z) = tanh(z A + b) of B samples, of which some converge earlier than others."""

    def __init__(self, batch, entries, dtype=torch.float64):
        torch.manual_seed(batch)
        weight = torch.randn(entries, entries, dtype=torch.float64)
        self.weight = 0.9 * weight / torch.linalg.matrix_norm(weight, 2)
        self.shift = torch.randn(batch, entries, dtype=torch.float64) * torch.logspace(-3, 1, batch)[:, None]
        self.z0 = torch.randn(batch, entries, dtype=torch.float64).to(dtype)

    def __call__(self, z):
        return torch.tanh(z @ self.weight.to(z) + self.shift.to(z))


class Wide(Problem):
    """One with samples of several blocks, and a remainder."""

    def __init__(self, batch, dtype=torch.float64):
        super().__init__(batch, 1)
        shape = batch, 2 * steps.BLOCK + 3
        self.weight = torch.rand(shape[1], dtype=torch.float64) * 1.8 - 0.9
        self.shift, self.z0 = torch.randn(2, *shape, dtype=torch.float64).to(dtype)

    def __call__(self, z):
        return torch.sin(z * self.weight.to(z) + self.shift)


# What a step writes, and which dimension is the batch.
BUFFERS = {
    "anderson": {"x": 0, "best": 0, "residuals": 1, "iterates": 1, "gram": 0},
    "broyden": {"x": 0, "best": 0, "moves": 1, "changes": 1, "matrix": 0, "squares": 0},
}


def same_steps(solver, f, steps=14, slots=4, tol=1e-4, mixing=1.0, **rule):
    """Hold each compiled step, from where the reference stands, to what the reference's does.

    Returns how many samples went on after each.
    """

    def take(state, backend):
        options = {**(ANDERSON if solver == "anderson" else BROYDEN), **rule, "last": step + 1 == steps}
        if solver == "anderson":
            return anderson.anderson_step(state, value, step, mixing=mixing, backend=backend, **options)
        broyden.broyden_residual(state, value, step, backend)
        return broyden.broyden_advance(state, step, backend=backend, **options)

    start = anderson.anderson_start if solver == "anderson" else broyden.broyden_start
    ours, expected = (start(f.z0, slots, tol, steps, backend) for backend in ("numba", "reference"))
    seen = []
    for step in range(steps):
        for name in BUFFERS[solver]:
            getattr(ours, name).copy_(getattr(expected, name))
        ours.record.data.copy_(expected.record.data)
        running, value = expected.record.status == RUNNING, f(expected.x)
        seen.append(take(expected, "reference"))
        assert take(ours, "numba") == seen[-1]

        going = expected.record.status == RUNNING
        for name, dim in BUFFERS[solver].items():
            if name == "x" and step + 1 == steps:
                continue  # nobody evaluates f there
            read_again = (going if name == "gram" else running).nonzero()[:, 0]
            out, wanted = (getattr(state, name).index_select(dim, read_again) for state in (ours, expected))
            if name == "matrix":  # products with the open pair are not read
                out, wanted = (each.clone() for each in (out, wanted))
                for each in (out, wanted):
                    each[:, step % (slots + 1)] = each[:, :, step % (slots + 1)] = 0
            torch.testing.assert_close(out, wanted, rtol=1e-7, atol=1e-10, equal_nan=True, msg=name)
        for row in range(record.FIELDS):
            torch.testing.assert_close(
                ours.record.data[row], expected.record.data[row], rtol=1e-9, atol=1e-14, equal_nan=True
            )
        if seen[-1] == 0:
            break
    return seen


def test_the_same_numbers_as_the_reference():
    names = ("STATUS", "COUNT", "RESIDUAL", "BEST", "LIMIT", "TOLERANCE", "STEPS", "FIELDS", "DIVERGENCE")
    assert all(getattr(steps, name) == getattr(record, name) for name in names)
    assert steps.WEIGHT_LIMIT == reference_anderson.WEIGHT_LIMIT
    assert steps.LEAST_SQUARE == reference_anderson.LEAST_SQUARE
    assert steps.RUNNING == RUNNING
    for status in (Status.CONVERGED, Status.DIVERGED, Status.NONFINITE):
        assert getattr(steps, status.name) == status


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative": False},
        {"over_batch": True},
        {"over_batch": True, "relative": False},
        {"relative_ridge": False, "ridge": 1e-3},
        {"ridge": 0.0},
        {"mixing": 0.6},
        {"slots": 1},
        {"slots": 9},
        {"tol": 0.0},
    ],
    ids=str,
)
def test_anderson_takes_the_references_steps(options, threads):
    going = same_steps("anderson", Problem(5, 19), **options)
    if options.get("over_batch"):
        assert set(going) <= {0, 5}
    elif options.get("tol") != 0:
        assert len(set(going)) > 1  # samples stopped one after another


@pytest.mark.parametrize(
    "options",
    [{}, {"relative": False}, {"over_batch": True}, {"slots": 1}, {"slots": 13}, {"tol": 0.0}],
    ids=str,
)
def test_broyden_takes_the_references_steps(options, threads):
    same_steps("broyden", Problem(5, 19), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"over_batch": True}, {"mixing": 0.6}, {"solver": "broyden"}],
    ids=str,
)
def test_samples_of_several_blocks(options, threads):
    same_steps(**{"solver": "anderson", "f": Wide(3), "steps": 9, "tol": 1e-3, **options})


class Marching(Problem):
    """The first sample's residual is the same at every step, so that its Gram matrix is singular."""

    def __call__(self, z):
        return torch.cat((z[:1] + 1, super().__call__(z)[1:]))


def test_where_weights_are_of_no_use_a_step_is_plain():
    same_steps("anderson", Marching(2, 4), steps=5, tol=0.0, ridge=0.0)


class Awkward(Problem):
    """Samples, in turn: ordinary, solved, NaN from the third step on, exploding, of one value, moving on."""

    def __init__(self, cube=1e3):
        super().__init__(6, 7)
        self.calls, self.cube = 0, cube
        self.z0[1] = 0

    def __call__(self, z):
        value = super().__call__(z)
        value[1] = z[1]
        value[2] = value[2] if self.calls < 2 else torch.nan
        value[3] = self.cube * z[3] ** 3 + 1
        value[4] = 0.5
        value[5] = z[5] + 1
        self.calls += 1
        return value


@pytest.mark.parametrize("tol", [1e-6, 0.0])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"relative": False},
        {"over_batch": True},
        {"over_batch": True, "relative": False},
        {"relative_ridge": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_awkward_samples_end_as_in_the_reference(solver, rule, tol, threads):
    if solver == "broyden" and "relative_ridge" in rule:
        pytest.skip("Broyden has no ridge")
    # What explodes ends a whole batch before one of its samples is not finite.
    same_steps(solver, Awkward(0.1 if "over_batch" in rule else 1e3), 9, tol=tol, **rule)


@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden(), td.Picard(mixing=0.7)], ids=str)
def test_float32_is_as_near_to_float64_as_the_reference(solver):
    f = Problem(4, 40, torch.float32)
    exact = td.solve(f, f.z0.double(), solver, tol=1e-12, max_steps=200)
    options = {"tol": 1e-5, "max_steps": 60}
    ours, expected = (td.solve(f, f.z0, solver, backend=name, **options) for name in ("numba", "reference"))
    assert ours.value.dtype == torch.float32
    assert torch.equal(ours.status, expected.status)
    assert (ours.steps - expected.steps).abs().max() <= 1
    error, allowed = ((each.value - exact.value).norm(dim=1) for each in (ours, expected))
    assert (error <= 2 * allowed + 1e-4).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32(scale):
    f = Problem(3, 11, torch.float32)
    solution = td.solve(lambda z: scale * f(z / scale), scale * f.z0, tol=1e-5, backend="numba")
    assert solution.converged.all()


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_small_systems(size):
    matrix, right = np.random.default_rng(0).normal(size=(2, size + 1, size + 1))
    matrix[0, 0] = 0 if size > 1 else 3  # needs a pivot
    wanted = np.linalg.solve(matrix[:size, :size], right[0, :size])
    answer = right[0].copy()
    steps._solve(matrix.copy(), answer, size)
    np.testing.assert_allclose(answer[:size], wanted, rtol=1e-9)
    assert answer[size] == right[0, size]


@pytest.mark.parametrize("relative_ridge", [True, False])
def test_weights_are_of_use_where_the_references_are(relative_ridge):
    """Also of what is no Gram matrix, as rounding may leave it: there the sum can be negative."""
    gram = torch.randn(60, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = (gram + gram.mT).numpy()
    gram[:, range(3), range(3)] = np.abs(gram[:, range(3), range(3)])
    expected, useful = reference_anderson._host_weights(gram, None, 0, 1e-3, relative_ridge)
    assert not useful.all()
    assert useful.any()
    matrix, scale, weights = np.empty((3, 3)), np.empty(3), np.empty(3)
    for b in range(60):
        used = steps._mixing_weights(gram[b], np.arange(3), 1e-3, relative_ridge, matrix, scale, weights)
        assert used == useful[b]
        if used:
            np.testing.assert_allclose(weights, expected[b], rtol=1e-7)


def test_huge_weights_are_of_no_use():
    residuals = np.array([[1, 0], [1.00001, 1e-6]])  # almost along one line
    gram = residuals @ residuals.T
    matrix, scale, weights = np.empty((2, 2)), np.empty(2), np.empty(2)
    assert not steps._mixing_weights(gram, np.arange(2), 0.0, True, matrix, scale, weights)
    assert np.isfinite(weights).all()
    assert steps._mixing_weights(gram, np.arange(2), 1e-6, True, matrix, scale, weights)


def test_a_singular_system_is_not_finite():
    answer = np.ones(3)
    steps._solve(np.ones((3, 3)), answer, 3)
    assert not np.isfinite(answer).all()


@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden()], ids=str)
def test_same_bits_every_time_by_any_number_of_threads(solver, deal_out):
    f = Wide(5, torch.float32)

    def plain(z):
        return 0.3 * z * z.abs().clamp(max=1) + f.shift

    values = []
    for threads in (1, 1, 2, 4, 7):
        deal_out(threads)
        values.append(td.solve(plain, f.z0, solver, tol=0, max_steps=12, backend="numba").value)
    assert all(torch.equal(value, values[0]) for value in values)


WITH_FEWER_THREADS = """
import os, sys
import torch
import triton_deq as td
from triton_deq import openmp

def solve(backend):
    return td.solve(f, z0, backend=backend, tol=1e-5, max_steps=9)

z0 = torch.zeros(16, 1024)
f = lambda z: 0.5 * z + torch.arange(16.0)[:, None]
torch.set_num_threads(3)
assert openmp.threads_for(16) == 3
ours, expected = solve("numba"), solve("reference")
assert ours.converged.all() and torch.equal(ours.steps, expected.steps), ours
torch.testing.assert_close(ours.value, expected.value, rtol=1e-4, atol=1e-4)
child = os.fork()
if child == 0:  # where also PyTorch would wait for ever, in an operator that takes several threads
    again = solve("numba") if openmp.threads_for(16) == 1 else None
    os._exit(7 if again is not None and torch.equal(again.value, ours.value) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork") or openmp.LIBRARY is None, reason="there are no such threads")
def test_where_openmp_has_fewer_threads_and_after_fork():
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", WITH_FEWER_THREADS], env=environment, timeout=120)
    assert run.returncode == 7


def test_a_value_that_is_a_parameter_or_strided():
    value = torch.nn.Parameter(torch.randn(3, 4))
    assert torch.equal(td.solve(lambda z: value, torch.zeros(3, 4), backend="numba").value, value)
    across = torch.randn(4, 3)
    assert torch.equal(td.solve(lambda z: across.T, torch.zeros(3, 4), backend="numba").value, across.T)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, which lets another one answer."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda each: each.held if type(each) is cls else each, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("solver", [td.Anderson(), td.Broyden(), td.Picard()], ids=str)
@pytest.mark.parametrize(
    "dress", [Wrapper, lambda value: torch._neg_view(-value)], ids=["wrapper", "negated"]
)
def test_a_value_that_its_address_does_not_tell(dress, solver):
    f = Problem(3, 8)
    ours = td.solve(lambda z: dress(f(z)), f.z0, solver, tol=0, max_steps=6, backend="numba")
    plain = td.solve(f, f.z0, solver, tol=0, max_steps=6, backend="numba")
    assert torch.equal(ours.value, plain.value)


def test_compaction_goes_on_with_compiled_steps():
    f = Problem(6, 9)
    f.select = lambda samples: lambda z: torch.tanh(z @ f.weight + f.shift[samples])
    whole = td.solve(f, f.z0, tol=1e-8, max_steps=60, backend="numba")
    compacted = td.solve(f, f.z0, tol=1e-8, max_steps=60, compact=0.7, backend="numba")
    assert compacted.path == "compiled steps"
    assert torch.equal(compacted.status, whole.status)
    torch.testing.assert_close(compacted.value, whole.value, rtol=1e-6, atol=1e-8)


def test_training_takes_them_in_both_directions():
    f = Problem(4, 9)
    gradients = []
    for backend in ("auto", "reference"):
        shift = f.shift.clone().requires_grad_()
        value, solution = td.fixed_point(
            lambda z, shift=shift: torch.tanh(z @ f.weight + shift),
            f.z0,
            tol=1e-10,
            max_steps=80,
            backend=backend,
            return_solution=True,
        )
        value.square().sum().backward()
        paths = solution.path, solution.backward.path
        assert paths == (("compiled steps",) * 2 if backend == "auto" else ("steps",) * 2)
        gradients.append(shift.grad)
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


# When they serve


def path(z0, **options):
    return td.solve(lambda z: 0.5 * z, z0, max_steps=2, **options).path


def test_auto_takes_them_in_their_dtypes():
    small = torch.zeros(1, 8)
    assert path(small) == path(small.double()) == "compiled steps"
    assert path(small.bfloat16()) == path(small.half()) == "steps"
    assert path(small, backend="reference") == "steps"


def test_auto_takes_them_for_large_states_if_every_thread_has_a_sample(monkeypatch):
    large = torch.zeros(2, backends.SMALL)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert path(large) == "compiled steps"
    assert path(large[:1]) == "compiled steps"  # is not large
    assert path(large.view(1, -1)) == "steps"
    assert path(large.view(1, -1), backend="numba") == "compiled steps"
    monkeypatch.setattr(openmp, "LIBRARY", None)
    assert path(large) == "steps"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert path(large.view(1, -1)) == "compiled steps"


def test_within_a_solve_that_asked_for_the_reference():
    paths = []

    def f(z):
        paths.append(path(z))
        return 0.5 * z

    td.solve(f, torch.zeros(2, 3), max_steps=2, backend="reference")
    td.solve(f, torch.zeros(2, 3), max_steps=2, backend="numba")
    assert paths == ["steps"] * 2 + ["compiled steps"] * 2 or paths == ["steps", "compiled steps"]


def test_what_they_cannot_do_is_said():
    with pytest.raises(
        ValueError, match=r"backend='numba' cannot serve here: the state has dtype torch.bfloat16"
    ):
        path(torch.zeros(2, 3, dtype=torch.bfloat16), backend="numba")

    class Watched(torch.Tensor):
        pass

    watched = torch.zeros(2, 3).as_subclass(Watched)
    assert path(watched) == "steps"
    with pytest.raises(ValueError, match="the state is a Watched, which NumPy cannot see"):
        path(watched, backend="numba")

    class Other:
        def __init__(self):
            self.start, self.step = td.Anderson().start, td.Anderson().step

    with pytest.raises(
        ValueError, match="backend='numba' cannot serve here: .*Other.* has no compiled steps"
    ):
        td.solve(torch.tanh, torch.zeros(2, 3), Other(), backend="numba")
    with pytest.raises(ValueError, match="backend='number' is unknown: choose one of .*'numba'"):
        path(torch.zeros(2, 3), backend="number")


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    backends._numba_missing.cache_clear()
    try:
        assert path(torch.zeros(2, 3)) == "steps"
        with pytest.raises(ValueError, match=r"cannot serve here: .*numba.*pip install triton-deq\[cpu\]"):
            path(torch.zeros(2, 3), backend="numba")
    finally:
        monkeypatch.undo()
        backends._numba_missing.cache_clear()


def test_without_a_folder_to_keep_compiled_functions_in(monkeypatch):
    njit = calls.numba.njit

    def refusing(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(calls.numba, "njit", refusing)
    assert calls.compiled(lambda a: a + 1)(1) == 2
