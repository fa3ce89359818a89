"""`triton-deq train image-classifier`."""

import argparse
from pathlib import Path
from typing import Any

from ..checks import parse_count
from .command_line import (
    Refusal,
    add_model,
    add_run,
    device_of,
    folder_of,
    options_of,
    tell_beginning,
    tell_end,
)

KIND = "image-classifier"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "digits")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10's Python batches for a cifar10 configuration, train/CLASS/ and val/CLASS/ with images "
        "for one of ImageNet (digits needs none: they ship with scikit-learn)",
    )
    parser.add_argument(
        "--initialiser",
        type=float,
        metavar="WEIGHT",
        help="of the loss of a learned start for the solve; 0 for none of it",
    )
    parser.add_argument(
        "--workers",
        type=parse_count(0),
        default=4,
        metavar="N",
        help="processes that decode images (default 4)",
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="an image that cannot be decoded ends the run, or is left out (default raise)",
    )
    add_run(parser, KIND, "images")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..data import BrokenImage
    from .errors import TrainingError
    from .image_classifier import ImageClassifierTask, build_image_classifier, evaluate_by_nfe
    from .loop import train
    from .ranks import Ranks, process_group
    from .recipes import image_recipe_for
    from .report import write_nfe

    device = device_of(arguments)
    folder = folder_of(arguments, KIND)
    with process_group(device) as device:
        ranks = Ranks()
        try:
            recipe = image_recipe_for(arguments.config)
            options = options_of(arguments, recipe.options)
            data = _images(arguments, options.seed)
            torch.manual_seed(options.seed)
            weights = arguments.penalty, arguments.initialiser
            model: Any = build_image_classifier(arguments.config, data.classes, *weights).to(device)
            task = ImageClassifierTask(model, data, arguments.batch or recipe.batch, options.seed)
        except (OSError, TypeError, ValueError, ImportError) as error:
            raise Refusal(error) from error
        if ranks.rank == 0:
            height, width = data.size
            described = f"{data.name}: {data.training:,} images of {height}×{width}, {data.classes} classes"
            tell_beginning(described, arguments.config, model, device, folder, options)
        try:
            valid = train(task, options, folder, resume=arguments.resume)
            accuracy = {} if model.pretraining else evaluate_by_nfe(model, task.valid)
        except BrokenImage as error:
            raise TrainingError(f"{error} (--on-error skip)") from error
        finally:
            task.close()
        if ranks.rank == 0:
            tell_end(valid)
            if accuracy:
                write_nfe(folder, options.steps, accuracy)
                print("evaluations of f  accuracy")
                for number, value in accuracy.items():
                    print(f"{number:16d}  {value:.4f}")
    return 0


def _images(arguments: argparse.Namespace, seed: int) -> Any:
    """The data of a configuration.

    Raises:
        OSError, ValueError, ImportError: they are not there, or not as they should be.
    """
    from ..data import CIFAR10, DIGITS, TensorImages, cifar10, digits, imagenet
    from ..models import find_image_configuration

    config, folder = arguments.config, arguments.data
    if config == "digits":
        if folder is not None:
            raise ValueError(
                f"--data {folder}: the digits ship with scikit-learn; leave it out, or change --config"
            )
        return TensorImages("digits", digits(), DIGITS, 10)
    if folder is None:
        what = "CIFAR-10's Python batches" if config.startswith("cifar10") else "train/CLASS/ and val/CLASS/"
        raise ValueError(f"--config {config} needs --data FOLDER with {what}: nothing is downloaded")
    if config.startswith("cifar10"):
        return TensorImages("CIFAR-10", cifar10(folder), CIFAR10, 10)
    size, _ = find_image_configuration(config).image_size
    return imagenet(folder, size, workers=arguments.workers, on_error=arguments.on_error, seed=seed)
