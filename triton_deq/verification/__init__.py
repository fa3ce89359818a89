"""`triton-deq verify`: every kernel against its float64 reference, on this machine.

On a GPU the compiled kernels run; elsewhere Triton's interpreter runs them, or with --emulate an emulation of
what is compiled for a GPU. Inputs are fresh random numbers, outputs are filled with NaN before each launch,
and the reference computes from the same inputs in float64.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ..backend import EMULATED, emulation_seed, emulation_target
from ..checks import parse_count, parse_rows_file
from .attention import check_attention
from .case import BOUNDS, LARGE, LAYOUTS, SHAPES, Case, Row
from .cross_entropy import check_cross_entropy
from .feedforward import check_feedforward
from .groupnorm import check_fusion, check_groupnorm
from .jacobian import check_probe, check_squared_norm
from .mlp import check_mlp, check_mlp_probe, check_mlp_solve
from .norm import check_norm
from .solvers import check_anderson, check_broyden
from .weightnorm import check_weightnorm

__all__ = [
    "BOUNDS",
    "CHECKS",
    "Case",
    "Row",
    "check_anderson",
    "check_attention",
    "check_broyden",
    "check_cross_entropy",
    "check_feedforward",
    "check_fusion",
    "check_groupnorm",
    "check_mlp",
    "check_mlp_probe",
    "check_mlp_solve",
    "check_norm",
    "check_probe",
    "check_squared_norm",
    "check_weightnorm",
]

CHECKS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "anderson": check_anderson,
    "broyden": check_broyden,
    "probe": check_probe,
    "squared_norm": check_squared_norm,
    "mlp": check_mlp,
    "mlp_probe": check_mlp_probe,
    "mlp_solve": check_mlp_solve,
    "attention": check_attention,
    "feedforward": check_feedforward,
    "norm": check_norm,
    "groupnorm": check_groupnorm,
    "fusion": check_fusion,
    "weightnorm": check_weightnorm,
    "cross_entropy": check_cross_entropy,
}


CUT = ("mlp", "mlp_probe", "feedforward", "groupnorm")
"""Checks of what is cut into larger pieces where a multiprocessor has more to do."""


def cases(seed: int, quick: bool, dtypes: list[str]) -> Iterator[Case]:
    """The fixed shapes, of which `quick` takes one, and one in the largest pieces, for those of `CUT`."""
    for dtype in dtypes:
        for shape in SHAPES[1:2] if quick else SHAPES:
            yield Case(getattr(torch, dtype), shape, _device(), seed)
        yield Case(getattr(torch, dtype), LARGE, _device(), seed, multiprocessors=1)


def random_cases(seeds: int, first: int, dtypes: list[str]) -> Iterator[Case]:
    """One random shape, dtype and layout a seed; small on a CPU, which is slow."""
    most = 1 << 20 if _device().type == "cuda" else 5000
    for seed in range(first, first + seeds):
        draw = random.Random(seed)
        entries = round(math.exp(draw.uniform(0, math.log(most))))
        shape = (draw.randint(1, max(1, min(64, most // entries // 4))), entries)
        if _device().type == "cpu":
            shape = (min(shape[0], 5), entries)
        dtype, layout = getattr(torch, draw.choice(dtypes)), draw.choice(LAYOUTS)
        yield Case(dtype, shape, _device(), seed, layout, draw.choice((1, None)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one shape, float32 and bfloat16 only")
    parser.add_argument(
        "--kernel", choices=sorted(CHECKS), action="append", help="only this check; may be repeated"
    )
    parser.add_argument(
        "--dtype", choices=sorted(BOUNDS), action="append", help="only this dtype; may be repeated"
    )
    parser.add_argument("--seed", type=parse_count(0), default=0, help="of the random inputs (default 0)")
    parser.add_argument(
        "--seeds", type=parse_count(1), metavar="N", help="instead: N random shapes, dtypes, strides"
    )
    parser.add_argument(
        "--emulate",
        type=parse_count(1),
        nargs="?",
        const=1,
        metavar="SEED",
        help="run the kernels as compiled for a GPU, on the CPU; the seed draws the order of their warps",
    )
    parser.add_argument(
        "--target", choices=EMULATED, help=f"the GPU of --emulate, which this implies (default {EMULATED[0]})"
    )
    parser.add_argument(
        "--json",
        type=parse_rows_file,
        metavar="FILE",
        help="write the rows as JSON too ('-': on standard output)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the checks, print a row each, return 1 if one is over its bound, 2 where none can run."""
    # Read when the kernels are first imported, which is below.
    if arguments.target is not None:
        os.environ["TRITON_DEQ_EMULATE_TARGET"] = arguments.target
    if arguments.emulate is not None or arguments.target is not None:
        os.environ.pop("TRITON_INTERPRET", None)
    try:
        seed = arguments.emulate or emulation_seed() or int(arguments.target is not None)
        emulation_target()
    except ValueError as error:  # of a variable of the environment
        print(f"triton-deq verify: {error}", file=sys.stderr)
        return 2
    if seed:
        os.environ["TRITON_DEQ_EMULATE"] = str(seed)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    dtypes = arguments.dtype or list(BOUNDS)
    if arguments.quick and not arguments.dtype:
        dtypes = ["float32", "bfloat16"]
    if arguments.seeds is None:
        chosen = cases(arguments.seed, arguments.quick, dtypes)
    else:
        chosen = random_cases(arguments.seeds, arguments.seed, dtypes)

    from ..ops.launch import cut_for

    began = time.perf_counter()
    rows: list[Row] = []
    show = print if arguments.json != "-" else lambda *_: None
    show(
        f"{'kernel':<23} {'dtype':<9} {'shape':>12} {'layout':<11} {'quantity':<19} {'error':>9} {'bound':>9}"
    )
    for case in chosen:
        for name in arguments.kernel or CHECKS:
            if case.shape == LARGE and name not in CUT:
                continue
            with cut_for(case.multiprocessors):
                found = list(CHECKS[name](case))
            rows += found
            for row in found:
                show(_line(row))
    if arguments.json:
        text = json.dumps([{**asdict(row), "passed": row.passed} for row in rows], indent=1)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n")
    return _conclude(rows, time.perf_counter() - began, arguments)


def _line(row: Row) -> str:
    shape = "x".join(map(str, row.shape))
    verdict = "" if row.passed else "  OVER ITS BOUND"
    return (
        f"{row.kernel:<23} {row.dtype:<9} {shape:>12} {row.layout:<11} {row.quantity:<19} "
        f"{row.error:9.1e} {row.bound:9.1e}"
        f"{verdict}"
    )


def _conclude(rows: list[Row], seconds: float, arguments: argparse.Namespace) -> int:
    """One closing sentence, on standard error where standard output is JSON."""
    out = sys.stderr if arguments.json == "-" else sys.stdout
    failed = [row for row in rows if not row.passed]
    worst = max(rows, key=_excess)
    within = f"{len(rows) - len(failed)} of {len(rows)} rows within their bounds"
    print(f"{within} on {worst.device} in {seconds:.0f} s", file=out)
    if arguments.seeds is not None or failed:
        check = max((name for name in CHECKS if worst.kernel.startswith(name)), key=len)
        sweep = "--seeds 1 " if arguments.seeds is not None else ""
        print(
            f"worst: {worst.kernel} {worst.quantity}, {worst.error:.1e} of {worst.bound:.1e}; again with: "
            f"triton-deq verify {sweep}--seed {worst.seed} --kernel {check}",
            file=out,
        )
    return 1 if failed else 0


def _excess(row: Row) -> float:
    """How far a row is towards its bound, or beyond it."""
    if row.bound == 0:
        return math.inf if row.error else 0.0
    return math.inf if math.isnan(row.error) else row.error / row.bound


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not emulation_seed() else "cpu")
