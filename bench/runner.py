"""Runs cases and makes rows of them."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from triton_deq import backend as backends
from triton_deq.memory import peak_bytes
from triton_deq.timing import interleave, quantiles

from .cases import Case, Setting, Solved, Variant
from .environment import Environment, now
from .roofline import least_ms
from .rows import Row

ROUNDS = {"tiny": (0.0, 1), "quick": (0.5, 5), "full": (2.0, 9)}
"""How many seconds the variants of a case take turns, and the least number of rounds."""
GPU_SECONDS = 0.5
"""On a GPU at most: its events are steady, and its minutes are dear."""


class Deadline:
    """How many seconds are left; without a limit, infinitely many."""

    def __init__(self, seconds: float = float("inf")):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def run(
    groups: Iterable[Callable[[Setting], Iterator[Case]]],
    setting: Setting,
    environment: Environment,
    take: Callable[[Row], None],
    deadline: Deadline | None = None,
) -> None:
    """Hand each row to `take` as soon as its case is done; begin no case after the deadline."""
    deadline = deadline or Deadline()
    for cases in groups:
        for case in cases(setting):
            if deadline.left() <= 0:
                return
            for row in run_case(case, setting, environment, deadline):
                take(row)


def run_case(
    case: Case, setting: Setting, environment: Environment, deadline: Deadline | None = None
) -> list[Row]:
    """A row for each variant, in their order; a variant that cannot run has its error in it."""
    deadline = deadline or Deadline()
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    first: dict[str, float] = {}
    torch._dynamo.reset()  # its limit of recompilations counts per function, over all cases
    for variant in _asked_for(case, setting):
        facts[variant.name] = {"backend": variant.backend}
        if deadline.left() <= 0:
            facts[variant.name]["error"] = "there was no time left for it"
            continue
        try:
            call = variant.prepare()
            result, first[variant.name] = setting.watch.first(call)
            facts[variant.name] |= _outcome(case, result)
            # A CPU's compiled code allocates out of sight, and an interpreter for itself.
            if setting.gpu or not (variant.compiles or backends.interpreting()):
                facts[variant.name]["peak_bytes"] = peak_bytes(call, setting.device)
            calls[variant.name] = call
        except Exception as error:  # whatever a peer raises is a fact about it
            facts[variant.name]["error"] = _sentence(error)

    if calls:
        seconds, least = ROUNDS[setting.scale]
        seconds, warm = min(seconds, GPU_SECONDS) if setting.gpu else seconds, setting.scale != "tiny"
        seconds = min(seconds, deadline.left())
        for name, times in interleave(calls, setting.watch, seconds, least, warm).items():
            facts[name] |= quantiles(times)
            facts[name] |= _rates(case, facts[name]["p50_ms"], environment)
    for variant in case.variants:
        if variant.compiles and variant.name in calls:
            compiling = first[variant.name] - facts[variant.name]["p50_ms"]
            facts[variant.name]["compile_ms"] = max(compiling, 0.0)
    return [make_row(case, name, setting, environment, found) for name, found in facts.items()]


def _asked_for(case: Case, setting: Setting) -> list[Variant]:
    """All of them, or if asked those that compile, with what they are held against."""
    if setting.compiled != "only":
        return list(case.variants)
    if not any(variant.compiles for variant in case.variants):
        return []
    return [each for each in case.variants if each.compiles or each.name in ("triton-deq", "bare f")]


def _outcome(case: Case, result: Any) -> dict[str, Any]:
    if not isinstance(result, Solved):
        return {}
    residual = None if case.problem is None else case.problem.residual(result.value)
    return {"steps": result.steps, "residual": residual}


def _rates(case: Case, p50_ms: float, environment: Environment) -> dict[str, float | None]:
    if case.work is None:
        return {}
    least = least_ms(case.work, environment.device) if environment.kind == "gpu" else None
    operations = sum(case.work.operations.values())
    return {
        "gigabytes_per_s": case.work.traffic / p50_ms / 1e6,
        "teraflops": operations / p50_ms / 1e9 if operations else None,
        "roofline": least / p50_ms if least is not None else None,
    }


def _sentence(error: Exception) -> str:
    """The kind and the first line of it that says something, without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(?:/[\w.@+-]+){2,}", "(path)", lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"[:300]


def make_row(case: Case, name: str, setting: Setting, environment: Environment, found: dict[str, Any]) -> Row:
    """A row from the fields that the variant's run `found`."""
    op, mode, dtype, shape = case.key
    return Row(
        **asdict(environment),
        timestamp=now(),
        group=case.group,
        op=op,
        mode=mode,
        dtype=dtype,
        shape=shape,
        variant=name,
        seed=setting.seed,
        **found,
    )
