"""The residual LayerNorm and its product: kernels against float64, float64 against PyTorch and autograd."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import layer_norm

from tests.bounds import assert_within_bounds
from triton_deq.ops import norm as op
from triton_deq.ops.launch import launch
from triton_deq.reference import norm as reference
from triton_deq.verification import BOUNDS, Case, check_norm
from triton_deq.verification.case import relative_error

kernels = pytest.mark.kernels


def tensors(batch=2, length=3, width=5, dtype=torch.float64, device="cpu"):
    """x, a branch, a mask that a sequence shares, gain, offset; all with gradients."""
    shapes = ((batch, length, width), (batch, length, width), (batch, 1, width), (width,), (width,))
    return tuple(torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes)


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 16), (5, 37), (2, 700)], ids=str)
def test_kernels_match_the_reference(shape, dtype, device):
    assert_within_bounds(check_norm(Case(getattr(torch, dtype), shape, torch.device(device), seed=1)))


@kernels
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout, device):
    assert_within_bounds(check_norm(Case(torch.float32, (3, 37), torch.device(device), 6, layout)))


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_wider_than_a_program(dtype, monkeypatch, device):
    monkeypatch.setattr(op, "MOST_BLOCK", 32)
    monkeypatch.setattr(op, "BLOCK", 16)
    assert_within_bounds(check_norm(Case(getattr(torch, dtype), (3, 50), torch.device(device), seed=2)))


@pytest.mark.parametrize("width", [1, 5])
def test_value_is_pytorchs(width, backend, device):
    x, branch, mask, gain, offset = tensors(width=width, device=device)
    total = x + mask * branch
    value, normal, inverse = op.norm(x, branch, mask, gain, offset, 1e-3, backend)
    torch.testing.assert_close(value, layer_norm(total, (width,), gain, offset, 1e-3))
    torch.testing.assert_close(normal, layer_norm(total, (width,), eps=1e-3))
    deviation = (total.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(inverse, 1 / deviation)
    with torch.no_grad():
        out = torch.full_like(x, math.nan)
        for place in (out, torch.full_like(x, math.nan).mT.contiguous().mT):
            assert op.norm_value(x, branch, mask, gain, offset, 1e-3, backend, place) is place
            torch.testing.assert_close(place, value)
        for found, wanted in zip(
            op.norm(x, branch, mask, gain, offset, 1e-3, backend), (value, normal, inverse), strict=True
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("given", ["x", "branch", "gain"])
def test_what_is_left_out(given, backend, device):
    x, branch, _, gain, offset = tensors(device=device)
    if given == "gain":
        value, normal, _ = op.norm(x, None, None, gain, offset, backend=backend)
        torch.testing.assert_close(value, layer_norm(x, (5,), gain, offset))
        torch.testing.assert_close(normal, layer_norm(x, (5,)))
        return
    given_branch = branch if given == "branch" else None
    value, normal, _ = op.norm(x, given_branch, backend=backend)
    assert value is normal
    torch.testing.assert_close(value, layer_norm(x if given_branch is None else x + branch, (5,)))


@pytest.mark.parametrize(
    "shape", [(5,), (1, 1, 5), (2, 1, 5), (1, 3, 5), (3, 5), (2, 3, 5), (2, 1, 1)], ids=str
)
def test_masks_that_broadcast(shape, backend, device):
    x, branch, *_ = tensors(device=device)
    mask = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    value, *_ = op.norm(x, branch, mask, backend=backend)
    wanted = layer_norm(x + mask * branch, (5,))
    torch.testing.assert_close(value, wanted)
    vector = torch.randn_like(value)
    found = torch.autograd.grad(value, (branch, mask), vector)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (branch, mask), vector))


def test_first_and_second_derivatives(backend, device):
    """Of all that `norm` returns in all that it takes."""
    given = tensors(length=2, width=3, device=device)

    def norm(*tensors):
        return op.norm(*tensors, backend=backend)

    assert gradcheck(norm, given)
    assert gradgradcheck(norm, given)


def test_derivatives_without_gain(backend, device):
    """There value and n are one tensor."""
    given = tensors(batch=1, width=3, device=device)[:2]

    def norm(*tensors):
        value, normal, inverse = op.norm(*tensors, backend=backend)
        return value * normal.exp(), inverse

    assert gradcheck(norm, given)
    assert gradgradcheck(norm, given)


@pytest.mark.parametrize("given", [1, 2, 3, 5])
def test_the_value_alone(given, backend, device):
    """With its gradients, and in the dtype of x also where the parameters have another."""
    tensors_given = tensors(device=device)[:given]
    vector = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    (value, *found), (wanted, *expected) = (
        (value, *torch.autograd.grad(value, tensors_given, vector))
        for value in (
            op.norm_value(*tensors_given, backend=backend),
            op.norm(*tensors_given, backend="reference")[0],
        )
    )
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(found, expected)
    narrow = op.norm_value(tensors_given[0].float(), *tensors_given[1:], backend=backend)
    torch.testing.assert_close(narrow, wanted.float())


@kernels
@pytest.mark.parametrize("asked", ["value", "normal", "inverse"])
def test_the_gradient_of_each_result_alone(asked, device):
    given = tensors(device=device)
    found, wanted = (
        torch.autograd.grad(
            dict(zip(("value", "normal", "inverse"), results, strict=True))[asked].square().sum(),
            given,
            materialize_grads=True,
        )
        for results in (op.norm(*given, backend="triton"), reference.norm(*given))
    )
    torch.testing.assert_close(found, wanted)


@kernels
@pytest.mark.parametrize("twice", [False, True])
def test_derivatives_where_some_are_not_asked_for(twice, device):
    given = tensors(device=device)
    vector = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    for asked in itertools.product((False, True), repeat=5):
        if not any(asked):
            continue
        leaves = [tensor.detach().requires_grad_(wish) for tensor, wish in zip(given, asked, strict=True)]
        wishes = [leaf for leaf in leaves if leaf.requires_grad]
        found, wanted = (
            torch.autograd.grad(value, wishes, vector, create_graph=twice)
            for value in (op.norm(*leaves, backend="triton")[0], reference.norm(*leaves)[0])
        )
        torch.testing.assert_close(found, wanted)


@kernels
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradients_of_parameters(dtype, device):
    given = tensors(4, 5, 37, getattr(torch, dtype), device)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    vector = torch.randn(4, 5, 37, dtype=given[0].dtype, device=device)
    found = torch.autograd.grad(op.norm(*given, backend="triton")[0], given, vector)
    wanted = torch.autograd.grad(reference.norm(*wide)[0], wide, vector.double())
    for out, expected in zip(found, wanted, strict=True):
        assert out.dtype == given[0].dtype
        assert relative_error(out, expected) <= BOUNDS[dtype]


def test_product_is_autograds_and_differentiable(backend, device):
    x, _, _, gain, offset = tensors(width=4, device=device)
    value, normal, inverse = op.norm(x, None, None, gain, offset, backend=backend)
    vectors = torch.randn(2, *x.shape, dtype=torch.float64, device=device, requires_grad=True)
    with torch.no_grad():
        products = op.norm_vjp(vectors, normal, inverse, gain, backend)
    for vector, product in zip(vectors, products, strict=True):
        (expected,) = torch.autograd.grad(value, x, vector.detach(), retain_graph=True)
        torch.testing.assert_close(product, expected)

    def product_of(*tensors):
        return op.norm_vjp(*tensors, backend=backend)

    given = [tensor[..., :1, :].detach().requires_grad_() for tensor in (vectors, normal, inverse)]
    assert gradcheck(product_of, (*given, gain))
    assert gradgradcheck(product_of, (*given, gain))
    assert gradcheck(product_of, given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "with gain"])
def test_the_reference_without_gradients_is_the_one_with(scaled, dtype):
    """PyTorch's own LayerNorm, which has no derivative of 1/σ, in the place of the formula."""
    x, branch, mask, gain, offset = (each.detach().to(dtype) for each in tensors())
    x = x + 30
    gain, offset = (gain, offset) if scaled else (None, None)
    vectors = torch.randn(2, *x.shape).to(dtype)
    results = []
    for recorded in (True, False):
        x.requires_grad_(recorded)
        _, normal, inverse = given = reference.norm(x, branch, mask, gain, offset, 0.1)
        product = reference.norm_vjp(vectors, normal, inverse, gain)
        results.append((*given, product, reference.norm_vjp(vectors[0, :0], normal[:0], inverse[:0])))
    assert product.grad_fn is None
    torch.testing.assert_close(*results)


def test_a_tangent_passes_through_the_reference_without_gradients():
    x, *_ = (each.detach() for each in tensors())
    direction = torch.randn_like(x)

    def made(x):
        _, normal, inverse = reference.norm(x)
        return normal, inverse, reference.norm_vjp(direction, normal, inverse)

    with torch.no_grad():
        found = torch.func.jvp(made, (x,), (direction,))
    torch.testing.assert_close(found, torch.func.jvp(made, (x,), (direction,)))
    assert found[1][1].abs().sum() > 0


def test_a_penalty_on_the_product(backend, device):
    """Its gradient in x passes through n and 1/σ; that of a vector that depends on them, once."""
    x, _, _, gain, offset = tensors(device=device)
    grads = []
    for norm, norm_vjp in (
        (lambda *a: op.norm(*a, backend=backend), lambda *a: op.norm_vjp(*a, backend=backend)),
        (reference.norm, reference.norm_vjp),
    ):
        _, normal, inverse = norm(x, None, None, gain, offset)
        penalty = norm_vjp(normal.sin(), normal, inverse, gain).square().sum()
        first = torch.autograd.grad(penalty, (x, gain), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), (x, gain))
        grads.append((*first, *second))
    torch.testing.assert_close(*grads)


def test_a_penalty_with_a_probe_that_has_no_gradient(backend, device):
    x, *_ = tensors(device=device)
    probe = torch.randn_like(x)
    grads = []
    for norm, norm_vjp in (
        (lambda *a: op.norm(*a, backend=backend), lambda *a: op.norm_vjp(*a, backend=backend)),
        (reference.norm, reference.norm_vjp),
    ):
        _, normal, inverse = norm(x)
        grads.append(torch.autograd.grad(norm_vjp(probe, normal, inverse).square().sum(), x)[0])
    value = layer_norm(x, x.shape[-1:])
    (product,) = torch.autograd.grad(value, x, probe, create_graph=True)
    grads.append(torch.autograd.grad(product.square().sum(), x)[0])
    for found in grads[:2]:
        torch.testing.assert_close(found, grads[2])


@kernels
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_large_means_cost_no_accuracy(blocks, monkeypatch, device):
    if blocks == "many":
        monkeypatch.setattr(op, "MOST_BLOCK", 32)
        monkeypatch.setattr(op, "BLOCK", 16)
    x, branch = 1e4 + torch.randn(3, 70, device=device), torch.randn(3, 70, device=device)
    found = op.norm(x, branch, backend="triton")
    wanted = reference.norm(x.double(), branch.double())
    assert max(map(relative_error, found, wanted)) <= BOUNDS["float32"]
    constant, *_ = op.norm(torch.full_like(x, 1e4 / 3), backend="triton")
    assert constant.abs().max() < 1e-3


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_pytorch(dtype, device):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter truncates where it should round to bfloat16")
    x, _, _, gain, offset = (tensor.detach() for tensor in tensors(2, 8, 60, dtype, device))
    wanted = layer_norm(x.double(), (60,), gain.double(), offset.double())
    ours = (op.norm_value(x, None, None, gain, offset, backend="triton").double() - wanted).norm()
    theirs = (layer_norm(x, (60,), gain, offset).double() - wanted).norm()
    assert ours <= 2 * theirs


@kernels
def test_rows_far_apart(device):
    """Neither the sums nor a gradient needs rows to lie one after another."""
    wide = torch.randn(4, 3, 12, device=device)
    x, branch = wide[..., :5], wide[..., 7:].requires_grad_()
    value, *_ = op.norm(x, branch, backend="triton")
    wanted = layer_norm(x + branch, (5,))
    torch.testing.assert_close(value, wanted)
    for vector in (wide[..., 6:11].detach(), torch.ones((), device=device).expand(4, 3, 5)):
        (found,) = torch.autograd.grad(value, branch, vector, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, branch, vector, retain_graph=True)[0])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=str)
def test_empty_batches(shape, backend, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    gain = torch.ones(5, device=device, requires_grad=True)
    value, normal, inverse = op.norm(x, x, x[:, :1], gain, gain, backend=backend)
    assert (value.shape, normal.shape, inverse.shape) == (shape, shape, (*shape[:2], 1))
    assert op.norm_vjp(value, normal, inverse, gain, backend).shape == shape
    value.sum().backward()
    assert not gain.grad.any()


def test_nan_stays_in_its_row(backend, device):
    x, branch, mask, gain, offset = (tensor.detach() for tensor in tensors(device=device))
    x[0, 1, 2], branch[1, 2, 0] = math.nan, math.inf
    results = op.norm(x, branch, mask, gain, offset, backend=backend)
    bad = [[False, True, False], [False, False, True]]
    for result in results:
        assert (~result.isfinite()).any(-1).tolist() == bad
    assert (~op.norm_vjp(x.nan_to_num(), *results[1:], gain, backend).isfinite()).any(-1).tolist() == bad


@kernels
def test_same_bits_every_time_and_however_many_rows(device):
    x, branch, mask, gain, offset = tensors(4, 3, 20, torch.float32, device)
    first, second = (op.norm(x, branch, mask, gain, offset, backend="triton") for _ in range(2))
    alone = op.norm(x[2:3], branch[2:3], mask[2:3], gain, offset, backend="triton")
    for one, other, some in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[2:3], some)


@kernels
def test_transforms_and_wider_dtypes_take_ordinary_operators(monkeypatch, device):
    x, branch, mask, gain, offset = tensors(dtype=torch.float32, device=device)
    wanted, *_ = op.norm(x, branch, mask, gain, offset, backend="triton")
    monkeypatch.setattr(op, "norm_fwd", None)
    single = torch.func.vmap(lambda x, y, m: op.norm(x, y, m, gain, offset)[0])(x, branch, mask)
    torch.testing.assert_close(single, wanted)
    torch.testing.assert_close(op.norm(x, branch, mask, gain.double(), offset.double())[0], wanted)
    norm = torch.compile(lambda *a: op.norm(*a)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(norm(x, branch, mask, gain, offset), wanted)


X = torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: op.norm(X, epsilon=0.0), ValueError, r"epsilon=0.0 is outside \(0, ∞\)"),
        (lambda: op.norm_value(X, epsilon=math.inf), ValueError, "epsilon=inf is outside"),
        (lambda: op.norm(X, epsilon="1"), TypeError, "epsilon='1' must be a number"),
        (lambda: op.norm(X.int()), TypeError, r"x has dtype torch.int32.*x\.float\(\)"),
        (lambda: op.norm(torch.ones(())), ValueError, r"x has shape \(\).*\[\.\.\., D\]"),
        (lambda: op.norm(X[..., :0]), ValueError, "D ≥ 1"),
        (lambda: op.norm(X, X[:1]), ValueError, r"branch has shape \(1, 3, 5\), x has \(2, 3, 5\)"),
        (lambda: op.norm(X, None, X), ValueError, "without a branch"),
        (
            lambda: op.norm(X, X, X[:, :2]),
            ValueError,
            r"mask has shape \(2, 2, 5\), which does not broadcast",
        ),
        (lambda: op.norm(X, X, X[None]), ValueError, r"mask has shape \(1, 2, 3, 5\)"),
        (lambda: op.norm(X, gain=X[0, 0]), ValueError, "gain was given and offset=None"),
        (lambda: op.norm(X, offset=X[0, 0]), ValueError, "offset was given and gain=None"),
        (lambda: op.norm(X, gain=X[0, 0, :4], offset=X[0, 0]), ValueError, r"gain has shape \(4,\).*\(5,\)"),
        (lambda: op.norm(X, gain=X[0, 0], offset=X[0]), ValueError, r"offset has shape \(3, 5\).*\(5,\)"),
        (lambda: op.norm_vjp(X[:1], X, X[..., :1]), ValueError, r"vector has shape \(1, 3, 5\), normal has"),
        (lambda: op.norm_vjp(X, X, X), ValueError, r"inverse has shape \(2, 3, 5\).*\(2, 3, 1\)"),
        (lambda: op.norm_vjp(X, X, X[..., :1], X), ValueError, r"gain has shape \(2, 3, 5\)"),
        (lambda: op.norm(X, backend="cuda"), ValueError, "backend='cuda' is unknown"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradients_of_both_terms(summed, masked, backend, device):
    x, branch, mask, _, _ = tensors(width=37, device=device)
    mask = mask if masked else None
    vector, more = torch.randn(2, *x.shape, dtype=x.dtype, device=device).unbind()
    more = more if summed else None
    value, normal, inverse = reference.norm(x, branch, mask)
    wanted = torch.autograd.grad(value, [x, branch], vector if more is None else vector + more)
    with torch.no_grad():
        found = op.norm_vjps(vector, normal, inverse, more, mask, backend=backend)
    torch.testing.assert_close(found, wanted)

    given = [each for each in (vector, normal, inverse, more, mask) if each is not None]
    leaves = [each.detach().requires_grad_() for each in given]

    def both(*leaves):
        rest = list(leaves[3:])
        return op.norm_vjps(
            *leaves[:3], rest.pop(0) if summed else None, rest.pop(0) if masked else None, backend=backend
        )

    assert gradcheck(both, leaves, fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
def test_an_addend_is_in_the_first_gradient_alone(masked, backend, device):
    x, _, mask, _, _ = (each.detach() for each in tensors(width=37, device=device))
    mask = mask if masked else None
    _, normal, inverse = reference.norm(x)
    vector, addend = torch.randn(2, *x.shape, dtype=x.dtype, device=device).unbind()
    wanted = reference.norm_vjp(vector, normal, inverse)
    of_x, of_branch = op.norm_vjps(vector, normal, inverse, None, mask, backend=backend, addend=addend)
    torch.testing.assert_close(of_x, wanted + addend)
    torch.testing.assert_close(of_branch, wanted if mask is None else wanted * mask)
    torch.testing.assert_close(op.norm_vjp_plus(vector, normal, inverse, addend, backend), wanted + addend)

    leaves = [each.detach().requires_grad_() for each in (vector, normal, inverse, addend)]

    def both(vector, normal, inverse, addend):
        pair = op.norm_vjps(vector, normal, inverse, None, mask, backend=backend, addend=addend)
        return *pair, op.norm_vjp_plus(vector, normal, inverse, addend, backend)

    assert gradcheck(both, leaves, fast_mode=True)
    assert gradgradcheck(both, leaves, fast_mode=True)


@kernels
@pytest.mark.parametrize("blocks", [False, True])
def test_an_addend_costs_no_launch(blocks, monkeypatch, device):
    """A narrow vector and a wide addend, left in a place of other bits; also in rows read by a loop."""
    if blocks:
        monkeypatch.setattr(op, "MOST_BLOCK", 16)
        monkeypatch.setattr(op, "BLOCK", 16)
    x, _, mask, _, _ = (each.detach() for each in tensors(width=37, dtype=torch.float32, device=device))
    _, normal, inverse = reference.norm(x)
    vector, addend = torch.randn_like(x).half(), torch.randn_like(x)
    launches = []
    monkeypatch.setattr(op, "launch", lambda *given, **named: (launches.append(1), launch(*given, **named)))
    wanted = reference.norm_vjp(vector.float(), normal, inverse)
    narrow, apart = torch.empty_like(vector), torch.empty_like(x.mT.contiguous()).mT
    for out in (None, narrow, apart):
        found = op.norm_vjp_plus(vector, normal, inverse, addend, "triton", out)
        assert out is None or found is out
        exact = torch.float32 if out is None else out.dtype
        torch.testing.assert_close(found, (wanted + addend).to(exact))
    of_x, of_branch = op.norm_vjps(vector, normal, inverse, None, mask, backend="triton", addend=addend)
    torch.testing.assert_close((of_x, of_branch), (wanted + addend, wanted * mask))
    assert len(launches) == 4


@kernels
def test_narrow_vectors_and_a_narrow_branch_in_one_launch(monkeypatch, device):
    """As in a backward solve under autocast: what comes from products and goes into them has 16 bits."""
    x, _, mask, _, _ = (each.detach() for each in tensors(width=37, dtype=torch.float32, device=device))
    _, normal, inverse = reference.norm(x)
    vector, more = torch.randn_like(x), torch.randn_like(x).half()
    launches = []
    monkeypatch.setattr(op, "launch", lambda *given, **named: (launches.append(1), launch(*given, **named)))
    found = op.norm_vjps(vector, normal, inverse, more, mask, torch.float16, "triton")
    assert len(launches) == 1
    assert [each.dtype for each in found] == [torch.float32, torch.float16]
    wanted = reference.norm_vjp(vector + more.float(), normal, inverse)
    torch.testing.assert_close(found, (wanted, (wanted * mask).half()), rtol=1e-3, atol=1e-5)
    (alone, same) = op.norm_vjps(more, normal, inverse, backend="triton")
    assert alone is same
    torch.testing.assert_close(alone, reference.norm_vjp(more.float(), normal, inverse))


def test_a_value_of_fewer_bits(backend, device):
    x, branch, mask, _, _ = (each.detach() for each in tensors(width=37, dtype=torch.float32, device=device))
    wanted = reference.norm(x, branch, mask)[0].half()
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            found = op.norm_value(x, branch, mask, backend=backend, dtype=torch.float16)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16 with out"):
        op.norm_value(x, out=torch.empty_like(x), dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": torch.ones(2, 3, 4)}, "vector has shape"),
        ({"more": torch.ones(3, 5)}, "more has shape"),
        ({"addend": torch.ones(5)}, "addend has shape"),
        ({"inverse": torch.ones(2, 3)}, "inverse has shape"),
        ({"mask": torch.ones(2, 2, 5)}, "mask has shape"),
    ],
)
def test_both_gradients_refuse_shapes_that_do_not_fit(change, message):
    given = {"vector": X, "normal": X, "inverse": X[..., :1], "more": X, "mask": X[:, :1]}
    op.norm_vjps(**given)
    with pytest.raises(ValueError, match=message):
        op.norm_vjps(**given | change)


def test_a_narrower_branch_is_widened_also_under_autocast(backend, device):
    """The state stays in float32 under autocast, and the branch comes from a product in bfloat16."""
    x, branch = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device).bfloat16()
    leaves = [x.requires_grad_(), branch.requires_grad_()]
    wanted, _, _ = reference.norm(x.double(), branch.double())
    with torch.autocast(device, torch.bfloat16):
        value, normal, inverse = op.norm(x, branch, backend=backend)
        product = op.norm_vjp(torch.ones_like(x), normal, inverse, backend=backend)
    assert (value.dtype, product.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(value, wanted.float())
    vector = torch.randn_like(value)
    found = torch.autograd.grad(value, leaves, vector)
    expected = torch.autograd.grad(wanted, leaves, vector.double())
    assert [grad.dtype for grad in found] == [torch.float32, torch.bfloat16]
    with torch.no_grad():
        torch.testing.assert_close(op.norm_value(x, branch, backend=backend), value)
        torch.testing.assert_close(op.norm(x, branch, backend=backend), (value, normal, inverse))
    torch.testing.assert_close(found[0], expected[0].float())


@pytest.mark.kernels
def test_a_wider_mask_is_read_as_it_is(device, monkeypatch):
    """A state kept in float16, and the masks of a dropout, which belong to parameters in float32."""
    launches = []
    monkeypatch.setattr(op, "launch", lambda *given, **named: (launches.append(1), launch(*given, **named)))
    x, branch = (torch.randn(2, 3, 6, device=device).half() for _ in range(2))
    mask = torch.rand(2, 1, 6, device=device) / 0.9
    leaves = [x.requires_grad_(), branch.requires_grad_()]
    wanted, normal, inverse = reference.norm(x.double(), branch.double(), mask.double())
    vector = torch.randn_like(x)
    expected = torch.autograd.grad(wanted, leaves, vector.double())
    close = {"rtol": 5e-3, "atol": 5e-3}

    with torch.no_grad():
        value = op.norm_value(x, branch, mask, backend="triton")
        both = op.norm_vjps(vector, normal.half(), inverse.float(), None, mask, backend="triton")
    assert len(launches) == 2
    assert value.dtype == torch.float16
    torch.testing.assert_close(value, wanted.half(), **close)
    for found, grad in zip(both, expected, strict=True):
        torch.testing.assert_close(found.half(), grad, **close)

    recorded = op.norm(x, branch, mask, backend="triton")[0]
    assert len(launches) == 3
    for found, grad in zip(torch.autograd.grad(recorded, leaves, vector), expected, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, grad, **close)


def places(device, dtype=torch.float64):
    """Rows with others behind them; every other sequence of more; a transposed one."""
    rows = torch.full((2, 3, 9), torch.nan, dtype=dtype, device=device)
    some = torch.full((4, 3, 6), torch.nan, dtype=dtype, device=device)
    across = torch.full((2, 6, 3), torch.nan, dtype=dtype, device=device)
    return rows[..., :6], some[::2], across.mT


@pytest.mark.parametrize("which", range(3))
def test_results_in_places_of_any_strides(which, backend, device):
    x, branch, more, vector = (torch.randn(2, 3, 6, dtype=torch.float64, device=device) for _ in range(4))
    mask = torch.randn(2, 1, 6, dtype=torch.float64, device=device)
    wanted, normal, inverse = reference.norm(x, branch, mask)
    out, also, place = (places(device)[which] for _ in range(3))
    assert op.norm_value(x, branch, mask, backend=backend, out=out, also=also) is out
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(also, wanted)

    of_x, of_branch = op.norm_vjps(vector, normal, inverse, more, mask, backend=backend, branch_out=place)
    assert of_branch is place
    expected = op.norm_vjps(vector, normal, inverse, more, mask, backend="reference")
    torch.testing.assert_close((of_x, of_branch), expected)
    unmasked = op.norm_vjps(vector, normal, inverse, more, backend=backend, branch_out=place)
    torch.testing.assert_close(unmasked[1], unmasked[0])
    assert unmasked[1] is place


@pytest.mark.kernels
def test_evenly_spaced_rows_are_written_by_the_kernel(device, monkeypatch):
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *given: copies.append(1))
    x = torch.randn(2, 3, 6, dtype=torch.float64, device=device)
    rows, _, _ = places(device)
    op.norm_value(x, x, backend="triton", out=rows)
    assert rows.isfinite().all()
    assert rows._base[..., 6:].isnan().all()
    assert not copies


def test_another_place_is_for_a_value_without_gain():
    with pytest.raises(ValueError, match="also with a gain"):
        op.norm_value(X, gain=X[0, 0], offset=X[0, 0], also=torch.empty_like(X))
