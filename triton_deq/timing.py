"""Timing of several variants that take turns.

One function timed after another favours one of them where the machine slows down for a second. So all take
turns, by CUDA events and from a cold cache on a GPU.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]

MOST_ROUNDS = 300


class Stopwatch:
    """Times one call in milliseconds: by CUDA events from a cold L2 cache on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * max(size, 1 << 24), dtype=torch.int8, device=device)

    def time(self, call: Call) -> float:
        if self._flush is None:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self._flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def first(self, call: Call) -> tuple[Any, float]:
        """What the call returns, and its wall time in milliseconds with all that it compiles."""
        self.synchronize()
        start = time.perf_counter()
        result = call()
        self.synchronize()
        return result, 1e3 * (time.perf_counter() - start)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleave(
    calls: Mapping[str, Call], watch: Stopwatch, seconds: float, least: int = 5, warm: bool = True
) -> dict[str, list[float]]:
    """Times of each call in milliseconds, in rounds, each in an order of its own.

    In a fixed order a variant would always find the caches and the threads of the same predecessor.
    At least `least` rounds, or three if they take ten times as long; then as many as fit into `seconds`.
    warm: call each once before.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names if warm else ():
        calls[name]()
    shuffle = random.Random(0)
    start = time.perf_counter()
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whoever is running
    try:
        for turn in range(MOST_ROUNDS):
            shuffle.shuffle(names)
            for name in names:
                times[name].append(watch.time(calls[name]))
            elapsed = time.perf_counter() - start
            if elapsed > seconds and (turn + 1 >= least or (turn + 1 >= 3 and elapsed > 10 * seconds)):
                break
    finally:
        gc.enable()
    return times


def quantiles(times: list[float]) -> dict[str, Any]:
    """The fields of a row that say how long it took."""
    low, middle, high = (float(value) for value in np.percentile(times, [20, 50, 80]))
    return {"samples": len(times), "p20_ms": low, "p50_ms": middle, "p80_ms": high}


def graphed(call: Call, watch: Stopwatch) -> Call:
    """`call` captured in a CUDA graph; returns its replay. The call may not read the device."""
    if watch.device.type != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    side = torch.cuda.Stream(watch.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated at first may not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    held = result, call  # and with the call the tensors that the graph reads

    def replay() -> Any:
        graph.replay()
        return held[0]

    return replay
