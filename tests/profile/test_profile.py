"""The command `profile`: rows, parts, reasons and the page, on models of a few entries."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from triton_deq import cli
from triton_deq.profile import show
from triton_deq.profile.counting import Traffic, count, tally
from triton_deq.profile.parts import Parts, shares
from triton_deq.profile.peers import resnet
from triton_deq.profile.plan import Plan, Refusal
from triton_deq.profile.sides import find_sides

TOYS = """
import torch
from torch import nn

import triton_deq as td


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        nn.init.normal_(self.layer.weight, 0, 0.05)

    def inject(self, x):
        return x

    def forward(self, z, u):
        return torch.tanh(self.layer(z) + u)


class Toy(nn.Module):
    def __init__(self, cell, penalty=None, **options):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.deq = td.DEQ(cell, max_steps=8, penalty=penalty, **options)

    def forward(self, images):
        return self.head(self.deq(self.stem(images)).value.mean((2, 3)))


def deq():
    return Toy(Cell())


def phantom():
    return Toy(Cell(), gradient=td.PhantomGradient())


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.deq = td.DEQ(td.MLPCell(6, 6), max_steps=8, penalty=td.JacobianPenalty(1.0, probability=0.25))

    def example_input(self, batch):
        return torch.randn(batch, 6)

    def forward(self, x):
        return self.deq(x)


def dense():
    return nn.Linear(6, 2)


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


class Raises(nn.Module):
    def __init__(self, error, batch):
        super().__init__()
        self.layer, self.error, self.batch = nn.Conv2d(3, 4, 3), error, batch

    def forward(self, images):
        if len(images) >= self.batch:
            raise self.error("tried to allocate 2.00 GiB")
        return self.layer(images)


def large():
    return Raises(torch.OutOfMemoryError, 4)


def interrupted():
    return Raises(KeyboardInterrupt, 2)


def two(argument):
    return argument


def nothing():
    return None


def broken():
    return 1 / 0


number = 7
"""


PLOTS = show._plots


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """The toys' module in the current folder, and PyTorch as a user has it: without interpreted kernels."""
    (tmp_path / "profiled_toys.py").write_text(TOYS)
    (tmp_path / "profiled_broken.py").write_text("import there_is_no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(show, "_plots", lambda folder, rows: [])  # drawing takes longer than what is drawn
    yield tmp_path
    sys.modules.pop("profiled_toys", None)


def profile(*arguments: str) -> int:
    return cli.main(["profile", "--device", "cpu", "--seconds", "0", "--output", "out", *arguments])


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]


def test_both_sides_at_each_setting(toys, capsys, monkeypatch):
    monkeypatch.setattr(show, "_plots", PLOTS)
    sizes = ("--image-size", "8", "--batch", "1,2")
    assert profile("--model", "profiled_toys:deq", "--against", "profiled_toys:network", *sizes) == 0
    found = rows()
    assert [(row["mode"], row["batch"], row["role"]) for row in found] == [
        (mode, batch, role)
        for mode in ("inference", "training")
        for batch in (1, 2)
        for role in ("model", "against")
    ]
    for row in found:
        assert row["error"] is None
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["per_second"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"], rel=1e-4)
        assert sum(row["parts"].values()) == pytest.approx(row["p50_ms"], rel=1e-4)
        assert row["flops"] > 0
        assert row["bytes"] > 0
        assert row["peak_bytes"] > 0
        assert row["operators"] > 0
        assert (row["kind"], row["dtype"], row["shape"]) == ("cpu", "fp32", [row["batch"], 3, 8, 8])
        assert {"torch", "triton_deq"} <= set(row["versions"])
        if row["role"] == "against":
            assert list(row["parts"]) == ["model"]
            assert row["nfe"] is None
            continue
        assert row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
        assert 0 < row["nfe"] <= 8
        parts = ["f", "solver", "injection+head"]
        if row["mode"] == "training":
            parts = ["f", "solver", "backward f", "backward solver", "rest"]
            assert row["backward_nfe"] > 0
        assert list(row["parts"]) == parts
    page = Path("out/index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "ratios of this machine" in page
    assert "ratios of this machine" in capsys.readouterr().out.splitlines()[0]


def test_the_evaluations_can_be_fixed(toys):
    options = ("--against", "none", "--nfe", "5", "--solver", "broyden", "--batch", "2", "--image-size", "8")
    assert profile("--model", "profiled_toys:deq", *options) == 0
    inference, training = rows()
    assert (inference["nfe"], inference["backward_nfe"]) == (5, None)
    assert (training["nfe"], training["backward_nfe"]) == (5, 5)
    assert inference["solver"].startswith("Broyden")
    assert inference["ratio_p50"] is None


def test_both_are_fed_with_the_example_that_one_of_them_has(toys):
    options = ("--against", "profiled_toys:Penalised", "--mode", "inference", "--batch", "3")
    assert profile("--model", "profiled_toys:dense", *options) == 0
    assert [(row["shape"], row["error"]) for row in rows()] == [([3, 6], None)] * 2


def test_a_penalty_is_a_part_of_each_step_or_of_none(toys):
    common = ("--model", "profiled_toys:Penalised", "--against", "none", "--mode", "training", "--batch", "3")
    assert profile(*common) == 0
    assert profile(*common, "--penalty", "off") == 0
    with_it, without = rows()
    assert "penalty" in with_it["parts"]
    assert with_it["penalty_probability"] == 0.25
    saved = with_it["p50_ms"] - with_it["expected_ms"]
    assert saved == pytest.approx(0.75 * with_it["parts"]["penalty"], rel=1e-3, abs=1e-6)
    assert "penalty" not in without["parts"]
    assert without["operators"] < with_it["operators"]
    assert with_it["unit"] == "samples"


def test_another_gradient_has_no_backward_solve(toys):
    options = ("--against", "none", "--mode", "training", "--batch", "1", "--image-size", "8")
    assert profile("--model", "profiled_toys:phantom", *options) == 0
    (row,) = rows()
    assert list(row["parts"]) == ["f", "solver", "rest"]


def test_what_a_cpu_cannot_do_is_a_reason(toys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    common = ("--against", "profiled_toys:network", "--dtype", "bf16", "--mode", "training")
    options = ("--execution", "graph,compile,eager", "--batch", "2", "--image-size", "8")
    assert profile("--model", "profiled_toys:deq", *common, *options) == 0
    found = rows()
    assert len(found) == 6
    for row in found:
        assert (row["error"] is None) == (row["execution"] != "graph")
        if row["execution"] == "graph":
            assert "GPU" in row["error"]
        if row["execution"] == "compile":
            assert list(row["parts"]) == ["model"]
            assert row["compile_ms"] is not None


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_narrow_states_and_whole_models(toys, mode):
    common = ("--against", "profiled_toys:network", "--mode", mode, "--batch", "2", "--nfe", "8")
    dtypes = ("--image-size", "8", "--dtype", "pure-bf16,bf16,fp32,bf16-state")
    assert profile("--model", "profiled_toys:deq", *common, *dtypes) == 0
    pure, pure_peer, autocast, autocast_peer, wide, wide_peer, state, state_peer = rows()
    for narrow, mixed, full in ((pure, autocast, wide), (pure_peer, autocast_peer, wide_peer)):
        assert [row["error"] for row in (narrow, mixed, full)] == [None] * 3
        assert narrow["dtype"] == "pure-bf16"
        assert narrow["operators"] < mixed["operators"]  # nothing is cast
        assert narrow["peak_bytes"] < full["peak_bytes"]
        assert narrow["parameters"] == full["parameters"]
        assert narrow["shape"] == full["shape"]
    for row in (pure, state):
        assert row["residual"] > 10 * wide["residual"]  # the state's own rounding
    assert state_peer["bytes"] == autocast_peer["bytes"]
    assert set(pure["parts"]) == set(wide["parts"])


def test_dtypes_beyond_autocast_are_those_of_a_copy():
    (side,) = find_sides(Plan("digits", against="none"), torch.device("cpu"), None)
    assert side.in_dtype("bf16") is side
    state, pure = side.in_dtype("bf16-state"), side.in_dtype("pure-bf16")
    assert [each.deq.state_dtype for each in (side, state, pure)] == [None, torch.bfloat16, None]
    dtypes = [next(each.model.parameters()).dtype for each in (side, state, pure)]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
    for each in (state, pure):
        assert any(part is each.deq for part in each.model.modules())
        assert each.deq is not side.deq


def test_pure_bf16_language_model_takes_a_memory_in_it(toys):
    common = ("--mode", "inference", "--batch", "1", "--nfe", "2")
    assert profile("--model", "tiny", "--against", "none", *common, "--dtype", "pure-bf16") == 0
    (row,) = rows()
    assert row["error"] is None


def test_a_sweep_goes_on_when_memory_runs_out(toys):
    against = ("--against", "profiled_toys:large", "--mode", "inference", "--image-size", "8")
    assert profile("--model", "profiled_toys:deq", *against, "--batch", "4,1") == 0
    model, large, _, small = rows()
    assert model["error"] is None
    assert model["ratio_p50"] is None
    assert large["p50_ms"] is None
    assert "out of memory" in large["error"]
    assert "smaller batch" in large["error"]
    assert small["error"] is None
    tables = Path("out/index.html").read_text().split("<table>")
    told = [table for table in tables if "out of memory" in table]
    assert len(told) == 1, "a reason is as long as all other columns together"
    assert '<td class="said">' in told[0]
    assert tables[1].count("<tr>") == 1 + 3, "only what was measured has times"


def test_nothing_measured_is_a_failure(toys):
    assert profile("--model", "profiled_toys:large", "--against", "none", "--batch", "4") == 1


def test_what_was_measured_before_an_interruption_is_kept(toys, capsys):
    options = ("--against", "none", "--mode", "inference", "--batch", "1,2")
    assert profile("--model", "profiled_toys:interrupted", *options) == 130
    assert [row["batch"] for row in rows()] == [1]
    assert "Interrupted" in Path("out/index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "profiled_nowhere:deq"], "importing profiled_nowhere failed"),
        (["--model", "profiled_broken:deq"], "there_is_no_such_module"),
        (["--model", "profiled_toys:nobody"], "has no 'nobody'"),
        (["--model", "profiled_toys:number"], "is int, which cannot be called"),
        (["--model", "profiled_toys:two"], "without arguments"),
        (["--model", "profiled_toys:nothing"], "returned NoneType"),
        (["--model", "profiled_toys:broken"], "ZeroDivisionError"),
        (["--model", "imagenet-tiny"], "imagenet-small"),
        (["--model", "profiled_toys:deq", "--against", "resnet9"], "resnet101"),
        (["--model", "profiled_toys:deq", "--against", "transformer-xl"], "needs a language model"),
        (["--model", "profiled_toys:Penalised", "--against", "resnet50"], "takes images"),
        (["--model", "profiled_toys:network", "--against", "none", "--nfe", "3"], "no td.DEQ"),
        (["--model", "tiny", "--image-size", "8"], "language model"),
        (["--model", "profiled_toys:deq", "--device", "nothing"], "--device nothing"),
    ],
)
def test_what_cannot_be_profiled(toys, arguments, message, capsys):
    assert profile(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "learning"], "inference,training"),
        (["--batch", "0"], "at least 1"),
        (["--image-size", "1x2x3x4"], "CxHxW"),
        (["--seconds", "-1"], "at least 0"),
    ],
)
def test_options_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["profile", "--model", "digits", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "against"), [("digits", "none"), ("tiny", "transformer-xl")], ids=["images", "language"]
)
def test_named_models(toys, model, against):
    options = ("--nfe", "2", "--batch", "1", "--penalty", "off")
    assert profile("--model", model, "--against", against, *options) == 0
    found = rows()
    assert [row["error"] for row in found] == [None] * len(found)
    assert found[0]["nfe"] == 2
    assert found[0]["unit"] == ("images" if model == "digits" else "tokens")


@pytest.mark.parametrize(("shape", "first"), [((1, 8, 8), (1, 1)), ((3, 224, 224), (2, 2))])
def test_a_resnet_is_built_for_its_images(shape, first):
    try:
        with torch.device("meta"):
            model, note = resnet("resnet50", shape, 7)
    except Refusal as refusal:
        pytest.skip(str(refusal))
    stem = next(part for part in model.modules() if isinstance(part, torch.nn.Conv2d))
    assert (stem.in_channels, stem.stride) == (shape[0], first)
    assert ("CIFAR" in note) == (shape[1] == 8)
    assert 23e6 < sum(parameter.numel() for parameter in model.parameters()) < 26e6


def test_without_a_resnet_the_remedy_is_said(toys, monkeypatch, capsys):
    """A torchvision that does not fit PyTorch does not raise an ImportError."""
    (toys / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(toys)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert profile("--model", "digits") == 2
    said = capsys.readouterr().err
    assert "pip install 'triton-deq[profile]'" in said
    assert "torchvision::nms" in said


def test_bytes_and_operators_are_counted():
    a, b = torch.randn(2, 10, 100)
    with Traffic() as traffic:
        (a + b).view(-1)  # 3 × 4 000 bytes; a view moves nothing
        a.copy_(b)  # does not read what it overwrites
        torch.empty(5000)
        a.expand(7, 10, 100).sum().item()  # 4 000 bytes are there, and a scalar of 4, which is read
    assert traffic.moved == 12000 + 8000 + 4004 + 4
    assert traffic.operators == 5
    assert traffic.syncs == 1


def test_launches_and_waits_are_told_by_their_names():
    launches = ("cudaLaunchKernel", "cuLaunchKernelEx", "hipModuleLaunchKernel", "cudaGraphLaunch")
    waits = ("cudaStreamSynchronize", "hipEventSynchronize")
    assert tally([*launches, *waits, "cudaDeviceSynchronize", "aten::add"]) == (4, 2)


def test_operations_are_counted():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    found = count(lambda: a @ b, lambda: None, "eager", torch.device("cpu"))
    assert found.flops == 2 * 3 * 4 * 5
    assert found.peak == 3 * 5 * 4
    assert count(lambda: a @ b, lambda: None, "compile", torch.device("cpu")).moved is None


@pytest.mark.parametrize("whole", [3.0, 10.0])
def test_parts_add_up_even_where_noise_makes_them_too_long(whole):
    alone = {"f": 3.0, "solve": 2.5, "backward f": 1.0, "backward solve": 1.5, "without penalty": 10.5}
    parts = shares(whole, alone, True, 10, Parts({}, 10, whole=False))
    assert math.isclose(sum(parts.values()), whole)
    assert min(parts.values()) >= 0
    assert parts["solver"] == parts["penalty"] == 0
    # Twice the evaluations take twice the time.
    twice = shares(20.0, alone, False, 20, Parts({}, 10, whole=False))
    assert twice["f"] == 5.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="is about GPUs")
def test_on_a_gpu_graphs_run_and_launches_are_counted(toys):
    common = ("--device", "cuda", "--execution", "eager,graph", "--batch", "2", "--image-size", "8")
    assert profile("--model", "profiled_toys:deq", "--against", "profiled_toys:network", *common) == 0
    for row in rows():
        assert row["error"] is None
        assert row["kind"] == "gpu"
        assert row["launches"] > 0
        assert row["peak_bytes"] > 0
        assert sum(row["parts"].values()) == pytest.approx(row["p50_ms"], rel=1e-4)
