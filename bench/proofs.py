"""The sections of `python -m bench gpu` that prove: what must be right before anything is timed.

On a GPU the tests run the compiled kernels, whose races, bfloat16 and graphs no interpreter has.
"""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from .order import Order

TESTS = (
    *("ops", "solvers", "cells", "citizen", "models"),
    *("test_launch.py", "test_jacobian.py", "test_deq.py", "test_gradients.py", "test_counters.py"),
    "test_compile.py",
)
"""Under tests/: all that runs kernels, their gradchecks, the same bits twice, CUDA graphs and streams."""
MODELS = ("language-model", "image-classifier")
"""As `triton-deq train` calls them."""
SEEDS = (1, 2, 3)
"""Of sweeps over random shapes, dtypes and strides."""
CASES = 24
"""Of a sweep of one kernel."""


def tests(order: Order) -> int:
    """The tests of this checkout on the device."""
    chosen, processes = (TESTS, workers()) if order.scale == "full" else (("test_timing.py",), 0)
    command = [sys.executable, "-m", "pytest", "-v", "-n", str(processes), "--dist", "worksteal"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.telling",
        "--tb",
        "short",
        *(str(Path("tests") / name) for name in chosen),
    ]
    process = subprocess.Popen(command)
    try:
        return process.wait(order.seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so it still tells what failed
        return process.wait()


def verify(order: Order) -> int:
    """Every kernel in every dtype against float64, and sweeps over random cases; a process each."""
    from triton_deq.verification import CHECKS

    with tempfile.TemporaryDirectory() as folder:
        asked = {"quick": ["--quick", "--kernel", "norm"]}
        if order.scale == "full":
            asked = {name: ["--kernel", name] for name in CHECKS}
            for seed in SEEDS:
                sweep = ["--seeds", str(CASES), "--seed", str(seed)]
                asked |= {f"{name}, seed {seed}": ["--kernel", name, *sweep] for name in CHECKS}
        files = {name: Path(folder) / f"{place}.json" for place, name in enumerate(asked)}
        commands = {
            name: ["-m", "triton_deq", "verify", *words, "--json", str(files[name])]
            for name, words in asked.items()
        }

        rows: list[dict[str, object]] = []

        def keep(name: str) -> None:
            """What there is so far, should the time end."""
            if files[name].exists():  # not if it crashed
                rows.extend(json.loads(files[name].read_text()))
            (order.output / "verify.json").write_text(json.dumps(rows, indent=1) + "\n")

        return together(commands, keep)


def together(commands: Mapping[str, Sequence[str]], after: Callable[[str], None] = lambda name: None) -> int:
    """Run Python with these arguments, as many at once as there are cores; 1 if one fails.

    The output of each is printed when it ends, and `after` is called with its name.
    """
    failed = 0
    with ThreadPoolExecutor(workers()) as pool:
        running = {
            pool.submit(
                subprocess.run,
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ): name
            for name, words in commands.items()
        }
        for done in as_completed(running):
            result = done.result()
            failed += result.returncode != 0
            print(f"--- {running[done]}: {result.returncode}\n{result.stdout}", flush=True)
            after(running[done])
    return int(failed > 0)


def workers() -> int:
    """Processes at once: compiling keeps a core busy, and each holds its own part of the GPU's memory."""
    return max(1, min(12, len(os.sched_getaffinity(0))))


def demo(order: Order) -> int:
    """The demo, shortened, and a short training run of each model's smallest configuration."""
    with tempfile.TemporaryDirectory() as folder:
        # A rehearsal takes the reference, whose steps are quick.
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        runs = [["demo", "--quick"], *(["train", kind, "--steps", "60"] for kind in MODELS)]
        runs = runs if order.scale == "full" else [["train", MODELS[0], "--steps", "1"]]
        codes = []
        for place, words in enumerate(runs):
            command = [sys.executable, "-m", "triton_deq", *words, "--output", f"{folder}/{place}"]
            print("---", *words, flush=True)
            codes.append(subprocess.run(command, env=environment).returncode)
        return max(codes)


def sanitize(tool: str) -> Callable[[Order], int]:
    """The quick check of every kernel under compute-sanitizer, each tensor an allocation with edges."""

    def section(order: Order) -> int:
        program, report = find_sanitizer(), order.output / "sanitizer.txt"
        with report.open("a", encoding="utf-8") as file:
            file.write(f"=== {tool}\n")
            if program is None or not torch.cuda.is_available():
                reason = (
                    "compute-sanitizer is not on PATH nor in a usual folder" if program is None else "no GPU"
                )
                file.write(f"skipped: {reason}\n")
                print("skipped:", reason)
                return 0
            file.flush()
            command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "triton_deq"]
            command += ["verify", "--quick", "--dtype", "float32"]
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
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
