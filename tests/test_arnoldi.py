"""The spectral radius, and the iteration that finds it."""

import math

import pytest
import torch

import triton_deq as td
from tests.problems import tanh_map
from tests.test_jacobian import full_jacobians
from triton_deq.arnoldi import arnoldi, largest


@pytest.mark.parametrize("entries", [1, 2, 7, 30, 80])
def test_spectral_radius(entries):
    f, *_ = tanh_map(3, entries, gain=1.5)
    z = torch.randn(3, entries, dtype=torch.float64)
    wanted = torch.linalg.eigvals(full_jacobians(f, z)).abs().max(dim=1).values
    torch.testing.assert_close(td.spectral_radius(f, z), wanted, rtol=2e-3, atol=0)


def test_spectral_radius_of_a_rotation():
    """All eigenvalues are one complex pair, where a Rayleigh quotient of a real vector is wrong."""
    angle = torch.tensor([0.3, 1.5, 3.0], dtype=torch.float64)
    cosine, sine = 0.9 * angle.cos(), 0.9 * angle.sin()
    rotations = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    radius = td.spectral_radius(lambda z: torch.einsum("bij,bj->bi", rotations, z), torch.ones(3, 2).double())
    torch.testing.assert_close(radius, torch.full((3,), 0.9, dtype=torch.float64))


def test_spectral_radius_of_a_small_state_is_exact_whatever_the_map():
    """All eigenvalues on a circle: a basis of some of the space does not tell them apart."""
    matrix = 0.9 * torch.linalg.qr(torch.randn(2, 64, 64, dtype=torch.float64)).Q
    radius = td.spectral_radius(lambda z: torch.einsum("bij,bj->bi", matrix, z), torch.ones(2, 64).double())
    torch.testing.assert_close(radius, torch.full((2,), 0.9, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [21, 29])
def test_a_few_products_more_spoil_no_complex_pair(steps):
    """The space of one vector has none, and knows less than the one before."""
    turn = torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)
    scales = torch.linspace(0.8, 1, 30, dtype=torch.float64)
    matrix = torch.block_diag(*(turn * scale for scale in scales))
    z = torch.ones(1, 60, dtype=torch.float64)
    found, wanted = (td.spectral_radius(lambda z: z @ matrix.T, z, taken) for taken in (steps, 20))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert 0.95 < wanted.item() < 1.0001


def test_spectral_radius_of_complex_pairs_among_many():
    blocks = [torch.tensor([[0.1 * k, -0.5], [0.5, 0.1 * k]], dtype=torch.float64) for k in range(20)]
    mix = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    matrix = mix @ torch.block_diag(*blocks) @ mix.T
    radius = td.spectral_radius(lambda z: z @ matrix.T, torch.ones(1, 40, dtype=torch.float64))
    assert math.isclose(radius.item(), math.hypot(1.9, 0.5), rel_tol=1e-6)


def test_spectral_radius_ends_when_it_knows():
    products = []

    class Counted:
        def __init__(self, values):
            self.values = values

        def __call__(self, z):
            return z * self.values

        def vjp(self, z):
            def pullback(vector):
                products.append(1)
                return vector * self.values

            return self(z), pullback

    values = torch.linspace(0, 0.5, 60, dtype=torch.float64)
    z, apart = torch.ones(2, 60, dtype=torch.float64), values.index_fill(0, torch.tensor(3), 0.9)
    torch.testing.assert_close(td.spectral_radius(Counted(apart), z), torch.full_like(z[:, 0], 0.9))
    assert len(products) in (20, 40)
    products.clear()
    td.spectral_radius(Counted(values), z, steps=50)  # whose largest are close to each other
    assert len(products) == 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_of_small_matrices(dtype):
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]]) * 0.7
    matrices = [
        torch.randn(6, 6),
        torch.randn(6, 6).triu() + 30 * torch.ones(6, 6).triu(1),  # far from normal
        torch.block_diag(rotation, torch.rand(4, 4) * 0.1),
        torch.diag(torch.tensor([0.5, -0.5, 0.1, 0, 0, 0])),
        torch.eye(6) * 1e-12,
    ]
    stacked = torch.stack(matrices).to(dtype)
    radius, vector, beside = largest(stacked)
    wanted = torch.linalg.eigvals(stacked.double()).abs().max(dim=1).values
    torch.testing.assert_close(radius.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 2e-6, atol=0)
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(5, dtype=dtype))
    # The plane of v and H v is one that H does not leave.
    for matrix, each in zip(stacked.double(), vector.double(), strict=True):
        plane = torch.linalg.qr(torch.stack([each, matrix @ each], 1)).Q
        twice = matrix @ (matrix @ each)
        assert (twice - plane @ (plane.T @ twice)).norm() <= 1e-4 * matrix.norm() ** 2
    turned = (stacked @ vector[..., None])[..., 0]
    torch.testing.assert_close(beside, torch.maximum(vector[:, -1].abs(), turned[:, -1].abs() / radius))
    radius, vector, _ = largest(torch.zeros(2, 3, 3, dtype=dtype))
    assert radius.tolist() == [0, 0]
    assert not vector.any()


def test_a_sample_that_is_not_finite_has_no_radius_and_spoils_no_other():
    z = torch.ones(3, 5)
    z[1, 2] = math.nan
    radius = td.spectral_radius(lambda z: 2 * z + z * z, z)
    assert radius[1].isnan()
    torch.testing.assert_close(radius[::2], torch.full((2,), 4.0))


def test_krylov_vectors_are_orthogonal():
    """Of a product that lies almost in the space, rounding leaves a part there: once is not enough."""
    scales = torch.logspace(0, -6, 30)
    basis, projection, left = arnoldi(lambda rows: rows * scales, torch.ones(2, 30), 12)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(12).expand(2, 12, 12), rtol=0, atol=1e-5)
    torch.testing.assert_close((basis * scales) @ basis.mT, projection.mT, rtol=0, atol=1e-6)
    rest = basis[:, -1] * scales - (projection[:, :, -1:] * basis).sum(1)
    torch.testing.assert_close(rest.norm(dim=1), left, rtol=0.2, atol=1e-7)


def test_spectral_radius_of_simple_maps():
    z = torch.ones(2, 5)
    assert td.spectral_radius(lambda z: 0 * z, z).tolist() == [0, 0]
    torch.testing.assert_close(td.spectral_radius(lambda z: 3 * z, z), torch.full((2,), 3.0))
    assert td.spectral_radius(torch.tanh, torch.zeros(0, 5)).shape == (0,)
    nilpotent = torch.tensor([[0.0, 1], [0, 0]])
    assert td.spectral_radius(lambda z: z @ nilpotent, torch.ones(1, 2)).item() < 1e-3
