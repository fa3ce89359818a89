"""States of several tensors: what a solve of the same, packed by hand, gives."""

import pytest
import torch
from torch import nn

import triton_deq as td
from tests import standin
from triton_deq.solvers.packing import packed

SOLVERS = [td.Anderson(3), td.Broyden(3), td.Picard()]
TIGHT = {"tol": 1e-11, "max_steps": 300, "backend": "reference"}
GRADIENTS = [
    td.ImplicitGradient(tol=1e-12, max_steps=300),
    td.ImplicitGradient(tol=1e-12, max_steps=300, double_backward=True),
    td.PhantomGradient(3),
    td.UnrolledGradient(),
]


def recurrent():
    """An LSTM as a map of `(h, c)`, the same packed by hand, and its parameters."""
    layer = nn.LSTMCell(3, 5).double()
    with torch.no_grad():
        layer.weight_hh.mul_(0.5)
    x = torch.randn(4, 3, dtype=torch.float64)

    def by_hand(z):
        return torch.cat(layer(x, tuple(z.split(5, dim=1))), dim=1)

    return lambda z: layer(x, z), by_hand, list(layer.parameters())


def zeros(*shapes):
    return tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_value_solution_and_gradients_are_those_of_the_packed_state(solver, gradient):
    f, by_hand, parameters = recurrent()
    options = {**TIGHT, "gradient": gradient, "return_solution": True}
    (h, c), solution = td.fixed_point(f, zeros((4, 5), (4, 5)), solver, **options)
    z, wanted = td.fixed_point(by_hand, *zeros((4, 10)), solver, **options)
    assert torch.equal(torch.cat([h, c], dim=1), z)
    assert torch.equal(torch.cat(solution.value, dim=1), wanted.value)
    assert torch.equal(solution.residual, wanted.residual)
    assert solution.nfe == wanted.nfe
    found = torch.autograd.grad(h.sin().sum() + c.cos().sum(), parameters)
    expected = torch.autograd.grad(z[:, :5].sin().sum() + z[:, 5:].cos().sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    if isinstance(gradient, td.ImplicitGradient):
        assert solution.backward.nfe == wanted.backward.nfe


@pytest.mark.kernels
def test_any_shapes_in_any_structure(backend, device):
    """f may write into the solver's history: its value is seen to be the same, step by step."""
    maps, numbers = torch.randn(3, 2, 4, 5, device=device), torch.randn(3, device=device)

    def f(z):
        return {
            "maps": [0.5 * torch.tanh(z["maps"][0] + z["number"][:, None, None, None]) + maps],
            "number": 0.3 * z["maps"][0].mean((1, 2, 3)) + numbers,
        }

    z0 = {"maps": [torch.zeros_like(maps).mT.contiguous().mT], "number": torch.zeros_like(numbers)}
    found = td.solve(f, z0, tol=1e-6, max_steps=60, backend=backend).value
    assert found["maps"][0].shape == maps.shape
    for one, other in zip(
        f(found)["maps"] + [f(found)["number"]], found["maps"] + [found["number"]], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_list_is_as_good_as_a_tuple_and_a_dict_has_no_order():
    f, _, _ = recurrent()
    h0, c0 = zeros((4, 5), (4, 5))
    wanted = td.solve(f, (h0, c0), **TIGHT).value

    def by_name(z):
        (h, c), (same,) = f((z["h"][0], z["c"])), z["h"]
        return {"c": c, "h": (h + 0 * same,)}

    found = td.solve(lambda z: f(tuple(z)), [h0, c0], **TIGHT).value
    named = td.solve(by_name, {"h": [h0], "c": c0}, **TIGHT).value
    assert (type(found), list(named), type(named["h"])) == (list, ["h", "c"], list)
    for one, other, third in zip(wanted, found, (named["h"][0], named["c"]), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def complex_map():
    """A complex linear map, the same of its real and imaginary parts, and its weight."""
    weight = nn.Parameter(0.15 * torch.randn(5, 5, dtype=torch.complex128))
    x = torch.randn(4, 5, dtype=torch.complex128)

    def in_pairs(z):
        return torch.view_as_real(torch.view_as_complex(z.unflatten(1, (5, 2))) @ weight + x).flatten(1)

    return lambda z: z @ weight + x, in_pairs, weight


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_complex_state_is_its_real_and_imaginary_parts(solver, gradient):
    f, in_pairs, weight = complex_map()
    options = {**TIGHT, "gradient": gradient, "return_solution": True}
    z, solution = td.fixed_point(f, torch.zeros(4, 5, dtype=torch.complex128), solver, **options)
    pairs, wanted = td.fixed_point(in_pairs, *zeros((4, 10)), solver, **options)
    assert torch.equal(torch.view_as_real(z).flatten(1), pairs)
    assert torch.equal(torch.view_as_real(solution.value).flatten(1), wanted.value)
    assert solution.nfe == wanted.nfe
    (found,) = torch.autograd.grad((z * z.conj()).real.sum() + z.imag.sum(), weight)
    (expected,) = torch.autograd.grad(pairs.square().sum() + pairs[:, 1::2].sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_norm_and_radius_of_a_complex_map():
    f, _, weight = complex_map()
    z = torch.randn(4, 5, dtype=torch.complex128).conj()
    torch.manual_seed(1)
    found = td.jacobian_norm(f, z, probes=400).mean()
    torch.testing.assert_close(found, weight.abs().square().sum() / 5, rtol=0.05, atol=0)
    radius = torch.linalg.eigvals(weight).abs().max()
    torch.testing.assert_close(td.spectral_radius(f, z), radius.expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("samples", [1, 4])
def test_complex_beside_real(samples):
    """An odd number of real ones before them: no pair begins where a complex number may."""
    x = torch.randn(samples, 3, dtype=torch.complex128)

    def f(z):
        level = 0.3 * z["field"].abs().mean(1) + 0.1
        return {"level": level[:, None], "field": (0.2 + 0.3j) * z["field"] * z["level"].cos() + x}

    z0 = {"level": zeros((samples, 1))[0], "field": torch.zeros_like(x)}
    found = td.solve(f, z0, **TIGHT).value
    assert found["field"].dtype == torch.complex128
    for name, value in f(found).items():
        torch.testing.assert_close(value, found[name], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match=r"f\(z\) is .*field: \(3,\).*field.real and imaginary: \(3, 2\)"):
        td.solve(lambda z: {**z, "field": z["field"].real}, z0)


def test_a_deq_of_a_complex_state_trains():
    """The initial state is shaped after the injection, so that is complex."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.15 * torch.randn(5, 5, dtype=torch.complex64))

        def inject(self, x):
            return torch.fft.fft(x)

        def forward(self, z, u):
            return z @ self.weight + u

    deq = td.DEQ(Cell(), penalty=td.JacobianPenalty(0.1), tol=1e-6).train()
    out = deq(torch.randn(4, 5))
    assert out.value.dtype == torch.complex64
    assert out.solution.converged.all()
    (out.value.abs().square().mean() + out.penalty).backward()
    assert deq.cell.weight.grad.isfinite().all()
    assert out.solution.backward.converged.all()


def test_norm_radius_and_penalty():
    f, by_hand, parameters = recurrent()
    h, c = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    z = torch.cat([h, c], dim=1)

    def of(function, f, z):
        torch.manual_seed(3)
        return function(f, z)

    for function in (td.jacobian_norm, td.spectral_radius, td.JacobianPenalty(0.7)):
        torch.testing.assert_close(of(function, f, (h, c)), of(function, by_hand, z))
    silent = td.JacobianPenalty(0.7, probability=0.0)
    assert silent(f, (h, c)).item() == 0
    found, wanted = (
        torch.autograd.grad(of(td.jacobian_norm, *given), parameters) for given in ((f, (h, c)), (by_hand, z))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTMCell(3, 5)
        with torch.no_grad():
            self.layer.weight_hh.mul_(0.5)

    def inject(self, x):
        return x

    def initial_state(self, u):
        return u.new_zeros(len(u), 5), u.new_zeros(len(u), 5)

    def forward(self, z, u):
        return self.layer(u, z)

    def select(self, u, samples):
        return u[samples]


def test_a_deq_of_several_tensors():
    cell, x = Cell(), torch.randn(4, 3) * torch.tensor([[0.01], [0.1], [1], [10]])
    deq = td.DEQ(cell, tol=1e-6, penalty=td.JacobianPenalty(0.5), backend="reference")
    out = deq(x)
    assert out.solution.converged.all()
    for value in (out.value, out.solution.value):
        assert [part.shape for part in value] == [(4, 5), (4, 5)]
    (out.value[0].square().sum() + out.penalty).backward()
    assert out.penalty.item() > 0
    assert out.solution.backward.converged.all()
    assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())
    with torch.no_grad():
        compacted = td.DEQ(cell, tol=1e-6, compact=0.75, backend="reference")(x)
        again = deq(x, out.value)
    torch.testing.assert_close(compacted.value, out.value, rtol=1e-4, atol=1e-5)
    assert (again.solution.steps == 1).all()


@pytest.mark.kernels
def test_a_deq_of_several_tensors_in_graphs(device, monkeypatch):
    standin.step_by_step(monkeypatch)
    if device != "cuda":
        standin.install(monkeypatch)
    cell, options = Cell().to(device), {"tol": 1e-5, "max_steps": 13, "backend": "triton"}
    plain, graphed = td.DEQ(cell, **options), td.DEQ(cell, **options, graph=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 3, device=device)
            found, wanted = graphed(x), plain(x)
            assert found.solution.path == "graph"
            for one, other in zip(found.value, wanted.value, strict=True):
                assert torch.equal(one, other)


def test_compiled_exported_and_transformed():
    f, *_ = recurrent()
    cell, x = Cell(), torch.randn(4, 3)
    wanted = td.DEQ(cell, max_steps=6, backend="reference")(x).value
    compiled = torch.compile(td.DEQ(cell, max_steps=6), backend="eager", fullgraph=True)
    exported = torch.export.export(td.DEQ(cell, max_steps=6).eval(), (x,)).module()
    for called in (compiled, exported):
        torch.testing.assert_close(called(x).value, wanted, rtol=1e-5, atol=1e-6)
    z0 = zeros((4, 5), (4, 5))

    def solved(scale):
        return td.fixed_point(lambda z: f((scale * z[0], z[1])), z0, gradient=GRADIENTS[0], **TIGHT)[0].sum()

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(solved(scale), scale)
    torch.testing.assert_close(torch.func.grad(solved)(scale.detach()), slope, rtol=1e-9, atol=0)


def test_not_converged_has_the_state():
    f, *_ = recurrent()
    for call in (td.solve, td.fixed_point):
        with pytest.raises(td.NotConverged) as raised:
            call(f, zeros((4, 5), (4, 5)), max_steps=2, throw=True)
        assert [part.shape for part in raised.value.solution.value] == [(4, 5), (4, 5)]


def test_empty_batch():
    h, c = td.solve(lambda z: z, zeros((0, 5), (0, 2, 3))).value
    assert (h.shape, c.shape) == ((0, 5), (0, 2, 3))


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        ((), TypeError, "got tuple of nothing"),
        ((torch.zeros(2, 3), 1.0), TypeError, "got tuple of Tensor, float"),
        (
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
            TypeError,
            "tensor 1 of z0 has dtype torch.int64",
        ),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, "tensor 1 of z0 has 3 samples"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2).double()},
            ValueError,
            "tensor 1 of z0 has 2 samples of torch.float64",
        ),
    ],
)
def test_a_state_that_cannot_be(z0, error, message):
    with pytest.raises(error, match=message):
        td.solve(lambda z: z, z0)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[0], ValueError, r"f\(z\) is a Tensor of shapes .*\(5,\)"),
        (lambda z: {"h": z[0], "c": z[1]}, ValueError, r"f.z. is a dict of shapes \[h: \(5,\), c: \(5,\)\]"),
        (lambda z: (*z, z[0]), ValueError, r"f.z. is a tuple of shapes .*2: \(5,\)"),
        (lambda z: (z[0], z[1][:, :3]), ValueError, r"0: \(5,\), 1: \(3,\)"),
        (lambda z: (z[0], None), ValueError, "NoneType"),
        (lambda z: (z[0], z[1].mean()), ValueError, "1: Tensor"),
        (lambda z: (z[0].float(), z[1].float()), TypeError, "dtype torch.float32"),
        (lambda z: (z[0][:2], z[1][:2]), ValueError, r"shape \(2, 10\), z has \(4, 10\)"),
    ],
)
def test_a_value_that_cannot_be(f, error, message):
    z0 = zeros((4, 5), (4, 5))
    for call in (td.solve, td.fixed_point, td.jacobian_norm):
        if call is td.jacobian_norm and error is TypeError:  # it takes a value of another dtype
            continue
        with pytest.raises(error, match=message):
            call(f, z0)
    wrapped, rows, _ = packed("z0", f, z0)
    with pytest.raises(error, match=message):
        wrapped.write(rows, torch.empty_like(rows))
