"""Kernels through Triton's compiler and the emulation, in processes of their own: this one interprets."""

import os
import subprocess
import sys

import pytest
import torch

from triton_deq import backend, cli
from triton_deq.ops import norm


def run(*command, **environment):
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env={**kept, **environment}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    ("asked", "target"), [(["--emulate", "3"], "sm_90"), (["--target", "sm_80"], "sm_80")], ids=["90", "80"]
)
def test_verify_runs_what_is_compiled(asked, target):
    kernels = ["--kernel", "anderson", "--kernel", "feedforward", "--kernel", "cross_entropy"]
    done = run("-m", "triton_deq", "verify", *asked, "--quick", "--dtype", "bfloat16", *kernels)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"within their bounds on CPU (emulated {target})" in done.stdout


PRODUCT = """
import torch, triton, triton.language as tl
from triton_deq import emulation
emulation.install()

@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, K: tl.constexpr):
    rows, columns, depth = tl.arange(0, 64), tl.arange(0, 32), tl.arange(0, 32)
    total = tl.zeros([64, 32], tl.float32)
    for start in range(0, K, 32):
        a = tl.load(a_ptr + rows[:, None] * K + (start + depth)[None, :])
        b = tl.load(b_ptr + (start + depth)[:, None] * 32 + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows[:, None] * 32 + columns[None, :], total)

a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, 32).bfloat16()
out = torch.empty(64, 32)
compiled = product_kernel[(1,)](a, b, out, 128, num_stages=3)
torch.testing.assert_close(out, a.float() @ b.float())
print("wgmma" in str(compiled.asm["ptx"]))
"""


@pytest.mark.parametrize(("target", "there"), [("sm_90", "True"), ("sm_80", "False")])
def test_products_go_through_the_tensor_cores_of_the_target(target, there, tmp_path):
    (tmp_path / "product.py").write_text(PRODUCT)
    done = run(str(tmp_path / "product.py"), TRITON_DEQ_EMULATE="1", TRITON_DEQ_EMULATE_TARGET=target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == there


RACE = """
import torch, triton, triton.language as tl
from triton_deq import emulation
emulation.install()

@triton.jit
def reversed_kernel(x_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + N + at, tl.load(x_ptr + N - 1 - at))

for barrier in (True, False):
    right = 0
    for _ in range(12):
        x = torch.full((256,), -1, dtype=torch.int32)
        reversed_kernel[(1,)](x, 128, barrier)
        right += torch.equal(x[128:], x[:128].flip(0))
    print(right)

@triton.jit
def beyond_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), 0)

for x in (torch.zeros(24), torch.zeros(32, device="meta")):
    try:
        beyond_kernel[(1,)](x, 32)
    except (emulation.Fault, ValueError) as error:
        print(error)
"""


def test_any_kernel_of_triton_runs_and_its_races_show(tmp_path):
    (tmp_path / "race.py").write_text(RACE)
    done = run(str(tmp_path / "race.py"), TRITON_DEQ_EMULATE="1")
    assert done.returncode == 0, done.stderr
    ordered, unordered, fault, elsewhere = done.stdout.splitlines()
    assert ordered == "12"
    assert int(unordered) < 12
    assert "st.global" in fault
    assert "outside of every tensor" in fault
    assert "got a tensor on meta: move it to the CPU" in elsewhere


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TRITON_DEQ_EMULATE": "yes"}, "TRITON_DEQ_EMULATE is 'yes': give a number"),
        ({"TRITON_DEQ_EMULATE": "-1"}, "TRITON_DEQ_EMULATE is '-1': give a number"),
        ({"TRITON_DEQ_EMULATE": "2", "TRITON_INTERPRET": "1"}, "set one of the two"),
    ],
)
def test_settings_that_cannot_be(settings, message, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        backend.emulation_seed()


@pytest.mark.parametrize(
    ("name", "value"), [("TRITON_DEQ_EMULATE", "yes"), ("TRITON_DEQ_EMULATE_TARGET", "sm_70")]
)
def test_the_command_names_what_cannot_be(name, value, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(name, value)
    assert cli.main(["verify", "--quick", "--kernel", "probe"]) == 2
    assert f"triton-deq verify: {name} is '{value}': give" in capsys.readouterr().err


def test_a_target_that_cannot_be(monkeypatch):
    monkeypatch.setenv("TRITON_DEQ_EMULATE_TARGET", "sm_70")
    with pytest.raises(
        ValueError,
        match="TRITON_DEQ_EMULATE_TARGET is 'sm_70': give one that can be emulated, sm_90 or sm_80",
    ):
        backend.emulation_target()


@pytest.mark.skipif(not backend.interpreting(), reason="kernels were not imported for the interpreter")
def test_a_kernel_of_the_interpreter_cannot_be_compiled_afterwards(monkeypatch):
    x = torch.randn(2, 8)
    norm.norm(x, gain=torch.ones(8), offset=torch.zeros(8), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_DEQ_EMULATE", "1")
    with pytest.raises(RuntimeError, match="was imported for Triton's interpreter.*in a new process"):
        norm.norm(x, gain=torch.ones(8), offset=torch.zeros(8), backend="triton")
