"""`triton-deq train language-model`."""

import argparse
from pathlib import Path
from typing import Any

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

KIND = "language-model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "tiny")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="WikiText-103, its three .tokens files (default: the help topics that ship with Python)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of vocabulary and ids (default: within --data)"
    )
    add_run(parser, KIND, "sequences")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .language_model import LanguageModelTask, build_language_model
    from .loop import train
    from .ranks import Ranks, process_group
    from .recipes import recipe_for

    device = device_of(arguments)
    folder = folder_of(arguments, KIND)
    with process_group(device) as device:
        ranks = Ranks()
        try:
            recipe = recipe_for(arguments.config)
            options = options_of(arguments, recipe.options)
            corpus = _corpus(arguments, ranks)
            torch.manual_seed(options.seed)
            model = build_language_model(arguments.config, len(corpus.words), arguments.penalty).to(device)
            task = LanguageModelTask(model, corpus, arguments.batch or recipe.batch)
        except (OSError, TypeError, ValueError, ImportError) as error:
            raise Refusal(error) from error
        if ranks.rank == 0:
            data = f"{corpus.name}: {len(corpus.train):,} tokens, {len(corpus.words):,} words"
            tell_beginning(data, arguments.config, model, device, folder, options)
        valid = train(task, options, folder, resume=arguments.resume)
        if ranks.rank == 0:
            tell_end(valid)
            print(f"The unigram model has perplexity {corpus.unigram_perplexity('valid'):.4g}.")
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
