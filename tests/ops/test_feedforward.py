"""A hidden layer and its gradient: kernels against float64, float64 against PyTorch and autograd."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from tests.bounds import assert_within_bounds
from triton_deq import backend as backends
from triton_deq.ops import feedforward as op
from triton_deq.verification import BOUNDS, Case, check_feedforward
from triton_deq.verification.case import relative_error

kernels = pytest.mark.kernels


def tensors(dtype=torch.float64, device="cpu", length=3, width=5, inner=7):
    """s of two sequences, weight, bias, a mask that the tokens of a sequence share."""
    s, weight, bias = (
        torch.randn(shape, dtype=dtype, device=device).requires_grad_()
        for shape in ((2, length, width), (inner, width), (inner,))
    )
    mask = torch.tensor([0, 1.25], dtype=dtype, device=device)[torch.randint(2, (2, 1, inner), device=device)]
    return s, weight, bias, mask


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names: list[str] = []
    run = op.launch

    def counted(kernel, *arguments, **constants):
        names.append(kernel.__name__)
        run(kernel, *arguments, **constants)

    monkeypatch.setattr(op, "launch", counted)
    return names


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (18, 48)], ids=str)
def test_kernels_match_the_reference(shape, dtype, device):
    assert_within_bounds(check_feedforward(Case(getattr(torch, dtype), shape, torch.device(device), seed=1)))


@kernels
def test_large_tiles_match_the_reference(device, large_tiles):
    assert_within_bounds(check_feedforward(Case(torch.float16, (130, 140), torch.device(device), seed=7)))
    assert (128, 128) in large_tiles


@kernels
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout, device):
    assert_within_bounds(check_feedforward(Case(torch.float32, (3, 37), torch.device(device), 6, layout)))


@kernels
@pytest.mark.parametrize("length", [1, 7, 40])
def test_rows_that_share_a_mask(length, device):
    """Sequences that begin and end inside of a tile, one a row, and longer than a tile."""
    s, weight, bias, _ = tensors(torch.float32, device, length=length, width=4, inner=33)
    s = torch.cat([s, s + 1])
    mask = torch.rand(4, 1, 33, device=device)
    with torch.no_grad():
        torch.testing.assert_close(
            op.feedforward_fwd(s, weight, bias, mask), (linear(s, weight, bias) * mask).relu()
        )


@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_are_autograds(masked, backend, device, launches):
    s, weight, bias, mask = tensors(device=device)
    mask = mask if masked else None
    value = op.feedforward(s, weight, bias, mask, backend)
    before = linear(s, weight, bias) * (1 if mask is None else mask)
    torch.testing.assert_close(value, before.relu())
    vector = torch.randn_like(value)
    found = torch.autograd.grad(value, (s, weight, bias), vector)
    torch.testing.assert_close(found, torch.autograd.grad(before.relu(), (s, weight, bias), vector))
    assert launches == (["feedforward_kernel"] if backend == "triton" else [])

    small, matrix = torch.randn(2, 3, 5, dtype=s.dtype, device=device), weight.detach().mT
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            inward = op.feedforward_vjp(small, matrix, value.detach(), backend)
            torch.testing.assert_close(inward, torch.where(before > 0, small @ matrix, 0))
            torch.testing.assert_close(op.feedforward(s, weight, bias, mask, backend), before.relu())


@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(masked, backend, device):
    s, weight, bias, mask = tensors(device=device, width=3, inner=4, length=2)
    mask = mask if masked else None

    def value(*given):
        return op.feedforward(*given, mask, backend)

    assert gradcheck(value, (s, weight, bias))
    assert gradgradcheck(value, (s, weight, bias))

    inner = value(s, weight, bias).detach()
    vector, matrix = torch.randn_like(s).requires_grad_(), torch.randn_like(weight.mT).requires_grad_()

    def vjp(vector, matrix):
        return op.feedforward_vjp(vector, matrix, inner, backend)

    assert gradcheck(vjp, (vector, matrix))
    assert gradgradcheck(vjp, (vector, matrix))


@pytest.mark.parametrize("masked", [False, True])
def test_a_branch_and_its_gradients_are_autograds(masked, backend, device, launches):
    s, up, up_bias, mask = tensors(device=device)
    down, down_bias = (
        torch.randn(shape, dtype=s.dtype, device=device).requires_grad_() for shape in ((6, 7), (6,))
    )
    mask = mask if masked else None
    leaves = (s, up, up_bias, down, down_bias)
    found = op.feedforward_branch(*leaves, mask, 1.25, backend)  # which counts for a mask alone
    hidden = (linear(s, up, up_bias) * (1 if mask is None else mask)).relu()
    wanted = linear(hidden, down, down_bias), hidden
    torch.testing.assert_close(found, wanted)
    vectors = tuple(map(torch.randn_like, wanted))
    for outputs in ((0,), (1,), (0, 1)):  # of the branch, of h, of both
        given, expected = (
            torch.autograd.grad(
                [pair[i] for i in outputs],
                leaves,
                [vectors[i] for i in outputs],
                retain_graph=True,
                allow_unused=True,
            )
            for pair in (found, wanted)
        )
        torch.testing.assert_close(given, expected)
    kernels_of = ["feedforward_kernel", *["feedforward_vjp_kernel"] * 2]
    assert launches == (kernels_of if backend == "triton" else [])
    with torch.no_grad():
        torch.testing.assert_close(op.feedforward_branch(*leaves, mask, 1.25, backend), wanted)


@pytest.mark.parametrize("asked", range(5))
def test_a_branch_that_some_leaves_have_no_gradient_of(asked, backend, device):
    s, up, up_bias, mask = tensors(device=device)
    down, down_bias = (torch.randn(shape, dtype=s.dtype, device=device) for shape in ((6, 7), (6,)))
    leaves = [each.detach() for each in (s, up, up_bias, down, down_bias)]
    leaves[asked].requires_grad_()
    branch, _ = op.feedforward_branch(*leaves, mask, 1.25, backend)
    wanted = linear((linear(*leaves[:3]) * mask).relu(), *leaves[3:])
    vector = torch.randn_like(branch)
    given, expected = (torch.autograd.grad(each, leaves[asked], vector) for each in (branch, wanted))
    torch.testing.assert_close(given, expected)


def test_first_and_second_derivatives_of_a_branch(backend, device):
    s, up, up_bias, mask = tensors(device=device, width=3, inner=4, length=2)
    down, down_bias = (
        torch.randn(shape, dtype=s.dtype, device=device).requires_grad_() for shape in ((3, 4), (3,))
    )

    def both(*leaves):
        return op.feedforward_branch(*leaves, mask, 1.25, backend)

    assert gradcheck(both, (s, up, up_bias, down, down_bias), fast_mode=True)
    assert gradgradcheck(both, (s, up, up_bias, down, down_bias), fast_mode=True)


def test_matrices_that_are_frozen(backend, device):
    """Then h alone has a gradient, and its sign has none."""
    s, weight, bias, mask = tensors(device=device)
    value = op.feedforward(s, weight.detach(), bias.detach(), mask, backend)
    vector = torch.randn(2, 3, 5, dtype=s.dtype, device=device)
    inward = op.feedforward_vjp(vector, weight.detach().mT, value, backend)
    torch.testing.assert_close(inward, torch.where(value > 0, vector @ weight.detach().mT, 0))


def test_a_mask_with_a_gradient_has_one(backend, device):
    """No kernel serves it, and ordinary operators do."""
    s, weight, bias, mask = tensors(device=device)
    mask.requires_grad_()
    assert gradcheck(lambda *given: op.feedforward(*given, backend), (s, weight, bias, mask + 1))


def test_nan_stays_in_its_row(backend, device):
    s, weight, bias, mask = (each.detach() for each in tensors(torch.float32, device))
    s[0, 1, 2] = math.nan
    value = op.feedforward(s, weight, bias, mask, backend)
    assert value[0, 1].isnan().all()
    assert not value[0, ::2].isnan().any()
    assert not value[1].isnan().any()
    vector = torch.zeros_like(s)
    inward = op.feedforward_vjp(vector, weight.mT, value, backend)
    assert not inward.isnan().any()
    vector[0, 0] = math.nan
    inward = op.feedforward_vjp(vector, weight.mT, value, backend)
    assert (inward[0, 0].isnan() == (value[0, 0] > 0)).all()
    assert not inward[0, 1:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=str)
def test_empty(shape, backend, device):
    s = torch.zeros(shape, device=device, requires_grad=True)
    weight, bias = torch.ones(7, 5, device=device), torch.ones(7, device=device)
    value = op.feedforward(s, weight, bias, torch.ones(shape[0], 1, 7, device=device), backend)
    assert value.shape == (*shape[:2], 7)
    value.sum().backward()
    assert s.grad.shape == shape
    assert op.feedforward_vjp(s.detach(), weight.mT, value.detach(), backend).shape == value.shape


def test_what_the_kernels_do_not_take(backend, device, launches):
    """A mask of each token's own, another dtype: as PyTorch has it."""
    s, weight, bias, _ = tensors(torch.float32, device)
    mask = torch.rand(2, 3, 7, device=device)
    torch.testing.assert_close(
        op.feedforward(s, weight, bias, mask, backend), (linear(s, weight, bias) * mask).relu()
    )
    with pytest.raises(RuntimeError):
        op.feedforward(s, weight.bfloat16(), bias, None, backend)
    with pytest.raises(RuntimeError):
        op.feedforward(s, weight[:, :4], bias, None, backend)
    with pytest.raises(RuntimeError):
        op.feedforward_vjp(s.detach(), weight.mT[:, :6], torch.ones(2, 3, 7, device=device), backend)
    assert launches == []


def test_a_vector_is_cast_to_the_matrix(backend, device):
    """A backward pass that runs outside of the forward's autocast."""
    s, weight, _, _ = tensors(torch.float32, device)
    matrix, inner = weight.detach().mT.bfloat16(), torch.ones(2, 3, 7, dtype=torch.bfloat16, device=device)
    found = op.feedforward_vjp(s.detach(), matrix, inner, backend)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, s.detach().double() @ matrix.double()) < BOUNDS["bfloat16"]


@kernels
def test_under_autocast_the_kernel_runs(device, launches):
    s, weight, bias, mask = (each.detach().bfloat16() for each in tensors(torch.float32, device))
    with torch.autocast(device, torch.bfloat16):
        value = op.feedforward(s, weight, bias.float(), mask, "triton")
    assert launches == ["feedforward_kernel"]
    assert value.dtype == torch.bfloat16
    assert backends.choose(s, "triton")[0] == "triton"
