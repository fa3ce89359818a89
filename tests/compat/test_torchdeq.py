"""TorchDEQ's own functions are what ours are held against: same options, same numbers in float64."""

import argparse
import copy
import importlib.metadata
import pickle
import sys

import pytest
import torch
import torchdeq
from torch import nn
from torchdeq.solver import anderson as their_anderson
from torchdeq.solver import broyden as their_broyden
from torchdeq.solver import fp_iter as their_fixed_point

import triton_deq.compat.torchdeq as compat
from triton_deq import backend

THEIRS = {
    "anderson": their_anderson.anderson_solver,
    "broyden": their_broyden.broyden_solver,
    "fixed_point_iter": their_fixed_point.fixed_point_iter,
}
OURS = {
    "anderson": compat.anderson_solver,
    "broyden": compat.broyden_solver,
    "fixed_point_iter": compat.fixed_point_iter,
}
INFO = {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius"}


@pytest.fixture(autouse=True)
def _uninstall():
    yield
    compat.uninstall()


def problem(batch=4, entries=17, norm=0.7, dtype=torch.float64):
    """A contraction in unlike scales, `[batch, entries]`."""
    weight = torch.randn(entries, entries, dtype=torch.float64)
    weight *= norm / torch.linalg.matrix_norm(weight, 2)
    scale = torch.logspace(-1, 1, batch, dtype=torch.float64)[:, None]
    x = (scale * torch.randn(batch, entries, dtype=torch.float64)).to(dtype)
    weight = weight.to(dtype)
    return (lambda z: torch.tanh(z @ weight) + x), torch.zeros_like(x)


def assert_same(ours, theirs, tolerance=1e-10):
    """The result, the states, and the statistics with their keys, shapes and dtypes."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=tolerance)
    assert len(ours[1]) == len(theirs[1])
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    assert ours[2].keys() == theirs[2].keys() == INFO
    assert type(ours[2]) is type(theirs[2])
    for key, value in theirs[2].items():
        torch.testing.assert_close(
            ours[2][key], value, rtol=1e-7, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )


CASES = [
    *(("anderson", options) for options in (
        {}, {"tol": 1e-6}, {"tau": 0.7}, {"m": 3, "lam": 1e-2}, {"m": 2},
        {"return_final": True, "max_iter": 9}, {"indexing": [3, 5, 8], "max_iter": 12, "tol": 0.0},
    )),
    *(("broyden", options) for options in (
        {}, {"tol": 1e-6, "max_iter": 60}, {"LBFGS_thres": 3}, {"LBFGS_thres": 3, "ls": True}, {"ls": True},
        {"return_final": True, "max_iter": 9}, {"indexing": [3, 5, 8], "max_iter": 12, "tol": 0.0},
    )),
    *(("fixed_point_iter", options) for options in (
        {}, {"tol": 1e-6}, {"tau": 0.7}, {"return_final": True, "max_iter": 9},
        {"indexing": [1, 5, 8], "max_iter": 12, "tol": 0.0},
    )),
]  # fmt: skip


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_numbers_are_theirs(name, options, stop_mode):
    f, x0 = problem(norm=1.2 if name == "broyden" else 0.7)
    ours = OURS[name](f, x0, stop_mode=stop_mode, backend="reference", **options)
    assert_same(ours, THEIRS[name](f, x0, stop_mode=stop_mode, **options))


@pytest.mark.kernels
@pytest.mark.parametrize("name", OURS)
def test_the_kernels_numbers_are_theirs(name, device):
    f, x0 = problem(batch=2, entries=5)
    theirs = THEIRS[name](f, x0, max_iter=7, tol=0.0, indexing=[4, 7])
    on_device = (lambda z: f(z.cpu()).to(device)), x0.to(device)
    ours = OURS[name](*on_device, max_iter=7, tol=0.0, indexing=[4, 7], backend="triton")
    assert_same(
        (
            ours[0].cpu(),
            [state.cpu() for state in ours[1]],
            type(ours[2])({k: v.cpu() for k, v in ours[2].items()}),
        ),
        theirs,
    )


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["anderson", "fixed_point_iter"])
def test_a_sample_that_is_not_finite_holds_nobody_up(name, backend):
    f, x0 = problem(batch=3, entries=5)

    def spoilt(z):
        value = f(z)
        value[1] = torch.nan
        return value

    calls = []
    result, _, info = OURS[name](lambda z: (calls.append(1), spoilt(z))[1], x0, backend=backend)
    expected, _, _ = OURS[name](f, x0, backend=backend)
    torch.testing.assert_close(result[::2], expected[::2], rtol=0, atol=1e-3)
    assert torch.equal(result[1], x0[1])
    assert len(calls) < 50
    assert (info["abs_lowest"][::2] < 1e-3).all()
    assert info["abs_lowest"][1] == 1e8


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(4,), (), (0, 5), (2, 0), (2, 3, 2, 2)], ids=str)
def test_any_shape(name, shape):
    x0 = torch.zeros(shape, dtype=torch.float64)
    if len(shape) == 4:
        x0 = x0.to(memory_format=torch.channels_last)
    seen = []
    result, states, info = OURS[name](
        lambda z: (seen.append(z), torch.cos(z) * 0.5)[1], x0, tol=1e-9, indexing=[5], backend="reference"
    )
    assert result.shape == shape
    assert len(states) == 1
    assert info.keys() == INFO
    if x0.numel():
        torch.testing.assert_close(result, 0.5 * torch.cos(result), rtol=0, atol=1e-8)
        assert all(z.shape == shape and z.stride() == x0.stride() for z in seen)
        theirs = THEIRS[name](lambda z: torch.cos(z) * 0.5, x0, tol=1e-9)
        assert info["abs_trace"].shape == theirs[2]["abs_trace"].shape
    else:
        assert not seen
        assert info["abs_trace"].shape[0] == len(x0)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works(name, dtype):
    f, x0 = problem(dtype=torch.float32)
    result, _, info = OURS[name](
        lambda z: f(z.float()).to(dtype), x0.to(dtype), stop_mode="rel", tol=2e-2, backend="reference"
    )
    assert result.dtype == dtype
    assert info["rel_trace"].dtype == torch.float32
    torch.testing.assert_close(result.float(), f(result.float()), rtol=5e-2, atol=5e-2)
    if name == "anderson":
        with pytest.raises(RuntimeError):
            THEIRS[name](lambda z: f(z.float()).to(dtype), x0.to(dtype))


@pytest.mark.parametrize("name", OURS)
def test_a_function_may_return_one_memory_each_time(name):
    """As a captured graph does."""
    f, x0 = problem()
    memory = torch.empty_like(x0)
    kept = OURS[name](
        lambda z: memory.copy_(f(z)), x0, max_iter=9, tol=0.0, indexing=[4], backend="reference"
    )
    assert_same(kept, THEIRS[name](f, x0, max_iter=9, tol=0.0, indexing=[4]))


def test_a_line_search_where_a_function_returns_one_memory_each_time():
    f, x0 = problem(norm=3.0)
    memory = torch.empty_like(x0)
    options = {"max_iter": 8, "tol": 0.0, "ls": True}
    kept = OURS["broyden"](lambda z: memory.copy_(f(z)), x0, backend="reference", **options)
    assert_same(kept, OURS["broyden"](f, x0, backend="reference", **options))


def test_a_function_may_not_change_what_it_returned():
    f, x0 = problem()
    memory = [torch.empty_like(x0), torch.empty_like(x0)]

    def alternating(z):
        memory.reverse()
        return memory[0].copy_(f(z))

    with pytest.raises(RuntimeError, match="let it return a clone"):
        compat.anderson_solver(alternating, x0, max_iter=9, tol=0.0, backend="reference")


def test_few_evaluations_give_the_better_of_them():
    f, x0 = problem()
    result, _, info = compat.anderson_solver(f, x0, max_iter=2, backend="reference")
    assert torch.equal(result, f(f(x0)))
    torch.testing.assert_close(info["abs_lowest"], (f(f(x0)) - f(x0)).norm(dim=1))
    assert (info["nstep"] == 2).all()


class Layer(nn.Module):
    """z ↦ tanh(W z + x), and for two states each with the other's."""

    def __init__(self, entries=6):
        super().__init__()
        self.linear = nn.Linear(entries, entries).double()
        with torch.no_grad():
            self.linear.weight *= 0.5

    def one(self, x):
        return lambda z: torch.tanh(self.linear(z) + x)

    def two(self, x):
        return lambda a, b: (torch.tanh(self.linear(b) + x), 0.3 * torch.sin(self.linear(a)) + x)


def trained(core, several, install=None, **options):
    """The outputs, the gradient and the statistics of one training step."""
    torch.manual_seed(1)
    layer, x = Layer(), torch.randn(3, 6, dtype=torch.float64)
    if install is not None:
        compat.install(backend="reference", **install)
    seen = []
    f_tol = 0.0 if options.keys() & {"n_states", "indexing"} else 1e-9  # see the next test
    deq = torchdeq.get_deq(core=core, **{"f_tol": f_tol, "b_tol": 1e-9, **options})
    start = [torch.zeros_like(x)] * 2 if several else torch.zeros_like(x)
    out, info = deq(layer.two(x) if several else layer.one(x), start, backward_writer=seen.append)
    flat = [each if torch.is_tensor(each) else torch.cat(list(each), dim=1) for each in out]
    sum((step + 1) * state.square().sum() for step, state in enumerate(flat)).backward()
    return flat, layer.linear.weight.grad, info, seen


DEQS = [
    {"ift": True},
    {"hook_ift": True},
    {"grad": 3, "tau": 0.8},
    {"grad": [1, 2], "n_states": 2, "f_max_iter": 12},
    {"ift": True, "indexing": [4, 8], "f_max_iter": 12},
    {"ift": True, "n_states": 3, "f_max_iter": 12},
]


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize("several", [False, True], ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("options", DEQS, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_a_training_step_is_theirs(name, options, several, core):
    solvers = {"f_solver": name, "b_solver": name, "f_max_iter": 30, **options}
    theirs = trained(core, several, **solvers)
    for install, prefix in (({}, "triton_"), ({"replace": True}, "")):
        chosen = {**solvers, "f_solver": prefix + name, "b_solver": prefix + name}
        ours = trained(core, several, install, **chosen)
        assert len(ours[0]) == len(theirs[0])
        for one, other in zip(ours[0], theirs[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-7, atol=1e-7)
        assert ours[2].keys() == theirs[2].keys()
        assert len(ours[3]) == len(theirs[3])
        compat.uninstall()


def test_every_state_asked_for_comes_with_its_gradient():
    """TorchDEQ pairs what is left with the wrong gradients when the solve ends early."""
    options = {
        "ift": True,
        "n_states": 4,
        "f_max_iter": 40,
        "f_tol": 1e-3,
        "f_solver": "triton_anderson",
        "b_solver": "triton_anderson",
    }
    out, _, _, backward = trained("indexing", False, {}, **options)
    assert len(out) == 4
    assert len(backward) == 1, "the implicit gradient was not taken"


def test_evaluation_gives_the_equilibrium_and_the_radius():
    compat.install(losses=True, backend="reference")
    layer, x = Layer(), torch.randn(3, 6, dtype=torch.float64)
    deq = torchdeq.get_deq(f_solver="triton_broyden", f_tol=1e-9).eval()
    (z,), info = deq(layer.one(x), torch.zeros_like(x), sradius_mode=True)
    torch.testing.assert_close(z, layer.one(x)(z), rtol=0, atol=1e-8)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, x: torch.tanh(layer.linear(z) + x)))(z, x)
    torch.testing.assert_close(
        info["sradius"], torch.linalg.eigvals(jacobian).abs().amax(1).detach(), rtol=1e-4, atol=0
    )


def test_a_deq_can_be_copied_and_pickled():
    compat.install(backend="reference")
    deq = torchdeq.get_deq(f_solver="triton_anderson")
    for same in (copy.deepcopy(deq), copy.deepcopy(pickle.loads(pickle.dumps(deq.f_solver)))):
        solver = getattr(same, "f_solver", same)
        f, x0 = problem()
        torch.testing.assert_close(solver(f, x0)[0], deq.f_solver(f, x0)[0], rtol=0, atol=0)


def test_losses(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)  # thousands of probes
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    f = lambda z: torch.tanh(z @ weight)  # noqa: E731
    value = f(z)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(z @ weight)))(z)

    loss = compat.jac_reg(value, z, vecs=4000)
    torch.testing.assert_close(loss, (jacobian.square().sum() / z.numel()), rtol=0.1, atol=0)
    loss.backward()
    assert weight.grad is not None
    assert not compat.jac_reg(f(z), z, create_graph=False).requires_grad

    vector, radius = compat.power_method(f(z), z)
    torch.testing.assert_close(
        radius, torch.linalg.eigvals(jacobian).abs().amax(1).detach(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_the_vector_of_a_real_eigenvalue_is_an_eigenvector():
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64)
    weight = weight + weight.T
    vector, radius = compat.power_method(z @ weight, z)
    product = vector @ weight
    torch.testing.assert_close(product.norm(dim=1), radius, rtol=1e-8, atol=0)
    cosine = (product * vector).sum(1).abs() / radius
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-8, atol=0)


def test_installing_and_taking_back():
    registry = torchdeq.solver._solvers
    before = dict(registry), torchdeq.get_deq, torchdeq.core.DEQBase.__init__, torchdeq.jac_reg
    compat.install(replace=True, losses=True)
    assert registry["anderson"].func is registry["triton_anderson"].func is compat.anderson_solver
    assert torchdeq.loss.jac_reg is torchdeq.jac_reg is compat.jac_reg
    assert torchdeq.core.power_method is compat.power_method
    compat.install()
    assert registry["anderson"] is THEIRS["anderson"]
    compat.uninstall()
    compat.uninstall()
    assert (dict(registry), torchdeq.get_deq, torchdeq.core.DEQBase.__init__, torchdeq.jac_reg) == before


def test_an_unknown_option_of_a_solver():
    f, x0 = problem()
    with pytest.raises(
        TypeError, match=r"has no option 'taw' \(did you mean 'tau'\?\).*It has: func, x0, max_iter"
    ):
        compat.anderson_solver(f, x0, taw=0.5)
    with pytest.warns(UserWarning, match="no option 'lamb'"):
        compat.broyden_solver(f, x0, lamb=0.5, strict=False, backend="reference")


def test_an_option_of_another_solver_is_passed_by_with_a_warning():
    """TorchDEQ's own MDEQ gives `tau` to whichever solver its command line names."""
    f, x0 = problem()
    plain = compat.broyden_solver(f, x0, backend="reference")[0]
    with pytest.warns(UserWarning, match="broyden_solver.. has no option 'm', 'tau'.*It is ignored"):
        given = compat.broyden_solver(f, x0, m=3, tau=0.5, backend="reference")[0]
    assert torch.equal(given, plain)
    with pytest.warns(UserWarning, match="'ls'"), pytest.raises(TypeError, match="no option 'lamb'"):
        compat.fixed_point_iter(f, x0, ls=True, lamb=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_mode": "relative"}, "stop_mode='relative' is unknown: choose one of 'abs', 'rel'"),
        ({"max_iter": 0}, "max_iter=0 is too small"),
        ({"tol": -1.0}, r"tol=-1.0 is outside"),
        ({"m": 0}, "m=0 is too small"),
        ({"tau": 0.0}, "tau=0.0 is outside"),
        ({"lam": -1.0}, "lam=-1.0 is outside"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_bad_numbers(options, message):
    f, x0 = problem()
    with pytest.raises(ValueError, match=message):
        compat.anderson_solver(f, x0, **options)


def test_bad_states():
    f, x0 = problem()
    with pytest.raises(TypeError, match="x0 must be a tensor, got list"):
        compat.anderson_solver(f, [x0])
    with pytest.raises(ValueError, match=r"func\(x\) has shape \(4, 16\), x0 has \(4, 17\)"):
        compat.anderson_solver(lambda z: z[:, 1:], x0, backend="reference")


def test_what_get_deq_ignores_is_reported():
    compat.install()
    with pytest.raises(
        TypeError, match=r"ignores 'stop_mode'.*give it as f_stop_mode or b_stop_mode.*f_max_iter"
    ):
        torchdeq.get_deq(f_solver="triton_anderson", stop_mode="rel")
    with pytest.raises(TypeError, match=r"'f_sover' \(did you mean 'f_solver'\?\)"):
        torchdeq.get_deq(f_sover="anderson")
    with pytest.raises(TypeError, match="ignores 'm'.*solver_kwargs"):
        torchdeq.core.DEQSliced(m=3)
    with pytest.warns(UserWarning, match=r"'f_max_iters' \(did you mean 'f_max_iter'\?\)"):
        torchdeq.get_deq(argparse.Namespace(f_max_iters=3, learning_rate=1e-3, epochs=4))
    with pytest.warns(UserWarning, match="ignores 'tol'"):
        torchdeq.core.DEQIndexing({"tol": 1e-3})
    compat.install(strict=False)
    with pytest.warns(UserWarning, match="ignores 'stop_mode'"):
        torchdeq.get_deq(stop_mode="rel")


def test_what_get_deq_knows_is_not_reported(recwarn):
    compat.install()
    parser = argparse.ArgumentParser()
    torchdeq.add_deq_args(parser)
    parser.add_argument("--epochs", default=3)
    torchdeq.get_deq(parser.parse_args(["--f_solver", "triton_anderson", "--core", "indexing"]))
    torchdeq.get_deq(f_solver="triton_broyden", n_states=2, norm_type="none", no_stat=False)
    assert not recwarn.list


def test_torchdeq_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(
        ImportError, match=r"pip install torchdeq==0.1.0 \(this module was tested with TorchDEQ 0.1.0\)"
    ):
        compat.install()


def test_torchdeq_of_another_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(
        ImportError, match=r"TorchDEQ 0.2.0 is installed.*tested with TorchDEQ 0.1.0.*strict=False"
    ):
        compat.install()
    with pytest.warns(UserWarning, match="TorchDEQ 0.2.0 is installed"):
        compat.install(strict=False)
