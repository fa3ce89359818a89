"""GroupNorm compiled by Numba: against its formula in float64, on any threads, and when it serves."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from triton_deq import backend as backends
from triton_deq import openmp
from triton_deq.ops import groupnorm as op
from triton_deq.reference import groupnorm as reference

pytest.importorskip("numba")
from triton_deq.compiled import groupnorm as compiled

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _kernels_cannot(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)


@pytest.fixture(autouse=True)
def cut(monkeypatch):
    """Small chunks, each worth a thread."""
    monkeypatch.setattr(compiled, "CHUNK", 32)
    monkeypatch.setattr(compiled, "ROWS", 5)
    monkeypatch.setattr(compiled, "GRAIN", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled code was called for a map."""
    seen = []

    def noted(*given):
        seen.append(given)
        return fwd(*given)

    fwd = compiled.groupnorm_fwd
    monkeypatch.setattr(compiled, "groupnorm_fwd", noted)
    return seen


def maps(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def given(
    batch=3, channels=6, height=5, width=7, groups=2, relu=True, leave=(), dtype=torch.float32, out=None
):
    """What `groupnorm` takes, without the operands that are to be left out."""
    torch.manual_seed(channels)
    vectors = {name: torch.randn(channels, dtype=dtype) for name in ("gain", "offset")}
    mask = torch.rand(batch, channels, dtype=dtype)
    shape = batch, channels, height, width
    others = {name: maps(*shape, dtype=dtype) for name in ("shift", "residual")}
    operands = {**vectors, "mask": mask, **others}
    kept = {name: None if name in leave else operand for name, operand in operands.items()}
    return op.Map(maps(*shape, dtype=dtype), groups, **kept, relu=relu, out=out)


def evaluated(each, backend="auto"):
    with torch.no_grad():
        value, held = op.groupnorm_each([each], backend)[0]
    return value, held.mean, held.inverse


def formula(each):
    """By ordinary operators, in float64."""
    wide = (tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in each[:9])
    with torch.no_grad():
        return reference.groupnorm(*wide)


def hold(each, found=None):
    """Value, μ and 1/σ to those of the formula."""
    tolerance = TOLERANCE[each.x.dtype]
    for ours, wanted in zip(evaluated(each) if found is None else found, formula(each), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)


PARTS = ("gain", "offset"), ("mask",), ("shift",), ("residual",)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("relu", [False, True])
def test_any_of_the_operands(relu, dtype, calls):
    for count in range(len(PARTS) + 1):
        for parts in itertools.combinations(PARTS, count):
            hold(given(leave=sum(parts, ()), relu=relu, dtype=dtype))
    assert len(calls) == 2 ** len(PARTS)


@pytest.mark.parametrize("wide", [(), ("shift",), ("residual",), ("shift", "residual")], ids=str)
def test_bfloat16(wide, calls):
    """One rounding, of the value; what is added may be wider than the map."""
    torch.manual_seed(0)
    each = given(channels=12, relu=False)
    narrow = {name: getattr(each, name).bfloat16() for name in ("x", "shift", "residual") if name not in wide}
    each = each._replace(**narrow)
    for relu in (False, True):
        here = each._replace(relu=relu)
        wanted = formula(here)
        value, mean, inverse = evaluated(here)
        assert value.dtype == mean.dtype == inverse.dtype == torch.bfloat16
        rounded = wanted[0].bfloat16()
        assert (value == rounded).double().mean() > 0.995  # but for those that lie between two
        torch.testing.assert_close(value.double(), wanted[0], rtol=2**-8, atol=1e-5)
        for found, formulas in zip((mean, inverse), wanted[1:], strict=True):
            torch.testing.assert_close(found.double(), formulas, rtol=2**-8, atol=1e-5)
        spare = here.x.clone(memory_format=torch.channels_last)
        again, *_ = evaluated(here._replace(x=spare, spare=True))
        assert again.data_ptr() == spare.data_ptr()
        assert torch.equal(again, value)
        place = torch.empty_like(spare, dtype=torch.float32)
        assert evaluated(here._replace(out=place))[0] is place
        assert torch.equal(place, value.float())
    assert len(calls) == 6


def test_what_is_added_to_float64_may_be_narrower(calls):
    each = given(dtype=torch.float64)
    hold(each._replace(shift=each.shift.bfloat16(), residual=each.residual.float()))
    assert len(calls) == 1


@pytest.mark.parametrize("relu", [False, True])
def test_rounding_to_bfloat16_is_pytorchs(relu):
    bits = np.random.default_rng(0).integers(0, 1 << 32, size=(64, 256), dtype=np.uint32)
    halfway = (bits & 0xFFFF0000) | 0x8000
    special = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001, 0x7F7FFFFF, 0x80000000, 1, 0x80000001]
    bits = np.vstack([bits, halfway, np.resize(np.array(special, np.uint32), (1, 256))])
    wide, narrow = torch.from_numpy(bits.view(np.float32)), np.empty(bits.shape, np.uint16)
    compiled._clip_narrow(bits, relu, narrow)
    found = torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16)
    wanted = (wide.relu() if relu else wide).bfloat16()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(nan=1.0), wanted.nan_to_num(nan=1.0))
    again = np.empty(bits.shape, np.uint32)
    compiled._widen(narrow, again)
    assert torch.equal(
        torch.from_numpy(again.view(np.float32)).nan_to_num(nan=1.0), found.float().nan_to_num(nan=1.0)
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "channels": 1, "groups": 1},
        {"channels": 8, "groups": 8},
        {"channels": 40, "groups": 4},  # more than a chunk's entries
        {"height": 1, "width": 1, "groups": 1},
        {"batch": 2, "channels": 2, "height": 31, "width": 3, "groups": 1},
    ],
    ids=str,
)
def test_shapes(shape, threads, calls):
    torch.set_num_threads(threads)
    hold(given(**shape))
    assert len(calls) == 1


def test_chunks_as_they_come(monkeypatch):
    for name, value in (("CHUNK", 1 << 12), ("ROWS", 16), ("GRAIN", 1 << 14)):
        monkeypatch.setattr(compiled, name, value)
    hold(given(channels=32, height=40, width=30, groups=8))


def test_the_number_of_threads_changes_no_bit():
    found = []
    for threads in range(1, 6):
        torch.set_num_threads(threads)
        found.append(evaluated(given(channels=12)))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.skipif(openmp.LIBRARY is None, reason="PyTorch has no OpenMP that is known")
def test_a_map_is_shared_by_as_many_threads_as_it_is_worth(monkeypatch):
    seen = []
    run_on = compiled.GroupNormCall.run_on
    monkeypatch.setattr(
        compiled.GroupNormCall, "run_on", lambda call, *given: (seen.append(given[1]), run_on(call, *given))
    )
    torch.set_num_threads(3)
    evaluated(given())
    monkeypatch.setattr(compiled, "GRAIN", given().x.numel() // 2)
    evaluated(given())
    monkeypatch.setattr(compiled, "GRAIN", given().x.numel() + 1)
    evaluated(given())
    assert seen == [3, 3, 2, 2, 1, 1]


@pytest.mark.parametrize("leave", [("mask", "shift", "residual"), ()], ids=["norm", "all"])
def test_the_value_in_the_place_of_x(leave):
    each = given(leave=leave)
    wanted, x = formula(each), each.x.clone(memory_format=torch.channels_last)
    value, mean, inverse = evaluated(each._replace(x=x, out=x))
    assert value is x
    hold(each, (value, mean, inverse))
    torch.testing.assert_close(x.double(), wanted[0], rtol=1e-5, atol=1e-5)


def test_a_map_that_is_spare():
    each = given()
    wanted = formula(each)
    value, mean, inverse = evaluated(each._replace(spare=True))
    assert value.data_ptr() == each.x.data_ptr()
    for found, formulas in zip((value, mean, inverse), wanted, strict=True):
        torch.testing.assert_close(found.double(), formulas, rtol=1e-5, atol=1e-5)
    x = each.x.clone()
    evaluated(each)
    assert torch.equal(each.x, x)


def test_views_of_a_packed_state(calls):
    """Maps with other entries between their samples, beside a dense one."""
    batch, channels, height, width = 3, 6, 4, 5
    size = channels * height * width
    rows = torch.randn(3, batch, 3 * size)
    views = [
        row[:, size : 2 * size].unflatten(1, (height, width, channels)).permute(0, 3, 1, 2) for row in rows
    ]
    before = rows.clone()
    each = given(batch, channels, height, width)._replace(x=views[0], residual=views[1], out=views[2])
    wanted = formula(each)
    value, mean, inverse = evaluated(each)
    assert value is each.out
    assert len(calls) == 1
    torch.testing.assert_close(value.double(), wanted[0], rtol=1e-5, atol=1e-5)
    hold(each, (value, mean, inverse))
    before[2, :, size : 2 * size] = rows[2, :, size : 2 * size]
    assert torch.equal(rows, before)


def test_places_and_operands_of_other_dtypes_and_layouts(calls):
    each = given()
    other = each._replace(
        gain=each.gain.double(),
        mask=each.mask.double().t().contiguous().t(),
        shift=each.shift.contiguous(),
        residual=each.residual.double().contiguous(),
    )
    places = torch.empty(each.x.shape, dtype=torch.float64), torch.empty(each.x.shape)
    for place in places:  # neither is one that it can write to itself
        value, mean, inverse = evaluated(other._replace(out=place))
        assert value is place
        hold(each, (value, mean, inverse))
    assert len(calls) == len(places)


def test_a_mean_far_from_zero():
    """Squares about the mean, not the mean of squares, which would have no digit left."""
    each = given(leave=("mask", "shift", "residual"), relu=False)
    each = each._replace(x=each.x + 3000)
    value, *_ = evaluated(each)
    ulps = 4 * 3000 * torch.finfo(torch.float32).eps  # of μ, which is kept in float32
    torch.testing.assert_close(value.double(), formula(each)[0], rtol=0, atol=ulps)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    each = given(relu=True, leave=("residual",))
    each.x[1, 0, 0, 0] = bad
    value, *_ = evaluated(each)
    assert value[1, :3].isnan().all()
    value[1, :3] = 0
    wanted = formula(each)[0]
    wanted[1, :3] = 0
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    each = given(relu=True)
    each.residual[0, 0, 0, 0] = torch.nan
    assert evaluated(each)[0].isnan().sum() == 1


def test_a_map_that_is_constant():
    each = given(leave=("mask", "shift", "residual"), relu=False)
    value, mean, inverse = evaluated(each._replace(x=torch.full_like(each.x, 2.5)))
    torch.testing.assert_close(value, each.offset[:, None, None].expand_as(value))
    torch.testing.assert_close(mean, torch.full_like(mean, 2.5))
    torch.testing.assert_close(inverse, torch.full_like(inverse, each.epsilon**-0.5))


class Dressed(torch.Tensor):
    """A subclass, of whose memory nobody knows."""


@pytest.mark.parametrize("case", ["reference", "contiguous", "half", "subclass", "negated", "empty"])
def test_operators_serve_where_compiled_code_cannot(case, calls):
    each = given()
    changed = {
        "contiguous": {"x": each.x.contiguous()},
        "half": {"x": each.x.half()},
        "subclass": {"residual": each.residual.as_subclass(Dressed)},
        "negated": {"shift": torch._neg_view(each.shift)},
        "empty": {"x": each.x[:0], "mask": each.mask[:0], "shift": each.shift[:0], "residual": None},
    }
    each = each._replace(**changed.get(case, {}))
    value, *_ = evaluated(each, "reference" if case == "reference" else "auto")
    tolerance = 1e-2 if case == "half" else 1e-5
    torch.testing.assert_close(value.double(), formula(each)[0], rtol=tolerance, atol=tolerance)
    assert not calls


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_what_it_computed(relu, calls):
    """PyTorch's operator for them, from the compiled code's μ and 1/σ."""
    each = given(relu=relu)
    tracked = ("x", "gain", "offset", "shift", "residual")
    found, wanted = [], []
    for wide, gradients in ((False, found), (True, wanted)):
        operands = [getattr(each, name).to(torch.float64 if wide else torch.float32) for name in tracked]
        leaves = [nn.Parameter(operand) for operand in operands]
        here = each._replace(**dict(zip(tracked, leaves, strict=True)))
        if wide:
            value = reference.groupnorm(*here._replace(mask=each.mask.double())[:9])[0]
        else:
            value = op.groupnorm_each([here])[0][0]
        torch.manual_seed(0)
        vector = torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
        gradients += torch.autograd.grad(value, leaves, vector)
    assert len(calls) == 1
    for ours, formulas in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), formulas, rtol=1e-4, atol=1e-4)


def test_a_solves_backend_reaches_it(calls):
    with backends.ambient("reference"):
        evaluated(given())
    assert not calls
    with backends.ambient("numba"):
        evaluated(given())
    assert len(calls) == 1


def test_who_watches_operators_sees_them(calls):
    with FlopCounterMode(display=False):
        evaluated(given())
    assert not calls
