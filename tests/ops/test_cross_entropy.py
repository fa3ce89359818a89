"""Negative log-likelihoods: kernels against the reference, that against SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from triton_deq.ops.cross_entropy import cross_entropy, cross_entropy_fwd, cross_entropy_vjp_fwd
from triton_deq.verification import BOUNDS, Case, check_cross_entropy

kernels = pytest.mark.kernels
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def drawn(rows=3, classes=7, padding=0, dtype=torch.float64, device="cpu"):
    logits = torch.randn(rows, classes + padding, dtype=dtype, device=device) * 3
    return logits, torch.randint(classes, (rows,), device=device)


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 5000)], ids=str)
def test_kernels_match_the_reference(dtype, shape, device):
    case = Case(getattr(torch, dtype), shape, torch.device(device), seed=1)
    over = [row for row in check_cross_entropy(case) if not row.passed]
    assert not over, "\n".join(map(str, over))


@pytest.mark.parametrize("padding", [0, 4])
def test_the_reference_is_scipys(padding):
    logits, targets = drawn(padding=padding)
    wanted = -log_softmax(logits[:, :7].numpy(), axis=1)[np.arange(3), targets.numpy()]
    found = cross_entropy(logits, targets, 7, backend="reference")
    torch.testing.assert_close(found, torch.from_numpy(wanted))


def test_the_reference_takes_some_rows_at_a_time(monkeypatch):
    """The last of them are fewer, and a row may be longer than a block; derivatives of any order, too."""
    for padding, block in ((0, 30), (2, 30), (2, 1)):
        logits, targets = drawn(7, padding=padding)
        leaf, vector = logits.requires_grad_(), torch.randn(7, dtype=torch.float64)
        whole = cross_entropy(leaf, targets, 7, backend="reference")
        slopes = torch.autograd.grad(whole, leaf, vector)
        with monkeypatch.context() as patch:
            patch.setattr("triton_deq.reference.cross_entropy.BLOCK", block)
            patch.setattr("triton_deq.reference.cross_entropy.MANY", 10)
            found = cross_entropy(leaf, targets, 7, backend="reference")
            assert type(found.grad_fn).__name__ == "CrossEntropyFunctionBackward"
            torch.testing.assert_close(found, whole)
            torch.testing.assert_close(cross_entropy(leaf.detach(), targets, 7, "reference"), whole)
            torch.testing.assert_close(torch.autograd.grad(found, leaf, vector), slopes)
            for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                assert check(lambda given, t=targets: cross_entropy(given, t, 7, "reference"), leaf)


@pytest.mark.parametrize("padding", [0, 3])
def test_derivatives_of_any_order(padding, backend, device):
    logits, targets = drawn(padding=padding, device=device)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: cross_entropy(given, targets, 7, backend), logits)
    assert torch.autograd.gradgradcheck(lambda given: cross_entropy(given, targets, 7, backend), logits)


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_pytorch(dtype, device):
    """Beside the float32 logits that a model would make of these."""
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter truncates where it should round to bfloat16")
    logits, targets = drawn(4, 3000, dtype=dtype, device=device)
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (slopes,) = torch.autograd.grad(wanted.sum(), exact)
    narrow = logits.clone().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(narrow.float(), targets, reduction="none")
    (their_slopes,) = torch.autograd.grad(theirs.sum(), narrow)
    value, levels = cross_entropy_fwd(logits, targets, 3000)
    assert (value - wanted).norm() <= 2 * (theirs - wanted).norm()
    ours = cross_entropy_vjp_fwd(logits, targets, levels, torch.ones_like(levels[0]), 3000)
    assert (ours - slopes).norm() <= 2 * (their_slopes - slopes).norm()


def test_large_logits_neither_overflow_nor_vanish(backend, device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=device)
    found = cross_entropy(logits, torch.tensor([1, 0], device=device), backend=backend)
    torch.testing.assert_close(found.cpu(), torch.tensor([2e4, math.log(3)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad, backend, device):
    logits, targets = drawn(3, 300, dtype=torch.float32, device=device)
    logits[1, 250] = bad
    targets[:] = 5
    logits.requires_grad_()
    value = cross_entropy(logits, targets, backend=backend)
    (slopes,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().tolist() == [True, False, True]
    assert slopes.isfinite().all(1).tolist() == [True, False, True]


def test_a_class_that_cannot_be(backend, device):
    """A logit of −∞ has no weight, and as a target no likelihood."""
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, -math.inf, 0.0]], device=device)
    found = cross_entropy(logits, torch.tensor([0, 1], device=device), backend=backend)
    assert found.tolist() == pytest.approx([math.log(2), math.inf])


def test_columns_that_are_no_classes(backend, device):
    """They change nothing, get no gradient, and not even memory full of NaN shows."""
    logits, targets = drawn(3, 300, 5, dtype=torch.float32, device=device)
    logits.requires_grad_()
    value = cross_entropy(logits, targets, 300, backend)
    (slopes,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(value, cross_entropy(logits[:, :300].contiguous(), targets, backend=backend))
    assert slopes[:, 300:].eq(0).all()
    assert slopes[:, :300].sum(1).abs().max() < 1e-5


@kernels
@pytest.mark.parametrize("make", [lambda x: x.mT.contiguous().mT, lambda x: x.repeat(1, 2)[:, : x.shape[1]]])
def test_any_strides(make, device):
    logits, targets = drawn(5, 130, dtype=torch.float32, device=device)
    torch.testing.assert_close(
        cross_entropy(make(logits), targets, backend="triton"), cross_entropy(logits, targets)
    )


@kernels
def test_a_target_that_is_no_class_is_nan(device):
    logits, _ = drawn(3, 7, dtype=torch.float32, device=device)
    found = cross_entropy(logits, torch.tensor([-1, 7, 3], device=device), backend="triton")
    assert found.isnan().tolist() == [True, True, False]


def test_no_rows(backend, device):
    logits = torch.empty(0, 5, device=device, requires_grad=True)
    value = cross_entropy(logits, torch.empty(0, dtype=torch.int64, device=device), backend=backend)
    assert value.shape == (0,)
    value.sum().backward()
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_value(dtype, backend, device):
    value = cross_entropy(*drawn(dtype=dtype, device=device), backend=backend)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(*drawn(dtype=dtype), backend="reference").dtype == value.dtype


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), r"logits is torch.float32 \(3,\)"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, dtype=torch.int64)), "logits is torch.int64"),
        ((torch.zeros(3, 2), torch.zeros(3)), r"pass an int64 tensor \(3,\)"),
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), r"targets is torch.int64 \(2,\)"),
        (
            (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 3),
            r"classes=3 is more than logits \(3, 2\)",
        ),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 0), "classes=0"),
    ],
)
def test_what_does_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(*given)
