"""Weight normalisation: values, gradients, orders in memory, zeros behind, shared launches."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from tests.bounds import assert_within_bounds
from triton_deq.cells.layers import called_narrow, normalise_kernels, weights_of
from triton_deq.ops import weightnorm as op
from triton_deq.ops.launch import launch
from triton_deq.ops.weightnorm import Weight
from triton_deq.verification import Case, check_weightnorm
from triton_deq.verification.case import LAYOUTS

SHAPES = [(5, 7), (4, 3, 3, 3), (4, 6, 1, 1), (1, 1), (3, 5000)]


@pytest.fixture
def launches(monkeypatch):
    found = []
    monkeypatch.setattr(op, "launch", lambda *given, **named: (found.append(1), launch(*given, **named)))
    return found


def drawn(shape, device, dtype=torch.float64, channels_last=False):
    v = torch.randn(shape, dtype=dtype, device=device)
    g = torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=dtype, device=device) + 0.5
    v = v.contiguous(memory_format=torch.channels_last) if channels_last else v
    return Weight(v.requires_grad_(), g.requires_grad_())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_pytorchs_formula_with_its_gradients(shape, channels_last, backend, device):
    if channels_last and len(shape) < 4:
        pytest.skip("has no channels")
    v, g, *_ = weight = drawn(shape, device, channels_last=channels_last)
    wanted = torch._weight_norm(v, g, 0)
    (value,) = op.weightnorm_each([weight], backend=backend)
    torch.testing.assert_close(value, wanted)
    for order in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
        assert value.is_contiguous(memory_format=order) == v.is_contiguous(memory_format=order)
    vector = torch.randn(shape, dtype=v.dtype, device=device)  # in PyTorch's own order
    found = torch.autograd.grad(value, (v, g), vector)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (v, g), vector))


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["v", "g", "both"])
def test_derivatives_of_any_order(which, backend, device):
    held = [drawn((3, 4), device), drawn((2, 2, 2, 2), device, channels_last=True)]
    held = [Weight(*(each.detach().requires_grad_(i in which) for i, each in enumerate(w[:2]))) for w in held]
    leaves = [each for weight in held for each in weight[:2] if each.requires_grad]

    def values(*given):
        rest = iter(given)
        weights = [Weight(*(next(rest) if each.requires_grad else each for each in w[:2])) for w in held]
        return tuple(op.weightnorm_each(weights, backend=backend))

    assert gradcheck(values, leaves)
    assert gradgradcheck(values, leaves)


def test_a_gradient_is_the_same_if_it_is_to_be_differentiated(backend, device):
    v, g, *_ = (each.detach().requires_grad_() for each in drawn((5, 7), device)[:2])
    (value,) = op.weightnorm_each([Weight(v, g)], backend=backend)
    vector = torch.randn_like(value)
    once = torch.autograd.grad(value, (v, g), vector, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, (v, g), vector, create_graph=True), once)


def test_transforms_see_ordinary_operators(backend, device):
    v, g = (each.detach() for each in drawn((5, 7), device)[:2])

    def norm(v):
        return op.weightnorm_each([Weight(v, g)], backend=backend)[0].square().sum()

    wanted = v.clone().requires_grad_()
    norm(wanted).backward()
    torch.testing.assert_close(torch.func.grad(norm)(v), wanted.grad)
    torch.testing.assert_close(torch.func.jvp(norm, (v,), (v,))[1], (wanted.grad * v).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
def test_zeros_behind_and_another_dtype(normed, dtype, backend, device):
    """Two dtypes that the interpreter rounds well."""
    v, g, *_ = drawn((5, 7), device, torch.float32)
    weight = Weight(v, g if normed else None, rows=6, columns=12)
    (value,) = op.weightnorm_each([weight], dtype, backend)
    assert value.dtype == dtype
    assert value.shape == (6, 12)
    wanted = torch._weight_norm(v, g, 0) if normed else v
    torch.testing.assert_close(value[:5, :7], wanted.to(dtype))
    assert value[5:].count_nonzero() + value[:, 7:].count_nonzero() == 0
    vector = torch.randn_like(value)
    found = torch.autograd.grad(value, [v, g] if normed else [v], vector)
    expected = torch.autograd.grad(wanted, [v, g] if normed else [v], vector[:5, :7].float())
    torch.testing.assert_close(found, expected)


def test_a_gradient_without_memory_of_its_own(backend, device):
    v, g, *_ = drawn((3, 4), device)
    (value,) = op.weightnorm_each([Weight(v, g)], backend=backend)
    wanted = torch.autograd.grad(torch._weight_norm(v, g, 0).sum(), (v, g))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), (v, g)), wanted)


@pytest.mark.kernels
def test_four_weights_share_a_launch(launches, device):
    weights = [drawn((1 + k, 3), device, torch.float32) for k in range(5)] + [
        Weight(torch.randn(2, 3, 1, 1, device=device))
    ]
    values = op.weightnorm_each(weights, torch.float16, "triton")
    assert len(launches) == 2
    for (v, g, *_), value in zip(weights, values, strict=True):
        torch.testing.assert_close(value, (v if g is None else torch._weight_norm(v, g, 0)).half())
    torch.autograd.grad(values[0].sum() + values[4].sum(), [each for w in weights[:5:4] for each in w[:2]])
    assert len(launches) == 3  # of those that somebody asks for


def test_rows_that_are_zero_or_not_finite_stay_by_themselves(backend, device):
    v, g, *_ = drawn((4, 6), device, torch.float32)
    with torch.no_grad():
        v[0], v[2, 3] = 0, torch.nan
        (value,) = op.weightnorm_each([Weight(v, g, columns=8)], backend=backend)
        torch.testing.assert_close(value[:, :6], torch._weight_norm(v, g, 0), equal_nan=True)
    assert value[1::2].isfinite().all()


@pytest.mark.kernels
def test_rounding_to_bfloat16_of_either_dtype(device):
    for dtype in (torch.float64, torch.float32):
        v, g, *_ = drawn((3, 40), device, dtype)
        (value,) = op.weightnorm_each([Weight(v, g)], torch.bfloat16, "triton")
        torch.testing.assert_close(value.to(dtype), torch._weight_norm(v, g, 0), rtol=2**-7, atol=0)


def test_none_and_rows_that_are_not_dense(backend, device):
    assert op.weightnorm_each([], backend=backend) == []
    for v in (torch.randn(4, 12, device=device)[:, ::2], torch.randn(6, 4, device=device).t()):
        v, g = v.requires_grad_(), torch.rand(4, device=device, requires_grad=True)
        (value,) = op.weightnorm_each([Weight(v, g)], backend=backend)
        wanted = torch._weight_norm(v.contiguous(), g[:, None], 0)
        torch.testing.assert_close(value, wanted)
        vector = torch.randn_like(wanted)
        found = torch.autograd.grad(value, (v, g), vector)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, (v, g), vector))


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_match_the_reference(layout, device):
    assert_within_bounds(check_weightnorm(Case(torch.float32, (5, 37), torch.device(device), 6, layout)))


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"weights\[1\].g has shape \(3,\), v has \(2, 5\)"):
        op.weightnorm_each([Weight(torch.ones(2, 5)), Weight(torch.ones(2, 5), torch.ones(3))])
    with pytest.raises(ValueError, match="only a matrix has room"):
        op.weightnorm_each([Weight(torch.ones(2, 5, 1, 1), columns=8)])


# ------------------------------------------------------------------------------------ the weights of layers


def layers():
    """As made here, by torch, by torch along another dimension, with one more of a user's, and plain."""

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    own, theirs, across, more, plain = (nn.Conv2d(3, 4, 3) for _ in range(5))
    for conv in (own, more):
        normalise_kernels(conv)
    nn.utils.parametrize.register_parametrization(more, "weight", Twice())
    nn.utils.parametrizations.weight_norm(theirs)
    nn.utils.parametrizations.weight_norm(across, dim=1)
    found = [own, theirs, across, more, plain]
    for layer in found[:4]:
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)
    return found


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_weights_of_layers_are_the_layers_own(dtype, launches, device):
    given = [layer.to(device) for layer in layers()]
    like = torch.ones(1, device=device)
    found = weights_of(given, dtype, like)
    assert len(launches) == (1 if dtype is None else 2)  # those of here and of torch; or all of them
    for layer, weight in zip(given, found, strict=True):
        torch.testing.assert_close(weight, layer.weight.to(weight.dtype))
        assert weight.dtype == (dtype or torch.float32)
    parameters = [each for layer in given for name, each in layer.named_parameters() if "bias" not in name]
    ours = torch.autograd.grad(sum(weight.float().square().sum() for weight in found), parameters)
    theirs = torch.autograd.grad(sum(layer.weight.square().sum() for layer in given), parameters)
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)


@pytest.mark.kernels
def test_a_module_whose_weights_are_cast_together_gives_what_it_would(launches, device):
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
    normalise_kernels(second)  # which reads its weight of two parameters
    module = nn.Sequential(first, nn.BatchNorm2d(4), second, nn.Flatten(), nn.Linear(16, 2)).to(device).eval()
    x = torch.randn(2, 3, 4, 4, device=device)
    with torch.no_grad():
        assert torch.equal(called_narrow(module, x, x), module(x))
        assert not launches
        with torch.autocast(device, torch.float16, cache_enabled=False):
            wanted, found = module(x), called_narrow(module, x, x)
    assert len(launches) == 1
    assert found.dtype == wanted.dtype == torch.float16
    torch.testing.assert_close(found, wanted)
    assert module[0].weight.dtype == torch.float32
