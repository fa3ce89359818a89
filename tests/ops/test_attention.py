"""Relative attention: the reference against plain loops, kernels against float64, that against autograd."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.bounds import assert_within_bounds
from triton_deq.ops import attention as op
from triton_deq.reference import attention as reference
from triton_deq.reference.attention import dropout_mask
from triton_deq.verification import BOUNDS, Case, check_attention

kernels = pytest.mark.kernels
NAMES = ("q", "k", "v", "positions", "content_bias", "position_bias", "memory_keys", "memory_values")


def tensors(batch=2, queries=4, memory=3, heads=2, depth=3, dtype=torch.float64, device="cpu", spare=1):
    """In the order of NAMES; q, k and v are views of one buffer, as in a cell."""
    draw = {"dtype": dtype, "device": device}
    fused = torch.randn(batch, queries, 3 * heads * depth, **draw)
    states = [part.unflatten(-1, (heads, depth)) for part in fused.chunk(3, dim=-1)]
    kept = [torch.randn(batch, memory, heads, depth, **draw) if memory else None for _ in range(2)]
    positions = torch.randn(memory + queries + spare, heads, depth, **draw)
    return [*states, positions, *torch.randn(2, heads, depth, **draw), *kept]


def leaves(*args, **kwargs):
    return [None if each is None else each.clone().requires_grad_() for each in tensors(*args, **kwargs)]


def context_of(given, device="cpu", **options):
    if options.get("dropout"):
        options["seed"] = torch.tensor([0x123456789ABCD], device=device)
    return op.Context(*given[3:], **options)


def by_loops(q, k, v, context):
    """The paper's formula, an entry at a time."""
    batch, queries, heads, depth = q.shape
    memory = context.memory
    window = context.window or memory + queries
    keep = torch.ones(batch, heads, queries, memory + queries)
    if context.dropout:
        keep = dropout_mask(context, keep.shape)
    value = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                scores, values, kept = [], [], []
                for distance in range(min(window, i + memory + 1)):
                    j = i + memory - distance
                    key = k[b, j - memory, h] if j >= memory else context.memory_keys[b, j, h]
                    content = (q[b, i, h] + context.content_bias[h]) @ key
                    position = (q[b, i, h] + context.position_bias[h]) @ context.positions[distance, h]
                    scores.append((content + position) / math.sqrt(depth))
                    values.append(v[b, j - memory, h] if j >= memory else context.memory_values[b, j, h])
                    kept.append(keep[b, h, i, j])
                weights = torch.stack(scores).softmax(0) * torch.stack(kept)
                value[b, i, h] = weights @ torch.stack(values)
    return value


# -------------------------------------------------------------------------------------------- the reference


def test_a_dropout_mask_is_fair_and_one_of_many():
    """Of a query and a key it is the same whatever is in memory; of another head or sample another."""
    context = op.Context(*[None] * 3, dropout=0.3, seed=torch.tensor([5]))
    mask = dropout_mask(context, torch.Size((2, 3, 40, 57)))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    kept = (mask > 0).double()
    assert (kept.mean() - 0.7).abs() < 4 * math.sqrt(0.21 / mask.numel())
    for memory in (0, 16, 30):
        shape = torch.Size((2, 3, 40, 40 + memory))
        assert torch.equal(dropout_mask(context, shape)[..., memory:], mask[..., 17:])
    heads = kept.view(6, -1) - 0.7
    alike = heads @ heads.mT / 0.21 / heads.shape[1]
    assert (alike - torch.eye(6)).abs().max() < 5 / math.sqrt(heads.shape[1])


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 1}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize(("queries", "memory"), [(5, 0), (5, 3), (1, 0), (1, 3), (2, 0)])
def test_the_reference_is_the_papers_formula(queries, memory, options, recorded):
    given = tensors(memory=memory, queries=queries)
    context = context_of(given, **options)
    wanted = by_loops(*given[:3], context)
    given[0].requires_grad_(recorded)
    found = reference.attention(*given[:3], context)
    assert found.requires_grad == recorded
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=1e-6)


def test_without_biases_and_positions_it_is_pytorchs_attention():
    q, k, v, *rest = tensors(memory=3)
    context = op.Context(*(torch.zeros_like(each) for each in rest[:3]), *rest[3:])
    keys, values = (
        torch.cat([old, new], 1).transpose(1, 2) for old, new in zip(rest[3:], (k, v), strict=True)
    )
    seen = torch.ones(4, 7, dtype=torch.bool).tril(3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen)
    torch.testing.assert_close(reference.attention(q, k, v, context), wanted.transpose(1, 2))


@pytest.mark.parametrize("options", [{}, {"window": 3, "dropout": 0.3}], ids=str)
@pytest.mark.parametrize(("queries", "memory"), [(4, 3), (4, 0), (1, 0), (1, 2)])
def test_the_references_product_is_autograds(queries, memory, options):
    given = leaves(queries=queries, memory=memory)
    context = context_of(given, **options)
    vector = torch.randn_like(given[0])
    wanted = torch.autograd.grad(reference.attention(*given[:3], context), given[:3], vector)
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            found = reference.attention_vjp(vector, *given[:3], context)
        torch.testing.assert_close(found.unbind(2), wanted)


# ------------------------------------------------------------------------------------ kernels against float64


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 20)], ids=str)
def test_kernels_match_the_reference(shape, dtype, device):
    case = Case(getattr(torch, dtype), shape, torch.device(device), seed=1)
    assert_within_bounds(check_attention(case))


@kernels
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout, device):
    case = Case(torch.float32, (1, 8), torch.device(device), 6, layout)
    assert_within_bounds(check_attention(case))


@kernels
@pytest.mark.parametrize(
    ("queries", "memory", "depth", "options"),
    [
        (1, 0, 5, {}),
        (1, 3, 16, {"window": 2}),
        (7, 3, 5, {"window": 1}),
        (20, 17, 5, {"window": 9}),
        (20, 0, 16, {"dropout": 0.3}),
        (33, 17, 5, {"window": 20, "dropout": 0.1}),
        (7, 0, 70, {}),
    ],
    ids=str,
)
def test_value_and_every_gradient(queries, memory, depth, options, device):
    given = leaves(1, queries, memory, 2, depth, device=device)
    context = context_of(given, device, **options)
    vector = torch.randn_like(given[0])
    present = [each for each in given if each is not None]
    value = op.attention(*given[:3], context, backend="triton")
    wanted = reference.attention(*given[:3], context)
    torch.testing.assert_close(value, wanted)
    found = torch.autograd.grad(value, present, vector)
    expected = torch.autograd.grad(wanted, present, vector)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        product = op.attention_vjp(vector, *given[:3], context, backend="triton")
    torch.testing.assert_close(product.unbind(2), expected[:3])


@kernels
def test_blocks_of_keys_that_are_hidden_are_not_read(device):
    """All keys but the last few are NaN, and so are their positions."""
    q, k, v, *rest = tensors(1, 33, 17, 1, 4, device=device)
    context = op.Context(*rest, window=2)
    wanted = reference.attention(q, k, v, context)
    k, v = k.clone(), v.clone()
    k[:, :15], v[:, :15] = math.nan, math.nan
    for each in rest[3:]:
        each.fill_(math.nan)
    value = op.attention(q, k, v, context, backend="triton")
    torch.testing.assert_close(value[:, 32:], wanted[:, 32:])


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_pytorch(dtype, device):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter truncates where it should round to bfloat16")
    given = tensors(2, 20, 17, 2, 16, dtype=dtype, device=device)
    wide = [each.double() for each in given]
    wanted = reference.attention(*wide[:3], context_of(wide))
    ours = op.attention(*given[:3], context_of(given), backend="triton").double()
    theirs = reference.attention(*given[:3], context_of(given)).double()
    assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm()


@kernels
def test_same_bits_every_time(device):
    given = leaves(2, 20, 3, 1, 5, dtype=torch.float32, device=device)
    context, vector = context_of(given, device, dropout=0.2), torch.randn_like(given[0])
    first, second = (
        torch.autograd.grad(op.attention(*given[:3], context, backend="triton"), given, vector)
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@kernels
@pytest.mark.parametrize("what", ["value", "gradients", "gradients of the product"])
def test_no_tensor_of_queries_by_keys(what, device):
    """T = 24 and R = 48 with heads of one column: nothing else is as large as the scores."""
    given = leaves(1, 24, 24, 1, 1, dtype=torch.float32, device=device)
    context, vector = context_of(given), torch.randn_like(given[0])
    with Allocations() as allocations:
        if what == "value":
            with torch.no_grad():
                op.attention(*given[:3], context, backend="triton")
        elif what == "gradients":
            op.attention(*given[:3], context, backend="triton").backward(vector)
        else:
            product = op.attention_vjp(vector, *given[:3], context, backend="triton")
            torch.autograd.backward(product.unbind(2), [vector] * 3)
    assert 24 <= max(allocations.sizes) < 24 * 48


class Allocations(TorchDispatchMode):
    """How many entries each storage has that an operator returned."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for each in tree_leaves(outputs):
            if isinstance(each, torch.Tensor):
                self.sizes.append(each.untyped_storage().nbytes() // each.element_size())
        return outputs


# --------------------------------------------------------------------------------------- both implementations


def test_derivatives(backend, device):
    given = leaves(1, 2, 1, 1, 2, device=device, spare=0)

    def value(*each):
        return op.attention(*each[:3], context_of(each, device, window=2, dropout=0.3), backend)

    assert gradcheck(value, given, fast_mode=True)
    assert gradgradcheck(value, given, fast_mode=True)


def test_derivatives_of_the_product(device):
    """Of the reference, which is also what differentiates the kernels' product more than once."""
    given = leaves(1, 2, 1, 1, 2, device=device, spare=0)
    vector = torch.randn_like(given[0]).requires_grad_()

    def product(vector, *each):
        return op.attention_vjp(
            vector, *each[:3], context_of(each, device, window=2, dropout=0.3), "reference"
        )

    assert gradcheck(product, [vector, *given], fast_mode=True)
    assert gradgradcheck(product, [vector, *given], fast_mode=True)


@kernels
@pytest.mark.parametrize(
    ("queries", "memory", "depth", "options"),
    [(1, 0, 5, {}), (20, 17, 5, {"window": 20, "dropout": 0.1}), (17, 0, 40, {})],
    ids=str,
)
def test_every_second_derivative(queries, memory, depth, options, device):
    given = leaves(1, queries, memory, 1, depth, device=device)
    present = [each for each in given if each is not None]
    vector, *directions = (torch.randn_like(given[0]) for _ in range(4))
    vector.requires_grad_()
    context = context_of(given, device, **options)
    found, wanted = (
        torch.autograd.grad(
            op.attention_vjp(vector, *given[:3], context, backend).unbind(2), [vector, *present], directions
        )
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, wanted)


@kernels
def test_third_derivatives_and_missing_cotangents(device):
    given = leaves(1, 2, 1, 1, 2, device=device)
    vector, direction = torch.randn_like(given[0]).requires_grad_(), torch.randn_like(given[0])
    thirds, seconds = [], []
    for backend in ("triton", "reference"):
        of_q = op.attention_vjp(vector, *given[:3], context_of(given), backend)[:, :, 0]
        seconds.append(torch.autograd.grad(of_q, given[:2], direction, retain_graph=True))
        (of_k,) = torch.autograd.grad(of_q, given[1], direction, create_graph=True)
        thirds.append(torch.autograd.grad(of_k.sum(), given[2])[0])
    torch.testing.assert_close(*seconds)
    torch.testing.assert_close(*thirds)


def test_only_what_is_asked_for(backend, device):
    for name in NAMES:
        given = [
            each.requires_grad_(mine == name)
            for mine, each in zip(NAMES, tensors(device=device), strict=True)
        ]
        value = op.attention(*given[:3], context_of(given), backend)
        wanted = reference.attention(*given[:3], context_of(given))
        value.sum().backward()
        found = {mine: each.grad for mine, each in zip(NAMES, given, strict=True) if each.grad is not None}
        assert list(found) == [name]
        (expected,) = torch.autograd.grad(wanted.sum(), given[NAMES.index(name)])
        torch.testing.assert_close(found[name], expected)


def test_a_product_may_reuse_an_evaluation(backend, device):
    given = tensors(device=device)
    context, vector = context_of(given), torch.randn_like(given[0])
    evaluated = op.attention_evaluated(*given[:3], context, backend)
    assert isinstance(evaluated, op.Weighted if backend == "reference" else op.Evaluated)
    found = op.attention_vjp(vector, *given[:3], context, backend, evaluated)
    wanted = reference.attention_vjp(vector, *given[:3], context)
    torch.testing.assert_close(found, wanted)
    if backend == "reference":  # it is indeed what the product is made of
        broken = evaluated._replace(weights=torch.zeros_like(evaluated.weights))
        assert not op.attention_vjp(vector, *given[:3], context, backend, broken).any()


@kernels
def test_an_evaluation_of_another_backend_is_not_taken(device):
    given = tensors(device=device)
    context, vector = context_of(given), torch.randn_like(given[0])
    for one, other in (("triton", "reference"), ("reference", "triton")):
        evaluated = op.attention_evaluated(*given[:3], context, one)
        found = op.attention_vjp(vector, *given[:3], context, other, evaluated)
        torch.testing.assert_close(found, op.attention_vjp(vector, *given[:3], context, other))


def test_a_product_that_is_differentiated_does_not_take_an_evaluation_that_was_not(backend, device):
    given = leaves(device=device)
    context, vector = context_of(given), torch.randn_like(given[0])
    present = [each for each in given if each is not None]
    with torch.no_grad():
        alone = op.attention_evaluated(*given[:3], context, backend)
    products = [
        op.attention_vjp(vector, *given[:3], context, backend, evaluated)
        for evaluated in (alone, op.attention_evaluated(*given[:3], context, backend), None)
    ]
    *found, wanted = (torch.autograd.grad(product.square().sum(), present) for product in products)
    for gradients in found:
        torch.testing.assert_close(gradients, wanted)


def test_an_evaluations_value_is_differentiable(backend, device):
    given = leaves(device=device)
    evaluated = op.attention_evaluated(*given[:3], context_of(given), backend)
    present = [each for each in given if each is not None]
    assert backend == "reference" or not evaluated.sums.requires_grad
    found = torch.autograd.grad(evaluated.value.square().sum(), present)
    wanted = torch.autograd.grad(reference.attention(*given[:3], context_of(given)).square().sum(), present)
    torch.testing.assert_close(found, wanted)


def test_strides_of_all_kinds(backend, device):
    """Reversed dimensions, a last one with gaps, a batch that is one sample repeated."""
    q, k, v, *rest = tensors(device=device)
    odd = [
        q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack((k, torch.full_like(k, math.nan)), -1)[..., 0],
        v[:1].expand_as(v),
    ]
    others = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in rest]
    plain = [each.contiguous() for each in odd]
    wanted = reference.attention(*plain, op.Context(*rest))
    torch.testing.assert_close(op.attention(*odd, op.Context(*others), backend), wanted)
    product = op.attention_vjp(odd[2], *odd, op.Context(*others), backend)
    torch.testing.assert_close(product, reference.attention_vjp(plain[2], *plain, op.Context(*rest)))


@kernels
def test_rows_wider_than_their_head(device):
    """Every argument leaves room for loads of 16 bytes, which what the kernels write has not."""
    given = [
        torch.nn.functional.pad(each, (0, 3))[..., :-3].requires_grad_()
        for each in tensors(1, heads=1, depth=5, dtype=torch.float32, device=device)
    ]
    vector = torch.nn.functional.pad(torch.randn_like(given[0]), (0, 3))[..., :-3].requires_grad_()
    directions = torch.randn(3, *vector.shape, device=device).unbind()
    found, wanted = [], []
    for results, backend in ((found, "triton"), (wanted, "reference")):
        context = context_of(given, device)
        product = op.attention_vjp(vector, *given[:3], context, backend)
        results += [op.attention(*given[:3], context, backend), product]
        results += torch.autograd.grad(product.unbind(2), [vector, *given], directions)
        results += torch.autograd.grad(results[0], given, vector.detach())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_of_its_own(backend, device):
    """Heads that two zeros make wider, with the scale of those before, are the same heads."""
    given = leaves(device=device)
    wide = [None if each is None else torch.nn.functional.pad(each, (0, 2)) for each in given]
    plain, scaled = context_of(given), context_of(wide, scale=given[0].shape[-1] ** -0.5)
    value = op.attention(*wide[:3], scaled, backend)
    wanted = reference.attention(*given[:3], plain)
    torch.testing.assert_close(value[..., :-2], wanted)
    vector = torch.randn_like(wanted)
    present = [each for each in given if each is not None]
    found = torch.autograd.grad(value[..., :-2], present, vector)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, present, vector))


def test_nan_stays_in_its_sample_and_head(backend, device):
    q, k, v, *rest = tensors(batch=3, device=device)
    k = k.clone()
    k[1, 2, 0] = math.nan
    value = op.attention(q, k, v, op.Context(*rest), backend)
    clean = torch.ones(3, 2, dtype=torch.bool, device=device)
    clean[1, 0] = False
    assert torch.equal(value.isfinite().all(3).all(1), clean)
    for product in op.attention_vjp(torch.ones_like(q), q, k, v, op.Context(*rest), backend).unbind(2):
        assert product.isfinite().all(3).all(1)[clean].all()


def test_empty_batches_and_empty_memory(backend, device):
    q, k, v, *rest = tensors(device=device)
    empty = op.Context(*rest[:3], rest[3][:0], rest[4][:0])
    assert op.attention(q[:0], k[:0], v[:0], empty, backend).shape == (0, 4, 2, 3)
    assert op.attention_vjp(q[:0], q[:0], k[:0], v[:0], empty, backend).shape == (0, 4, 3, 2, 3)
    none, nothing = op.Context(*rest[:3]), [each[:, :0].requires_grad_() for each in rest[3:]]
    value = op.attention(q, k, v, none._replace(memory_keys=nothing[0], memory_values=nothing[1]), backend)
    torch.testing.assert_close(value, reference.attention(q, k, v, none))
    value.sum().backward()


@kernels
def test_transforms_and_mixed_dtypes_take_ordinary_operators(device):
    given = tensors(dtype=torch.float32, device=device)
    context = context_of(given)
    assert op._served(*given[:3], context, "triton")
    assert not op._served(given[0].double(), *given[1:3], context, "triton")
    assert not op._served(*given[:3], context._replace(content_bias=given[4].double()), "triton")
    with torch.autocast(device, torch.bfloat16):  # it has had its say in the products before
        assert op._served(*given[:3], context, "triton")
    q, k, v = given[:3]
    _, pull = torch.func.vjp(lambda *each: op.attention(*each, context, backend="triton"), q, k, v)
    torch.testing.assert_close(pull(v), reference.attention_vjp(v, q, k, v, context).unbind(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": lambda q: q[0]}, r"q has shape \(4, 2, 3\)"),
        ({"k": lambda k: k[:, 1:]}, r"k has shape \(2, 3, 2, 3\).*\(2, 4, 2, 3\)"),
        ({"v": lambda v: v[..., 1:]}, "v has shape"),
        ({"positions": lambda r: r[:6]}, r"positions has shape \(6, 2, 3\).*7 or more"),
        ({"positions": lambda r: r[:, 0]}, "positions has shape"),
        ({"content_bias": lambda b: b[0]}, "content_bias has shape"),
        ({"position_bias": lambda b: b.mT}, "position_bias has shape"),
        ({"memory_keys": lambda m: m[:1]}, "memory_keys has shape"),
        ({"memory_values": lambda m: m[:, 1:]}, "memory_values has shape"),
        ({"memory_values": lambda m: None}, "memory_values is None"),
    ],
)
def test_shapes_that_do_not_fit(change, words):
    given = dict(zip(NAMES, tensors(), strict=True))
    given |= {name: function(given[name]) for name, function in change.items()}
    q, k, v, *rest = given.values()
    with pytest.raises(ValueError, match=words):
        op.attention(q, k, v, op.Context(*rest))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": 0}, ValueError, "window=0"),
        ({"dropout": 1.0, "seed": torch.tensor([1])}, ValueError, "dropout=1.0"),
        ({"dropout": -0.1}, ValueError, "dropout=-0.1"),
        ({"dropout": 0.1}, ValueError, "without a seed"),
        ({"dropout": 0.1, "seed": torch.tensor([1.0])}, TypeError, "seed is torch.float32"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, TypeError, r"seed is torch.int64 \(2,\)"),
    ],
)
def test_options_that_do_not_fit(options, error, words):
    given = tensors()
    with pytest.raises(error, match=words):
        op.attention(*given[:3], op.Context(*given[3:], **options))
    if not options.get("dropout"):
        return
    with pytest.raises(ValueError, match="vector has shape"):
        op.attention_vjp(given[0][:1], *given[:3], op.Context(*given[3:]))


@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_a_path_through_another_argument_counts_once(function, backend, device):
    """Also where the gradient is to be differentiated again: q, k and v are made of one z."""
    given = tensors(device=device)
    context = context_of(given)
    z = given[0].detach().requires_grad_()

    def gradients(module, *backend):
        heads = (z, z.sin(), z.cos() * z)
        vector = [torch.ones_like(z)] if function == "attention_vjp" else []
        out = getattr(module, function)(*vector, *heads, context, *backend)
        total = out.sum() if function == "attention" else sum((part**2).sum() for part in out)
        (first,) = torch.autograd.grad(total, z, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), z)[0]

    for found, wanted in zip(gradients(op, backend), gradients(reference), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_mask_may_be_made_beforehand(device):
    given = tensors(device=device)
    context = context_of(given)._replace(dropout=0.4, seed=torch.tensor([3], device=device))
    made = op.with_mask(context, given[0].shape[:2], "reference")
    assert made.mask.shape == (2, 2, 4, 7)
    q, k, v = given[:3]
    torch.testing.assert_close(op.attention(q, k, v, made), op.attention(q, k, v, context))
    assert op.with_mask(context, given[0].shape[:2], "triton").mask is None
