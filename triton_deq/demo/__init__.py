"""`triton-deq demo`: an existing DEQ accelerated, a DEQ stabilised, the kernels verified.

Nothing here is imported by the rest of the package, and importing this module loads none of the extras
that the demo needs; `run` does.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from ..checks import parse_count

EXTRAS = {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "rich": "rich"}
"""Packages of the extra `demo`, and the modules they are imported as."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="everything shortened, for a first look or for CI"
    )
    parser.add_argument(
        "--seed", type=parse_count(0), default=0, help="of data, weights and probes (default 0)"
    )
    parser.add_argument(
        "--output",
        type=_folder,
        default=Path("build/demo"),
        metavar="DIR",
        help="where the page, the plots and the rows go (default build/demo)",
    )


def run(arguments: argparse.Namespace) -> int:
    """The whole demo. Returns 0 if the solvers agree and every kernel is within its bounds, else 1."""
    missing = [package for package, module in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"triton-deq demo needs {', '.join(missing)}: pip install 'triton-deq[demo]'", file=sys.stderr)
        return 2
    from .show import demo

    return demo(quick=arguments.quick, seed=arguments.seed, output=arguments.output)


def _folder(text: str) -> Path:
    """An argparse type: a folder that is there or can be made."""
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"{part} is a file: name a folder")
    return path
