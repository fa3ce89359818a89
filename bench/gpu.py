"""`python -m bench gpu`: all that a borrowed GPU is needed for, without network or installation.

Two plans, a call of nine minutes each: "prove" holds everything against its reference, "measure" times it.

At most eight small files: rows.jsonl and models.jsonl (measurements), verify.json, sanitizer.txt,
profile.txt, log.txt (all output), failures.txt (of sections that failed) and summary.txt. What a section
found is on disk before the next one begins.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import ROOT
from .runner import Deadline
from .sections import PLANS, SECTIONS

RESERVE = 10.0
"""Seconds kept for the summary."""


def main(minutes: float, output: Path, chosen: list[str] | None, plan: str | None = None) -> int:
    """Run the sections within `minutes`; 0 if all succeeded, 1 if one failed, 2 for an unknown one.

    chosen: their names; otherwise those of a plan, or all.
    """
    unknown = [name for name in chosen or () if name not in SECTIONS]
    if unknown:
        print(f"unknown section {', '.join(unknown)}: choose from {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rehearsal = not torch.cuda.is_available()
    if rehearsal:
        print("no GPU here: a rehearsal with tiny sizes and interpreted kernels; its rows prove nothing")

    deadline = Deadline(60 * minutes - RESERVE)
    names = list(chosen or (SECTIONS if plan is None else PLANS[plan]))
    outcomes = []
    for position, name in enumerate(names):
        shares = sum(SECTIONS[other][0] for other in names[position:])
        seconds = deadline.left() * SECTIONS[name][0] / shares  # what others left over is shared out
        if seconds < 1:
            outcomes.append((name, "no time left", 0.0))
            continue
        start = time.monotonic()
        outcome = run_section(name, output, seconds, "tiny" if rehearsal else "full")
        outcomes.append((name, outcome, time.monotonic() - start))
        print(f"{name:<10} {outcome:<12} {outcomes[-1][2]:6.0f} s", flush=True)
    text = summary(outcomes, output / "rows.jsonl")
    (output / "summary.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(any(outcome not in ("done", "out of time") for _, outcome, _ in outcomes))


def run_section(name: str, output: Path, seconds: float, scale: str, module: str = "bench.sections") -> str:
    """Run one section in its own process; returns how it ended.

    One that fails leaves the end of its output in failures.txt. One that does not heed its time is killed.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment["PYTHONUNBUFFERED"] = "1"
    if scale == "tiny":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, name, "--output", str(output)]
    command += ["--seconds", f"{max(seconds - 8, seconds / 2):.1f}", "--scale", scale]
    log = output / "log.txt"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n=== {name}, up to {seconds:.0f} s\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            outcome = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            outcome = "out of time"
    if outcome.startswith("failed"):
        with log.open("rb") as file_read:
            file_read.seek(begin)
            said = file_read.read().decode(errors="replace")
        with (output / "failures.txt").open("a", encoding="utf-8") as file:
            file.write(f"=== {name}: {outcome}\n{said[-20000:]}\n")
    return outcome


def summary(outcomes: list[tuple[str, str, float]], rows: Path) -> str:
    """How the sections went, and a line for each case: ours against the best peer."""
    from .rows import read
    from .tables import OURS, compare, copy_bandwidth

    lines = [f"{name:<10} {outcome:<12} {seconds:6.0f} s" for name, outcome, seconds in outcomes]
    comparisons = compare(read([rows])) if rows.exists() else []
    copy = copy_bandwidth(comparisons)
    if copy is not None:
        lines.append(f"copy bandwidth {copy:.0f} GB/s")
    lines.append(f"\n{'case':<58} {'ours ms':>9} {'best ms':>9} {'speed-up':>8}  best peer")
    for each in comparisons:
        ours, best = each.find(OURS), each.peers[0] if each.peers else None
        if ours is None or best is None or each.speedup is None:
            continue
        head = each.head
        case = f"{head.group} {head.op} {head.mode} {'x'.join(map(str, head.shape))} {head.dtype}"
        times = f"{each.cost(ours):9.4f} {each.cost(best):9.4f} {each.speedup:7.2f}x"
        lines.append(f"{case:<58} {times}  {best.variant}")
    return "\n".join(lines) + "\n"
