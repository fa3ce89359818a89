"""The multiscale cell: against the layer written out plainly, its product against the autograd engine."""

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import triton_deq as td
from bench.peers.mdeq import PlainMDEQ
from tests.counters import Counter
from triton_deq.backend import ambient
from triton_deq.cells import MDEQCell
from triton_deq.cells.layers import normalise_kernels
from triton_deq.cells.mdeq_layers import pack, unpack
from triton_deq.deq import Injected

kernels = pytest.mark.kernels


@pytest.fixture
def reference(monkeypatch):
    """Without the interpreter, which would only take its time where the kernels are not what is tested."""
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)


def setup(channels=(4, 8), dropout=0.0, batch=2, size=(4, 8), dtype=torch.float64, **options):
    """A cell with parameters of all kinds, its u, a state with a gradient, and the features."""
    torch.manual_seed(0)
    cell = MDEQCell(channels, 2, 2, dropout=dropout, init_std=0.3, **options).to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(batch, channels[0], *size, dtype=dtype, requires_grad=True)
    u = cell.inject(x)
    z = torch.randn(cell.initial_state(u).shape, dtype=dtype, requires_grad=True)
    return cell, x, u, z


def plainly(z, u):
    """A state in the order of the plain layer: each map as channel, row, column."""
    return torch.cat([each.flatten(1) for each in unpack(z, u.scales)], 1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("channels", [(6,), (4, 8), (4, 4, 8, 8)], ids=str)
def test_value_product_and_penalty_are_the_plain_layers(channels, dropout, reference):
    size = (8, 16) if len(channels) > 2 else (4, 8)
    cell, x, u, z = setup(channels, dropout, size=size, post_affine=dropout == 0)
    at = plainly(z, u)
    expected = PlainMDEQ(cell, x, u.masks)(at)
    value, pullback = cell.vjp(z, u)
    torch.testing.assert_close(plainly(value, u), expected)
    torch.testing.assert_close(cell(z, u), value)

    probe = torch.randn_like(z)
    product = pullback(probe)
    (wanted,) = torch.autograd.grad(expected, at, plainly(probe, u), create_graph=True)
    torch.testing.assert_close(plainly(product, u), wanted)

    leaves = [x, z, *cell.parameters()]
    found, expected = (
        torch.autograd.grad(p.square().sum() + v.square().sum(), leaves)
        for p, v in ((product, value), (wanted, expected))
    )
    torch.testing.assert_close(found, expected)


def test_the_product_is_the_jacobian(reference):
    cell, _, u, z = setup(size=(2, 2), batch=1)
    full = jacobian(lambda z: cell(z, u), z)[0, :, 0]
    _, pullback = cell.vjp(z, u)
    probes = torch.eye(z.shape[1], dtype=z.dtype)[:, None]
    torch.testing.assert_close(pullback(probes)[:, 0], full)
    torch.testing.assert_close(pullback(probes[:4].reshape(2, 2, 1, -1))[1, 1, 0], full[3])


@kernels
def test_kernels_are_the_reference(device):
    """Value, product and the penalty's gradient, with a dropout; and the places that steps write to."""
    found = []
    for backend in ("reference", "triton"):
        cell, x, u, z = setup(dropout=0.5, size=(2, 4), batch=1)
        cell, x, z = cell.to(device), x.detach().to(device).requires_grad_(), z.detach().to(device)
        z.requires_grad_()
        with ambient(backend):
            torch.manual_seed(1)
            u = cell.inject(x)
            value, pullback = cell.vjp(z, u)
            product = pullback(torch.ones_like(z))
            loss = product.square().sum() + value.square().sum()
            gradients = torch.autograd.grad(loss, [x, z, *cell.parameters()])
            with torch.no_grad():
                out, back = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
                cell.write(z, u, out)
                pullback.plus(z).write(torch.ones_like(z), back)
        torch.testing.assert_close(out, value.detach())
        torch.testing.assert_close(back, (product + z).detach())
        found.append([value, product, *gradients])
    torch.testing.assert_close(found[1], found[0])


@kernels
def test_a_step_is_convolutions_and_one_launch_for_all_between_two(device):
    """8 convolutions, a GroupNorm behind each and one more in each block, 2 sums; nothing else moves data.

    GroupNorms of both resolutions share a launch: 3 of the blocks, that of the paths, the final one.
    """
    # cuDNN has no channels-last convolution in float64, and copies what it is given so.
    cell, x, _, z = setup(size=(2, 2), batch=1, dtype=torch.float64 if device == "cpu" else torch.float32)
    cell, x, z = cell.to(device), x.detach().to(device), z.detach()[:, :24].to(device)
    made = {"new_empty", "empty_like", "empty"}
    with ambient("triton"), torch.no_grad():
        u = cell.inject(x)
        out = torch.empty_like(z)
        with Counter(z) as counter:
            cell.write(z, u, out)
        launches, operators = counter.now.launches, counter.now.operators
        assert (launches.count("groupnorm_kernel"), launches.count("fusion_kernel")) == (5, 1)
        assert len(launches) == 6
        assert operators["empty_like"] == 2  # the sums: a norm's value takes the place of what it is made of
        assert {name: count for name, count in operators.items() if name not in made} == {"convolution": 8}

        adjoint = cell.vjp(z, u)[1].plus(z)
        with Counter(z) as counter:
            adjoint.write(z, out)
        launches, operators = counter.now.launches, counter.now.operators
        assert launches.count("groupnorm_vjp_kernel") == 5
        # A product of the sums, the sum of what crossed, and that of all with g.
        assert (launches.count("fusion_vjp_kernel"), launches.count("fusion_kernel")) == (1, 2)
        assert len(launches) == 8
        assert {name: count for name, count in operators.items() if name not in made} == {"convolution": 8}
        assert not counter.now.reads


@kernels
def test_convolutions_get_dense_maps_by_one_launch(device):
    """The maps of a packed state lie apart, and each convolution would copy its own."""
    cell, x, _, z = setup((4, 4, 8), dtype=torch.float64 if device == "cpu" else torch.float32)
    cell, x, z = cell.to(device), x.to(device), z.to(device)
    seen, real = [], torch.nn.functional.conv2d
    with ambient("triton"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        u = cell.inject(x)
        wanted = torch.empty_like(z)
        cell.write(z[:1], u._replace(shift=u.shift[:1]), wanted[:1])
        cell.write(z[1:], u._replace(shift=u.shift[1:]), wanted[1:])

        def conv2d(x, *rest):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return real(x, *rest)

        patch.setattr(torch.nn.functional, "conv2d", conv2d)
        out = torch.empty_like(z)
        with Counter(z) as counter:
            cell.write(z, u, out)
    assert all(seen)
    assert counter.now.launches.count("fusion_kernel") == 2
    torch.testing.assert_close(out, wanted)


@kernels
def test_convolutions_of_one_map_are_one(device):
    """Of three resolutions: two for each block, two down, two up and one that follows, a final one for each.

    Without gradients; the value is that of all alone, as an evaluation has it that products are asked of.
    """
    cell, x, _, z = setup((4, 4, 8), dtype=torch.float64 if device == "cpu" else torch.float32)
    cell, x, z = cell.to(device), x.to(device), z.to(device)
    with ambient("triton"):
        with torch.no_grad():
            u = cell.inject(x)
            with Counter(z) as counter:
                value = cell(z, u)
            assert counter.now.operators["convolution"] == 3 * 2 + (2 + 2 + 1) + 3
            with Counter(z) as counter:
                wanted, pullback = cell.vjp(z, u)
            assert counter.now.operators["convolution"] == 3 * 2 + (3 + 3 + 1) + 3
            with Counter(z) as counter:
                product = pullback(z)
            assert counter.now.operators["convolution"] == 3 * 2 + (2 + 2 + 1) + 3
        torch.testing.assert_close(product, pullback(z))  # with gradients: each alone
        torch.testing.assert_close(value, wanted)
        torch.testing.assert_close(cell(z, cell.inject(x)), wanted)
        u = cell.inject(x)
        assert not any(weight.requires_grad for weight in u.joined)
    with ambient("reference"):
        assert cell.inject(x).joined == ()


def names_of(call):
    class Names(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Names() as names:
        call()
    return names.seen


def test_steps_write_in_place_and_pack_nothing(reference):
    """Also into a ring whose rows lie apart, forwards and backwards."""
    cell, _, u, z = setup((4, 4, 8))
    ring = torch.full((2, 3, z.shape[1]), torch.nan, dtype=z.dtype)
    out, seen = ring[:, 1], []
    seen += names_of(lambda: cell.write(z, u, out))
    torch.testing.assert_close(out, cell(z, u).detach())
    with torch.no_grad():
        torch.testing.assert_close(cell(z, u), out)
        _, pullback = cell.vjp(z, u)
        shift, vector = torch.randn_like(z), torch.randn_like(z)
        adjoint = pullback.plus(shift)
        back = ring[:, 2]
        seen += names_of(lambda: adjoint.write(vector, back))
        torch.testing.assert_close(back, pullback(vector) + shift)
        torch.testing.assert_close(adjoint(vector), back)
    assert ring[:, 0].isnan().all()
    assert not {"cat", "stack"} & set(seen)


@pytest.mark.parametrize("gradients", [False, True])
def test_transforms_see_through(gradients, reference):
    """vmap and forward derivatives, of the cell and of its product, with gradients and without."""
    cell, _, u, z = setup()
    z, both = z.detach(), torch.stack([z.detach(), 2 * z.detach()])
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(
            torch.vmap(lambda z: cell(z, u))(both), torch.stack([cell(z, u) for z in both])
        )
        _, pullback = cell.vjp(z, u)
        adjoint = pullback.plus(z)
        for product in (pullback, adjoint):
            torch.testing.assert_close(
                torch.vmap(product)(both), torch.stack([product(each) for each in both])
            )
        _, along = torch.func.jvp(lambda z: cell(z, u), (z,), (both[1],))
    torch.testing.assert_close((along * z).sum(), (pullback(z) * both[1]).sum())


def test_weight_normalisation_is_pytorchs(reference):
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Conv2d(3, 5, 3, bias=False).to(memory_format=torch.channels_last) for _ in range(2)
    )
    normalise_kernels(ours)
    weight_norm(theirs)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)
    leaves = [[*layer.parameters()] for layer in (ours, theirs)]
    found, wanted = (
        torch.autograd.grad(layer.weight.pow(3).sum(), each)
        for layer, each in zip((ours, theirs), leaves, strict=True)
    )
    torch.testing.assert_close(found, wanted)


def test_masks_last_a_solve_and_end_with_training(reference):
    cell, x, u, z = setup(dropout=0.5)
    torch.testing.assert_close(cell(z, u), cell(z, u))
    values = {float(value) for mask in u.masks for value in mask.unique()}
    assert values <= {0.0, 2.0}
    assert [mask.shape for mask in u.masks] == [(2, 4), (2, 8)]
    assert cell.eval().inject(x).masks is None


def test_samples_are_selected(reference):
    cell, _, u, z = setup(dropout=0.5, batch=3)
    chosen = torch.tensor([2, 0])
    torch.testing.assert_close(cell(z[chosen], cell.select(u, chosen)), cell(z, u)[chosen])


@pytest.mark.parametrize("compact", [None, 0.9])
def test_a_training_step_by_products_is_that_of_the_engine(compact, reference):
    """The gradient of an equilibrium with the penalty, with and without the closed form."""

    class Plain(MDEQCell):
        def forward(self, z, u):  # its own forward: the products are the engine's
            return super().forward(z, u)

    found = []
    for kind in (MDEQCell, Plain):
        cell, x, _, _ = setup(batch=3)
        cell = _damped(kind, cell)
        assert (cell.vjp is None) == (kind is Plain)
        deq = td.DEQ(
            cell, tol=1e-10, max_steps=200, compact=compact, penalty=td.JacobianPenalty(1.0),
            gradient=td.ImplicitGradient(tol=1e-10, max_steps=200),
        )  # fmt: skip
        torch.manual_seed(1)
        out = deq(x)
        (out.value.square().sum() + out.penalty).backward()
        assert out.solution.converged.all()
        assert out.solution.backward.converged.all()
        found.append([x.grad, out.penalty.detach(), *(each.grad for each in cell.parameters())])
        x.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def _damped(kind, cell):
    """The cell with little of z beside what is injected, so that there is a fixed point."""
    damped = kind(cell.channels, 2, 2, init_std=0.3).double()
    damped.load_state_dict(cell.state_dict())
    with torch.no_grad():
        for unit in damped.post:
            unit.norm.weight.mul_(0.1)
        damped.blocks[0].second.conv.parametrizations.weight.original0.mul_(0.1)
        damped.blocks[1].norm.weight.mul_(0.1)
    return damped


def test_gradient_and_penalty_share_an_evaluation(reference, monkeypatch):
    cell, x, _, _ = setup()
    deq = td.DEQ(cell, max_steps=3, penalty=td.JacobianPenalty(1.0))
    evaluations = []
    original = MDEQCell._vjp
    monkeypatch.setattr(MDEQCell, "_vjp", lambda *given: evaluations.append(1) or original(*given))
    deq(x).penalty.backward()
    assert len(evaluations) == 1
    f = Injected(cell, cell.inject(x))
    z = cell.initial_state(f.u)
    first = f.vjp(z)
    assert f.vjp(z) is first
    z.add_(1)
    second = f.vjp(z)
    assert second is not first
    torch.testing.assert_close(second[0], cell(z, f.u))


def test_autocast(reference):
    cell, x, u, z = setup(dtype=torch.float32, size=(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = cell.inject(x.detach())
        value, pullback = cell.vjp(z, narrow)
        with torch.no_grad():
            out = torch.empty_like(z)
            cell.write(z, narrow, out)
    product = pullback(value)
    assert value.dtype == product.dtype == out.dtype == torch.float32
    torch.testing.assert_close(out, value.detach())

    def error(found, expected):
        return (found - expected).norm()

    wide, wide_pullback = cell.vjp(z, u)
    plain = PlainMDEQ(cell, x.detach())
    at = plainly(z, u)
    with torch.autocast("cpu", torch.bfloat16):
        narrow_plain = plain(at)
    (plain_product,) = torch.autograd.grad(narrow_plain, at, plainly(value, u).detach())
    assert error(value, wide) <= 2 * error(narrow_plain, plainly(wide, u))
    assert error(product, wide_pullback(value)) <= 2 * error(plain_product, plainly(wide_pullback(value), u))
    product.square().sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in cell.parameters())


def test_a_compiled_step_with_penalty_is_one_graph(reference):
    cell, x, _, _ = setup(dtype=torch.float32)

    def loss(x):
        u = cell.inject(x)
        z = cell.initial_state(u)
        for _ in range(2):
            z = cell(z, u)
        return z.square().mean() + td.jacobian_norm(Injected(cell, u), z.detach())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    compiled(x).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_pack_undoes_unpack(reference):
    _, _, u, z = setup((4, 4, 8, 8), size=(8, 8))
    torch.testing.assert_close(pack(unpack(z, u.scales)), z)
    assert all(each._base is not None for each in unpack(z.detach(), u.scales))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (8, 12), "groups": 8}, r"channels\[1\]=12 is not divisible by groups=8"),
        ({"channels": ()}, r"channels=\(\) has no resolution"),
        ({"channels": (8,), "dropout": 1}, "dropout=1 drops everything"),
        ({"channels": (8, 0)}, r"channels\[1\]=0 is too small"),
        ({"channels": (8,), "expansion": 0}, "expansion=0 is too small"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MDEQCell(**arguments)


def test_bad_input(reference):
    cell, x, u, z = setup()
    with pytest.raises(ValueError, match=r"x is \(2, 3, 4, 8\): give features \[B, 4, H, W\]"):
        cell.inject(x[:, :3])
    with pytest.raises(ValueError, match="maps of 3×8, and 2 resolutions .* multiples of 2"):
        cell.inject(x[:, :, :3])
    with pytest.raises(ValueError, match=r"z has shape \(2, 5\), and this u is for \(2, 192\)"):
        cell(z[:, :5], u)
    for layer, name in (
        (cell.blocks[0].norm, "GroupNorm"),
        (cell.blocks[1], "Block"),
        (cell.post[0], "ConvNorm"),
    ):
        hook = layer.register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match=f"a {name} of the cell was replaced or has a hook"):
            cell.inject(x)
        hook.remove()
