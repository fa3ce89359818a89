"""The verify command: its rows, its exit code, and that it notices a wrong kernel."""

import json
import subprocess
import sys

import pytest
import torch

from triton_deq import cli
from triton_deq.ops import jacobian as op
from triton_deq.verification.case import relative_error


@pytest.mark.kernels
def test_quick_run_in_a_fresh_process(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "triton_deq", "verify", "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())
    assert {row["kernel"] for row in rows} == {
        "anderson_residual",
        "anderson_advance",
        "anderson_step",
        "broyden_residual",
        "fusion",
        "fusion_vjp",
        "groupnorm",
        "groupnorm_second",
        "groupnorm_vjp",
        "broyden_advance",
        "probe",
        "squared_norm",
        "mlp",
        "mlp_vjp",
        "mlp_probe",
        "mlp_probe_vjp",
        "mlp_solve",
        "feedforward",
        "feedforward_vjp",
        "norm",
        "norm_vjp",
        "weightnorm",
        "weightnorm_vjp",
        "cross_entropy",
        "cross_entropy_vjp",
        "attention",
        "attention_query_vjp",
        "attention_key_vjp",
        "attention_position_vjp",
        "attention_jvp",
    }
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["passed"] and row["error"] <= row["bound"] for row in rows)
    assert f"{len(rows)} of {len(rows)} rows within their bounds" in done.stdout


@pytest.mark.kernels
def test_random_sweep_names_the_worst_case(capsys):
    assert cli.main(["verify", "--seeds", "2", "--seed", "3", "--kernel", "probe"]) == 0
    out = capsys.readouterr().out
    assert "again with: triton-deq verify --seeds 1 --seed" in out


@pytest.mark.kernels
def test_several_checks_and_dtypes(capsys):
    asked = ["--kernel", "probe", "--kernel", "squared_norm", "--dtype", "float16", "--dtype", "float32"]
    assert cli.main(["verify", "--quick", *asked, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["dtype"] for row in rows} == {"float16", "float32"}
    assert {row["kernel"] for row in rows} == {"probe", "squared_norm"}


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", ["sign", "unwritten", "nan"])
def test_a_wrong_kernel_is_noticed(wrong, monkeypatch, capsys):
    right = op.squared_norm_fwd

    def broken(rows):
        out = right(rows)
        if wrong == "sign":
            return -out
        out[-1] = 0 if wrong == "unwritten" else torch.nan
        return out

    monkeypatch.setattr(op, "squared_norm_fwd", broken)
    assert cli.main(["verify", "--quick", "--kernel", "squared_norm"]) == 1
    assert "OVER ITS BOUND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "gemm"], "'anderson'"),
        (["--dtype", "int8"], "'float32'"),
        (["--seed", "-1"], "at least 0"),
        (["--seeds", "0"], "at least 1"),
        (["--seeds", "x"], "not an integer"),
        (["--json", "nowhere/rows.json"], "no folder nowhere"),
    ],
)
def test_bad_arguments_name_the_valid_ones(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", *arguments])
    assert message in capsys.readouterr().err


def test_relative_error():
    nan, one = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert relative_error(nan, nan) == 0
    assert relative_error(nan, one) == float("inf")
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0]), torch.tensor([0.0])) == float("inf")
