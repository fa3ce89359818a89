"""`triton-deq inspect`: compile every kernel for GPUs that need not be there, and hold it to its budget.

Importing this imports no Triton: the kernels are found and compiled when the command runs.
"""

import argparse
import fnmatch
import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checks import parse_count, parse_rows_file
from . import roofline, show
from .compiling import Job, configurations
from .targets import TARGETS
from .workers import compile_all

CATALOG = "triton_deq.kernels.catalog"


class Refusal(Exception):
    """A sentence for the user: the command cannot do what was asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        metavar="PATTERN",
        action="append",
        help="only names that contain it; * and ? stand for any; may be repeated",
    )
    parser.add_argument(
        "--target", choices=list(TARGETS), action="append", help="only this one; may be repeated"
    )
    parser.add_argument(
        "--json",
        type=parse_rows_file,
        metavar="FILE",
        help="also write the rows as JSON ('-': standard output only)",
    )
    parser.add_argument("--asm", metavar="DIR", help="write PTX and SASS, or AMD assembly, to this folder")
    parser.add_argument(
        "--waits", action="store_true", help="also what a warp waits for, from NVIDIA's machine code: a model"
    )
    parser.add_argument(
        "--jobs", type=parse_count(1), default=os.cpu_count(), help="processes (default: one a CPU)"
    )
    parser.add_argument(
        "--roofline", choices=list(roofline.DEVICES), help="instead: the least times on this GPU"
    )
    parser.add_argument(
        "--launch-us",
        type=float,
        default=roofline.LAUNCH * 1e6,
        metavar="MICROSECONDS",
        help="--roofline: time of one launch (default %(default)g, from Python; about 1 in a CUDA graph)",
    )
    parser.add_argument(
        "--catalog", metavar="MODULE", default=CATALOG, help="a module with ENTRIES like those of %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a row each; 1 if one breaks its budget or does not compile, 2 if nothing could be done."""
    try:
        catalog = _catalog(arguments.catalog)
        entries = _choose(catalog, arguments.kernel)
        if arguments.roofline:
            return _roofline(catalog, entries, arguments)
        return _inspect(catalog, entries, arguments)
    except (Refusal, OSError) as error:
        print(f"triton-deq inspect: {error}", file=sys.stderr)
        return 2


def _inspect(catalog: Any, entries: list[int], arguments: argparse.Namespace) -> int:
    import triton

    targets = arguments.target or list(TARGETS)
    if arguments.waits and all(TARGETS[name].backend != "cuda" for name in targets):
        raise Refusal(f"--waits reads NVIDIA's machine code, and --target is {targets[0]}: add sm_90")
    _require_tools(targets)
    if arguments.asm:
        Path(arguments.asm).mkdir(parents=True, exist_ok=True)
    asm = arguments.asm and str(Path(arguments.asm).resolve())
    jobs = [
        Job(arguments.catalog, entry, configuration, target, asm, arguments.waits)
        for entry in entries
        for configuration in range(len(configurations(catalog.ENTRIES[entry].kernel)))
        for target in targets
    ]
    began = time.perf_counter()
    quiet = arguments.json == "-"
    rows = list(show.table(compile_all(jobs, arguments.jobs), quiet))
    version = triton.__version__
    _write([{**asdict(row), "passed": row.passed, "triton": version} for row in rows], arguments.json)
    if arguments.waits and not quiet:
        print(show.waits(rows))
    out = sys.stderr if quiet else sys.stdout
    print(show.conclusion(rows, version, time.perf_counter() - began), file=out)
    return 0 if all(row.passed for row in rows) else 1


def _roofline(catalog: Any, entries: list[int], arguments: argparse.Namespace) -> int:
    for option in ("target", "asm", "waits"):
        if getattr(arguments, option):
            raise Refusal(f"--roofline compiles nothing: leave out --{option}")
    chosen = [catalog.ENTRIES[entry] for entry in entries]
    found = roofline.bounds(catalog, chosen, arguments.roofline, arguments.launch_us * 1e-6)
    if arguments.json != "-":
        print(show.bounds(found, arguments.roofline, arguments.launch_us))
    _write([{**asdict(bound), "least": bound.least} for bound in found], arguments.json)
    return 0


def _write(rows: list[dict[str, Any]], file: str | None) -> None:
    text = json.dumps(rows, indent=1)
    if file == "-":
        print(text)
    elif file:
        Path(file).write_text(text + "\n")


def _catalog(module: str) -> Any:
    if importlib.util.find_spec("triton") is None:
        raise Refusal("Triton is not installed; it comes as a wheel for Linux: pip install triton")
    return importlib.import_module(module)


def _choose(catalog: Any, patterns: list[str] | None) -> list[int]:
    """The indices of the entries with one of the patterns somewhere in their name; all without one."""
    names = [entry.name for entry in catalog.ENTRIES]
    if patterns is None:
        return list(range(len(names)))
    chosen: set[int] = set()
    for pattern in patterns:
        glob = "*" + pattern.replace("[", "[[]") + "*"  # names have brackets: no character classes here
        found = {i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, glob)}
        if not found:
            raise Refusal(f"no kernel matches {pattern!r}; there are\n  " + "\n  ".join(names))
        chosen |= found
    return sorted(chosen)


def _require_tools(targets: list[str]) -> None:
    """NVIDIA's assembler is a program of its own, which Triton's wheel brings along."""
    from triton.backends.nvidia.compiler import get_ptxas

    for target in (TARGETS[name] for name in targets):
        if target.backend == "cuda":
            try:
                get_ptxas(target.arch)
            except RuntimeError as error:
                raise Refusal(
                    f"{target.name} needs ptxas, and Triton finds none ({error}): reinstall triton's wheel, "
                    "set TRITON_PTXAS_PATH, or ask for --target gfx942"
                ) from error
