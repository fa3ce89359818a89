"""The command line: `triton-deq demo | verify | inspect | profile | train`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "demo": (".demo", "accelerate, stabilise and verify a DEQ on real data"),
    "verify": (".verification", "run every kernel against its float64 reference"),
    "inspect": (".inspection", "compile every kernel for GPUs that need not be there"),
    "profile": (".profile", "time a model beside ResNet-101, Transformer-XL or a model of yours"),
    "train": (".training", "train a model, or plot runs"),
}
"""A command's module has `add_arguments(parser)` and `run(arguments) -> exit code`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 where a file or folder is not to be had."""
    parser = argparse.ArgumentParser(
        prog="triton-deq", description="Triton kernels for deep equilibrium models."
    )
    parser.add_argument("--version", action="version", version=f"triton-deq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        implementation = importlib.import_module(module, __package__)
        implementation.add_arguments(command)
        command.set_defaults(run=implementation.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except OSError as error:
        print(f"triton-deq {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
