"""Measures both sides at each setting of the sweep."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..timing import Stopwatch, interleave, quantiles
from .calls import Impossible, Step
from .counting import count
from .parts import Parts, observe, shares, take_apart
from .plan import Plan, Setting, sentence
from .rows import Rows
from .sides import Side
from .tasks import shape_of

Call = Callable[[], Any]


@dataclass
class Measured:
    """One side at one setting.

    Attributes:
        fields: of its row. step, calls, parts: what is timed; no calls where it cannot run.
    """

    side: Side
    fields: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    calls: dict[str, Call] = field(default_factory=dict)
    parts: Parts | None = None

    def key(self, call: str) -> str:
        """The name of a call among those of both sides."""
        return f"{self.side.role} {call}"

    def fail(self, reason: str) -> None:
        self.fields["error"] = reason
        self.calls, self.parts = {}, None


def measure(sides: list[Side], setting: Setting, plan: Plan, watch: Stopwatch, rows: Rows) -> list[Measured]:
    """Both sides in turns; a row for each, in which there is a reason where there is no time."""
    torch._dynamo.reset()  # its limit of recompilations counts over the whole sweep
    found = [_prepare(side, setting, plan, watch) for side in sides]
    times = _times(found, plan, watch)
    for each in found:
        _conclude(each, setting, times)
    if len(found) == 2 and all(each.calls for each in found):
        _compare(found[0], found[1], times)
    for each in found:
        rows.add(each.side, setting, each.shape, each.fields)
        each.side.model.zero_grad(set_to_none=True)
        each.calls, each.parts = {}, None
    _release(watch)
    return found


def _prepare(side: Side, setting: Setting, plan: Plan, watch: Stopwatch) -> Measured:
    """Whatever a model raises is a fact about it at this setting, and the sweep goes on."""
    measured = Measured(side)
    torch.manual_seed(plan.seed)
    try:
        _look(measured, setting, watch)
    except Impossible as reason:
        measured.fail(str(reason))
    except Exception as error:
        measured.fail(reason_of(error))
        del error
    if not measured.calls:
        measured.side.model.zero_grad(set_to_none=True)
        _release(watch)
    return measured


def _look(measured: Measured, setting: Setting, watch: Stopwatch) -> None:
    side = measured.side = measured.side.in_dtype(setting.dtype)
    step = Step(side, setting, watch)
    measured.shape = shape_of(step.arguments)
    seen = observe(step)
    _, first = watch.first(step.call)
    if setting.execution == "compile":
        measured.fields["compile_ms"] = first
    side.model.zero_grad(set_to_none=True)  # or gradients that are there would not count as memory
    counts = count(step.dispatched, step.call, setting.execution, watch.device)
    measured.fields |= {
        "peak_bytes": counts.peak,
        "flops": counts.flops,
        "bytes": counts.moved,
        "operators": counts.operators,
        "launches": counts.launches,
        "syncs": counts.syncs,
    }
    calls: dict[str, Call] = {"step": step.call}
    if seen is not None:
        solution = seen.solution
        measured.fields |= {
            "nfe": solution.nfe,
            "residual": solution.residual.max().item(),
            "backward_nfe": seen.backward_nfe,
        }
        if solution.backward is not None:
            measured.fields["backward_residual"] = solution.backward.residual.max().item()
        measured.parts = take_apart(step, seen, watch)
        if measured.parts is not None:
            calls |= measured.parts.calls
    measured.calls = calls


class _Failed(Exception):
    """A call that raised between others."""

    def __init__(self, measured: Measured, reason: str):
        super().__init__(reason)
        self.measured, self.reason = measured, reason


def _times(found: list[Measured], plan: Plan, watch: Stopwatch) -> dict[str, list[float]]:
    """Of each side's calls; a side that fails in between is left out, and the other begins anew."""
    while True:
        calls = {each.key(name): _guarded(each, call) for each in found for name, call in each.calls.items()}
        if not calls:
            return {}
        try:
            return interleave(calls, watch, plan.seconds * len(calls), least=3)
        except _Failed as failure:
            failure.measured.fail(failure.reason)
            failure.measured.side.model.zero_grad(set_to_none=True)
        _release(watch)


def _guarded(measured: Measured, call: Call) -> Call:
    def guarded() -> None:
        try:
            call()
        except Exception as error:
            raise _Failed(measured, reason_of(error)) from None

    return guarded


def _conclude(each: Measured, setting: Setting, times: dict[str, list[float]]) -> None:
    """From times to the fields of a row."""
    if not each.calls:
        return
    side, fields = each.side, each.fields
    fields |= quantiles(times[each.key("step")])
    whole = fields["p50_ms"]
    if fields.get("compile_ms") is not None:
        fields["compile_ms"] = max(fields["compile_ms"] - whole, 0.0)
    fields["per_second"] = 1e3 * setting.batch * side.task.per_sample / whole
    for name, rate in (("flops", "teraflops"), ("bytes", "gigabytes_per_s")):
        if fields.get(name):
            fields[rate] = fields[name] / whole / (1e9 if name == "flops" else 1e6)
    fields["parts"] = _parts(each, setting, times)
    if each.parts is not None and each.parts.evaluations:
        scale = fields["nfe"] / each.parts.evaluations
        fields["f_ms"] = scale * float(np.median(times[each.key("f")]))
    if "penalty" in fields["parts"]:
        fields["expected_ms"] = whole - (1 - (side.probability or 0.0)) * fields["parts"]["penalty"]


def _parts(each: Measured, setting: Setting, times: dict[str, list[float]]) -> dict[str, float]:
    """By the 20th percentiles, whose differences other work on the machine disturbs least; they add up to the
    step's median."""
    quiet = {name: float(np.percentile(times[each.key(name)], 20)) for name in each.calls}
    pieces = shares(quiet["step"], quiet, setting.training, each.fields.get("nfe") or 0, each.parts)
    return {name: part * each.fields["p50_ms"] / quiet["step"] for name, part in pieces.items()}


def _compare(model: Measured, against: Measured, times: dict[str, list[float]]) -> None:
    """The model's time over the peer's, within each round."""
    peer = np.array(times[against.key("step")])
    ratios = np.percentile(np.array(times[model.key("step")]) / peer, [20, 50, 80])
    model.fields |= {
        f"ratio_p{share}": float(ratio) for share, ratio in zip((20, 50, 80), ratios, strict=True)
    }
    if "f_ms" in model.fields:
        model.fields["f_ratio"] = model.fields["f_ms"] / float(np.median(peer))


def reason_of(error: BaseException) -> str:
    """A sentence about why something did not run."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"out of memory ({sentence(error)}): a smaller batch may fit"
    return sentence(error)


def _release(watch: Stopwatch) -> None:
    gc.collect()
    if watch.device.type == "cuda":
        torch.cuda.empty_cache()
