"""The demo's parts in short; `.ci/run` runs the whole of it in its quick form."""

import json
import math

import pytest
import torch

from triton_deq import cli
from triton_deq.data import synthetic
from triton_deq.demo import accelerate, rows, textbook
from triton_deq.demo import synthetic as experiment


@pytest.fixture(scope="module")
def outcomes():
    """The scalar experiment for three weights, four epochs each, from the same start."""
    data = synthetic()
    return [experiment.examine(weight, experiment.train(weight, 4), data) for weight in (0.0, 1.0, 4.0)]


def test_a_larger_penalty_needs_fewer_steps(outcomes):
    steps = [outcome.steps.float().mean().item() for outcome in outcomes]
    assert steps[0] > 1.5 * steps[1] > 1.5 * 1.2 * steps[2]


def test_a_larger_penalty_flattens_the_surface(outcomes):
    slopes = [outcome.slope for outcome in outcomes]
    assert slopes[0] > slopes[1] > slopes[2]


def test_every_weight_fits_the_curve(outcomes):
    spread = synthetic().valid_y.std().item()
    assert all(outcome.capped_error < 0.3 * spread for outcome in outcomes)


def test_the_zigzag_is_the_plain_iteration(outcomes):
    model = outcomes[2].model
    corners = experiment.zigzag(model, 0.5, steps=8)
    assert corners[0][0] == 0
    assert [value for _, value in corners[:-1]] == [z for z, _ in corners[1:]]
    grid = experiment.surface(model, torch.tensor([0.5]), torch.tensor([corners[2][0]]))
    assert math.isclose(grid.item(), corners[2][1], rel_tol=1e-5)


def test_the_textbooks_module_has_the_same_fixed_point_and_gradients_here():
    problem = textbook.digits_model(channels=16, scale=1, separable=False, seed=0)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for agreement in accelerate.agreement("small", problem, x, y):
        assert agreement.passed, agreement


def test_the_textbooks_anderson_solves_a_linear_map():
    """It is no straw man: it finds the fixed point, in fewer steps than the plain iteration."""
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix *= 0.9 / torch.linalg.eigvals(matrix).abs().max()
    offset = torch.randn(2, 6, dtype=torch.float64)
    z, steps = textbook.anderson(lambda z: z @ matrix.T + offset, torch.zeros_like(offset), tol=1e-6)
    answer = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, offset.T).T
    torch.testing.assert_close(z, answer, rtol=1e-4, atol=1e-4)
    assert steps < 50


def test_rows_say_what_ran_where(tmp_path):
    found = rows.Rows(3, rows.environment("cpu"))
    found.add("synthetic", "steps", 7, "evaluations", weight=2.0)
    found.add("synthetic", "residual", math.nan, "1")
    found.write(tmp_path / "rows.json")
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert (first["value"], first["unit"], first["weight"], first["seed"]) == (7, "evaluations", 2.0, 3)
    assert first["device"]
    assert {"python", "torch"} <= set(first["versions"])
    assert second["value"] is None


def test_a_folder_that_cannot_be_is_named(capsys):
    assert cli.main(["demo", "--output", "/proc/nowhere"]) == 2
    assert "/proc/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seed", "-1"], "at least 0"), (["--output", __file__], "is a file"), (["--fast"], "unrecognized")],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *arguments])
    assert message in capsys.readouterr().err
