"""The command line: `python -m bench run | report | gpu | ledger | levers | damping`, from a checkout."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from triton_deq.checks import parse_count

from . import ROOT
from .rows import RowsError

RESULTS = ROOT / "bench" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="run | report | gpu | ledger | levers | damping")

    run = commands.add_parser("run", help="measure on this machine and append rows")
    run.add_argument("--group", action="append", metavar="G", help="only this group; may be repeated")
    run.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    run.add_argument("--tiny", action="store_true", help="sizes that prove only that it runs")
    run.add_argument("--no-compile", action="store_true", help="leave out what torch.compile would do")
    run.add_argument("--output", type=Path, metavar="FILE", help="default: bench/results/DEVICE.jsonl")
    run.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    run.add_argument("--seed", type=int, default=0, help="of all inputs (default 0)")
    run.set_defaults(call=_run)

    report = commands.add_parser("report", help="tables and plots from the rows, and the README's section")
    report.add_argument("--check", action="store_true", help="only tell whether the README agrees with them")
    report.add_argument("--output", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    report.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    report.set_defaults(call=_report)

    gpu = commands.add_parser("gpu", help="all that a borrowed GPU is needed for, in one call")
    gpu.add_argument("--minutes", type=float, default=9.0, help="end within this time (default 9)")
    gpu.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    gpu.add_argument("--plan", choices=("prove", "measure"), help="only this half; default both")
    gpu.add_argument("--section", action="append", metavar="S", help="only this section; may be repeated")
    gpu.set_defaults(call=_gpu)

    ledger = commands.add_parser("ledger", help="what a step of each model launches and moves, without a GPU")
    ledger.add_argument("--step", action="append", metavar="S", help="only those called so; may be repeated")
    ledger.add_argument("--roofline", default="h100", choices=("a100", "h100", "h200"), help="default h100")
    ledger.add_argument("--output", type=Path, metavar="FILE", help="write the tables there too")
    ledger.set_defaults(call=_ledger)

    levers = commands.add_parser("levers", help="an image classifier's accuracy against time, lever by lever")
    levers.add_argument("run", type=Path, metavar="RUN", help="a run on the digits, with the penalty")
    levers.add_argument("--learned", type=Path, required=True, metavar="RUN", help="with a learned start too")
    levers.add_argument("--plain", type=Path, required=True, metavar="RUN", help="without either")
    levers.add_argument("--output", type=Path, default=ROOT / "build" / "levers", metavar="DIR")
    levers.add_argument("--seconds", type=float, default=20.0, help="of timing (default 20)")
    levers.set_defaults(call=_levers)

    damping = commands.add_parser("damping", help="how well a DEQ trains, by its backward solve")
    damping.add_argument(
        "--seeds", type=parse_count(1), default=8, metavar="N", help="runs of each way (default 8)"
    )
    damping.add_argument(
        "--steps", type=parse_count(1), default=60, metavar="N", help="of the optimiser (default 60)"
    )
    damping.add_argument("--output", type=Path, default=ROOT / "build" / "damping.jsonl", metavar="FILE")
    damping.set_defaults(call=_damping)

    arguments = parser.parse_args(argv)
    # Compilers of peers warn at length about graph breaks; what matters of it is in the rows.
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        return arguments.call(arguments)
    except RowsError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    from .session import run_groups

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    scale = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    compiled = "no" if arguments.no_compile else "too"
    return run_groups(arguments.group, scale, compiled, arguments.output, arguments.seed, RESULTS)


def _report(arguments: argparse.Namespace) -> int:
    from .report import report

    return report(arguments.results, arguments.output, ROOT / "README.md", arguments.check)


def _gpu(arguments: argparse.Namespace) -> int:
    from .gpu import main as gpu

    return gpu(arguments.minutes, arguments.output, arguments.section, arguments.plan)


def _ledger(arguments: argparse.Namespace) -> int:
    from .ledger import main as ledger

    return ledger(arguments.step, arguments.roofline, arguments.output)


def _levers(arguments: argparse.Namespace) -> int:
    from .levers import levers

    return levers(arguments.run, arguments.learned, arguments.plain, arguments.output, arguments.seconds)


def _damping(arguments: argparse.Namespace) -> int:
    from .damping import damping

    return damping(arguments.seeds, arguments.steps, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
