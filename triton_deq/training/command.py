"""`triton-deq train`: language-model, and plot."""

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..checks import parse_count
from .options import AUTOCAST, OPTIMIZERS, TrainingOptions

CHOICES = {"optimizer": OPTIMIZERS, "autocast": AUTOCAST}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    purpose = "a DEQ-Transformer on a text"
    language = what.add_parser("language-model", help=purpose, description=f"Train {purpose}.")
    _add_language_model(language)
    language.set_defaults(train=_language_model)
    purpose = "draw validation perplexity, evaluations and spectral radius of runs"
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
    except _Refusal as refusal:
        return _say(refusal, 2)


class _Refusal(Exception):
    """A sentence for the user: the command cannot do what was asked."""


def _say(sentence: object, code: int) -> int:
    print(f"triton-deq train: {sentence}", file=sys.stderr)
    return code


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


def _options(arguments: argparse.Namespace, defaults: TrainingOptions) -> TrainingOptions:
    given = {option.name: getattr(arguments, option.name) for option in fields(TrainingOptions)}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "steps" in changed:  # a run that is made shorter has its phases shortened with it
        for name in ("pretrain_steps", "warmup_steps"):
            changed.setdefault(name, getattr(defaults, name) * changed["steps"] // defaults.steps)
    return replace(defaults, **changed)


def _add_language_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="tiny", metavar="NAME", help="of the model (default tiny)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="WikiText-103, its three .tokens files (default: the help topics that ship with Python)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of vocabulary and ids (default: within --data)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of the run (default runs/language-model-CONFIG)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--batch", type=parse_count(1), metavar="N", help="sequences (of all ranks together)")
    penalty = parser.add_mutually_exclusive_group()
    penalty.add_argument("--penalty", type=float, metavar="WEIGHT", help="of the Jacobian regularisation")
    penalty.add_argument("--no-penalty", action="store_const", const=0.0, dest="penalty", help="none of it")
    _add_options(parser)


def _language_model(arguments: argparse.Namespace) -> int:
    import torch

    from .language_model import LanguageModelTask, build_language_model
    from .loop import train
    from .ranks import Ranks, process_group
    from .recipes import recipe_for

    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise _Refusal(f"--device {device}: this PyTorch sees no GPU; try --device cpu")
    except RuntimeError as error:
        raise _Refusal(f"--device: {error}") from error
    folder = arguments.output or Path("runs") / f"language-model-{arguments.config}"
    with process_group(device) as device:
        ranks = Ranks()
        try:
            recipe = recipe_for(arguments.config)
            options = _options(arguments, recipe.options)
            corpus = _corpus(arguments, ranks)
            torch.manual_seed(options.seed)
            model = build_language_model(arguments.config, len(corpus.words), arguments.penalty).to(device)
            task = LanguageModelTask(model, corpus, arguments.batch or recipe.batch)
        except (OSError, TypeError, ValueError, ImportError) as error:
            raise _Refusal(error) from error
        if ranks.rank == 0:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(f"{corpus.name}: {len(corpus.train):,} tokens, {len(corpus.words):,} words")
            print(f"{arguments.config}: {parameters:,} parameters, on {device}; the run is {folder}")
            for name, value in asdict(options).items():
                print(f"  {name} {value}")
        valid = train(task, options, folder, resume=arguments.resume)
        if ranks.rank == 0:
            baseline = corpus.unigram_perplexity("valid")
            print("valid: " + ", ".join(f"{name} {value:.4g}" for name, value in valid.items()))
            print(f"The unigram model has perplexity {baseline:.4g}.")
    return 0


def _corpus(arguments: argparse.Namespace, ranks: Any) -> Any:
    """The text. Rank 0 makes the cache, and the others read it."""
    from ..data import help_topics, wikitext

    if arguments.data is None:
        return help_topics()
    for turn in (True, False):
        if (ranks.rank == 0) == turn:
            corpus = wikitext(arguments.data, arguments.cache)
        ranks.any(False)
    return corpus


def _plot(arguments: argparse.Namespace) -> int:
    try:
        from .plots import plot

        plot(arguments.runs, arguments.output)
    except ImportError as error:
        raise _Refusal(f"plots need matplotlib ({error}): pip install 'triton-deq[train]'") from error
    except (OSError, ValueError) as error:
        raise _Refusal(error) from error
    print(arguments.output)
    return 0
