"""`python -m bench ledger`: its figures against ones worked out by hand, and what a step may cost."""

import pytest
import torch

import triton_deq as td
from bench import ledger
from bench.ledger import count
from triton_deq.inspection.roofline import DEVICES
from triton_deq.ops.attention import Context, attention
from triton_deq.ops.groupnorm import groupnorm
from triton_deq.ops.norm import norm_value

pytest.importorskip("triton")
PEAK = DEVICES["h100"]


def of(make, call) -> ledger.Ledger:
    """What `call` on the tensors of `make` costs."""

    def prepare():
        tensors = make()
        return lambda: call(*tensors)

    return count(prepare, "h100")


def test_a_product():
    made = of(lambda: (torch.empty(128, 64), torch.empty(64, 32)), torch.mm)
    (line,) = made.lines.values()
    assert (line.kind, line.name, line.calls) == ("products", "mm", 1)
    assert line.traffic == 4 * (128 * 64 + 64 * 32 + 128 * 32)
    work = 2 * 128 * 64 * 32
    assert line.least == pytest.approx(1e3 * max(line.traffic / PEAK.bandwidth, work / PEAK.rates["fp32"]))


def test_sixteen_bits_are_multiplied_by_tensor_cores():
    made = of(lambda: (torch.empty(4096, 4096, dtype=torch.bfloat16),), lambda x: x @ x)
    (line,) = made.lines.values()
    assert line.traffic == 2 * 2 * 4096**2  # x once, though it stands on both sides
    assert line.least == pytest.approx(1e3 * 2 * 4096**3 / PEAK.rates["tensor_bf16"])


@pytest.mark.parametrize(
    ("call", "name", "entries"),
    [
        (lambda x, i: x + x, "add", 200),
        (lambda x, i: x + x[:, :1].expand(10, 10), "add", 210),
        (lambda x, i: x.add_(1), "add_", 200),
        (lambda x, i: torch.empty_like(x).copy_(x), "copy_", 200),
        (lambda x, i: x.gather(1, i), "gather", 20),
        (lambda x, i: x[i[:, 0]][:, 0], "index", 200),
        (lambda x, i: torch.nn.functional.embedding(i, x), "embedding", 200),
        (lambda x, i: x.view(5, 20).mT, None, 0),
    ],
)
def test_bytes_of_an_operator(call, name, entries):
    made = of(lambda: (torch.empty(10, 10), torch.empty(10, 1, dtype=torch.int64)), call)
    assert [(each.name, each.traffic) for each in made.lines.values()] == (
        [(name, 4 * entries)] if name else []
    )


@pytest.mark.kernels
def test_launches_stand_for_their_tensors():
    made = of(lambda: (torch.empty(6, 100),), norm_value)
    (line,) = made.lines.values()
    assert (line.kind, line.name, line.calls, line.traffic) == ("kernels", "norm", 1, 2 * 4 * 600)


@pytest.mark.kernels
@pytest.mark.parametrize("place", ["its own", "that of x"])
def test_a_map_that_takes_its_own_value_is_read_and_written(place):
    def call(x):
        return groupnorm(x, 2, out=x if place == "that of x" else None)

    made = of(lambda: (torch.empty(2, 4, 3, 5, memory_format=torch.channels_last),), call)
    (line,) = (line for line in made.lines.values() if line.kind == "kernels")
    assert line.traffic == 2 * 4 * 120


@pytest.mark.kernels
def test_products_inside_a_kernel_are_the_catalogs():
    def make():
        states = [torch.empty(2, 256, 4, 64, dtype=torch.bfloat16) for _ in range(3)]
        positions, *biases = torch.empty(256, 4, 64), torch.empty(4, 64), torch.empty(4, 64)
        return *states, Context(*(each.bfloat16() for each in (positions, *biases)))

    (line,) = [
        each
        for each in of(make, attention).lines.values()
        if (each.kind, each.name) == ("kernels", "attention")
    ]
    products = 3 * 2 * 2 * 256 * 257 // 2 * 4 * 64
    assert line.least == pytest.approx(
        1e3 * max(line.traffic / PEAK.bandwidth, products / PEAK.rates["tensor_bf16"])
    )


@pytest.mark.kernels
def test_a_solver_moves_what_the_catalog_says():
    """Reads and writes of one slot count, and not the ring: 2m + 4 states a step."""

    def solve(x):
        return td.solve(lambda z: z, x, td.Anderson(history=6), tol=0, max_steps=10)

    lines = of(lambda: (torch.empty(64, 16384),), solve).lines
    moved = sum(lines["kernels", f"anderson_{part}"].traffic for part in ("residual", "advance"))
    assert moved == pytest.approx(10 * 16 * 4 * 64 * 16384, rel=0.02)


def test_where_the_host_waits():
    made = of(lambda: (torch.empty(8),), lambda x: (x[x > 0].sum().item(), x.tolist()))
    assert dict(made.waits) == {"elsewhere": 3}


@pytest.mark.kernels
def test_every_step_has_a_ledger(tmp_path, capsys):
    assert ledger.main(None, "h200", tmp_path / "a" / "ledger.txt", "tiny") == 0
    text = (tmp_path / "a" / "ledger.txt").read_text()
    assert text == capsys.readouterr().out
    for name in ("deq-transformer training penalised", "digits inference", "digits training"):
        assert f"{name} (least time on h200: " in text
    assert "solvers/stopping.py, wait" in text


def test_an_unknown_step_lists_the_steps(capsys):
    assert ledger.main(["resnet"], "h100", None, "tiny") == 2
    assert "choose from deq-transformer inference, " in capsys.readouterr().err


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("step", "launches", "operators", "share"),
    [("deq-transformer training", 205, 385, 0.13), ("cifar10-large training", 610, 380, 0.05)],
)
def test_what_goes_on_beside_products(step, launches, operators, share):
    """At the published sizes; more means that a pass over the state or the hidden layer has come back."""
    made = count(ledger._steps("full")[step], "h100")
    rest = made.total("rest")
    assert made.total("kernels").calls <= launches
    assert rest.calls <= operators
    assert rest.traffic <= share * sum(made.total(kind).traffic for kind in ledger.KINDS)
