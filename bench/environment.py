"""What ran the benchmark: device, versions, commit. No host names and no paths: rows are published."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from . import ROOT

PACKAGES = ("torch", "triton", "numba", "torchdeq", "jaxopt", "jax")


@dataclass(frozen=True)
class Environment:
    """The fields of a row that are the same for a whole run; see `rows.Row`."""

    run: str
    device: str
    kind: str
    threads: int
    commit: str | None
    dirty: bool
    source: str
    versions: dict[str, str | None]


def look(device: torch.device) -> Environment:
    """The environment of a run that begins now."""
    source = digest()
    return Environment(
        run=f"{now()}-{source[:4]}",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        kind="gpu" if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        commit=_git("rev-parse", "HEAD"),
        dirty=_git("status", "--porcelain", "--", "triton_deq", "kernels", "bench") != "",
        source=source,
        versions=versions(),
    )


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def slug(environment: Environment) -> str:
    """A file name for the rows of a device: `nvidia-h200`, or `cpu-2core` by the cores there are."""
    if environment.kind == "cpu":
        return f"cpu-{os.cpu_count()}core"
    return re.sub(r"[^a-z0-9]+", "-", environment.device.lower()).strip("-")


def versions() -> dict[str, str | None]:
    from triton_deq import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "triton_deq": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def digest() -> str:
    """Of the library's Python files; the same for the same code, committed or not."""
    total = hashlib.sha256()
    for folder in ("kernels", "triton_deq"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says about the checkout; None where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
