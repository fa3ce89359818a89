"""`triton-deq train`: language-model, image-classifier, and plot."""

import argparse
import sys
from pathlib import Path

from . import image_command, language_command
from .command_line import Refusal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    for name, purpose, command in (
        ("language-model", "a DEQ-Transformer on a text", language_command),
        ("image-classifier", "a multiscale DEQ on images", image_command),
    ):
        model = what.add_parser(name, help=purpose, description=f"Train {purpose}.")
        command.add_arguments(model)
        model.set_defaults(train=command.run)
    purpose = "draw validation scalars of runs, and accuracy against evaluations of f"
    plot = what.add_parser("plot", help=purpose, description=f"{purpose.capitalize()}.")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that training wrote to")
    plot.add_argument("--output", type=Path, default=Path("runs.png"), help="the image (default runs.png)")
    plot.set_defaults(train=_plot)


def run(arguments: argparse.Namespace) -> int:
    """0; 1 if training cannot go on, 2 if it could not begin, 130 if it was interrupted."""
    from .errors import CheckpointError, Interrupted, TrainingError

    try:
        return arguments.train(arguments)
    except Interrupted as interruption:
        return _say(interruption, 130)
    except KeyboardInterrupt:
        return _say("interrupted within a step; what was saved before is there to --resume from", 130)
    except CheckpointError as error:
        return _say(error, 2)
    except TrainingError as error:
        return _say(error, 1)
    except Refusal as refusal:
        return _say(refusal, 2)


def _say(sentence: object, code: int) -> int:
    print(f"triton-deq train: {sentence}", file=sys.stderr)
    return code


def _plot(arguments: argparse.Namespace) -> int:
    try:
        from .plots import plot

        plot(arguments.runs, arguments.output)
    except ImportError as error:
        raise Refusal(f"plots need matplotlib ({error}): pip install 'triton-deq[train]'") from error
    except (OSError, ValueError) as error:
        raise Refusal(error) from error
    print(arguments.output)
    return 0
