"""The layer and its product: kernels against float64, float64 against autograd."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.bounds import assert_within_bounds
from triton_deq.ops import mlp as op
from triton_deq.ops.mlp_probe import MLPJacobianFunction
from triton_deq.reference import mlp as reference
from triton_deq.reference.activations import ACTIVATIONS, Activation
from triton_deq.verification import BOUNDS, Case, check_mlp

kernels = pytest.mark.kernels
RELU = ACTIVATIONS["relu"]


def layer(batch=4, width=5, depth=3, dtype=torch.float64, device="cpu"):
    return tuple(
        torch.randn(shape, dtype=dtype, device=device).requires_grad_()
        for shape in ((batch, depth), (width, depth), (batch, width))
    )


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (70, 130)], ids=str)
def test_kernels_match_the_reference(shape, dtype, device):
    assert_within_bounds(check_mlp(Case(getattr(torch, dtype), shape, torch.device(device), seed=1)))


@kernels
@pytest.mark.parametrize(
    ("shape", "tile"), [((130, 140), (128, 128)), ((130, 60), (128, 64)), ((60, 140), (64, 128))], ids=str
)
def test_large_tiles_match_the_reference(shape, tile, device, large_tiles):
    assert_within_bounds(check_mlp(Case(torch.float16, shape, torch.device(device), seed=7)))
    assert tile in large_tiles


@kernels
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout, device):
    assert_within_bounds(check_mlp(Case(torch.float32, (3, 37), torch.device(device), 6, layout)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_autograds(activation, backend, device):
    z, weight, u = layer(device=device)
    value, slope = op.mlp_and_slope(z, weight, u, ACTIVATIONS[activation], backend)
    inner = (z @ weight.T + u).detach().requires_grad_()
    wanted = getattr(torch.nn.functional, activation)(inner)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), inner)[0])


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "softplus"])
def test_derivatives_of_value_and_slope(activation, backend, device):
    function = ACTIVATIONS[activation]

    def both(*tensors):
        return op.mlp_and_slope(*tensors, function, backend)

    tensors = layer(batch=2, width=3, depth=2, device=device)
    assert gradcheck(both, tensors)
    assert gradgradcheck(both, tensors)


def test_derivatives_where_some_are_not_asked_for(backend, device):
    z, weight, _ = layer(device=device)
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)  # broadcast over the batch
    for tensors in ((z, weight.detach(), bias), (z.detach(), weight, bias.detach())):
        assert gradcheck(lambda *given: op.mlp(*given, ACTIVATIONS["silu"], backend=backend), tensors)
        assert gradgradcheck(lambda *given: op.mlp(*given, ACTIVATIONS["silu"], backend=backend), tensors)


def test_gradients_where_one_argument_depends_on_another(backend, device):
    """Each path counts once, also where the gradient is to be differentiated again."""
    z, weight, _ = layer(width=3, device=device)
    tanh = ACTIVATIONS["tanh"]
    wanted = torch.autograd.grad(torch.tanh(z @ weight.T + z.sin()).sum(), z)
    value = op.mlp(z, weight, z.sin(), tanh, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z, create_graph=True), wanted)
    if backend == "triton":
        seed = torch.tensor([11], device=device)
        norms = MLPJacobianFunction.apply(z, weight, z.sin(), seed, 2, "rademacher", tanh)
        first, again = (
            torch.autograd.grad(norms.sum(), z, retain_graph=True, create_graph=graph)
            for graph in (False, True)
        )
        torch.testing.assert_close(first, again)


def test_slope_of_relu_has_no_derivative(backend, device):
    tensors = layer(device=device)
    value, slope = op.mlp_and_slope(*tensors, RELU, backend)
    first = torch.autograd.grad((value * slope.detach()).sum(), tensors, create_graph=True)
    wanted, flat = reference.mlp_and_slope(*tensors, RELU)
    expected = torch.autograd.grad((wanted * flat).sum(), tensors, create_graph=True)
    torch.testing.assert_close(first, expected)


def test_product_is_autograds_and_differentiable(backend, device):
    z, weight, u = layer(device=device)
    value, slope = op.mlp_and_slope(z, weight, u, ACTIVATIONS["silu"], backend)
    vectors = torch.randn(2, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    shift = torch.randn(2, 4, 3, dtype=torch.float64, device=device)
    with torch.no_grad():
        products = op.mlp_vjp(vectors, slope, weight, shift, backend)
    for vector, product, given in zip(vectors, products, shift, strict=True):
        (expected,) = torch.autograd.grad(value, z, vector.detach(), retain_graph=True)
        torch.testing.assert_close(product, expected + given)
    strided = torch.empty(2, 3, 4, dtype=torch.float64, device=device).transpose(1, 2)
    with torch.no_grad():
        op.mlp_vjp(vectors, slope, weight, shift, backend, out=strided)
    torch.testing.assert_close(strided, products)
    assert gradcheck(
        lambda *given: op.mlp_vjp(*given, backend=backend), (vectors, slope.detach().requires_grad_(), weight)
    )


def test_leading_dimensions_and_empty_batches(backend, device):
    _, weight, _ = layer(device=device)
    z = torch.randn(2, 3, 3, dtype=torch.float64, device=device)
    u = torch.randn(3, 5, dtype=torch.float64, device=device)
    with torch.no_grad():
        value = op.mlp(z, weight, u, RELU, backend=backend)
        torch.testing.assert_close(value, torch.relu(z @ weight.T + u))
        assert op.mlp(z[:0], weight, u, RELU, backend=backend).shape == (0, 3, 5)


def test_what_does_not_fit_is_left_to_pytorch(backend, device):
    z, weight, u = (tensor.detach() for tensor in layer(device=device))
    wide = torch.randn(3, 4, 1, dtype=torch.float64, device=device)  # broadcasts z as well
    wanted = torch.relu(z @ weight.T + wide)
    torch.testing.assert_close(op.mlp(z, weight, wide, RELU, backend=backend), wanted)
    with pytest.raises(RuntimeError, match="size"):
        op.mlp(z, weight, u[:, :3], RELU, backend=backend)
    with pytest.raises(RuntimeError, match="shape"):
        op.mlp(z[:, :2], weight, u, RELU, backend=backend)


@pytest.mark.parametrize("width", [5, 600])
def test_norm_is_pytorchs(width, backend, device):
    z, weight, u = layer(width=width, device=device)
    norm = op.Norm(*torch.randn(2, width, dtype=torch.float64, device=device), 1e-5)
    wanted = torch.nn.functional.layer_norm(
        torch.tanh(z @ weight.T + u), (width,), norm.gain, norm.offset, norm.epsilon
    )
    torch.testing.assert_close(op.mlp(z, weight, u, ACTIVATIONS["tanh"], norm, backend), wanted)
    with torch.no_grad():
        torch.testing.assert_close(op.mlp(z, weight, u, ACTIVATIONS["tanh"], norm, backend), wanted)


@pytest.mark.parametrize(
    ("width", "dtype", "fused"),
    [(256, torch.float32, True), (257, torch.float32, False), (512, torch.bfloat16, True)],
    ids=str,
)
def test_rows_of_more_than_a_kilobyte_are_normalised_afterwards(width, dtype, fused):
    assert op.normalises(torch.empty(width, 3, dtype=dtype)) is fused


def test_nan_stays_in_its_sample(backend, device):
    z, weight, u = (tensor.detach() for tensor in layer(device=device))
    z[1, 2] = math.nan
    value = op.mlp(z, weight, u, RELU, backend=backend)
    assert value.isnan().any(1).tolist() == [False, True, False, False]


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_pytorch(dtype, device):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter truncates where it should round to bfloat16")
    z, weight, u = (tensor.detach().to(dtype) for tensor in layer(20, 60, 90, device=device))
    wanted = torch.tanh(z.double() @ weight.double().T + u.double())
    ours = (op.mlp(z, weight, u, ACTIVATIONS["tanh"], backend="triton").double() - wanted).norm()
    theirs = (torch.tanh(torch.nn.functional.linear(z, weight) + u).double() - wanted).norm()
    assert ours <= 2 * theirs


@kernels
def test_tanh_and_softplus_keep_small_values(device):
    """Where 1 − exp(−2a) and log(1 + exp(a)) would lose them."""
    a = torch.tensor([[1e-6, -3e-4, 0.02, -0.6, 0.63, 9.0, -20.0, 60.0]], device=device)
    zero = torch.zeros(8, 1, device=device)
    for name, function in (("tanh", torch.tanh), ("softplus", torch.nn.functional.softplus)):
        value = op.mlp(torch.zeros(1, 1, device=device), zero, a, ACTIVATIONS[name], backend="triton")
        torch.testing.assert_close(value.double(), function(a.double()), rtol=1e-6, atol=0)


@kernels
def test_transforms_autocast_and_foreign_activations_take_ordinary_operators(device):
    z, weight, u = layer(dtype=torch.float32, device=device)
    tanh = ACTIVATIONS["tanh"]
    assert op.served(z, tanh, "triton", weight, u)
    assert not op.served(z, Activation("tanh", torch.sin, torch.cos), "triton", weight, u)
    assert not op.served(z, tanh, "triton", weight.double(), u)
    with torch.autocast(device, torch.bfloat16):
        assert op.mlp(z, weight, u, tanh, backend="triton").dtype == torch.promote_types(
            torch.bfloat16, u.dtype
        )
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, u: op.mlp(z, weight, u, tanh)))(z, u)
    slope = op.mlp_and_slope(z, weight, u, tanh, "triton")[1]
    torch.testing.assert_close(jacobian, slope[:, :, None] * weight)
