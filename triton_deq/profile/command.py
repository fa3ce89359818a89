"""The options of `triton-deq profile`, and what happens in which order."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..checks import parse_count
from .plan import DTYPES, EXECUTIONS, MODES, SOLVERS, Plan, Refusal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a configuration of triton_deq.models (imagenet-small, cifar10-tiny, tiny, ...), or "
        "module.path:factory, a callable without arguments that returns an nn.Module",
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="resnet101 (default for images), resnet50, transformer-xl (default for language models), "
        "another factory, or none",
    )
    parser.add_argument("--mode", type=_choices(MODES), default=MODES, help="default inference,training")
    parser.add_argument("--batch", type=_batches, metavar="N,N,...", help="samples a call, one or several")
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="S|HxW|CxHxW",
        help="of the images (default: the configuration's; 3x32x32 for a factory without example_input)",
    )
    parser.add_argument(
        "--dtype",
        type=_choices(DTYPES),
        default=("fp32",),
        help="fp32,bf16 (autocast),bf16-state (and a DEQ's state and history),pure-bf16 (and parameters)",
    )
    parser.add_argument(
        "--execution",
        type=_choices(EXECUTIONS),
        default=("eager",),
        help="eager,graph,compile: of both sides; default eager",
    )
    parser.add_argument(
        "--nfe",
        type=parse_count(1),
        metavar="N",
        help="evaluations of f in the forward and in the backward solve (default: the model's own tolerance)",
    )
    parser.add_argument("--solver", choices=SOLVERS, help="of both solves (default: the model's own)")
    parser.add_argument(
        "--penalty",
        choices=("on", "off"),
        default="on",
        help="the Jacobian penalty of a model that has one, in each training step (default on)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, help="of timing a call; three rounds at least (default 1)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/profile"),
        metavar="FOLDER",
        help="of rows.jsonl and index.html (default build/profile)",
    )
    parser.add_argument("--seed", type=parse_count(0), default=0, help="of weights and inputs (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 if nothing could be measured, 2 if it could not begin, 130 if it was interrupted."""
    from .show import profile

    try:
        return profile(Plan.of(arguments))
    except Refusal as refusal:
        print(f"triton-deq profile: {refusal}", file=sys.stderr)
        return 2


def _choices(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: some of these, with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for part in given:
            if part not in known:
                raise argparse.ArgumentTypeError(f"{part!r} is unknown: give some of {','.join(known)}")
        return given

    return parse


def _batches(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(parse_count(1)(part) for part in text.split(",")))


def _size(text: str) -> tuple[int, ...]:
    sizes = tuple(parse_count(1)(part) for part in text.lower().replace("×", "x").split("x"))
    if len(sizes) > 3:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sizes)} numbers: give S, HxW or CxHxW")
    return sizes * 2 if len(sizes) == 1 else sizes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number of at least 0")
    return seconds
