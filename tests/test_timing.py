"""Turns, quantiles, and peak memory."""

import pytest
import torch

from triton_deq.memory import peak_bytes
from triton_deq.timing import Stopwatch, graphed, interleave, quantiles

CPU = torch.device("cpu")


def test_variants_take_turns_in_changing_order():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(calls, Stopwatch(CPU), seconds=0, least=3)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 3)
    rounds = ["".join(order[start : start + 3]) for start in range(0, 12, 3)]  # the first to warm up
    assert [sorted(turn) for turn in rounds] == [["a", "b", "c"]] * 4
    assert len(set(rounds)) > 1


def test_quantiles():
    found = quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 100.0])
    assert found["samples"] == 6
    assert found["p50_ms"] == 3.5
    assert found["p20_ms"] == 2.0
    assert found["p80_ms"] == 5.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_graph_needs_a_gpu():
    with pytest.raises(RuntimeError, match="need a GPU"):
        graphed(lambda: None, Stopwatch(CPU))


def test_peak_memory_is_what_lives_at_once():
    x = torch.randn(1000)

    def call():
        a = x + 1  # 4 000 bytes each
        b = a * 2
        del a
        c = b.view(10, 100)
        del b
        return c.exp()

    assert peak_bytes(call, CPU) == 8000
