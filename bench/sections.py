"""The sections of `python -m bench gpu`, each in a process of its own: `python -m bench.sections NAME ...`.

A process of its own, because a kernel that crashes a GPU's context would take all later sections with it.
"""

import argparse
import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_deq.timing import Stopwatch

from . import environment as environments
from .cases import Setting
from .runner import Deadline
from .session import run_groups


@dataclass(frozen=True)
class Order:
    """What a section is told: where to write, how many seconds it may take, and on what scale to work."""

    output: Path
    seconds: float
    scale: str

    @property
    def rows(self) -> Path:
        return self.output / "rows.jsonl"


def verify(order: Order) -> int:
    """Every kernel in every dtype against float64."""
    arguments = ["--json", str(order.output / "verify.json")]
    return _verify([*arguments, "--quick"] if order.scale == "tiny" else arguments)


def _verify(arguments: list[str]) -> int:
    from triton_deq import verification

    parser = argparse.ArgumentParser()
    verification.add_arguments(parser)
    return verification.run(parser.parse_args(arguments))


def _bench(groups: list[str], compiled: str) -> Callable[[Order], int]:
    def section(order: Order) -> int:
        return run_groups(groups, order.scale, compiled, order.rows, 0, order.output, order.seconds)

    return section


def profile(order: Order) -> int:
    """The three cases where this library does worst against its best peer, under PyTorch's profiler."""
    from .groups import GROUPS
    from .rows import read
    from .tables import compare

    comparisons = [each for each in compare(read([order.rows])) if each.speedup is not None]
    worst = [each.head for each in sorted(comparisons, key=lambda each: each.speedup or 0.0)[:3]]
    device, deadline = environments.choose_device(), Deadline(order.seconds)
    setting = Setting(device, order.scale, 0, Stopwatch(device), "no")
    with (order.output / "profile.txt").open("w", encoding="utf-8") as file:
        for row in worst:
            for case in GROUPS[row.group](setting):
                if case.key == (row.op, row.mode, row.dtype, row.shape) and deadline.left() > 0:
                    call = next(each for each in case.variants if each.name == "triton-deq").prepare()
                    title = " ".join(map(str, (row.group, *case.key)))
                    file.write(f"{title}\n{_profile(call, device)}\n\n")
                    file.flush()
                    print("profiled", title)
    return 0


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


def _sanitize(tool: str) -> Callable[[Order], int]:
    """The quick check of every kernel under compute-sanitizer, each tensor an allocation with edges."""

    def section(order: Order) -> int:
        program, report = find_sanitizer(), order.output / f"{tool}.txt"
        if program is None or not torch.cuda.is_available():
            reason = "compute-sanitizer is not on PATH nor in a usual folder" if program is None else "no GPU"
            report.write_text(f"skipped: {reason}\n", encoding="utf-8")
            print("skipped:", reason)
            return 0
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.sections"]
        command += ["quick-verify", "--output", str(order.output)]
        with report.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        print(report.read_text(encoding="utf-8", errors="replace")[-2000:])
        return done.returncode

    return section


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in a folder where CUDA usually lies."""
    usual = [
        "/usr/local/cuda*/bin/compute-sanitizer",
        "/usr/local/cuda*/compute-sanitizer/compute-sanitizer",
        "/opt/cuda*/bin/compute-sanitizer",
        "/opt/nvidia/*/compute-sanitizer/compute-sanitizer",
    ]
    found = [path for pattern in usual for path in sorted(glob.glob(pattern))]
    return shutil.which("compute-sanitizer") or next(iter(found), None)


SECTIONS: dict[str, tuple[float, Callable[[Order], int]]] = {
    "verify": (90, verify),
    "solvers": (120, _bench(["ceilings", "step", "solve"], "no")),
    "memcheck": (60, _sanitize("memcheck")),
    "models": (70, _bench(["kernels", "penalty", "training"], "no")),
    "compiled": (120, _bench(["step", "solve", "training", "penalty", "kernels"], "only")),
    "profile": (30, profile),
    "racecheck": (50, _sanitize("racecheck")),
}
"""By name, the most valuable first: the share of the time, in seconds of nine minutes, and the section."""

HIDDEN = {"quick-verify": lambda order: _verify(["--quick", "--dtype", "float32"])}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=[*SECTIONS, *HIDDEN])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--scale", default="full")
    arguments = parser.parse_args()
    section = HIDDEN.get(arguments.name) or SECTIONS[arguments.name][1]
    return section(Order(arguments.output, arguments.seconds, arguments.scale))


if __name__ == "__main__":
    sys.exit(main())
