"""Norm, spectral radius and penalty against the full Jacobian."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import triton_deq as td
from tests.problems import tanh_map
from triton_deq.deq import Injected


def full_jacobians(f, z):
    """`[B, N, N]`, from autograd's own full Jacobian of the whole batch."""
    whole = torch.autograd.functional.jacobian(f, z, create_graph=True)
    batch = z.shape[0]
    entries = z[0].numel()
    whole = whole.reshape(batch, entries, batch, entries)
    return torch.stack([whole[sample, :, sample] for sample in range(batch)])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_norm_in_the_mean(distribution):
    f, *_ = tanh_map(3, 6)
    z = torch.randn(3, 6, dtype=torch.float64)
    wanted = full_jacobians(f, z).square().sum((1, 2)).mean() / 6
    generator = torch.Generator().manual_seed(1)
    estimates = torch.stack(
        [td.jacobian_norm(f, z, 1, distribution, generator, "reference").detach() for _ in range(2000)]
    )
    standard_error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - wanted) < 4 * standard_error
    assert standard_error < 0.05 * wanted


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a CPU where nobody interprets: PyTorch draws the probes."""
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_probes_where_no_kernel_can_run_are_what_pytorch_draws(without_kernels, distribution):
    f, *_ = tanh_map(3, 6)
    z = torch.randn(3, 6, dtype=torch.float64)
    jacobians = full_jacobians(f, z)
    generator = torch.Generator().manual_seed(1)
    again = torch.Generator().manual_seed(1)
    for probes in (1, 2):
        norm = td.jacobian_norm(f, z, probes, distribution, generator)
        if distribution == "gaussian":
            drawn = [torch.randn(3, 6, generator=again, dtype=z.dtype) for _ in range(probes)]
        else:
            drawn = [2 * torch.randint(2, (3, 6), generator=again) - 1.0 for _ in range(probes)]
        wanted = [torch.einsum("bi,bij->bj", vector.double(), jacobians).square().sum() for vector in drawn]
        torch.testing.assert_close(norm, sum(wanted) / (18 * probes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_probes_where_no_kernel_can_run_have_variance_one(without_kernels, distribution, dtype):
    """The estimate of the identity's norm is the probe's mean square, in f's dtype."""
    z = torch.zeros(16, 64, dtype=dtype)
    torch.manual_seed(2)
    norms = td.jacobian_norm(lambda z: z + 0, z, 8, distribution, reduction="none")
    assert norms.dtype == torch.float32
    deviation = norms - 1
    if distribution == "rademacher":
        assert deviation.abs().max() == 0
    else:  # the variance of a mean of 512 squares is 2 / 512
        assert 0 < deviation.abs().max() < 5 * math.sqrt(2 / 512)


def test_norm_where_no_kernel_can_run_under_torch_compile(without_kernels):
    f, weight, _ = tanh_map(2, 5)
    z = torch.randn(2, 5, dtype=torch.float64)

    def norm(z):
        return td.jacobian_norm(f, z, 2)

    values, gradients = [], []
    for call in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        values.append(call(z))
        gradients.append(torch.autograd.grad(values[-1], weight)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_norm_with_both_backends_is_the_same_number(device):
    f, *_ = tanh_map(2, 7, device=device)
    z = torch.randn(2, 7, dtype=torch.float64, device=device)
    values = [
        td.jacobian_norm(f, z, 2, generator=torch.Generator().manual_seed(3), backend=backend)
        for backend in ("reference", "triton")
    ]
    torch.testing.assert_close(*values)


@pytest.mark.kernels
def test_norm_in_float32_with_the_kernels(device):
    f, weight, _ = tanh_map(2, 7, device=device, dtype=torch.float32)
    z = torch.randn(2, 7, device=device)
    out = [
        torch.autograd.grad(
            td.jacobian_norm(f, z, 2, generator=torch.Generator().manual_seed(3), backend=backend), weight
        )[0]
        for backend in ("reference", "triton")
    ]
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_the_same_estimate_from_the_full_jacobian(backend, device):
    """In z, and in what f closes over, with the same probe."""
    from triton_deq.ops.jacobian import probe

    f, weight, bias = tanh_map(2, 5, device=device)
    z = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    norm = td.jacobian_norm(f, z, generator=torch.Generator().manual_seed(7), backend=backend)
    mine = torch.autograd.grad(norm, (z, weight, bias))

    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(7)).to(device)
    epsilon = probe(z, seed, 0, "gaussian", "reference")
    products = torch.einsum("bi,bij->bj", epsilon, full_jacobians(f, z))
    wanted_norm = products.square().sum() / z.numel()
    wanted = torch.autograd.grad(wanted_norm, (z, weight, bias))
    torch.testing.assert_close(norm, wanted_norm)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_norm_under_torch_compile(distribution):
    """In one graph: the product is written out in the forward, so that one backward suffices."""
    _, weight, bias = tanh_map(2, 5)
    z = torch.randn(2, 5, dtype=torch.float64)

    def norm(weight):
        return td.jacobian_norm(
            lambda z: torch.tanh(z @ weight.T + bias), z, 2, distribution, backend="reference"
        )

    values, gradients = [], []
    for call in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        values.append(call(weight))
        gradients.append(torch.autograd.grad(values[-1], weight)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wrapped", [False, True], ids=["compiled itself", "compiled within"])
def test_norm_of_an_f_that_was_compiled_by_itself(wrapped):
    """A compiled function has no double backward; f is asked as it was written."""
    f, weight, _ = tanh_map(2, 5)
    z = torch.randn(2, 5, dtype=torch.float64)
    compiled = torch.compile(f, backend="aot_eager")
    values, gradients = [], []
    for each in (f, (lambda z: compiled(z)) if wrapped else compiled):
        torch.manual_seed(3)
        values.append(td.jacobian_norm(each, z, backend="reference"))
        gradients.append(torch.autograd.grad(values[-1], weight)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_norm_of_a_value_that_a_compiled_f_computed():
    f, weight, _ = tanh_map(2, 5)
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(f, backend="aot_eager")
    value = 2 * compiled(3 * z)
    norm = td.jacobian_norm_of(value, z, backend="reference")  # a number it is
    with pytest.raises(RuntimeError, match=r"call jacobian_norm\(f, z\)"):
        norm.backward()
    # What was compiled upstream of f does no harm: that is differentiated once.
    scaled = torch.compile(lambda weight: 2 * weight, backend="aot_eager")(weight)
    norm = td.jacobian_norm_of(torch.tanh(z @ scaled.T), z, backend="reference")
    (found,) = torch.autograd.grad(norm, weight)
    assert found.isfinite().all()
    assert found.any()


def test_norm_of_what_does_not_depend_on_z():
    constant = torch.ones(2, 3)
    assert td.jacobian_norm(lambda z: constant, torch.zeros(2, 3)).item() == 0
    with torch.no_grad():
        assert td.jacobian_norm(lambda z: constant, torch.zeros(2, 3)).item() == 0
    assert td.jacobian_norm(torch.tanh, torch.zeros(0, 3)).item() == 0


def test_norm_without_gradients():
    f, *_ = tanh_map(2, 5)
    with torch.no_grad():
        assert not td.jacobian_norm(f, torch.randn(2, 5, dtype=torch.float64)).requires_grad


def test_norm_in_the_transforms_of_torch_func():
    weight, z = 0.3 * torch.randn(5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def norm(weight, z):
        generator = torch.Generator().manual_seed(0)
        f = lambda z: torch.tanh(z @ weight)  # noqa: E731
        return td.jacobian_norm(f, z, 2, generator=generator, backend="reference")

    leaves = weight.clone().requires_grad_(), z.clone().requires_grad_()
    wanted = torch.autograd.grad(norm(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(norm, (0, 1))(weight, z), wanted)
    along = torch.randn_like(weight)
    tangent = torch.func.jvp(lambda weight: norm(weight, z), (weight,), (along,))[1]
    torch.testing.assert_close(tangent, (wanted[0] * along).sum())
    several = torch.vmap(lambda weight: norm(weight, z), randomness="same")(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(several, torch.stack([norm(weight, z), norm(2 * weight, z)]))


@pytest.mark.parametrize("closed", [False, True])
def test_in_inference_mode_as_without_gradients(closed):
    """There the engine records nothing, and a product would be 0."""
    cell = td.MLPCell(6, 4).eval()
    x, z = torch.randn(3, 4), torch.randn(3, 6)
    with torch.no_grad():
        u = cell.inject(x)
    f = Injected(cell, u) if closed else lambda z: cell(z, u)

    def found(z):
        generator = torch.Generator().manual_seed(0)
        return td.jacobian_norm(f, z, generator=generator, backend="reference"), td.spectral_radius(f, z)

    with torch.no_grad():
        wanted = found(z)
    assert all((each > 0).all() for each in wanted)
    with torch.inference_mode():
        torch.testing.assert_close(found(z), wanted)
        torch.testing.assert_close(found(z + 0), wanted)  # made there


def test_what_inference_mode_has_made_is_named():
    with torch.inference_mode():
        x = torch.randn(3, 6)
        with pytest.raises(RuntimeError, match="f closes over a tensor that torch.inference_mode"):
            td.spectral_radius(lambda z: torch.tanh(z * x), torch.randn(3, 6))
        with pytest.raises(RuntimeError, match="f's own"):
            td.jacobian_norm(failing, torch.randn(3, 6))


def failing(z):
    raise RuntimeError("f's own")


def test_norm_takes_an_f_that_torch_func_cannot():
    """Running statistics are updated in place, which torch.func.vjp refuses."""
    layer = nn.BatchNorm1d(4)
    td.jacobian_norm(lambda z: layer(z) * 0.5, torch.randn(8, 4)).backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("given", ["f", "value"])
def test_norm_of_each_sample(given):
    """In the mean that of each sample's own Jacobian; their mean is what reduction="mean" gives."""
    f, *_ = tanh_map(3, 6)
    z = (torch.arange(1.0, 4)[:, None] * torch.randn(3, 6)).double().requires_grad_()
    wanted = full_jacobians(f, z).square().sum((1, 2)) / 6

    def estimate(probes, reduction):
        generator = torch.Generator().manual_seed(1)
        if given == "f":
            return td.jacobian_norm(f, z, probes, "rademacher", generator, "reference", reduction)
        return td.jacobian_norm_of(f(z), z, probes, "rademacher", generator, "reference", reduction)

    with torch.no_grad() if given == "f" else torch.enable_grad():
        samples = estimate(1000, "none")
    assert samples.shape == (3,)
    torch.testing.assert_close(samples, wanted, rtol=0.05, atol=0, check_dtype=False)
    torch.testing.assert_close(estimate(4, "none").mean(), estimate(4, "mean"))


def test_norm_of_each_sample_with_the_closed_form():
    cell = td.MLPCell(5, 3).double()
    z, u = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    found = [
        td.jacobian_norm(f, z, 3, generator=torch.Generator().manual_seed(2), reduction="none")
        for f in (Closed(cell, u), lambda z: cell(z, u))
    ]
    torch.testing.assert_close(*found)


def test_norm_of_an_empty_batch():
    z = torch.zeros(0, 3, requires_grad=True)
    for value in (
        td.jacobian_norm(torch.tanh, z, 2, reduction="none"),
        td.jacobian_norm_of(torch.tanh(z), z, 2, reduction="none"),
    ):
        assert value.shape == (0,)
    assert td.jacobian_norm_of(torch.tanh(z), z).item() == 0
    assert td.jacobian_norm(torch.tanh, torch.zeros(2, 0), reduction="none").tolist() == [0, 0]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_norm_of_a_value_is_that_of_f(distribution, backend, device):
    f, weight, bias = tanh_map(2, 5, device=device)
    z = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for estimate, first in ((td.jacobian_norm, f), (td.jacobian_norm_of, f(z))):
        generator = torch.Generator().manual_seed(7)
        norm = estimate(first, z, 3, distribution, generator, backend)
        found.append((norm, *torch.autograd.grad(norm, (z, weight, bias), retain_graph=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_norm_of_a_value_leaves_the_graph_to_the_task():
    """As in the authors' code: one evaluation of f serves the loss and the penalty."""
    f, weight, _ = tanh_map(2, 5)
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    value = f(z)
    (value.square().sum() + td.jacobian_norm_of(value, z, 2)).backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not td.jacobian_norm_of(f_with_graph(f, z), z).requires_grad


def f_with_graph(f, z):
    with torch.enable_grad():
        return f(z)


Z = torch.zeros(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: td.jacobian_norm(torch.tanh, Z, 0), ValueError, "probes=0 is too small"),
        (lambda: td.jacobian_norm(torch.tanh, Z, True), TypeError, "probes=True must be an int"),
        (lambda: td.jacobian_norm(torch.tanh, Z, 1, "cauchy"), ValueError, "'cauchy'.*'gaussian'"),
        (lambda: td.jacobian_norm(torch.tanh, Z, generator=3), TypeError, "generator must be"),
        (
            lambda: td.jacobian_norm(torch.tanh, Z, reduction="sum"),
            ValueError,
            "reduction='sum' is unknown: choose one of 'mean', 'none'",
        ),
        (
            lambda: td.jacobian_norm(torch.tanh, torch.zeros(2, 3).long()),
            TypeError,
            "z has dtype torch.int64",
        ),
        (lambda: td.jacobian_norm(lambda z: z.long(), Z), TypeError, r"f\(z\) has dtype torch.int64"),
        (lambda: td.jacobian_norm(lambda z: z[:1], Z), ValueError, r"f\(z\) has shape \(1, 3\)"),
        (lambda: td.spectral_radius(lambda z: z[:1], Z), ValueError, r"f\(z\) has shape \(1, 3\)"),
        (lambda: td.jacobian_norm_of(Z.tanh(), Z, 0), ValueError, "probes=0 is too small"),
        (lambda: td.jacobian_norm_of(Z.tanh(), Z, reduction=None), ValueError, "reduction=None is unknown"),
        (lambda: td.jacobian_norm_of(Z[:1], Z), ValueError, r"value has shape \(1, 3\)"),
        (lambda: td.jacobian_norm_of(torch.tanh, Z), TypeError, "value must be a tensor"),
        (
            lambda: td.jacobian_norm_of(Z.detach().tanh(), Z.detach()),
            ValueError,
            r"z\.requires_grad=False.*z = z\.detach\(\)\.requires_grad_\(\)",
        ),
        (
            lambda: td.jacobian_norm_of(Z.tanh().detach(), Z),
            ValueError,
            r"value\.requires_grad=False.*with gradients enabled",
        ),
        (
            lambda: td.jacobian_norm_of(Z.clone().tanh(), Z.clone()),
            ValueError,
            "value does not depend on z.*the very z",
        ),
        (lambda: td.JacobianPenalty(-1.0), ValueError, r"weight=-1\.0 is outside \[0, ∞\)"),
        (lambda: td.JacobianPenalty(1.0, 1.5), ValueError, r"probability=1\.5 is outside \[0, 1\]"),
        (lambda: td.JacobianPenalty(1.0, -0.5), ValueError, r"probability=-0\.5 is outside \[0, 1\]"),
        (lambda: td.JacobianPenalty(1.0, probes=0), ValueError, "probes=0 is too small"),
        (lambda: td.JacobianPenalty(1.0, seed=-1), ValueError, "seed=-1 is too small"),
    ],
)
def test_what_cannot_be_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def casts_itself(layer):
    def f(z):
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(layer(z.float()))

    return f


@pytest.mark.parametrize("given", ["f", "value"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda layer: lambda z: layer(torch.tanh(layer(z))), torch.bfloat16),
        (lambda layer: lambda z: torch.tanh(layer(z)).to(z.dtype), torch.float32),
        (casts_itself, torch.float32),
    ],
    ids=["bfloat16", "float32", "its own"],
)
def test_norm_under_autocast(make, dtype, given):
    """Close to the float32 one, and a state of float32 gets its gradient in float32."""
    layer = nn.Linear(32, 32)
    f = make(layer)
    start = torch.randn(16, 32)
    found = []
    for enabled in (False, True):
        z = start.clone().requires_grad_()
        generator = torch.Generator().manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                value = f(z)  # as a solve does before: the casts it leaves in autocast's cache
            assert value.dtype == (dtype if enabled else torch.float32)
            if given == "f":
                norm = td.jacobian_norm(f, z, 4, "rademacher", generator)
            else:
                norm = td.jacobian_norm_of(f(z), z, 4, "rademacher", generator)
        assert norm.dtype == torch.float32
        norm.backward()
        assert z.grad.dtype == torch.float32
        found.append((norm.detach(), z.grad, layer.weight.grad))
        layer.zero_grad()
    for exact, mixed in zip(*found, strict=True):
        assert (mixed - exact).norm() < 0.03 * exact.norm()


def test_spectral_radius_under_autocast():
    layer, z = nn.Linear(8, 8), torch.randn(4, 8)
    wanted = td.spectral_radius(layer, z)
    with torch.autocast("cpu", torch.bfloat16):
        found = td.spectral_radius(layer, z)
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0)


class Closed:
    """The cell's f with its closed-form product."""

    def __init__(self, cell, u):
        self.cell, self.u = cell, u

    def __call__(self, z):
        return self.cell(z, self.u)

    def vjp(self, z):
        return self.cell.vjp(z, self.u)


def test_spectral_radius_with_the_closed_form(monkeypatch):
    cell = td.MLPCell(6, 3).double()
    z, u = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    wanted = td.spectral_radius(lambda z: cell(z, u), z)
    monkeypatch.setattr(torch.autograd, "grad", None)
    torch.testing.assert_close(td.spectral_radius(Closed(cell, u), z), wanted)
    with pytest.raises(TypeError):  # the engine is indeed out of reach
        td.spectral_radius(lambda z: cell(z, u), z)


def test_penalty_fires_with_its_probability_and_repeats_from_its_state():
    penalty = td.JacobianPenalty(2.0, probability=0.3, seed=5)
    f, z = (lambda z: 0.5 * z), torch.randn(4, 3)
    fired = [penalty(f, z, "reference").item() > 0 for _ in range(400)]
    assert 0.2 < sum(fired) / 400 < 0.4

    saved = copy.deepcopy(penalty.state_dict())
    following = [penalty(f, z, "reference").item() > 0 for _ in range(50)]
    for again in (td.JacobianPenalty(2.0, probability=0.3), pickle.loads(pickle.dumps(penalty))):
        again.load_state_dict(saved)
        assert [again(f, z, "reference").item() > 0 for _ in range(50)] == following


def test_a_file_of_tensors_holds_a_model_with_its_penalty(tmp_path):
    """One of safetensors, as Hugging Face's libraries save models."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, again = (td.DEQ(td.MLPCell(6, 3), penalty=td.JacobianPenalty(1.0, 0.5)) for _ in range(2))
    model.penalty.draw()
    safetensors.save_model(model, tmp_path / "model.safetensors")
    assert safetensors.load_model(again, tmp_path / "model.safetensors") == (set(), [])
    assert again.penalty.calls == 1
    x = torch.randn(4, 3)
    torch.testing.assert_close(again(x).value, model(x).value)
    assert [again.penalty.draw() for _ in range(20)] == [model.penalty.draw() for _ in range(20)]


def test_ranks_draw_alike_whatever_their_global_generators():
    """τ is the same on every rank; the probes are each rank's own, and repeat from its global seed."""
    f, *_ = tanh_map(4, 3)
    z = torch.randn(4, 3, dtype=torch.float64)

    def rank(global_seed):
        torch.manual_seed(global_seed)
        penalty = td.JacobianPenalty(1.0, probability=0.5, seed=3)
        return [penalty(f, z, "reference").item() for _ in range(40)]

    first, second = rank(10), rank(11)
    fired = [value > 0 for value in first]
    assert fired == [value > 0 for value in second]
    assert 5 < sum(fired) < 35
    assert all(a != b for a, b, fires in zip(first, second, fired, strict=True) if fires)
    assert rank(10) == first


def test_a_draw_ahead_is_the_next_calls_and_is_saved():
    f, z = (lambda z: 0.5 * z), torch.ones(4, 3, dtype=torch.float64)
    ahead, plain = (td.JacobianPenalty(2.0, 0.5, distribution="rademacher", growth=0.5) for _ in range(2))
    for _ in range(20):
        fires = ahead.draw()
        restored = td.JacobianPenalty(2.0, 0.5, distribution="rademacher", growth=0.5)
        restored.load_state_dict(copy.deepcopy(ahead.state_dict()))
        wanted = plain(f, z, "reference").item()
        assert fires == (wanted > 0)
        for penalty in (ahead, restored):
            assert penalty(f, z, "reference").item() == wanted
            assert (penalty.calls, penalty.fired) == (plain.calls, plain.fired)


@pytest.mark.parametrize("ahead", [False, True], ids=["at the call", "ahead"])
def test_a_call_that_checkpointing_repeats_is_no_step(ahead):
    """Three calls a backward pass, with τ, γ, counts and gradients of a model without checkpointing."""
    model = td.DEQ(
        td.MLPCell(6, 3).double(),
        penalty=td.JacobianPenalty(1.0, 0.5, seed=4, growth=0.5),
        backend="reference",
    )
    plain = copy.deepcopy(model)
    x = torch.randn(3, 5, 3, dtype=torch.float64)

    def loss(model, x):
        if ahead:
            model.penalty.draw()
        out = model(x)
        return out.value.square().mean() + out.penalty

    gradients = {}
    for step in range(5):
        for each, call in ((plain, loss), (model, partial(checkpoint, loss, use_reentrant=False))):
            torch.manual_seed(step % 2)  # numbers seen before, in steps that are new
            total = sum(call(each, part) for part in x)
            gradients[each] = torch.autograd.grad(total, tuple(each.parameters()))
        torch.testing.assert_close(gradients[model], gradients[plain])
        assert (model.penalty.calls, model.penalty.fired) == (plain.penalty.calls, plain.penalty.fired)
    assert plain.penalty.calls == 15
    assert 0 < plain.penalty.fired < 15


def test_penalty_is_weight_times_norm():
    z = torch.randn(4, 3, dtype=torch.float64)
    for weight in (0.0, 2.0):
        torch.manual_seed(1)
        penalty = td.JacobianPenalty(weight, distribution="rademacher")(lambda z: 0.5 * z, z, "reference")
        assert math.isclose(penalty.item(), weight * 0.25)


def test_penalty_grows_stops_and_knows_pretraining():
    f, z = (lambda z: 0.5 * z), torch.ones(4, 3, dtype=torch.float64)
    penalty = td.JacobianPenalty(
        2.0, distribution="rademacher", growth=0.5, growth_interval=2, stop_after=5, pretraining_weight=8.0
    )
    values = []
    for call in range(7):
        penalty.pretraining = call == 1
        values.append(penalty(f, z, "reference").item() / 0.25)
    assert values == [2.0, 8.0, 2.5, 2.5, 3.0, 0.0, 0.0]
    assert (penalty.calls, penalty.fired) == (7, 5)
    assert "fired=5 of 7" in repr(penalty)

    again = td.JacobianPenalty(2.0, growth=0.5, growth_interval=2)
    again.load_state_dict(penalty.state_dict())
    assert (again.calls, again.fired) == (7, 5)
    assert again.present_weight == 3.5


@pytest.mark.parametrize(
    "fields",
    [{"growth": -1.0}, {"growth_interval": 0}, {"stop_after": -1}, {"pretraining_weight": -2.0}],
    ids=str,
)
def test_penalty_fields_are_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        td.JacobianPenalty(1.0, **fields)
