"""The authors' solvers on ours, held against their published formulas in float64."""

import math

import pytest
import torch

from tests.compat import locuslab_formulas as formulas
from triton_deq import backend
from triton_deq.compat import locuslab as compat


def problem(shape=(3, 5, 4), norm=0.7):
    """A map of `[B, ...]` with the given Lipschitz constant."""
    batch, entries = shape[0], math.prod(shape[1:])
    weight = torch.randn(entries, entries, dtype=torch.float64)
    weight *= norm / torch.linalg.matrix_norm(weight, 2)
    x = torch.randn(shape, dtype=torch.float64)
    return (lambda z: torch.tanh(z.reshape(batch, -1) @ weight).view(shape) + x), torch.zeros_like(x)


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours["result"], theirs["result"], rtol=0, atol=1e-10)
    for key in ("nstep", "prot_break", "eps", "threshold"):
        assert ours[key] == theirs[key], key
    for key in ("lowest", "abs_trace", "rel_trace"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-12), key


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 1e-6}, {"m": 3, "lam": 1e-2, "beta": 0.8, "threshold": 12}, {"eps": 0.0, "threshold": 9}],
    ids=str,
)
def test_anderson(options, stop_mode):
    f, x0 = problem()
    ours = compat.anderson(f, x0, stop_mode=stop_mode, name="forward", backend="reference", **options)
    assert_same(ours, formulas.anderson(f, x0, stop_mode=stop_mode, **options))


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("norm", [0.7, 2.0])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-7}, {"eps": 0.0, "threshold": 9}], ids=str)
def test_broyden(options, norm, stop_mode):
    f, x0 = problem(norm=norm)
    options = {"threshold": 30, "stop_mode": stop_mode, **options}
    ours = compat.broyden(f, x0, name="backward", backend="reference", **options)
    assert_same(ours, formulas.broyden(f, x0, **options))


@pytest.mark.kernels
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_the_kernels(solver, device):
    f, x0 = problem((2, 3, 2))
    on_device = (lambda z: f(z.cpu()).to(device)), x0.to(device)
    ours = getattr(compat, solver)(*on_device, threshold=8, eps=1e-4, backend="triton")
    ours["result"] = ours["result"].cpu()
    assert_same(ours, getattr(formulas, solver)(f, x0, threshold=8, eps=1e-4))


def test_broyden_breaks_off_where_it_explodes():
    x0 = torch.zeros(2, 3, 2, dtype=torch.float64)

    def exploding():
        residuals = iter([1e-3, 1.1e-3, 1.2e-3, 1e7])
        return lambda z: z + next(residuals)

    ours = compat.broyden(exploding(), x0, threshold=30, stop_mode="abs", backend="reference", eps=1e-6)
    assert ours["prot_break"]
    assert_same(ours, formulas.broyden(exploding(), x0, threshold=30, stop_mode="abs", eps=1e-6))


def test_broyden_gives_up_where_nothing_goes_on():
    """Below three tolerances, once the last 30 steps have changed little: not while the first five count."""
    calls = []

    def f(z):
        calls.append(1)
        noise = 1 + 1e-3 * (len(calls) % 2)
        return z + (2.8e-3 if len(calls) < 7 else 2e-3) * noise / z.numel() ** 0.5

    x0 = torch.zeros(1, 2, 2, dtype=torch.float64)
    ours = compat.broyden(f, x0, threshold=60, eps=1e-3, stop_mode="abs", backend="reference")
    assert len(calls) == 1 + 5 + 30
    assert len(ours["abs_trace"]) == 61


def test_a_line_search_helps_where_the_whole_step_overshoots():
    f, x0 = problem(norm=3.0)
    plain = compat.broyden(f, x0, threshold=4, backend="reference")
    searched = compat.broyden(f, x0, threshold=4, ls=True, backend="reference")
    assert searched["abs_trace"][0] <= plain["abs_trace"][0]
    assert searched["lowest"] == pytest.approx(
        (f(searched["result"]) - searched["result"]).norm().item() / f(searched["result"]).norm().item(),
        rel=1e-6,
    )


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_a_small_threshold_gives_the_best_there_is(threshold):
    """The original's `lowest_xest` is not bound there."""
    f, x0 = problem()
    ours = compat.anderson(f, x0, threshold=threshold, backend="reference")
    at = ours["result"]
    assert ours["lowest"] == pytest.approx(((f(at) - at).norm() / (f(at).norm() + 1e-5)).item())


def test_a_singular_gram_matrix():
    """Residuals in one direction, and no ridge: the original's solve fails."""
    x0 = torch.zeros(2, 3, 1, dtype=torch.float64)
    f = lambda z: 0.5 * z + 1  # noqa: E731
    ours = compat.anderson(f, x0, lam=0.0, eps=1e-9, backend="reference")
    torch.testing.assert_close(ours["result"], torch.full_like(x0, 2.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_sample_that_is_not_finite_is_left_out(solver):
    f, x0 = problem()

    def spoilt(z):
        value = f(z)
        value[1] = torch.nan
        return value

    ours = getattr(compat, solver)(spoilt, x0, threshold=30, backend="reference")
    assert ours["lowest"] < 1e-3
    assert torch.equal(ours["result"][1], x0[1])
    torch.testing.assert_close(f(ours["result"])[::2], ours["result"][::2], rtol=0, atol=2e-2)

    nothing = getattr(compat, solver)(lambda z: z * torch.nan, x0, threshold=30, backend="reference")
    assert torch.equal(nothing["result"], x0)
    assert (nothing["lowest"], nothing["nstep"]) == (1e8, 0)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_half_precision_and_an_empty_batch(solver):
    f, x0 = problem()
    half = getattr(compat, solver)(
        lambda z: f(z.double()).bfloat16(), x0.bfloat16(), threshold=12, eps=2e-2, backend="reference"
    )
    assert half["result"].dtype == torch.bfloat16
    assert half["lowest"] < 2e-2
    empty = getattr(compat, solver)(lambda z: 1 / 0, x0[:0], threshold=12)
    assert empty["result"].shape == (0, 5, 4)


def test_losses(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)  # thousands of probes
    z = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    f = lambda z: torch.tanh(z.reshape(-1, 6) @ weight).view(z.shape)  # noqa: E731
    rows = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(z @ weight)))(z.reshape(2, 6))

    loss = compat.jac_loss_estimate(f(z), z, vecs=4000)
    torch.testing.assert_close(loss, rows.square().sum() / z.numel(), rtol=0.1, atol=0)
    loss.backward()
    assert weight.grad is not None
    assert not compat.jac_loss_estimate(f(z), z, create_graph=False).requires_grad

    vector, radius = compat.power_method(f(z), z)
    assert vector.shape == z.shape
    expected = torch.linalg.eigvals(rows).abs().amax(1, keepdim=True).detach()
    torch.testing.assert_close(radius, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: compat.anderson(f, x, betta=1), TypeError, r"no option 'betta' \(did you mean 'beta'"),
        (lambda f, x: compat.broyden(f, x, 30, beta=1.0), TypeError, r"no option 'beta'.*It has: f, x0"),
        (lambda f, x: compat.anderson(f, x, stop_mode="relative"), ValueError, "choose one of 'abs', 'rel'"),
        (lambda f, x: compat.anderson(f, x, beta=2.0), ValueError, "beta=2.0 is outside"),
        (lambda f, x: compat.broyden(f, x, 0), ValueError, "threshold=0 is too small"),
        (lambda f, x: compat.broyden(f, x, 30, eps=-1.0), ValueError, "eps=-1.0 is outside"),
        (lambda f, x: compat.broyden(f, [x], 30), TypeError, "x0 must be a tensor, got list"),
        (lambda f, x: compat.broyden(f, x.long(), 30), TypeError, "x0 has dtype torch.int64"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*problem())


def test_an_unknown_option_can_be_a_warning():
    f, x0 = problem()
    with pytest.warns(UserWarning, match="no option 'betta'.*It is ignored"):
        compat.anderson(f, x0, betta=1.0, strict=False, backend="reference")
