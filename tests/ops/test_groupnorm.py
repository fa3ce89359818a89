"""GroupNorm with what surrounds it: kernels against float64, float64 against PyTorch and autograd."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import group_norm

from triton_deq.ops import groupnorm as op
from triton_deq.ops import launch as launches
from triton_deq.reference import groupnorm as reference
from triton_deq.verification import BOUNDS, Case, check_groupnorm
from triton_deq.verification.case import relative_error

kernels = pytest.mark.kernels


def maps(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


def tensors(batch=2, channels=4, height=2, width=3, **draw):
    """x, γ, β, u and r with gradients, and a mask."""
    shape = (batch, channels, height, width)
    x, shift, residual = (maps(*shape, **draw).requires_grad_() for _ in range(3))
    gain, offset, mask = (
        torch.randn(size, **{"dtype": torch.float64, **draw}) for size in (4, 4, (batch, 4))
    )
    return (x, gain.requires_grad_(), offset.requires_grad_(), shift, residual), mask.abs()


def evaluated(*given, backend="auto"):
    """The value, and what its product needs."""
    return op.groupnorm_each([op.Map(*given)], backend)[0]


def plainly(x, groups, gain, offset, mask, shift, residual, relu):
    value = group_norm(x * mask[:, :, None, None] + shift, groups, gain, offset) + residual
    return value.relu() if relu else value


@kernels
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [*(((2, 37), "contiguous", dtype) for dtype in BOUNDS), ((2, 500), "strided", "float32")],
    ids=str,
)
def test_kernels_match_the_reference(shape, layout, dtype, device):
    rows = list(check_groupnorm(Case(getattr(torch, dtype), shape, torch.device(device), 1, layout)))
    over = [row for row in rows if not row.passed]
    assert not over, "\n".join(map(str, over))


@kernels
def test_kernels_take_the_place_of_a_map_that_is_spare(device):
    x = maps(2, 4, 3, 3, device=device, dtype=torch.float32)
    wanted = evaluated(x, 2, backend="reference")[0]
    places = {
        "dense": x.clone(memory_format=torch.channels_last),
        "channels": torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, :4],
    }
    for kind, place in places.items():
        value = op.groupnorm_each([op.Map(place, 2, spare=True)], "triton")[0][0]
        torch.testing.assert_close(value, wanted)
        assert (value.data_ptr() == place.data_ptr()) == (kind == "dense")


def small_tiles(monkeypatch):
    """Several of them to a program's part."""
    for name, size in (("WHOLE", 32), ("TILE", 32), ("SECOND_TILE", 16)):
        monkeypatch.setattr(op, name, size)


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_larger_than_a_tile(dtype, monkeypatch, device):
    small_tiles(monkeypatch)
    rows = list(check_groupnorm(Case(getattr(torch, dtype), (2, 150), torch.device(device), 2)))
    assert all(row.passed for row in rows), rows


@kernels
@pytest.mark.parametrize(("dtype", "several"), [("float32", False), ("float16", False), ("bfloat16", True)])
def test_several_groups_of_a_program(dtype, several, monkeypatch, device):
    """Of 2 channels, or of 1, in one tile or in several; where only one multiprocessor wants a program."""
    if several:
        small_tiles(monkeypatch)
    with launches.cut_for(1):
        for entries in (450, 150):
            rows = list(check_groupnorm(Case(getattr(torch, dtype), (4, entries), torch.device(device), 2)))
            assert all(row.passed for row in rows), rows


@pytest.mark.parametrize(
    ("width", "dtype", "groups", "samples", "packed"),
    [
        (4, torch.bfloat16, 8, 96, 4),  # 32 bytes, and 192 programs
        (4, torch.bfloat16, 8, 64, 2),  # 4 groups each would leave 4 of 132 multiprocessors without a program
        (4, torch.bfloat16, 8, 32, 1),
        (4, torch.float32, 8, 96, 2),
        (8, torch.float32, 8, 96, 1),
        (20, torch.bfloat16, 8, 96, 1),
        (6, torch.bfloat16, 8, 96, 1),
        (4, torch.bfloat16, 6, 96, 2),
    ],
)
def test_a_program_has_groups_enough_to_fill_a_sector(width, dtype, groups, samples, packed):
    shape = torch.Size((samples, width * groups, 32, 32))
    tiles = op._tiles(shape, dtype, groups, op.TILE, op.WHOLE, 132)
    assert tiles.sizes == (1024, width * groups, groups, packed)
    assert tiles.programs * packed == groups


@pytest.mark.parametrize(
    ("pixels", "width", "dtype", "tile", "warps"),
    [
        (64, 16, torch.bfloat16, (64, 16), 2),
        (1024, 4, torch.bfloat16, (1024, 4), 8),
        (3136, 4, torch.float32, (4096, 4), 16),
        (784, 20, torch.float32, (128, 32), 8),  # more than a program holds
        (3136, 4, torch.float64, (1024, 4), 8),
    ],
)
def test_a_part_that_a_program_can_hold_is_one_tile(pixels, width, dtype, tile, warps):
    found = op._tiles(torch.Size((2, 8 * width, pixels, 1)), dtype, 8, op.TILE, op.WHOLE, 132)
    assert (found.tile[1:], found.warps) == (tile, warps)


@kernels
def test_programs_of_many_warps_share_no_launch_with_those_of_few(device, monkeypatch):
    sizes = [(1, 4, 32, 32), (1, 4, 128, 64), (1, 4, 4, 4), (1, 4, 128, 65)]
    given = [maps(*size, dtype=torch.float32, device=device) for size in sizes]
    warps, real = [], op.launch

    def launch(kernel, grid, *args, **constants):
        warps.append((constants["num_warps"], len(constants["CONSTANTS"])))
        return real(kernel, grid, *args, **constants)

    monkeypatch.setattr(op, "launch", launch)
    found = op.groupnorm_each([op.Map(x, 2) for x in given], "triton")
    assert warps == [(launches.most_warps(), 1), (8, 3)]
    for x, (value, _) in zip(given, found, strict=True):
        torch.testing.assert_close(value, group_norm(x, 2))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
def test_value_and_gradients_are_pytorchs(layout, relu, backend, device):
    given, mask = tensors(device=device)
    x, gain, offset, shift, residual = (
        each.detach().contiguous(memory_format=layout).requires_grad_() if each.dim() == 4 else each
        for each in given
    )
    given = (x, gain, offset, shift, residual)
    value = op.groupnorm(x, 2, gain, offset, mask, shift, residual, relu, backend=backend)
    wanted = plainly(x, 2, gain, offset, mask, shift, residual, relu)
    torch.testing.assert_close(value, wanted)
    vector = torch.randn_like(value)
    torch.testing.assert_close(
        torch.autograd.grad(value, given, vector), torch.autograd.grad(wanted, given, vector)
    )


@pytest.mark.parametrize("given", ["x", "gain", "shift", "residual"])
def test_what_is_left_out(given, backend, device):
    (x, gain, offset, shift, _), _ = tensors(device=device)
    options = {"gain": {"gain": gain, "offset": offset}, "x": {}}.get(given, {given: shift})
    value = op.groupnorm(x, 4, backend=backend, **options)
    wanted = group_norm(
        x + shift if given == "shift" else x, 4, *(options.get(n) for n in ("gain", "offset"))
    )
    torch.testing.assert_close(value, wanted + shift if given == "residual" else wanted)


@pytest.mark.parametrize("relu", [False, True])
def test_first_second_and_third_derivatives(relu):
    """Of the value in all that it takes; and of its product, which knows what μ and σ are of x."""
    given, mask = tensors(channels=4, height=1)

    def value(x, gain, offset, shift, residual):
        return op.groupnorm(x, 2, gain, offset, mask, shift, residual, relu, backend="reference")

    def product(vector, x, gain, offset, shift, residual):
        _, held = evaluated(x, 2, gain, offset, mask, shift, residual, relu, backend="reference")
        return op.groupnorm_vjp(vector, held, "reference")

    vector = torch.randn_like(given[0]).requires_grad_()
    for function, inputs in ((value, given), (product, (vector, *given))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_second_derivatives_where_what_is_added_is_made_of_x():
    x = maps(1, 4, 1, 3).requires_grad_()
    ours = op.groupnorm(x, 2, shift=x.sin(), residual=2 * x, backend="reference")
    theirs = group_norm(x + x.sin(), 2) + 2 * x
    vector = torch.randn_like(x)
    found, wanted = (torch.autograd.grad(value, x, vector, create_graph=True)[0] for value in (ours, theirs))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(first.square().sum(), x)[0] for first in (found, wanted))
    )


@kernels
def test_derivatives_by_the_kernels(device):
    given, mask = tensors(batch=1, height=1, width=2, device=device)
    vector = torch.randn_like(given[0]).requires_grad_()

    def product(vector, x, gain, offset, shift, residual):
        value, held = evaluated(x, 2, gain, offset, mask, shift, residual, True, backend="triton")
        return value, *op.groupnorm_vjp(vector, held, "triton")

    assert gradcheck(product, (vector, *given), fast_mode=True)


def test_the_reference_without_a_graph_is_the_one_with(device):
    (x, gain, offset, shift, residual), mask = tensors()
    with torch.no_grad():
        found = reference.groupnorm_fwd(x, 2, gain, offset, mask, shift, residual, True, 1e-5)
        wanted = reference.groupnorm(x, 2, gain, offset, mask, shift, residual, True)
        torch.testing.assert_close(found, wanted)
        held = reference.Normalised(x, gain, mask, shift, *found[1:], found[0])
        vector = torch.randn_like(x)
        product = reference.groupnorm_vjp_fwd(vector, held)
        torch.testing.assert_close((product.x, product.other), reference.groupnorm_vjp(vector, held))


@kernels
def test_no_statistic_is_lost_in_a_large_mean(monkeypatch, device):
    monkeypatch.setattr(op, "TILE", 8)
    x = maps(2, 4, 4, 4, dtype=torch.float32, device=device)
    value = op.groupnorm(x + 1000, 2, backend="triton")
    rounded = (x + 1000).double()  # what the sum has left of x
    assert relative_error(value, group_norm(rounded, 2)) < 1e-4


@kernels
def test_the_value_alone_is_that_with_statistics(monkeypatch, device):
    (x, gain, offset, shift, residual), mask = tensors(device=device)
    asked, real = [], op.launch

    def launch(kernel, *args, **constants):
        if kernel.fn.__name__ == "groupnorm_kernel":
            asked.append(constants["CONSTANTS"][0][9])
        return real(kernel, *args, **constants)

    monkeypatch.setattr(op, "launch", launch)
    with torch.no_grad():
        given = (x, 2, gain, offset, mask, shift, residual, True)
        value = op.groupnorm(*given, backend="triton")
        assert torch.equal(value, evaluated(*given, backend="triton")[0])
    op.groupnorm(*given, backend="triton").sum().backward()  # which reads them
    assert asked == [False, True, True]


def several(device, channels=(6, 2, 4, 2, 8), batch=2, **draw):
    """Maps of several sizes, with more and with less around them."""
    given = []
    for place, width in enumerate(channels):
        shape = (batch, width, 1 + place % 3, 3)
        x, shift, residual = (maps(*shape, device=device, **draw) for _ in range(3))
        gain, offset = (torch.randn(width, dtype=x.dtype, device=device) for _ in range(2))
        mask = torch.rand(batch, width, dtype=x.dtype, device=device) if place % 2 else None
        around = (gain, offset, mask, shift, residual, True) if place else (None,) * 5
        given.append(op.Map(x, 2, *around))
    return given


@kernels
def test_maps_that_share_launches_are_as_each_alone(monkeypatch, device):
    """And so are their products; a launch takes four, of the largest first."""
    launched, real = [], op.launch

    def launch(kernel, grid, parts, samples, **constants):
        sizes = [part[0].numel() for part in parts]
        assert samples == 2
        assert grid == (2 * sum(constants["PROGRAMS"]),) == (2 * 2 * len(parts),)
        launched.append((kernel.fn.__name__, sizes))
        return real(kernel, grid, parts, samples, **constants)

    given = several(device)
    vectors = [torch.randn_like(each.x) for each in given]
    monkeypatch.setattr(op, "launch", launch)
    found = op.groupnorm_each(given, "triton")
    products = op.groupnorm_vjp_each(vectors, [held for _, held in found], "triton")
    sizes = [96, 72, 36, 24, 12]
    assert launched == [
        (name, part)
        for name in ("groupnorm_kernel", "groupnorm_vjp_kernel")
        for part in (sizes[:4], sizes[4:])
    ]
    for one, vector, (value, held), pair in zip(given, vectors, found, products, strict=True):
        expected, other = evaluated(*one, backend="reference")
        torch.testing.assert_close((value, *held[4:6]), (expected, *other[4:6]))
        wanted = op.groupnorm_vjp(vector, other, "reference")
        torch.testing.assert_close(pair[: 1 + held.residual], wanted[: 1 + held.residual])


@pytest.mark.parametrize("odd", ["batch", "dtype", "gradient", "empty"])
def test_maps_of_other_kinds_side_by_side(odd, backend, device):
    given = several(device, channels=(4, 2))
    if odd == "batch":
        given += several(device, channels=(4,), batch=3)
    elif odd == "dtype":
        given += several(device, channels=(4,), dtype=torch.float32)
    elif odd == "empty":
        given = several(device, channels=(4, 2), batch=0)
    else:
        given[1].x.requires_grad_()
    vectors = [torch.randn_like(each.x) for each in given]
    found = op.groupnorm_each(given, backend)
    products = op.groupnorm_vjp_each(vectors, [held for _, held in found], backend)
    for one, vector, (value, held), pair in zip(given, vectors, found, products, strict=True):
        expected, other = evaluated(*one, backend="reference")
        torch.testing.assert_close(value, expected)
        wanted = op.groupnorm_vjp(vector, other, "reference")
        torch.testing.assert_close(pair[: 1 + held.residual], wanted[: 1 + held.residual])
    if odd == "gradient":
        (found[1][0].sum() + products[1][0].square().sum()).backward()
        assert given[1].x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 6, 1, 5), (3, 6, 5, 1), (1, 6, 2, 5)], ids=str)
def test_the_stride_of_a_single_row_says_nothing(shape, backend, device):
    """PyTorch's own operator takes it for the map's layout, and refuses the map."""
    x = maps(*shape, device=device)
    strides = [999 if size == 1 else stride for size, stride in zip(shape, x.stride(), strict=True)]
    x = x.as_strided(shape, strides).detach().requires_grad_()
    value = op.groupnorm(x, 2, backend=backend)
    plain = group_norm(x.contiguous(), 2)
    torch.testing.assert_close(value, plain)
    vector = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, x, vector)
    torch.testing.assert_close(torch.autograd.grad(value, x, vector), wanted)


@pytest.mark.parametrize("size", [(3, 4), (1, 4), (4, 1), (1, 1)])
def test_some_channels_of_a_map(size, backend, monkeypatch, device):
    """As a convolution gives them that serves several; read as they lie where that can be seen."""
    whole = maps(2, 10, *size, device=device)
    some = whole[:, 2:6]
    copied, real = [], op.laid
    monkeypatch.setattr(launches, "laid", lambda x: copied.append(x) or real(x))
    with torch.no_grad():
        value = op.groupnorm(some, 2, relu=True, backend=backend)
    assert value.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(value, group_norm(some, 2).relu())
    assert not (copied and size[1] > 1)


@pytest.mark.parametrize("size", [(3, 4), (4, 1)])
def test_a_product_into_some_channels_of_a_map(size, backend, device):
    with torch.no_grad():
        given = [maps(2, 4, *size, device=device) for _ in range(2)]
        held = [evaluated(x, 2, backend=backend)[1] for x in given]
        whole = maps(2, 10, *size, device=device).fill_(math.nan)
        place = whole[:, 3:7]
        wanted = [of_x for of_x, _ in op.groupnorm_vjp_each(given, held, backend)]
        found = op.groupnorm_vjp_each(given, held, backend, [None, place])
    assert found[1][0] is place
    torch.testing.assert_close([of_x for of_x, _ in found], wanted)
    assert whole.isnan().sum() == whole.numel() * 6 // 10


def test_value_in_the_place_of_x(backend, monkeypatch, device):
    """With groups of one tile, and of several."""
    (x, gain, offset, shift, residual), mask = tensors(device=device)
    with torch.no_grad():
        for tile in (op.TILE, 4):
            monkeypatch.setattr(op, "TILE", tile)
            wanted, place = plainly(x, 2, gain, offset, mask, shift, residual, True), x.clone()
            given = (place, 2, gain, offset, mask, shift, residual, True)
            assert op.groupnorm(*given, backend=backend, out=place) is place
            torch.testing.assert_close(place, wanted)


def test_value_into_a_place(backend, device):
    """Of a packed state, of another dtype, or one that no kernel writes to."""
    with torch.no_grad():
        x = maps(2, 4, 2, 3, dtype=torch.float32, device=device)
        wanted = group_norm(x, 2).relu()
        packed = torch.full((2, 40), math.nan, dtype=torch.float32, device=device)
        part = packed[:, 8:32].unflatten(1, (2, 3, 4)).permute(0, 3, 1, 2)
        for out in (part, torch.empty(2, 4, 2, 3, device=device), maps(2, 4, 2, 3, device=device)):
            value = op.groupnorm(x, 2, relu=True, backend=backend, out=out)
            assert value is out
            torch.testing.assert_close(out.float(), wanted)
        assert packed[:, :8].isnan().all()
        assert packed[:, 32:].isnan().all()


def test_nan_stays_in_its_group(backend, device):
    x = maps(2, 4, 2, 2, device=device)
    x[1, 3, 0, 1] = math.nan
    value = op.groupnorm(x, 2, relu=True, backend=backend)
    assert value[1, 2:].isnan().all()
    assert value[:1].isfinite().all()
    assert value[1, :2].isfinite().all()


def test_empty_batch(backend, device):
    x = maps(0, 4, 2, 2, device=device).requires_grad_()
    value = op.groupnorm(x, 2, relu=True, backend=backend)
    assert value.shape == x.shape
    value.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 3}, ValueError, "x has 4 channels, which groups=3 does not divide"),
        ({"groups": 0}, ValueError, "groups=0 is too small"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x has shape \(2, 4\): give x of shape \[B, C, H, W\]"),
        ({"x": torch.zeros(2, 4, 1, 1, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"gain": torch.ones(4)}, ValueError, "gain was given and offset=None"),
        ({"mask": torch.ones(4)}, ValueError, r"mask has shape \(4,\): for this x it must be \(2, 4\)"),
        ({"shift": torch.ones(2, 4, 1, 1)}, ValueError, r"shift has shape \(2, 4, 1, 1\)"),
        ({"epsilon": 0.0}, ValueError, r"epsilon=0.0 is outside \(0, ∞\)"),
        ({"mask": torch.ones(2, 4, requires_grad=True)}, ValueError, "no gradient reaches a mask"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        op.groupnorm(**{"x": torch.zeros(2, 4, 3, 3), "groups": 2, **change})


def test_a_vector_of_another_shape():
    _, held = evaluated(torch.randn(2, 4, 3, 3), 2)
    with pytest.raises(ValueError, match=r"vector has shape \(2, 4, 3, 2\), the value has \(2, 4, 3, 3\)"):
        op.groupnorm_vjp(torch.randn(2, 4, 3, 2), held)
