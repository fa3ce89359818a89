"""What holds of any solve, whatever the map, the solver, the options and the state's layout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_deq as td

EVERY_TIME_THE_SAME = settings(max_examples=150, deadline=None, derandomize=True, database=None)
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 2e-4, torch.float64: 1e-9}
LAYOUTS = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.transpose(1, -1).contiguous().transpose(1, -1),
    "strided": lambda z: torch.stack([z, z], dim=-1)[..., 0],
    "expanded": lambda z: z[:1].expand_as(z) if len(z) else z,
}
SOLVERS = st.one_of(
    st.builds(
        td.Anderson,
        st.sampled_from([1, 2, 3, 6, 33]),
        st.sampled_from([1.0, 0.7, 0.1]),
        st.sampled_from([1e-6, 1e-3, 0.0]),
        st.sampled_from(["relative", "absolute"]),
    ),
    st.builds(td.Broyden, st.sampled_from([1, 2, 10, 33])),
    st.builds(td.Picard, st.sampled_from([1.0, 0.5])),
)
OPTIONS = st.fixed_dictionaries(
    {
        "tol": st.sampled_from([0.0, 1e-5, 1e-2]),
        "max_steps": st.sampled_from([1, 2, 3, 8, 25]),
        "residual": st.sampled_from(["relative", "absolute"]),
        "check_every": st.sampled_from([1, 3]),
        "debug": st.booleans(),
        "compact": st.sampled_from([None, 0.5]),
    }
)


class Map:
    """`z ↦ act(z W + b)`, for all samples or some."""

    def __init__(self, act, weight, offset):
        self.act, self.weight, self.offset = act, weight, offset

    def __call__(self, z):
        return self.act(z.reshape(len(z), -1) @ self.weight + self.offset).view(z.shape)

    def select(self, samples):
        return type(self)(self.act, self.weight, self.offset[samples])


class WritingMap(Map):
    """One that leaves its value in the solver's history."""

    def write(self, z, out):
        out.copy_(self(z))


@st.composite
def problems(draw):
    """A map, from a contraction to one that diverges, and a state; one sample may hold what is not finite."""
    batch, shape = draw(st.integers(0, 4)), draw(st.sampled_from([(1,), (7,), (33,), (3, 2, 2)]))
    dtype = draw(st.sampled_from(list(ROUNDING)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(math.prod(shape), math.prod(shape), dtype=torch.float64)
    weight *= draw(st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.3])) / torch.linalg.matrix_norm(weight, 2)
    offset = torch.randn(batch, len(weight), dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    spoiled = draw(st.sampled_from([None, None, math.nan, math.inf]))
    if batch and spoiled is not None:
        offset[draw(st.integers(0, batch - 1)), 0] = spoiled
    act = draw(st.sampled_from([torch.tanh, torch.relu, torch.clone]))
    z0 = draw(st.sampled_from([0.0, 1.0])) * torch.randn(batch, *shape, dtype=torch.float64)
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    kind = draw(st.sampled_from([Map, WritingMap]))
    return kind(act, weight.to(dtype), offset.to(dtype)), layout(z0.to(dtype))


@pytest.mark.parametrize("backend", ["reference", "numba"])
@EVERY_TIME_THE_SAME
@given(problems(), SOLVERS, OPTIONS)
def test_a_solution_says_what_is_so(backend, problem, solver, options):
    if backend == "numba":
        pytest.importorskip("numba")
    f, z0 = problem
    if backend == "numba" and z0.dtype not in (torch.float32, torch.float64):
        return
    before = z0.clone()
    solution = td.solve(f, z0, solver, backend=backend, trace=options["compact"] is None, **options)
    torch.testing.assert_close(z0, before, rtol=0, atol=0)
    assert (solution.value.shape, solution.value.dtype) == (z0.shape, z0.dtype)
    assert solution.nfe <= options["max_steps"]
    if solution.trace is not None:
        assert solution.trace.shape == (solution.nfe, len(z0))
    if len(z0) == 0:
        return
    if solution.trace is not None:
        torch.testing.assert_close(solution.residual, solution.trace.amin(dim=0), rtol=1e-6, atol=0)

    value = f(solution.value).double().flatten(1)
    difference = (value - solution.value.double().flatten(1)).norm(dim=1)
    size = value.norm(dim=1)
    expected = difference / (size + (difference == 0)) if options["residual"] == "relative" else difference
    rounded = ROUNDING[z0.dtype] * (expected + 1 + (size if options["residual"] == "absolute" else 0))
    seen = solution.residual.isfinite()
    assert ((solution.residual - expected).abs() <= rounded)[seen].all(), (solution.residual, expected)
    assert solution.value[seen].isfinite().all()
    reached = seen & (solution.residual <= options["tol"]) & (options["tol"] > 0)
    assert (reached <= solution.converged).all(), solution.status
    assert (solution.converged <= (solution.residual <= options["tol"])).all(), solution.status
    assert (solution.steps <= solution.nfe).all()
    assert (
        solution.steps[~solution.converged & (solution.status == td.Status.MAX_STEPS)] == solution.nfe
    ).all()
