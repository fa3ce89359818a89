"""The multiscale sum: kernels against float64, float64 against interpolation and autograd."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import interpolate

from triton_deq.ops import fusion as op
from triton_deq.reference import fusion as reference
from triton_deq.verification import BOUNDS, Case, check_fusion

kernels = pytest.mark.kernels
FACTORS = (1, 2, 4, 1)


def tensors(channels=3, height=4, width=8, dtype=torch.float64, device="cpu"):
    """Base and four terms."""
    return tuple(
        torch.randn(2, channels, height // k, width // k, dtype=dtype, device=device)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for k in (1, *FACTORS)
    )


@kernels
@pytest.mark.parametrize(
    ("layout", "dtype"), [*(("contiguous", dtype) for dtype in BOUNDS), ("strided", "float32")]
)
def test_kernels_match_the_reference(layout, dtype, device):
    rows = list(check_fusion(Case(getattr(torch, dtype), (2, 700), torch.device(device), 1, layout)))
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 4])
def test_value_and_gradients(terms, relu, backend, device):
    given = tensors(device=device)[: 1 + terms]
    wanted = given[0] + sum(interpolate(t, scale_factor=k) for t, k in zip(given[1:], FACTORS, strict=False))
    wanted = wanted.relu() if relu else wanted
    value = op.fusion(given[0], given[1:], relu, backend)
    torch.testing.assert_close(value, wanted)
    vector = torch.randn_like(value)
    found = torch.autograd.grad(value, given, vector)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, given, vector))
    product = op.fusion_vjp(vector, value.detach() if relu else None, FACTORS[:terms], backend)
    torch.testing.assert_close(product, found)
    with torch.no_grad():
        torch.testing.assert_close(op.fusion(given[0], given[1:], relu, backend), value)


def several(device):
    """Sums of several sizes, with more and with fewer terms, the last into a place of another dtype."""
    given = []
    for channels, side, count in ((2, 8, 4), (5, 4, 1), (3, 8, 2), (1, 4, 3), (4, 4, 0)):
        base, *terms = (each.detach() for each in tensors(channels, side, side, device=device))
        given.append(op.Sum(base, terms[:count], relu=count != 1))
    base, term = (
        torch.randn(2, 3, 4, 4, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)
    )
    packed = torch.full((2, 60), math.nan, dtype=torch.float64, device=device)
    place = packed[:, 4:52].unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)
    return [*given, op.Sum(base, [term], False, place)], packed


@kernels
def test_sums_that_share_launches_are_as_each_alone(monkeypatch, device):
    """And so are their products; a launch takes three terms of four sums."""
    launched, real = [], op.launch

    def launch(kernel, grid, parts, samples, **constants):
        launched.append((kernel.fn.__name__, [part[0].numel() for part in parts]))
        return real(kernel, grid, parts, samples, **constants)

    monkeypatch.setattr(op, "launch", launch)
    given, packed = several(device)
    values = op.fusion_each(given, "triton")
    assert launched == [("fusion_kernel", sizes) for sizes in ([384, 256, 160, 128], [96, 32], [256])]
    assert packed[:, 4:52].isfinite().all()
    assert packed.isnan().sum() == 2 * 12
    for each, value in zip(given, values, strict=True):
        wanted = reference.fusion(each.base.double(), each.terms, each.relu)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)

    launched.clear()
    factors = [
        [8 // term.shape[2] if each.base.shape[2] == 8 else 4 // term.shape[2] for term in each.terms]
        for each in given[:5]
    ]
    vectors = [torch.randn_like(each.base) for each in given[:5]]
    masks = [value if each.relu else None for each, value in zip(given[:5], values, strict=False)]
    found = op.fusion_vjp_each(vectors, masks, factors, "triton")
    assert [name for name, _ in launched] == ["fusion_vjp_kernel"] * 2
    for vector, mask, each, product in zip(vectors, masks, factors, found, strict=True):
        torch.testing.assert_close(product, reference.fusion_vjp(vector, mask, each))


def test_sums_of_other_kinds_side_by_side(backend, device):
    """A place for the value, on the reference's way too; one with a gradient; none in the batch."""
    given, packed = several(device)
    given[1].base.requires_grad_()
    values = op.fusion_each(given, backend)
    assert packed.isnan().sum() == 2 * 12
    for each, value in zip(given, values, strict=True):
        torch.testing.assert_close(value, reference.fusion(each.base.to(value.dtype), each.terms, each.relu))
    (of_base,) = torch.autograd.grad(values[1].sum(), given[1].base)
    assert (of_base == 1).all()
    more = torch.randn(3, 4, 2, 2, device=device)
    given, values = given[:1], op.fusion_each([given[0], op.Sum(more, [])], backend)
    torch.testing.assert_close(values[0], reference.fusion(given[0].base.to(values[0].dtype), given[0].terms))
    assert torch.equal(values[1], more.relu())
    products = op.fusion_vjp_each(values, values, [[], []], backend)
    assert all(torch.equal(product[0], value) for product, value in zip(products, values, strict=True))
    empty = torch.zeros(0, 3, 4, 4, device=device)
    place = torch.zeros(0, 3, 4, 4, device=device)
    assert op.fusion_each([op.Sum(empty, [], out=place)], backend)[0] is place


@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives(relu):
    given = tensors(channels=1)

    def function(base, *terms):
        value = op.fusion(base, terms, relu, "reference")
        return value, *op.fusion_vjp(base * 2, value.detach() if relu else None, FACTORS, "reference")

    assert gradcheck(function, given)
    assert gradgradcheck(lambda base, *terms: op.fusion(base, terms, relu, "reference"), given)


def test_layouts_and_nan(backend, device):
    """Terms in PyTorch's default order; NaN stays where it is."""
    base, *terms = (each.detach().contiguous() for each in tensors(device=device))
    terms[1][1, 0, 0, 0] = math.nan
    value = op.fusion(base, terms, backend=backend)
    assert value[1, 0, :2, :2].isnan().all()
    assert value.isnan().sum() == 4
    terms[1][1, 0, 0, 0] = 0
    torch.testing.assert_close(op.fusion(base, terms, backend=backend), reference.fusion(base, terms))


def test_empty_batch(backend, device):
    base, term = torch.zeros(0, 3, 4, 4, device=device), torch.zeros(0, 3, 2, 2, device=device)
    assert op.fusion(base, [term], backend=backend).shape == base.shape
    assert [each.shape[2] for each in op.fusion_vjp(base, base, [2], backend)] == [4, 2]


def test_bad_input():
    base = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"terms\[0\] has shape \(2, 3, 3, 4\), base has \(2, 3, 4, 4\)"):
        op.fusion(base, [torch.zeros(2, 3, 3, 4)])
    with pytest.raises(ValueError, match=r"terms\[1\] has shape \(2, 2, 4, 4\)"):
        op.fusion(base, [base, torch.zeros(2, 2, 4, 4)])
    with pytest.raises(TypeError, match="base is torch.int64"):
        op.fusion(base.long(), [])
    with pytest.raises(ValueError, match=r"factors has 3, which does not divide vector's \(4, 4\)"):
        op.fusion_vjp(base, base, [3])
    with pytest.raises(ValueError, match=r"vector has shape \(2, 3, 4, 4\), value has \(2, 3, 2, 2\)"):
        op.fusion_vjp(base, torch.zeros(2, 3, 2, 2), [2])
