"""What the commands that train a model share: their flags, and what these say."""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..checks import parse_count
from .options import AUTOCAST, OPTIMIZERS, TrainingOptions

CHOICES = {"optimizer": OPTIMIZERS, "autocast": AUTOCAST}


class Refusal(Exception):
    """A sentence for the user: the command cannot do what was asked."""


def add_model(parser: argparse.ArgumentParser, config: str) -> None:
    parser.add_argument("--config", default=config, metavar="NAME", help=f"of the model (default {config})")


def add_run(parser: argparse.ArgumentParser, kind: str, samples: str) -> None:
    """Where and how a run goes; `samples` are what a batch has."""
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help=f"of the run (default runs/{kind}-CONFIG)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--batch", type=parse_count(1), metavar="N", help=f"{samples} (of all ranks together)"
    )
    penalty = parser.add_mutually_exclusive_group()
    penalty.add_argument("--penalty", type=float, metavar="WEIGHT", help="of the Jacobian regularisation")
    penalty.add_argument("--no-penalty", action="store_const", const=0.0, dest="penalty", help="none of it")
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each of the trainer's options; what is not given is the recipe's."""
    group = parser.add_argument_group("training (defaults are the configuration's)")
    for option in fields(TrainingOptions):
        choices = CHOICES.get(option.name)
        kind: Any = parse_count(0) if option.type is int else option.type
        group.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=kind,
            choices=choices,
            metavar=None if choices else "N" if option.type is int else "X",
            help=option.metadata["help"],
        )


def options_of(arguments: argparse.Namespace, defaults: TrainingOptions) -> TrainingOptions:
    """The recipe's options with what was given in their place.

    Raises:
        TypeError, ValueError: a number that cannot be.
    """
    given = {option.name: getattr(arguments, option.name) for option in fields(TrainingOptions)}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "steps" in changed:  # a run that is made shorter has its phases shortened with it
        for name in ("pretrain_steps", "warmup_steps"):
            changed.setdefault(name, getattr(defaults, name) * changed["steps"] // defaults.steps)
    return replace(defaults, **changed)


def device_of(arguments: argparse.Namespace) -> Any:
    """The device to train on.

    Raises:
        Refusal: it is not there.
    """
    import torch

    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise Refusal(f"--device {device}: this PyTorch sees no GPU; try --device cpu")
    except RuntimeError as error:
        raise Refusal(f"--device: {error}") from error
    return device


def folder_of(arguments: argparse.Namespace, kind: str) -> Path:
    return arguments.output or Path("runs") / f"{kind}-{arguments.config}"


def tell_beginning(
    data: str, config: str, model: Any, device: Any, folder: Path, options: TrainingOptions
) -> None:
    """What is trained on what, and how."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(data)
    print(f"{config}: {parameters:,} parameters, on {device}; the run is {folder}")
    for name, value in asdict(options).items():
        print(f"  {name} {value}")


def tell_end(valid: dict[str, float]) -> None:
    """The last validation."""
    print("valid: " + ", ".join(f"{name} {value:.4g}" for name, value in valid.items()))
