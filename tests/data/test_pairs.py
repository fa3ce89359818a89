"""The data sets: what is in them, and that a seed gives the same split."""

import math

import pytest
import torch

from triton_deq import data


def test_digits_are_the_scans_that_scikit_learn_ships():
    pytest.importorskip("sklearn")
    split = data.digits()
    assert split.x.shape == (1437, 1, 8, 8)
    assert split.valid_x.shape == (360, 1, 8, 8)
    assert (split.x.min(), split.x.max()) == (0, 1)
    assert set(split.y.tolist()) == set(split.valid_y.tolist()) == set(range(10))
    assert torch.equal(data.digits().x, split.x)
    assert not torch.equal(data.digits(seed=1).x, split.x)


def test_the_synthetic_curve_is_the_papers():
    split = data.synthetic()
    assert split.x.shape == split.y.shape == (4096, 1)
    assert split.valid_x.shape == (1000, 1)
    wanted = [1.5 * x**3 + x**2 - 5 * x + 2 * math.sin(x) - 3 for x in split.x[:5, 0].tolist()]
    torch.testing.assert_close(data.curve(split.x[:5, 0]), torch.tensor(wanted))
    noise = split.y - data.curve(split.x)
    assert abs(noise.mean()) < 0.005
    assert 0.045 < noise.std() < 0.055
    assert torch.equal(data.synthetic().y, split.y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: data.digits(validation=1797), ValueError, "validation=1797 leaves nothing"),
        (lambda: data.digits(validation=0), ValueError, "validation=0 is too small"),
        (lambda: data.synthetic(pairs=1000), ValueError, "pairs=1000 is too small"),
        (lambda: data.synthetic(seed=-1), ValueError, "seed=-1 is too small"),
        (lambda: data.synthetic(pairs="all"), TypeError, "pairs='all' must be an int"),
    ],
)
def test_bad_arguments(make, error, message):
    pytest.importorskip("sklearn")
    with pytest.raises(error, match=message):
        make()
