"""`python -m bench run`: the groups asked for, each row on disk before the next case begins."""

import os
import sys
import tempfile
from pathlib import Path

import torch

from triton_deq.timing import Stopwatch

from . import environment as environments
from .cases import Setting
from .rows import Row, write
from .runner import Deadline, run


def run_groups(
    groups: list[str] | None,
    scale: str,
    compiled: str,
    output: Path | None,
    seed: int,
    results: Path,
    seconds: float = float("inf"),
) -> int:
    """Measure and append rows to `output`; returns 2 for an unknown group, 0 otherwise.

    groups: their names, None for all. compiled: see `Setting`. seconds: begin no case after these.
    """
    from .groups import GROUPS

    unknown = [name for name in groups or () if name not in GROUPS]
    if unknown:
        print(f"unknown group {', '.join(unknown)}: choose from {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    device = environments.choose_device()
    environment = environments.look(device)
    output = output or results / f"{environments.slug(environment)}.jsonl"
    print(f"{environment.device}, torch {environment.versions['torch']}; rows go to {output}")
    setting = Setting(device, scale, seed, Stopwatch(device), compiled)

    def take(row: Row) -> None:
        write(output, row)
        print(line(row), flush=True)

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as in PyTorch's matrix products
    # A cache of its own, so that compiling is timed and not the reading of what an earlier run has compiled.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        run([GROUPS[name] for name in groups or GROUPS], setting, environment, take, Deadline(seconds))
    return 0


def line(row: Row) -> str:
    """A row for the eye."""
    shape = "x".join(map(str, row.shape))
    what = f"{row.group:<9} {row.op:<22} {row.mode:<8} {row.dtype:<9} {shape:<14} {row.variant:<24}"
    if row.error is not None:
        return f"{what} {row.error[:80]}"
    extra = "" if row.residual is None else f" {row.steps:>3} steps, residual {row.residual:.1e}"
    if row.gigabytes_per_s is not None:
        extra += f" {row.gigabytes_per_s:8.1f} GB/s"
    return f"{what} {row.p50_ms:10.3f} ms{extra}"
