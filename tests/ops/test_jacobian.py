"""Probes and squared norms: kernels against the reference, that against published numbers and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from triton_deq.ops.jacobian import probe, squared_norm
from triton_deq.reference import jacobian as reference
from triton_deq.verification import BOUNDS, Case, check_probe, check_squared_norm

kernels = pytest.mark.kernels
SEED = torch.tensor([0x0123456789ABCDEF])


@kernels
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 4100)], ids=str)
@pytest.mark.parametrize("check", [check_probe, check_squared_norm])
def test_kernels_match_the_reference(check, dtype, shape, device):
    case = Case(getattr(torch, dtype), shape, torch.device(device), seed=1)
    over = [row for row in check(case) if not row.passed]
    assert not over, "\n".join(map(str, over))


def test_philox_known_answers():
    """The known-answer vectors of Random123 1.14 for philox4x32-10."""
    zero = torch.zeros(1, dtype=torch.int64)
    (w0, w2), (w1, w3) = reference._philox(zero, zero, zero)
    assert [word.item() for word in (w0, w1, w2, w3)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("first", [0, 4, -6], ids=["", "later columns", "columns before the first"])
@pytest.mark.parametrize("seed", [SEED, ~SEED], ids=["positive", "negative"])
def test_words_are_the_same_from_numpy_and_from_operators(monkeypatch, seed, first):
    on_host = reference.words(seed, torch.tensor([3, 1]), 37, 10, first)
    monkeypatch.setattr(reference, "_on_host", lambda seed: False)
    assert torch.equal(on_host, reference.words(seed, torch.tensor([3, 1]), 37, 10, first))


@pytest.mark.parametrize("rows", [1, 7, 9, 16, 20, 37])
def test_words_are_those_of_their_counters(rows):
    """One at a time; and a table that begins elsewhere, or has fewer rows, is a part of the larger one."""
    found = reference.words(SEED, torch.tensor([5]), rows, 6, -2)[0]
    for row in range(rows):
        for column in range(-2, 4):
            counter = torch.tensor([((row // 16 * 8 + row % 8) << 32) | (column // 2 & 0xFFFFFFFF)])
            even, odd = reference._philox(SEED, counter, torch.tensor([5]))
            assert found[row, column + 2] == (odd if column % 2 else even)[row // 8 % 2]
    assert found.unique().numel() == found.numel()
    assert torch.equal(found[:, 2:], reference.words(SEED, torch.tensor([5]), 40, 4)[0, :rows])


def test_each_index_and_seed_has_its_own_probe(backend, device):
    like, seed = torch.empty(64, device=device), SEED.to(device)
    first = probe(like, seed, 0, backend=backend)
    assert torch.equal(first, probe(like, seed, 0, backend=backend))
    for other in (probe(like, seed, 1, backend=backend), probe(like, seed + 1, 0, backend=backend)):
        assert abs(np.corrcoef(first.cpu(), other.cpu())[0, 1]) < 0.5


def test_gaussian_probe_is_standard_normal():
    sample = probe(torch.empty(100_000, dtype=torch.float64), SEED, 0, "gaussian", "reference").numpy()
    assert stats.kstest(sample, "norm").pvalue > 0.01
    assert abs(np.mean(sample[:50_000] * sample[50_000:])) < 4 / math.sqrt(50_000)


def test_rademacher_probe_is_a_fair_sign():
    sample = probe(torch.empty(100_000), SEED, 0, "rademacher", "reference")
    assert set(sample.tolist()) == {-1.0, 1.0}
    assert abs(sample.mean().item()) < 4 / math.sqrt(100_000)


def test_squared_norm_has_derivatives_of_any_order(backend, device):
    value = torch.randn(3, 2, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: squared_norm(v, backend), value)
    assert torch.autograd.gradgradcheck(lambda v: squared_norm(v, backend), value)


def test_squared_norm_of_any_strides(backend, device):
    value = torch.randn(5, 7, 3, device=device)
    for view in (value.transpose(0, 2), value[:, ::2], value[:1].expand(4, -1, -1)):
        wanted = view.double().flatten(1).square().sum(1)
        torch.testing.assert_close(squared_norm(view, backend).double(), wanted, rtol=2e-6, atol=0)


def test_squared_norm_of_nothing(backend, device):
    assert squared_norm(torch.empty(0, 4, device=device), backend).shape == (0,)
    assert squared_norm(torch.empty(3, 0, device=device), backend).tolist() == [0, 0, 0]


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_norm_errs_at_most_twice_as_much_as_pytorch(dtype, device):
    value = torch.randn(4, 3000, device=device).to(dtype)
    wanted = value.double().square().sum(1)
    ours = (squared_norm(value, "triton").double() - wanted).norm()
    theirs = (value.square().sum(1).double() - wanted).norm()
    assert ours <= 2 * theirs


def test_nan_stays_in_its_sample(backend, device):
    value = torch.randn(3, 9, device=device)
    value[1, 4] = math.nan
    assert squared_norm(value, backend).isnan().tolist() == [False, True, False]


def test_unknown_names():
    with pytest.raises(ValueError, match="distribution='uniform' is unknown"):
        probe(torch.empty(3), SEED, 0, "uniform")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        squared_norm(torch.empty(3, 3), "cuda")
