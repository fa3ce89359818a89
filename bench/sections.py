"""The sections of `python -m bench gpu`, each in a process of its own: `python -m bench.sections NAME ...`.

A process of its own, because a kernel that crashes a GPU's context would take all later sections with it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from triton_deq.timing import Stopwatch

from . import environment as environments
from . import proofs
from .cases import Case, Setting
from .order import Order
from .runner import Deadline
from .session import run_groups


def bench(groups: list[str], compiled: str, order: Order) -> int:
    """`python -m bench run` of these groups."""
    return run_groups(groups, order.scale, compiled, order.rows, 0, order.output, order.seconds)


def profile(order: Order) -> int:
    """Under PyTorch's profiler: whole training steps, and where this library does worst against a peer."""
    from .groups import GROUPS

    device, deadline = environments.choose_device(), Deadline(order.seconds)
    setting = Setting(device, order.scale, 0, Stopwatch(device), "no")
    with (order.output / "profile.txt").open("w", encoding="utf-8") as file:
        for group, chosen in [*_whole_steps(order), *_worst(order)]:
            for case in GROUPS[group](setting):
                if chosen(case) and deadline.left() > 0:
                    call = next(each for each in case.variants if each.name == "triton-deq").prepare()
                    title = " ".join(map(str, (group, *case.key)))
                    file.write(f"{title}\n{_profile(call, device)}\n\n")
                    file.flush()
                    print("profiled", title)
    return 0


def _whole_steps(order: Order) -> list[tuple[str, Callable[[Case], bool]]]:
    """The groups of whole models and which of their cases; a rehearsal's would be the interpreter's."""
    groups = ("language", "images") if order.scale == "full" else ()
    return [(group, _is_training) for group in groups]


def _worst(order: Order) -> list[tuple[str, Callable[[Case], bool]]]:
    """The three cases of the rows with the smallest speed-up."""
    from .rows import read
    from .tables import compare

    rows = read([order.rows]) if order.rows.exists() else []
    compared = [each for each in compare(rows) if each.speedup is not None]
    heads = [each.head for each in sorted(compared, key=lambda each: each.speedup or 0.0)[:3]]
    return [(row.group, partial(_is, (row.op, row.mode, row.dtype, row.shape))) for row in heads]


def _is_training(case: Case) -> bool:
    return case.mode == "training"


def _is(key: tuple[object, ...], case: Case) -> bool:
    return case.key == key


def _profile(call: Callable[[], object], device: torch.device) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def versus(order: Order) -> int:
    """`triton-deq profile` of whole models in turns with ResNet-101 and with Transformer-XL.

    The first has both sides as they are best: in graphs.
    """
    images = ["--model", "cifar10-large", "--nfe", "6", "--batch", "96", "--execution", "graph"]
    text = ["--model", "wikitext103-pre-ln-jr", "--nfe", "14", "--batch", "14", "--penalty", "off"]
    runs = [
        [*images, "--dtype", "bf16,bf16-state,pure-bf16", "--mode", "inference"],
        [*text, "--dtype", "bf16"],
        [*images, "--dtype", "bf16,bf16-state", "--mode", "training"],
    ]
    general = ["--seconds", "2"]
    if order.scale == "tiny":
        runs = [["--model", "digits", "--nfe", "2", "--batch", "1", "--mode", "inference"]]
        general = ["--seconds", "0"]
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for words in runs:
            command = [sys.executable, "-m", "triton_deq", "profile", *words, *general, "--output", folder]
            codes.append(subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}).returncode)
            rows = Path(folder) / "rows.jsonl"
            if rows.exists():
                shutil.copy(rows, order.output / "models.jsonl")
    return max(codes)


def warm(order: Order) -> int:
    """Compile our kernels of the groups to come, on all cores; see `bench.warming`."""
    parts = proofs.workers()
    groups = WARMED if order.scale == "full" else WARMED[:1]
    words = [["-m", "bench.warming", str(part), str(parts), order.scale, *groups] for part in range(parts)]
    return proofs.together({f"warm {part}": each for part, each in enumerate(words)})


Section = Callable[[Order], int]

WARMED = ("tuning", "step", "solve", "kernels", "penalty", "training", "transformer", "language", "images")
"""The groups whose kernels are compiled before anything is timed."""
PROOFS: dict[str, tuple[float, Section]] = {
    "verify": (130, proofs.verify),
    "tests": (200, proofs.tests),
    "memcheck": (60, proofs.sanitize("memcheck")),
    "demo": (90, proofs.demo),
    "racecheck": (50, proofs.sanitize("racecheck")),
}
MEASUREMENTS: dict[str, tuple[float, Section]] = {
    "warm": (60, warm),
    "tuning": (50, partial(bench, ["tuning"], "no")),
    "solvers": (100, partial(bench, ["ceilings", "step", "solve"], "no")),
    "wholes": (110, partial(bench, ["images", "language"], "no")),
    "models": (80, partial(bench, ["kernels", "penalty", "training", "transformer"], "no")),
    "versus": (90, versus),
    "compiled": (
        110,
        partial(bench, ["step", "solve", "training", "language", "penalty", "kernels"], "only"),
    ),
    "profile": (35, profile),
    "compat": (20, partial(bench, ["compat"], "no")),
}
"""By name, the most valuable first: the share of the time, in seconds of nine minutes, and the section."""
PLANS = {"prove": PROOFS, "measure": MEASUREMENTS}
SECTIONS = PROOFS | MEASUREMENTS


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--scale", default="full")
    arguments = parser.parse_args()
    return SECTIONS[arguments.name][1](Order(arguments.output, arguments.seconds, arguments.scale))


if __name__ == "__main__":
    sys.exit(main())
